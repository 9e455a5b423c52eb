"""Every family that README names through every door: a run of it, then load, eval and export."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText

import zipr1
from zipr1.core.errors import InputError, RunError
from zipr1.core.load import validate
from zipr1.core.recipe import Model, Sparse
from zipr1.export.session import export
from zipr1.models.families import FAMILIES
from zipr1.models.inputs import model_inputs
from zipr1.models.policy import load_policy
from zipr1.models.sparse.request import Request
from zipr1.train import loop

QUIET = Console(file=io.StringIO())
SPARSE = {"p": 0.7, "probes": {"recent": 3, "random": 6}, "dense_below": 0}
CLIPS = tinymodels.CLIPS
QUESTION = "which digit is green?"
NEW = 6
families = pytest.mark.parametrize("family", FAMILIES)


def test_these_are_the_families_of_the_readme():
    readme = (Path(__file__).parents[2] / "README.md").read_text().lower()
    names = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "llava-onevision", "smolvlm")
    assert all(name in readme for name in names)
    assert len([f for f in FAMILIES if not f.endswith("_moe")]) == len(names)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By family: two steps of training on questions about two pictures."""
    root = tmp_path_factory.mktemp("families")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (48, 64, 3)), ("b.png", (80, 64, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
    rows = [
        {"question": QUESTION, "image": name, "answer": answer}
        for name, answer in (("a.png", "two"), ("b.png", "red"))
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @cache
    def made(family: str) -> Path:
        base = tinymodels.folder(family, root / f"{family}-base")
        values = {
            "model": {"path": str(base), "min_pixels": 1024},
            "data": {"source": str(root / "rows.jsonl"), "heldout": str(root / "rows.jsonl")},
            "sparse": SPARSE,
            "budgets": {"low": 0.5, "high": 0.9},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "prompts": 2, "max_new_tokens": NEW},
        }
        with torch.enable_grad():  # whoever asks first
            loop.run(validate(values), root / family, "never", "cpu", ["zipr1"], QUIET)
        return root / family

    return made


def chats(root: Path) -> list[Any]:
    """A question about one picture, and a longer one about two."""
    a, b = ({"type": "image", "image": root / name} for name in ("a.png", "b.png"))
    text = {"type": "text", "text": QUESTION}
    return [
        [{"role": "user", "content": [a, text]}],
        [{"role": "user", "content": [b, text, a, text]}],
    ]


def asked(chat: Any) -> tuple[Any, list[Any]]:
    """Messages as the policy takes them, and pixels."""
    parts = chat[0]["content"]
    pixels = [np.asarray(Image.open(p["image"])) for p in parts if p["type"] == "image"]
    plain = [{"type": "image"} if p["type"] == "image" else p for p in parts]
    return [{"role": "user", "content": plain}], pixels


def encoded_of(policy: Any, chat: Any, name: str) -> Any:
    messages, pixels = asked(chat)
    visuals = [policy.processor.visual("image", p, None) for p in pixels]
    return policy.place(
        policy.processor.ids(policy.processor.text(messages), visuals), visuals, name
    )


@families
@pytest.mark.parametrize("p", [0.7, 1.0])
@torch.no_grad()
def test_load_answers_as_the_policy_does(runs, family, p):
    """One by one and as a padded batch, through the stock class's own `generate`."""
    run = runs(family)
    model, processor = zipr1.load(str(run), budget=p, device="cpu")
    policy = load_policy(Model(path=str(run)), "cpu")
    settings = Sparse(**{**SPARSE, "p": p})
    found = []
    for i, chat in enumerate(chats(run.parent)):
        one = encoded_of(policy, chat, str(i))
        features = policy.encode_vision([one])
        wanted = policy.generate([one], features, Request(settings) if p < 1 else None, NEW)
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == one.ids.tolist()
        said = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        tokens = said[0, len(one) :].tolist()
        assert tokens == wanted.tokens[0].tolist()
        found.append(tokens)
        stats = zipr1.stats(model)
        if p < 1:
            assert stats.kept[0].tolist() == wanted.counts[0].tolist()
            assert stats.token_ratio < 1
        else:
            assert stats.token_ratio == 1
    both = processor.apply_chat_template(
        chats(run.parent), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    said = model.generate(**both, max_new_tokens=NEW, do_sample=False)[
        :, both["input_ids"].shape[1] :
    ]
    for row, tokens in zip(said.tolist(), found, strict=True):
        assert row[: len(tokens)] == tokens


def by_hand(family: str, policy: Any, one: Any) -> dict[str, torch.Tensor]:
    """The arguments of a family's own forward for one prompt, as its own documentation shapes them."""
    ids, patches = one.ids[None], [v.patches for v in one.visuals]
    image = policy.processor.placeholder["image"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        grids = torch.tensor([v.grid for v in one.visuals])
        types = (ids == image).int()
        return {
            **inputs, "pixel_values": torch.cat(patches), "image_grid_thw": grids, "mm_token_type_ids": types,
        }  # fmt: skip
    tiles = torch.stack([p[0] for p in patches])  # (n, 3, S, S)
    if family == "internvl":
        return {**inputs, "pixel_values": tiles}
    if family == "smolvlm":
        return {**inputs, "pixel_values": tiles[None]}
    sizes = torch.tensor([[64, 64]] * len(tiles))
    several = torch.tensor([max(2, len(tiles))])  # one tile each, as of a sample with several
    return {
        **inputs, "pixel_values": tiles[:, None], "image_sizes": sizes, "batch_num_images": several,
    }  # fmt: skip


@families
@torch.no_grad()
def test_inputs_are_those_of_the_family_s_own_forward(runs, family):
    """Logits at p = 1, of the policy and of the stock class on our inputs, are those on inputs made by hand."""
    run = runs(family)
    policy = load_policy(Model(path=str(run)), "cpu")
    stock = AutoModelForImageTextToText.from_pretrained(run / "last" / "model").eval()
    ones = [encoded_of(policy, chat, str(i)) for i, chat in enumerate(chats(run.parent))]
    rows = model_inputs([(one.ids, one.visuals) for one in ones], policy.processor, family)
    padded = stock(**rows).logits
    answer = torch.tensor([40])
    free = [i for i in range(policy.words) if i not in policy.processor.placeholder.values()]
    for b, one in enumerate(ones):
        wanted = stock(**by_hand(family, policy, one)).logits[0, -1, free]
        logits, _ = policy.answer_logits([one], policy.encode_vision([one]), [answer])
        torch.testing.assert_close(logits[0, 0, free], wanted, atol=1e-4, rtol=1e-4)
        single = stock(**model_inputs([(one.ids, one.visuals)], policy.processor, family)).logits
        torch.testing.assert_close(single[0, -1, free], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(padded[b, -1, free], wanted, atol=1e-3, rtol=1e-3)
        blank = by_hand(family, policy, one)
        blank["pixel_values"] = blank["pixel_values"].flip(-1)
        assert (stock(**blank).logits[0, -1, free] - wanted).abs().max() > 1e-3, "pictures matter"
    text = model_inputs([(ones[0].ids[:4], [])], policy.processor, family)
    assert not {"pixel_values", "image_grid_thw", "image_sizes"} & set(text)


@families
@torch.no_grad()
def test_exports_are_the_run_in_stock_transformers_and_in_load(runs, tmp_path, family):
    run = runs(family)
    result = export(run, tmp_path / "out", device="cpu")
    assert result["check"]["n"] == result["check"]["same_text"] == 2
    assert result["check"]["logits_error"] < 1e-5
    policy = load_policy(Model(path=str(run)), "cpu")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    one = encoded_of(policy, chats(run.parent)[1], "b")
    wanted, _ = policy.answer_logits([one], policy.encode_vision([one]), [torch.tensor([40])])
    free = [i for i in range(policy.words) if i not in policy.processor.placeholder.values()]
    found = stock(**by_hand(family, policy, one)).logits[0, -1, free]
    torch.testing.assert_close(found, wanted[0, 0, free], atol=1e-4, rtol=1e-4)
    answers = []
    for path in (run, tmp_path / "out"):
        model, processor = zipr1.load(str(path), device="cpu")  # at the run's own p
        assert processor.inner.settings == policy.processor.settings
        inputs = processor.apply_chat_template(
            chats(run.parent)[1], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        answers.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist())
        assert zipr1.stats(model).token_ratio < 1
    assert answers[0] == answers[1]


@families
def test_eval_answers_pictures_and_says_in_one_line_that_it_cannot_see_clips(
    runs, tmp_path, family
):
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate import session

    request = session.EvalRequest(
        str(runs(family)),
        ["digits", "moving_digits"],
        [],
        4,
        tmp_path / "out",
        None,
        "cpu",
        base=False,
    )
    if family in CLIPS:
        results = session.run(request, ["zipr1"], QUIET)
    else:
        with pytest.raises(RunError, match=r"1 of 2 benchmarks have no result \(moving_digits\)"):
            session.run(request, ["zipr1"], QUIET)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        (error,) = results["errors"]
        assert error["task"] == "moving_digits" and "\n" not in error["error"]
        assert "clips are handled for the models of Qwen alone" in error["error"]
        assert "give this model pictures" in error["error"]
    seen = json.loads((tmp_path / "out" / "benchmarks" / "digits.json").read_text())
    assert "error" not in seen
    assert "digits" in json.dumps(results)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in CLIPS])
def test_a_clip_is_refused_by_name(runs, family):
    _, processor = zipr1.load(str(runs(family)), device="cpu")
    clip = {"type": "video", "video": np.zeros((4, 32, 32, 3), np.uint8)}
    with pytest.raises(InputError, match="clips are handled for the models of Qwen alone"):
        processor.apply_chat_template(
            [{"role": "user", "content": [clip]}], tokenize=True, return_dict=True
        )
