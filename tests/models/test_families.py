"""Other families, random tiny ones of transformers' own classes, with pictures: dense at p = 1, pruned below."""

from __future__ import annotations

import copy
import os
import warnings
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import policychecks
import pytest
import tinymodels
import torch
from rich.console import Console

from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Model, Probes, Sparse
from zipr1.models import families
from zipr1.models.families import CANNOT, FAMILIES, find
from zipr1.models.policy import Policy, load_policy
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.train import loop
from zipr1.train.dry_run import dry_run

SMALL = Sparse(p=0.7, probes=Probes(recent=3, random=6), dense_below=0)


OTHERS = tinymodels.OTHERS


@lru_cache
def shared(family: str) -> Policy:
    with TemporaryDirectory() as path:
        return load_policy(Model(path=str(tinymodels.folder(family, Path(path)))), "cpu")


def inputs(policy: Policy, encoded: Any) -> dict[str, Any]:
    """What transformers' processor would hand to the model for one sample with one picture."""
    visual = encoded.visuals[0]
    ids = encoded.ids[None]
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["pixel_values"] = visual.patches
    kind = policy.model.config.model_type
    if kind.startswith("qwen3"):
        found["image_grid_thw"] = torch.tensor([visual.grid])
        found["mm_token_type_ids"] = (ids == policy.processor.placeholder["image"]).int()
    if kind == "llava_onevision":
        found |= {"image_sizes": torch.tensor([visual.size]), "batch_num_images": torch.tensor([1])}
        found["pixel_values"] = visual.patches[None]
    if kind == "smolvlm":
        found["pixel_values"] = visual.patches[None]
    return found


@pytest.mark.parametrize("parted", [True, False])
def test_what_qwen3_sees_is_the_same_in_either_form_of_its_features(parted):
    """Those for the first layers come parted by picture, or whole, as from older versions of transformers."""
    sizes, grids = (2, 3), ([1, 2, 4], [1, 2, 6])
    whole = torch.arange(5 * 4.0).view(5, 4)
    layers = [whole + 100 * depth for depth in (1, 2)]

    class Seen:
        pooler_output = whole.split(sizes)
        deepstack_features = [x.split(sizes) if parted else x for x in layers]  # noqa: RUF012

    class Model:
        def get_image_features(self, patches, grid):
            assert grid.tolist() == list(grids)
            return Seen

    visuals = [SimpleNamespace(patches=torch.zeros(4 * n, 1), grid=g) for n, g in zip(sizes, grids)]
    found = FAMILIES["qwen3_vl"].encode_vision(Model(), "image", visuals, torch.device("cpu"))
    assert [len(x) for x in found] == [2, 3]
    assert torch.equal(torch.cat(found), torch.cat([whole, *layers], 1))


def test_a_version_whose_class_asks_for_torchvision_is_refused_by_name(monkeypatch):
    class Asking(type):
        def __getattr__(cls, name):
            raise ImportError("\nXPil requires the Torchvision library\n")

    older = SimpleNamespace(__version__="5.17.0", SmolVLMImageProcessorPil=Asking("XPil", (), {}))
    monkeypatch.setattr(families, "transformers", older)
    with pytest.raises(InputError) as told:
        families.pixel_defaults(FAMILIES["smolvlm"])
    assert str(told.value) == (
        "SmolVLMImageProcessor: transformers 5.17.0 does not read its settings here (XPil requires the Torchvision "
        "library); pip install 'transformers>=5.23'"
    )


def prompts() -> list[Any]:
    return [tinymodels.prompt(0, "image"), tinymodels.prompt(2, "image", 3, turns=2)]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("forced", [False, True], ids=["bypass", "forced"])
@torch.no_grad()
def test_everything_kept_is_the_dense_model(family, forced):
    policy = shared(family)
    plain = copy.deepcopy(policy.model)
    plain.set_attn_implementation("sdpa")
    encoded = tinymodels.encode(policy, prompts())
    features = policy.encode_vision(encoded)
    settings = SMALL.model_copy(update={"p": 1.0})
    ours = policy.generate(encoded, features, Request(settings, force=forced), 6)
    blocked = list(policy.processor.placeholder.values())
    for b, e in enumerate(encoded):
        stock = inputs(policy, e)
        theirs = plain.generate(
            **stock, max_new_tokens=6, do_sample=False, eos_token_id=policy.processor.end_ids,
            suppress_tokens=blocked,
        )[0, len(e) :]  # fmt: skip
        assert ours.tokens[b].tolist() == theirs.tolist()[: len(ours.tokens[b])]
        request = Request(settings, force=forced)
        with sparse_attention(policy.model, request) as run:
            logits, _ = policy.answer_logits([e], features, [torch.tensor([40])], run)
        wanted = plain(**stock).logits[:, -1:].float()
        wanted[..., blocked] = logits[..., blocked]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        # The picture matters, or the test could not tell a wrong one.
        other = {**stock, "pixel_values": stock["pixel_values"].flip(-1)}
        assert (plain(**other).logits[:, -1:] - wanted).abs()[..., 200:].max() > 1e-3
    if forced:
        assert ours.counts.tolist() == [[len(e)] * policy.layers for e in encoded]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_below_one_it_prunes_and_replays(family, skip):
    if family in tinymodels.HYBRID and skip == "layer":
        pytest.skip("refused: tests/models/test_hybrid.py")
    policychecks.below_one_it_prunes_and_replays(shared(family), prompts(), SMALL, skip)


@pytest.mark.parametrize("family", OTHERS)
def test_it_trains_and_what_it_leaves_loads(tmp_path, family):
    values = {
        "model": {
            "path": str(tinymodels.folder(family, tmp_path / "base")),
            "lora": {"rank": 2, "alpha": 4},
        },
        "data": {"prompts": 4, "heldout_prompts": 2, "mix": {"digits": 1.0}},
        "sparse": {"probes": {"recent": 3, "random": 6}, "dense_below": 0},
        "budgets": {"low": 0.6, "high": 0.9, "num_generations": 2},
        "train": {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 3},
    }
    if family.startswith("qwen3"):
        del values["model"]["lora"]
    recipe = validate(values)
    # The embedded held-out questions hold clips: these models are asked about pictures alone.
    rows = tmp_path / "rows.jsonl"
    picture(tmp_path / "a.png")
    rows.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": '
        '"which?"}]}], "images": ["a.png"], "answer": "red"}\n'
    )
    data = recipe.data.model_copy(update={"source": str(rows), "heldout": str(rows)})
    recipe = recipe.model_copy(update={"data": data})
    summary = loop.run(recipe, tmp_path / "run", "auto", "cpu", ["zipr1"], Console(quiet=True))
    assert 0 < summary["after"]["token_ratio"] < 1
    again = load_policy(Model(path=str(tmp_path / "run")), "cpu")
    assert again.model.config.model_type == family
    assert again.processor.settings == shared(family).processor.settings


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_dry_run_plans_it(tmp_path, family, lora):
    """Every part of the memory, counted by hand from the sizes in TEXT: KV of 4 rows, gradients, two moments."""
    picture(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "which?", "image": "a.png", "answer": "red"}\n')
    values = {
        "model": {
            "path": str(tinymodels.folder(family, tmp_path / "base")),
            "lora": {"rank": 2, "alpha": 4} if lora else None,
            "gradient_checkpointing": True,
        },
        "data": {"source": str(rows), "heldout": str(rows)},
        "sparse": {"dense_below": 0},
        "budgets": {"num_generations": 2},
        "train": {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 3},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
        result = dry_run(validate(values), "cpu", console)
    text = console.export_text()
    assert "memory, peak (estimate)" in text and "not_checked" not in result
    assert (" tile" in text) == (not family.startswith("qwen3"))
    core = shared(family).model
    total = sum(p.numel() for p in core.parameters())
    # Two of rank 2 for each of q (64, 64), k and v (64, 32), o (64, 64), gate, up and down (64, 96), in 3 layers.
    # Experts have none. Of Qwen3.5's four layers two have these, with twice the q, and all four an MLP; beside its
    # experts one of width 32 is for all tokens.
    hybrid = family in tinymodels.HYBRID
    q, attending, layers = (192, 2, 4) if hybrid else (128, 3, 3)
    mlp = {"qwen3_vl_moe": 0, "qwen3_5_moe": 3 * 96}.get(family, 3 * 160)
    own = 2 * (attending * (q + 128 + 2 * 96) + layers * mlp) if lora else result["trainable"]
    parts = result["memory"]
    assert result["parameters"] == total and result["trainable"] == own
    if not lora:
        tower = sum(p.numel() for p in shared(family).tower())
        assert own == total - tower and parts["reference"] == 4 * own
    assert parts["weights"] == 4 * (total + own * lora)
    assert (parts["gradients"], parts["optimizer"]) == (4 * own, 8 * own)
    # Keys and values of 2 heads of 16 numbers in each layer that holds them: 2 questions, 2 rollouts and a greedy
    # answer each.
    assert result["rollout_rows"] + result["greedy_rows"] == 6
    assert (
        parts["kv_cache"] == attending * 2 * 2 * 16 * 6 * (result["prompt_tokens"]["max"] + 3) * 4
    )
    fixed = sum(parts[k] for k in ("weights", "reference", "gradients", "optimizer"))
    assert parts["peak"] >= fixed + parts["activations"] + parts["logits"]


def picture(path: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("family", [f for f in OTHERS if f not in tinymodels.CLIPS])
def test_clips_are_refused_by_name(family):
    with pytest.raises(InputError, match="clips are handled for the models of Qwen alone"):
        tinymodels.encode(shared(family), [tinymodels.prompt(1, "video")])


def test_what_cannot_work_says_why():
    assert not set(CANNOT) & set(FAMILIES)
    for name, reason in CANNOT.items():
        with pytest.raises(InputError, match=f"x/y is a {name}, which cannot .*{reason[:20]}"):
            find(name, "x/y")
    with pytest.raises(InputError, match="is a bert, which is not a family that was tried"):
        find("bert", "x/y")
