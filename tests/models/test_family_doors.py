"""Every family that README names through every door: a run of it, then load, eval and export."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
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
from zipr1.data import video
from zipr1.export.session import export
from zipr1.export.verify import QUESTIONS
from zipr1.models import positions
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


def media_of(family: str) -> tuple[str, ...]:
    """Of which kinds of question the tests below ask this family."""
    return ("pictures", "several media", "text", *(["clips"] if family in CLIPS else []))


# The table of docs/models.md is made of these marks and of the tests' own, `door` (tests/doors.py).
families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.asked(f, *media_of(f))) for f in FAMILIES]
)


def test_these_are_the_families_of_the_readme():
    readme = (Path(__file__).parents[2] / "README.md").read_text().lower()
    names = (
        "qwen2-vl",
        "qwen2.5-vl",
        "qwen3-vl",
        "qwen3.5",
        "internvl",
        "llava-onevision",
        "smolvlm",
    )
    assert all(name in readme for name in names)
    assert len([f for f in FAMILIES if not f.endswith("_moe")]) == len(names)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By family: two steps of training on the questions of `chats`."""
    root = tmp_path_factory.mktemp("families")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (48, 64, 3)), ("b.png", (80, 64, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / name)
    clip = rng.integers(0, 256, (5, 48, 32, 3), dtype=np.uint8)
    video.write(root / "c.mp4", clip, 4.0)

    @cache
    def made(family: str) -> Path:
        base = tinymodels.folder(family, root / f"{family}-base")
        rows = [row(chat) for chat in chats(root, family).values()]
        (root / f"{family}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        source = str(root / f"{family}.jsonl")
        values = {
            "model": {"path": str(base), "min_pixels": 1024},
            "data": {"source": source, "heldout": source},
            "sparse": SPARSE,
            "budgets": {"low": 0.5, "high": 0.9},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "prompts_per_step": len(rows), "max_new_tokens": NEW},
        }
        with torch.enable_grad():  # whoever asks first
            loop.run(validate(values), root / family, "never", "cpu", ["zipr1"], QUIET)
        return root / family

    return made


def chats(root: Path, family: str) -> dict[str, Any]:
    """A question of each kind that the family is asked."""
    a, b = ({"type": "image", "image": str(root / name)} for name in ("a.png", "b.png"))
    clip = {"type": "video", "video": str(root / "c.mp4")}
    text = {"type": "text", "text": QUESTION}
    parts = {
        "pictures": [a, text],
        "several media": [b, text, clip if family in CLIPS else a, text],
        "text": [text],
        "clips": [clip, text],
    }
    return {kind: [{"role": "user", "content": parts[kind]}] for kind in media_of(family)}


def row(chat: Any) -> dict[str, Any]:
    """As a line of a file of questions."""
    parts = chat[0]["content"]
    files = {kind: [p[kind] for p in parts if p["type"] == kind] for kind in ("image", "video")}
    return {
        "messages": messages_of(chat), "images": files["image"], "videos": files["video"], "answer": "red",
    }  # fmt: skip


def messages_of(chat: Any) -> Any:
    parts = chat[0]["content"]
    plain = [p if p["type"] == "text" else {"type": p["type"]} for p in parts]
    return [{"role": "user", "content": plain}]


def encoded_of(policy: Any, chat: Any, name: str) -> Any:
    visuals = []
    alone = sum(part["type"] != "text" for part in chat[0]["content"]) == 1
    for part in chat[0]["content"]:
        if part["type"] == "image":
            pixels = np.asarray(Image.open(part["image"]))
            visuals.append(policy.processor.visual("image", pixels, None, alone=alone))
        elif part["type"] == "video":
            pixels, fps, times = video.read_timed(part["video"])
            visuals.append(policy.processor.visual("video", pixels, fps, times=times))
    ids = policy.processor.ids(policy.processor.text(messages_of(chat)), visuals)
    return policy.place(ids, visuals, name)


@families
@pytest.mark.door("train")
def test_each_question_is_answered_and_learned_from(runs, family):
    lines = [
        json.loads(line) for line in (runs(family) / "rollouts.jsonl").read_text().splitlines()
    ]
    kinds = media_of(family)
    for step in (0, 1):
        own = [line for line in lines if line["step"] == step]
        assert len({line["id"] for line in own}) == len(own) == len(kinds)
        for line in own:
            shares = [sum(kept) / len(kept) / line["prompt_tokens"] for kept in line["kept"]]
            assert shares == pytest.approx(line["token_ratio"]) and min(shares) < 1
    losses = [
        json.loads(x)["loss"] for x in (runs(family) / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2 and np.isfinite(losses).all()


@families
@pytest.mark.door("load")
@pytest.mark.parametrize("p", [0.7, 1.0])
@torch.no_grad()
def test_load_answers_as_the_policy_does(runs, family, p):
    """One by one and as a padded batch, through the stock class's own `generate`."""
    run = runs(family)
    model, processor = zipr1.load(str(run), budget=p, device="cpu")
    policy = load_policy(Model(path=str(run)), "cpu")
    settings = Sparse(**{**SPARSE, "p": p})
    found = []
    asked = chats(run.parent, family)
    for kind, chat in asked.items():
        one = encoded_of(policy, chat, kind)
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
    together = processor.apply_chat_template(
        list(asked.values()), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    said = model.generate(**together, max_new_tokens=NEW, do_sample=False)
    said = said[:, together["input_ids"].shape[1] :]
    for row, tokens in zip(said.tolist(), found, strict=True):
        assert row[: len(tokens)] == tokens


def by_hand(family: str, policy: Any, one: Any) -> dict[str, torch.Tensor]:
    """The arguments of a family's own forward for one prompt, as its own documentation shapes them."""
    ids = one.ids[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pictures = [v.patches for v in one.visuals if v.kind == "image"]
    if family.startswith("qwen"):
        marks = policy.processor.placeholder
        types = (ids == marks["image"]).int() + 2 * (ids == marks["video"]).int()
        inputs["mm_token_type_ids"] = types
        for name, kind in (("", "image"), ("_videos", "video")):
            some = [v for v in one.visuals if v.kind == kind]
            if some:
                inputs[f"pixel_values{name}"] = torch.cat([v.patches for v in some])
                inputs[f"{kind}_grid_thw"] = torch.tensor([v.grid for v in some])
        if family in ("qwen2_vl", "qwen2_5_vl"):
            # Those of transformers depart from Qwen's after a clip (tests/models/test_positions.py).
            inputs["position_ids"] = one.positions[:, None]
        return inputs
    if not pictures:
        return inputs
    tiles = torch.cat(pictures)  # (n, 3, S, S)
    if family == "internvl":
        return {**inputs, "pixel_values": tiles}
    if family == "smolvlm":
        return {**inputs, "pixel_values": tiles[None]}
    sizes = torch.tensor([v.size for v in one.visuals])
    assert [len(p) for p in pictures] in ([2], [1, 1]), "alone a tile more, together one each"
    return {
        **inputs, "pixel_values": torch.stack(pictures), "image_sizes": sizes,
        "batch_num_images": torch.tensor([len(pictures)]),
    }  # fmt: skip


@families
@torch.no_grad()
def test_inputs_are_those_of_the_family_s_own_forward(runs, family):
    """Logits at p = 1, of the policy and of the stock class on our inputs, are those on inputs made by hand."""
    run = runs(family)
    policy = load_policy(Model(path=str(run)), "cpu")
    stock = AutoModelForImageTextToText.from_pretrained(run / "last" / "model").eval()
    if policy.family.qwen_positions:
        positions.correct(stock)
    ones = [encoded_of(policy, chat, kind) for kind, chat in chats(run.parent, family).items()]
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
        for name in ("pixel_values", "pixel_values_videos"):
            other = by_hand(family, policy, one)
            if name in other:
                other[name] = other[name].flip(-1)
                assert (stock(**other).logits[0, -1, free] - wanted).abs().max() > 1e-3, name
    text = model_inputs([(ones[0].ids[:4], [])], policy.processor, family)
    assert not {"pixel_values", "image_grid_thw", "image_sizes"} & set(text)


@families
@pytest.mark.door("export")
@torch.no_grad()
def test_exports_are_the_run_in_stock_transformers_and_in_load(runs, tmp_path, family):
    run = runs(family)
    result = export(run, tmp_path / "out", device="cpu")
    asked = chats(run.parent, family)
    assert result["check"]["n"] == result["check"]["same_text"] == QUESTIONS
    assert result["check"]["logits_error"] < 1e-5
    policy = load_policy(Model(path=str(run)), "cpu")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    free = [i for i in range(policy.words) if i not in policy.processor.placeholder.values()]
    for kind, chat in asked.items():
        one = encoded_of(policy, chat, kind)
        features = policy.encode_vision([one])
        wanted, _ = policy.answer_logits([one], features, [torch.tensor([40])])
        found = stock(**by_hand(family, policy, one)).logits[0, -1, free]
        torch.testing.assert_close(found, wanted[0, 0, free], atol=1e-4, rtol=1e-4)
    answers = []
    for path in (run, tmp_path / "out"):
        model, processor = zipr1.load(str(path), device="cpu")  # at the run's own p
        assert processor.inner.settings == policy.processor.settings
        for chat in asked.values():
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            said = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            answers.append(said[0, inputs["input_ids"].shape[1] :].tolist())
            assert zipr1.stats(model).token_ratio < 1
    assert answers[: len(asked)] == answers[len(asked) :]


@families
@pytest.mark.door("eval")
@torch.no_grad()
def test_lmms_eval_is_answered_as_the_policy_answers(runs, family):
    """Through the model that lmms-eval is given: messages as its tasks write them, dense and sparse."""
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate.adapter import Adapter

    run = runs(family)
    asked = chats(run.parent, family)
    requests = []
    for number, chat in enumerate(asked.values()):
        parts = [
            {"type": p["type"], "url": Image.open(p["image"]) if p["type"] == "image" else p["video"]}
            if p["type"] != "text" else p
            for p in chat[0]["content"]
        ]  # fmt: skip
        message = [{"role": "user", "content": parts}]
        arguments = ("", lambda document: document, {"max_new_tokens": NEW}, number, "t", "test")
        requests.append((SimpleNamespace(args=arguments), message))
    policy = load_policy(Model(path=str(run)), "cpu")
    for p in (0.7, 1.0):
        adapter = Adapter(pretrained=str(run), budget=p, device="cpu")
        adapter.task_dict["t"] = {"test": [message for _, message in requests]}
        found = adapter.generate_until([request for request, _ in requests])
        settings = Sparse(**{**SPARSE, "p": p})
        for kind, chat, text in zip(asked, asked.values(), found, strict=True):
            one = encoded_of(policy, chat, kind)
            features = policy.encode_vision([one])
            wanted = policy.generate([one], features, Request(settings) if p < 1 else None, NEW)
            assert text == policy.processor.decode(wanted.tokens[0])


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
