"""Exported folders: what stock transformers makes of them, the same bytes twice, and damage told in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import tinyruns
import torch
import transformers
from safetensors.torch import load_file, save_file

import zipr1
from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Lora, Model
from zipr1.core.rundir import RunDir
from zipr1.data.embedded import SOURCES
from zipr1.export import merged, verify
from zipr1.export import session as exports
from zipr1.export.session import FORMATS, export
from zipr1.models.open import find_source
from zipr1.models.policy import load_policy

STOCK = """
import importlib.util, json, sys
folder, given, out, packages = sys.argv[1:]
sys.path.append(packages)  # no .pth file is read: what is installed in editable mode stays unknown
assert importlib.util.find_spec("zipr1") is None and importlib.util.find_spec("zipr1_kernels") is None
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
tensors = load_file(given)
pixels, answer = tensors.pop("pixels"), tensors.pop("answer")
known = json.load(open(folder + "/processor_config.json"))
assert hasattr(transformers, known["processor_class"]), known["processor_class"]
model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
assert model.config.get_text_config()._attn_implementation == "sdpa"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
images = transformers.AutoImageProcessor.from_pretrained(folder)
made = images(Image.fromarray(pixels.numpy()), return_tensors="pt")
torch.testing.assert_close(made["pixel_values"], tensors["pixel_values"], atol=1e-5, rtol=1e-5)
assert made["image_grid_thw"].tolist() == tensors["image_grid_thw"].tolist()
text = tokenizer.apply_chat_template(json.load(open(given + ".json")), tokenize=False, add_generation_prompt=True)
pad = "<|image_pad|>"
ids = tokenizer(text.replace(pad, pad * (tensors["input_ids"] == model.config.image_token_id).sum().item()))
assert ids["input_ids"] == tensors["input_ids"][0].tolist()
with torch.no_grad():
    said = model.generate(**tensors, max_new_tokens=6, do_sample=False)[0, len(ids["input_ids"]):]
    logits = model(**tensors).logits
save_file({"logits": logits}, out)
json.dump(tokenizer.decode(said, skip_special_tokens=True), open(out + ".json", "w"))
"""


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    model = {"path": "tiny", "lora": {"rank": 4, "alpha": 8}}
    return tinyruns.make_run(tmp_path_factory.mktemp("lora") / "run", model=model)


@torch.no_grad()
def test_a_process_without_zipr1_gives_the_runs_logits_and_text(run, exported, tmp_path):
    policy = tinyruns.policy_of(run)
    prompt = tinyruns.questions()[0]
    pixels = prompt.media[0].source
    encoded = policy.encode(prompt, [(pixels, None)], 1000)
    inputs = verify.stock_inputs(policy, encoded)
    features = policy.encode_vision([encoded])
    answer = policy.processor.answer_ids(prompt.answer)
    extra = {"pixels": torch.from_numpy(pixels), "answer": answer}
    save_file({k: v.contiguous() for k, v in (inputs | extra).items()}, tmp_path / "inputs")
    (tmp_path / "inputs.json").write_text(json.dumps(prompt.messages))
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", STOCK]
    command += map(str, (exported, tmp_path / "inputs", tmp_path / "out", packages))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, _ = policy.answer_logits([encoded], features, [answer])  # budget 1.0: no request
    free = [i for i in range(wanted.shape[-1]) if i not in policy.processor.placeholder.values()]
    got = load_file(tmp_path / "out")["logits"][0, -1, free]
    torch.testing.assert_close(got, wanted[0, 0, free], atol=1e-5, rtol=1e-5)
    said = policy.processor.decode(policy.generate([encoded], features, None, 6).tokens[0])
    assert json.loads((tmp_path / "out.json").read_text()) == said


def test_the_same_run_gives_the_same_bytes(run, exported, tmp_path):
    result = export(run, tmp_path / "again", device="cpu")
    assert tinyruns.hashes(tmp_path / "again") == tinyruns.hashes(exported)
    assert result["check"]["same_text"] == result["check"]["n"] == 4
    assert result["check"]["logits_error"] < 1e-5
    assert result["bytes"] == sum(p.stat().st_size for p in exported.iterdir())
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "again").iterdir()} == {0o644}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_answers_as_the_run_and_is_reproducible(lora_run, tmp_path, format):
    for name in ("a", "b"):
        result = export(lora_run, tmp_path / name, format, "float32", "cpu")
        assert result["check"]["logits_error"] < 1e-5
    assert tinyruns.hashes(tmp_path / "a") == tinyruns.hashes(tmp_path / "b")
    base, trained, ours = (
        load_policy(Model(path=str(path)), "cpu") for path in ("tiny", lora_run, tmp_path / "a")
    )
    key = "model.language_model.layers.1.mlp.up_proj.weight"
    weights = [dict(p.model.named_parameters())[key] for p in (base, trained, ours)]
    torch.testing.assert_close(weights[2], weights[1], atol=1e-5, rtol=0)  # fmt: skip
    assert (weights[2] - weights[0]).abs().max() > 0.1


def test_a_run_of_all_weights_has_no_adapter(run, tmp_path):
    with pytest.raises(InputError, match="trained all weights and has no adapter; use --format"):
        export(run, tmp_path / "x", "adapter", device="cpu")


def test_dtypes_and_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "SHARD", "1MB")
    result = export(run, tmp_path / "half", dtype="bfloat16", device="cpu")
    shards = sorted((tmp_path / "half").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "half" / "model.safetensors.index.json").is_file()
    assert {t.dtype for s in shards for t in load_file(s).values()} == {torch.bfloat16}
    assert result["dtype"] == "bfloat16" and 1e-4 < result["check"]["logits_error"] < 6e-2
    config = tinyruns.read(tmp_path / "half" / "config.json")
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    load_policy(Model(path=str(tmp_path / "half")), "cpu")
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"{shards[1].name}: missing"):
        load_policy(Model(path=str(tmp_path / "half")), "cpu")


def test_zipr1_json_tells_how_to_run_it(run, exported):
    about = tinyruns.read(exported / "zipr1.json")
    sparse = about["sparse"]
    assert (sparse["p"], sparse["rule"], sparse["skip"]) == (0.9, "top_p", "layer")
    assert sparse["probes"] == {"recent": 8, "random": 4}
    assert about["results"]["after"]["token_ratio_by_layer"] == [0.4, 0.3, 0.2, 0.1]
    assert about["provenance"]["base"] == "tiny" and about["provenance"]["step"] == 7
    assert about["provenance"]["recipe_sha256"] == tinyruns.recipe().sha256()
    assert (
        find_source(str(exported)).sparse
        == find_source(str(run)).sparse
        == tinyruns.recipe().sparse
    )
    assert str(run) not in "".join(p.read_text() for p in exported.glob("*.json"))


def test_the_card_tells_what_was_measured(run, exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    row = (
        "| digits | 40 | 95.0 % (93.0 to 97.0) | 90.0 % (88.0 to 92.0) | 87.5 % (85.5 to 89.5) "
        "| 94.0 % -> 25.0 % | -7.5 points (-10.0 to -5.0) |"
    )
    assert row in card
    for told in (
        "On digits it loses 7.5 points",
        "1 h 2 min of training",
        "1,234 rollouts",
        "p = 0.9",
        "UCI digits",
    ):
        assert told in card, told
    assert str(run) not in card and not re.search(r"\d{4}-\d\d-\d\d", card)


def test_an_unfinished_run_says_so(tmp_path):
    run = tinyruns.make_run(tmp_path / "run", finished=False)
    export(run, tmp_path / "out", device="cpu")
    assert (
        "Nothing: the run was exported at step 7 of 7" in (tmp_path / "out/README.md").read_text()
    )
    assert tinyruns.read(tmp_path / "out/zipr1.json")["provenance"]["finished"] is False


def test_the_base_is_followed_back_through_runs(run, tmp_path):
    from zipr1.export.source import open_run

    second = tinyruns.make_run(tmp_path / "second", model={"path": str(run)})
    source = open_run(second)
    assert (source.base, source.licence()) == ("tiny", "apache-2.0")
    (tmp_path / "base").mkdir()
    shutil.copytree(run / "last" / "model", tmp_path / "base", dirs_exist_ok=True)
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: qwen\n---\n# Hi\n")
    third = open_run(tinyruns.make_run(tmp_path / "third", model={"path": str(tmp_path / "base")}))
    assert third.licence() == "qwen" and not third.base_is_public


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("header", "its header is not the one"),
        ("length", "its header is not the one"),
        ("short", "has .* bytes and zipr1.json says"),
        ("missing", "model.safetensors: missing"),
        ("bit", "model.safetensors: not as it was exported, its hash is another"),
        ("foreign", "its header is not the one|bytes and zipr1.json says"),
        ("other", "not written by zipr1 export"),
        ("list", "not written by zipr1 export"),
        ("later", "version 99 and this zipr1 reads 1"),
        ("stranger", "knows nothing of extra.safetensors"),
    ],
)
def test_damage_is_told_in_one_line(exported, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    weights, about = folder / "model.safetensors", folder / "zipr1.json"
    raw = bytearray(weights.read_bytes())
    if damage == "header":  # another dtype, as valid as the first
        place = raw.index(b'"F32"')
        raw[place : place + 5] = b'"I32"'
        weights.write_bytes(raw)
    elif damage == "length":
        raw[:8] = (2**60).to_bytes(8, "little")
        weights.write_bytes(raw)
    elif damage == "bit":
        raw[-100] ^= 1
        weights.write_bytes(raw)
    elif damage == "short":
        weights.write_bytes(raw[:-10])
    elif damage == "missing":
        weights.unlink()
    elif damage == "foreign":
        values = tinyruns.read(about)
        values["weights"]["model.safetensors"]["header"] = "0" * 64
        about.write_text(json.dumps(values))
    elif damage == "other":
        about.write_text('{"name": "something else"}')
    elif damage == "list":
        about.write_text("[1]")
    elif damage == "later":
        about.write_text(json.dumps(tinyruns.read(about) | {"zipr1": 99}))
    else:
        save_file({"x": torch.zeros(1)}, folder / "extra.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_policy(Model(path=str(folder)), "cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("1")
    (tmp_path / "file").write_text("1")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"--to .*{name}: is there already"):
            export(run, tmp_path / name, device="cpu")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["file", "full"]
    assert (tmp_path / "full" / "mine").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left"), OSError("?")])
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, error):
    def fail(*arguments):
        found.extend(p.name for p in tmp_path.iterdir())
        raise error

    found: list[str] = []
    monkeypatch.setattr(exports, "compare", fail)
    # What is no word of a disk is a fault of ours, and keeps its traceback.
    full = getattr(error, "errno", None) is not None
    expected = RunError if full else OSError if isinstance(error, OSError) else error
    with pytest.raises(expected) as told:
        export(run, tmp_path / "out", device="cpu")
    assert not full or str(told.value) == (
        f"{tmp_path / 'out'}: cannot be written (No space left); free some space or mend the permissions, then "
        "export again"
    )
    assert sorted(found) == [".tmp-out", ".tmp-out.lock"] and not list(tmp_path.iterdir())


def test_a_killed_exports_leftovers_are_no_model_and_are_replaced(run, exported, tmp_path):
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "model.safetensors").write_text("half")
    export(run, tmp_path / "out", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tinyruns.hashes(tmp_path / "out") == tinyruns.hashes(exported)


def test_weights_that_changed_on_the_way_are_found(lora_run, tmp_path, monkeypatch):
    """The adapter is forgotten while merging: every file is in order, but not the run's."""

    def forget(source, model, adapted, processor, dtype, folder):
        plain = adapted.unload().to(dtype)
        merged.save_folder(plain, processor.tokenizer, processor.settings, folder)
        return plain

    monkeypatch.setattr(merged, "write", forget)
    with pytest.raises(RunError, match="do not say what the run says"):
        export(lora_run, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_came_back_otherwise_is_found(run, tmp_path, monkeypatch):
    save = merged.save_folder

    def flip(model, tokenizer, settings, folder, shard="5GB"):
        save(model, tokenizer, settings, folder, shard=shard)
        tensors = load_file(folder / "model.safetensors")
        next(t for n, t in tensors.items() if n.endswith("norm.weight"))[0] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merged, "save_folder", flip)
    with pytest.raises(RunError, match="did not come back as it was written"):
        export(run, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "nowhere: not a run directory .there is no such folder"),
        ({"format": "gguf"}, "--format gguf: unknown; allowed: merged, adapter"),
        ({"dtype": "int8"}, "--dtype int8: unknown; allowed: auto, float32"),
    ],
)
def test_wrong_arguments(run, tmp_path, change, message):
    values = {"run": run, "to": tmp_path / "x", "device": "cpu"} | change
    with pytest.raises(InputError, match=message):
        export(**values)


def test_the_best_checkpoint_by_its_folder_and_by_its_name(run, exported, tmp_path):
    root = tmp_path / "run"
    folder = RunDir.open(tinyruns.recipe(), root, info={})
    trained, untouched = run / "last" / "model", load_policy(Model(path="tiny"), "cpu")
    folder.save_checkpoint(6, lambda to: shutil.copytree(trained, to / "model"), best=True)
    folder.save_checkpoint(7, lambda to: untouched.save(to / "model"))
    wanted = load_file(exported / "model.safetensors")
    for name, path, checkpoint in (("a", root / "best", None), ("b", root, "best")):
        result = export(path, tmp_path / name, device="cpu", checkpoint=checkpoint)
        assert result["step"] == 6
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == wanted.keys() and all(found[k].equal(wanted[k]) for k in wanted)
    last, best, same = (
        dict(zipr1.load(path, device="cpu")[0].named_parameters())
        for path in (root, root / "best", run)
    )
    assert best.keys() == same.keys() and all(best[k].equal(same[k]) for k in same)
    assert not all(best[k].equal(last[k]) for k in last)


def test_a_run_without_a_checkpoint(tmp_path):
    RunDir.open(tinyruns.recipe(), tmp_path / "run", info={})
    with pytest.raises(InputError, match="no complete checkpoint yet"):
        export(tmp_path / "run", tmp_path / "x", device="cpu")


@pytest.mark.parametrize(
    ("data", "family"),
    [({}, "digits"), ({"source": "pages"}, "pages"), ({"source": "a.jsonl", "heldout": "b"}, "digits")],
)  # fmt: skip
def test_a_run_is_asked_embedded_questions(data, family):
    """Of a run on rows of its own too: its recipe may name any file."""
    recipe = tinyruns.recipe(data=data)
    prompts, origin = verify.samples(recipe, ("image", "video"))
    assert origin == f"embedded {family}" and len(prompts) == 4
    assert {p.task for p in prompts} == set(SOURCES[family].TASKS)
    pictures, _ = verify.samples(recipe, ("image",))
    assert len(pictures) == 4 and {m.kind for p in pictures for m in p.media} == {"image"}


def test_a_checkpoint_of_a_checkpoint_is_refused(run, tmp_path):
    for given in (run / "last", (run / "last").resolve()):
        with pytest.raises(InputError, match=r"--checkpoint 3: .* is a checkpoint itself; give"):
            export(given, tmp_path / "x", device="cpu", checkpoint="3")
    assert not (tmp_path / "x").exists()


def test_the_stock_processor_classes_exist():
    from zipr1.models.families import FAMILIES

    for family in FAMILIES.values():
        assert hasattr(transformers, family.processor), family.processor
        assert hasattr(transformers, family.pixels), family.pixels
    assert Lora().rank
