"""Weights that are not the model's, or no numbers, are refused by name at every door; so are files that changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinymodels
import tinyruns
import torch
from safetensors.torch import load_file, save_file
from test_doors import DOORS, LORA

from zipr1.core import checksums
from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Model
from zipr1.export.session import export
from zipr1.models import misshapen
from zipr1.models.adapters import with_adapter
from zipr1.models.loading import restore_weights
from zipr1.models.open import resolve
from zipr1.models.policy import load_policy
from zipr1.train import optim

NORM = "model.layers.1.input_layernorm.weight"
doors = pytest.mark.parametrize("door", DOORS)


def changed(path: Path, damage: str, name: str) -> str:
    """Damages the tensor `name` of a safetensors file; what is to be said of it."""
    tensors = load_file(path)
    tensor = tensors[name]
    key = name
    name = name[max(name.find("layers."), 0) :]  # the live modules have other names in front
    size = list(tensor.shape)
    if damage == "missing":
        del tensors[key]
        said = f"{name} is missing"
    elif damage == "unexpected":
        tensors["model.stranger.weight"] = torch.zeros(2)
        said = "model.stranger.weight is not of this model"
    elif damage == "misshaped":
        tensors[key] = torch.zeros(3, 5)
        said = f"{name} is [3, 5] and the model's is {size}"
    elif damage == "nan":
        tensor.view(-1)[-1] = float("nan")
        said = f"{name} holds NaN in float32"
    else:
        tensor.view(-1)[0] = float("-inf")
        said = f"{name} holds infinity in float32"
    save_file(tensors, path, metadata={"format": "pt"})
    return said


DAMAGES = ("missing", "unexpected", "misshaped", "nan", "infinite")


def copy(run: Path, to: Path) -> tuple[Path, Path]:
    """A copy of a run, and the file of its weights."""
    shutil.copytree(run, to, symlinks=True)
    return to, next((to / "last").resolve().glob("model/**/*.safetensors"))


def name_in(path: Path) -> str:
    return NORM if "adapter" not in path.name else sorted(load_file(path))[3]


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(InputError) as told:
        call()
    line = str(told.value)
    assert all(part in line for part in parts), line
    assert "\n" not in line and len(line) < 700


@doors
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_tensor_that_is_missing_is_never_made_up(runs, monkeypatch, tmp_path, door, kind):
    """Hashes are those of the files: they were written so."""
    run, weights = copy(runs[kind], tmp_path / "run")
    said = changed(weights, "missing", name_in(weights))
    checksums.write((run / "last").resolve(), 7)
    refused(lambda: DOORS[door](str(run), monkeypatch, tmp_path), said, str(weights.parent))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["whole", "lora"])
@pytest.mark.parametrize("how", ["open", "resume"])
def test_tensors_that_are_not_the_models_are_named(runs, tmp_path, damage, kind, how):
    run, weights = copy(runs[kind], tmp_path / "run")
    said = changed(weights, damage, name_in(weights))
    checksums.write((run / "last").resolve(), 7)
    if how == "open":
        refused(lambda: load_policy(Model(path=str(run)), "cpu"), said)
        return
    policy = load_policy(tinyruns.recipe(model={"path": "tiny", "lora": LORA}).model if kind == "lora"
                         else Model(path="tiny"), "cpu")  # fmt: skip
    before = {name: p.clone() for name, p in policy.trainable()}
    refused(lambda: policy.load_weights((run / "last" / "model").resolve()), said)
    assert all(torch.equal(before[name], p) for name, p in policy.trainable())


@pytest.mark.parametrize("family", [*tinymodels.FAMILIES, *tinymodels.OTHERS])
def test_every_family_has_all_its_weights(tmp_path, family):
    folder = tinymodels.folder(family, tmp_path / "model")
    settings = Model(path=str(folder))
    load_policy(settings, "cpu")
    file = folder / "model.safetensors"
    whole = load_file(file)
    # Not an expert of many, which is told by the stack it is missing from.
    single = (n for n in sorted(whole) if not re.search(r"experts\.\d", n))
    name = next(n for n in single if "layers.1" in n and "mlp" in n)
    vision = next(n for n in sorted(whole) if "visi" in n or "visual" in n)
    for damage, lost in (("missing", name), ("misshaped", name), ("missing", vision)):
        changed(file, damage, lost)
        said = ".".join(lost.split(".")[-3:]) + (" is [3, 5]" if damage == "misshaped" else "")
        refused(lambda: load_policy(settings, "cpu"), said, str(folder))
        save_file(whole, file, metadata={"format": "pt"})
    save_file({**whole, "model.stranger": torch.zeros(1)}, file, metadata={"format": "pt"})
    refused(lambda: load_policy(settings, "cpu"), "stranger is not of this model")


def test_one_expert_among_many_is_named(tmp_path):
    """In a file that has them one by one, which transformers stacks while it loads."""
    folder = tinymodels.folder("qwen3_vl_moe", tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    stacked = "model.language_model.layers.1.mlp.experts.down_proj"
    assert whole[stacked].shape == (4, 64, 48)
    single = {f"{stacked.removesuffix('.down_proj')}.{i}.down_proj.weight": one.clone()
              for i, one in enumerate(whole.pop(stacked))}  # fmt: skip
    save_file({**whole, **single}, folder / "model.safetensors", metadata={"format": "pt"})
    assert misshapen.find(str(folder)) == {}
    third = f"{stacked.removesuffix('.down_proj')}.2.down_proj.weight"
    single[third] = torch.zeros(64, 47)
    save_file({**whole, **single}, folder / "model.safetensors", metadata={"format": "pt"})
    assert misshapen.find(str(folder)) == {third: ((64, 47), (64, 48))}


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", 7])
def test_weights_that_lie_elsewhere_are_refused(tmp_path, name):
    """An index may name any file of the machine, and transformers reads it."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    name = str(tmp_path) + name if str(name).startswith("/") else name
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(whole, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = ("model.safetensors.index.json has ", "which is not a file in the folder")
    refused(lambda: load_policy(Model(path=str(folder)), "cpu"), str(folder), *said)


def test_tied_embeddings_and_buffers_that_are_computed_are_no_fault(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    whole = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    embeddings = next(n for n in whole if n.endswith("embed_tokens.weight"))
    assert "lm_head.weight" not in whole
    for more in ({}, {"lm_head.weight": whole[embeddings].clone()},
                 {"model.language_model.rotary_emb.inv_freq": torch.ones(8)}):  # fmt: skip
        save_file({**whole, **more}, folder / "model.safetensors", metadata={"format": "pt"})
        load_policy(Model(path=str(folder)), "cpu")


@doors
def test_a_flipped_bit_is_found(runs, monkeypatch, tmp_path, door):
    run, weights = copy(runs["whole"], tmp_path / "run")
    raw = bytearray(weights.read_bytes())
    raw[-1000] ^= 1  # as finite a number as before
    weights.write_bytes(raw)
    said = "model/model.safetensors is not as it was written: its hash is another"
    refused(lambda: DOORS[door](str(run), monkeypatch, tmp_path), said, "bring it back")
    inside = str((run / "last" / "model").resolve())
    if door not in ("export", "adapter"):
        refused(lambda: DOORS[door](inside, monkeypatch, tmp_path / "inside"), said)


@doors
def test_a_checkpoint_that_lost_a_file_is_not_opened(runs, monkeypatch, tmp_path, door):
    for number, name in enumerate(("complete.json", "model/tokenizer.json")):
        run, _ = copy(runs["whole"], tmp_path / f"run{number}")
        (run / "last" / name).unlink()
        refused(lambda run=str(run): DOORS[door](run, monkeypatch, tmp_path / "x"), str(run))


def test_adapters_are_safetensors_alone(runs, monkeypatch, tmp_path):
    """peft reads adapter_model.bin with torch.load where there is nothing else."""
    export(runs["lora"], tmp_path / "out", "adapter", device="cpu")
    folder, opened = tmp_path / "out", []
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "zipr1.json").unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **b: opened.append(a))
    for call in (
        lambda: load_policy(Model(path=str(folder)), "cpu"),
        lambda: restore_weights(None, folder),
    ):
        refused(call, str(folder), "has no adapter_model.safetensors", "can run code")
    assert not opened


@pytest.mark.parametrize(
    "values", [{"peft_type": "NONE"}, {"r": "x"}, {"peft_type": None}, {"r": -1}]
)
def test_an_adapter_with_settings_that_peft_does_not_take_is_one_line(runs, tmp_path, values):
    run, weights = copy(runs["lora"], tmp_path / "run")
    settings = weights.with_name("adapter_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **values}))
    checksums.write((run / "last").resolve(), 7)
    refused(lambda: load_policy(Model(path=str(run)), "cpu"), str(weights.parent))


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "XLORA", "adapters": {"a": "/elsewhere"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "/elsewhere"},
        {"peft_type": "IA3"},
        {"peft_type": ["LORA"]},
        {"peft_type": None},
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_peft_reads_it(
    runs, monkeypatch, tmp_path, values
):
    """Some kinds read files outside of their folder."""
    weights = copy(runs["lora"], tmp_path / "run")[1]
    settings = weights.with_name("adapter_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **values}))
    read: list[Any] = []
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *a, **b: read.append(a))
    monkeypatch.setattr("zipr1.models.adapters.load_file", lambda *a, **b: read.append(a))
    said = (str(settings), "peft_type: got", "LORA is allowed")
    refused(lambda: with_adapter(None, weights.parent), *said)
    assert not read


# Each makes Python's `re` try more ways than there are atoms, on the name of any module.
ENDLESS = {
    "target_modules": r"(.*\w)*:",
    "exclude_modules": r"((\w|\.)+)+:",
    "modules_to_save": [r"((\w+\.?)+)+:"],
    "layers_pattern": [r"(.+)+:"],
    "rank_pattern": {r"((.*)+)+:": 4},
    "alpha_pattern": {r"(\w+_?)*:": 4},
}


@pytest.mark.parametrize("field", ENDLESS)
def test_a_pattern_that_never_comes_to_an_end_is_refused(runs, monkeypatch, tmp_path, field):
    """Honest ones, as others write them, are not."""
    weights = copy(runs["lora"], tmp_path / "run")[1]
    settings = weights.with_name("adapter_config.json")
    values = json.loads(settings.read_text())
    model = load_policy(Model(path="tiny"), "cpu").model
    honest = (
        r"^(?!.*(?:visual)).*?(?:language|text).*?(?:self_attn|mlp).*?(?:q|k|v|o|gate|up|down)_proj"
    )
    settings.write_text(json.dumps({**values, "target_modules": honest}))
    with_adapter(model, weights.parent)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    monkeypatch.setattr("zipr1.models.patterns.LIMIT", 1.0)  # the longer, the same
    settings.write_text(json.dumps({**values, field: ENDLESS[field]}))
    said = (str(settings), "take longer than 1 s", "list the modules by name")
    refused(lambda: with_adapter(model, weights.parent), *said)


# --- the optimizer


def trained(name: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """An optimizer after a step in which one parameter had no gradient."""
    torch.manual_seed(0)
    named = [(n, torch.nn.Parameter(torch.randn(s))) for n, s in
             {"a": (3, 2), "b": (2,), "embed_tokens": (4, 2), "idle": (2, 2)}.items()]  # fmt: skip
    settings = tinyruns.recipe(optim={"name": name}).optim
    optimizer = optim.build(named, settings)
    for n, parameter in named:
        parameter.grad = None if n == "idle" else torch.ones_like(parameter)
    optimizer.step()
    return named, settings, optim.state_tensors(optimizer, named)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_as_the_first_would(name):
    named, settings, tensors = trained(name)
    matrix = {"adamw": ["exp_avg", "exp_avg_sq", "step"], "muon": ["momentum_buffer"]}[name]
    wanted = {f"{n}/{field}" for n in ("a", "idle") for field in matrix}
    wanted |= {f"{n}/{f}" for n in ("b", "embed_tokens") for f in ("exp_avg", "exp_avg_sq", "step")}
    assert tensors.keys() == wanted
    copies = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
    ends = []
    for values, restored in ((named, False), (copies, True)):
        optimizer = optim.build(values, settings)
        if restored:
            optim.restore(optimizer, values, tensors, "x")
        else:  # the unbroken one, from its live state
            again = {n: p.detach().clone() for n, p in values}
            torch.manual_seed(0)
            for n, p in values:
                p.data = torch.randn(p.shape)
                p.grad = None if n == "idle" else torch.ones_like(p)
            optimizer.step()
            assert all(torch.equal(again[n], p) for n, p in values)
        for _, p in values:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        ends.append([p.detach().clone() for _, p in values])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("a/step"), "a/step is missing"),
        (lambda t: t.pop("b/exp_avg_sq"), "b/exp_avg_sq is missing"),
        (lambda t: [t.pop(k) for k in [*t] if k.startswith("a/")], "a/exp_avg, a/exp_avg_sq, a/step are missing"),
        (lambda t: [t.pop(k) for k in [*t] if k[-3:] == "avg"], "embed_tokens/exp_avg and 1 more are missing"),
        (lambda t: t.update({"c/step": t["a/step"]}), "c/step is not of this model"),
        (lambda t: t.update({"a/moment": t["a/step"]}), "a/moment is not of this model"),
        (lambda t: t.update({"a/exp_avg": torch.zeros(2, 3)}), "a/exp_avg is [2, 3] and the model's is [3, 2]"),
        (lambda t: t.update({"a/step": torch.zeros(2)}), "a/step is [2] and the model's is []"),
        (lambda t: t.update({"a/step": torch.tensor(-1.0)}), "a/step is -1.0, and a count of steps"),
        (lambda t: t.update({"a/step": torch.tensor(0.5)}), "a/step is 0.5, and a count of steps"),
        (lambda t: t["b/exp_avg"].fill_(float("nan")), "the tensor b/exp_avg holds NaN"),
    ],
)  # fmt: skip
def test_an_optimizer_with_half_of_its_moments_is_refused(change, said):
    named, settings, tensors = trained("adamw")
    change(tensors)
    refused(
        lambda: optim.restore(optim.build(named, settings), named, tensors, "state.safetensors"),
        "state.safetensors: ",
        said,
    )


# --- numbers that are none


def test_logits_that_are_no_numbers_are_no_wrong_answer():
    """Finite weights can overflow between layers, as in float16."""
    policy = tinymodels.make()
    encoded = tinymodels.encode(policy, [tinymodels.prompt(0, "image")])
    features = policy.encode_vision(encoded)
    head, calls = policy.head, []
    for bad in (0, 2):

        def overflows(hidden, model=None, bad=bad):
            calls.append(1)
            logits = head(hidden, model)
            return logits * float("nan") if len(calls) == bad + 1 else logits

        calls.clear()
        policy.head = overflows
        policy.processor.end_ids = []
        with pytest.raises(RunError, match=r"logits are NaN or infinite.* model.dtype=float32"):
            policy.generate(encoded, features, None, 4)
        calls.clear()
        with pytest.raises(RunError, match="logits are NaN"):  # drawn, not the likeliest
            policy.generate(encoded, features, None, 4, torch.full((1, 4), 0.5))
