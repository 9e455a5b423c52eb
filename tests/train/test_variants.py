"""Whole runs of two steps by recipes that differ in one thing: each does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
from safetensors.torch import load_file
from tinyruns import start, steps, write

from zipr1.train import loop
from zipr1.train import update as updating


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


class Run:
    """A run, the policy that it trained, and the rows of its updates."""

    def __init__(self, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any):
        self.policy: Any = None
        self.rows: list[Any] = []
        self.layer_tokens = self.mlp_tokens = self.learned = 0
        load_policy, flatten = loop.load_policy, updating.flatten

        def watched(*arguments: Any) -> Any:
            self.policy = load_policy(*arguments)
            layer = self.policy.decoder.layers[1]
            layer.register_forward_pre_hook(self._layer)
            layer.mlp.gate_proj.register_forward_pre_hook(self._mlp)
            return self.policy

        def noted(*arguments: Any) -> Any:
            self.rows.append(flatten(*arguments))
            return self.rows[-1]

        changes["train"] = {"steps": 2, **changes.get("train", {})}
        self.folder, self.recipe = folder, write(folder.with_suffix(".yaml"), base, **changes)
        with monkeypatch.context() as patched:
            patched.setattr(loop, "load_policy", watched)
            patched.setattr(updating, "flatten", noted)
            self.summary = start(self.recipe, folder)
        self.metrics = steps(folder)
        lines = folder / "rollouts.jsonl"
        self.rollouts = [json.loads(x) for x in lines.open()] if lines.exists() else []

    def _layer(self, module: Any, inputs: Any) -> None:
        self.layer_tokens += inputs[0][..., 0].numel()

    def _mlp(self, module: Any, inputs: Any) -> None:
        self.mlp_tokens += inputs[0][..., 0].numel()
        self.learned += torch.is_grad_enabled()


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    def make(**changes: Any) -> Run:
        made = Run(model, tmp_path / "run", monkeypatch, **changes)
        assert made.summary["steps"] == 2 and len(made.metrics) == 2
        assert 0 < made.summary["after"]["token_ratio"] <= 1
        # Going on with a finished run trains nothing and measures the same.
        again = start(made.recipe, made.folder)
        assert steps(made.folder) == made.metrics and again["after"] == made.summary["after"]
        return made

    return make


def cells(rollout: dict[str, Any]) -> list[list[int]]:
    """By layer, in which third of [0.6, 0.9] the thresholds of a question lie."""
    p = np.array(rollout["budgets"])
    return np.clip((p - 0.6) / 0.3 * 3, 0, 2.999).astype(int).T.tolist()


def test_the_default(run):
    made = run()
    assert all("expected_ratio" in row and "cut_ratio_mean" not in row for row in made.metrics)
    assert made.layer_tokens == made.mlp_tokens  # attention alone is skipped
    assert all(sorted(column) == [0, 1, 2] for r in made.rollouts for column in cells(r))
    # Pressed tokens are not paid for in the answers' reward, and a lone answer's baseline is the others' mean.
    assert all(r["total"] == r["correct"] for line in made.rollouts for r in line["rewards"])
    rewards = torch.tensor([[r["total"] for r in line["rewards"]] for line in made.rollouts[:3]])
    others = (rewards.sum(1, keepdim=True) - rewards) / 2
    torch.testing.assert_close(made.rows[0].advantage.view(3, 3), rewards - others)


def test_adapters_alone_are_trained_and_saved(run, model):
    made = run(model={"lora": {"rank": 4, "alpha": 8}})
    folder = (made.folder / "last" / "model").resolve()
    assert [p.name for p in folder.iterdir()] == ["adapter"]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert saved and all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert any(bool(value.any()) for name, value in saved.items() if ".lora_B." in name)
    stored = load_file(next(model.glob("*.safetensors")))
    name = "layers.0.self_attn.q_proj"
    base = made.policy.model.state_dict()[f"model.language_model.{name}.base_layer.weight"]
    (before,) = (value for key, value in stored.items() if key.endswith(f"{name}.weight"))
    assert torch.equal(base, before)


def test_whole_layers_are_skipped(run):
    made = run(sparse={"skip": "layer"})
    assert made.mlp_tokens < made.layer_tokens
    assert all(row["token_ratio"] < 1 for row in made.metrics)


def test_layers_are_recomputed_and_the_numbers_stay(run, tmp_path, model, monkeypatch):
    one = run(sparse={"skip": "layer"})
    two = Run(
        model, tmp_path / "two", monkeypatch,
        sparse={"skip": "layer"}, model={"gradient_checkpointing": True},
    )  # fmt: skip
    assert two.learned == 2 * one.learned > 0  # each MLP once more, in backward
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_answers_are_paid_for_what_they_save_by_the_groups_deviation(run):
    made = run(
        efficiency={"method": "answers"}, ppo={"baseline": "mean", "scale_rewards": "std"}
    )  # fmt: skip
    assert all("expected_ratio" not in row for row in made.metrics)
    for line in made.rollouts:
        right = any(r["correct"] for r in line["rewards"])
        for r, ratio in zip(line["rewards"], line["token_ratio"], strict=True):
            assert r["reduction"] == pytest.approx((1 - ratio) * right)
    for rows in made.rows:
        groups = rows.advantage.view(3, 3).double()
        assert groups.mean(1).abs().max() < 1e-6
        deviations = groups.std(1, correction=0)
        assert bool(((deviations - 1).abs() < 1e-2).logical_or(deviations < 1e-6).all())


def test_cut_learns_the_kept_counts_of_thresholds_drawn_alone(run):
    made = run(efficiency={"method": "cut"}, budgets={"sampling": "independent"})
    for row in made.metrics:
        assert row["cut_ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert "expected_ratio" not in row
    assert all(rows.cut_old is not None and bool((rows.cut_old < 0).any()) for rows in made.rows)
    assert any(sorted(column) != [0, 1, 2] for r in made.rollouts for column in cells(r))


def test_the_supervised_stage_rolls_nothing_out(run):
    made = run(train={"stage": "supervised"}, supervised={"questions": 3})
    assert not made.rollouts and made.summary["rollouts"] == 0 and not made.rows
    assert made.summary["before"] == {}
    assert all(row["stage"] == 0 and row["loss"] > 0 for row in made.metrics)
    assert made.policy.reference_model is None


def test_top_k_keeps_its_share_of_the_tokens(run):
    made = run(sparse={"rule": "top_k", "p": 0.5}, efficiency={"method": "answers"})
    assert made.summary["after"]["token_ratio"] == pytest.approx(0.5, abs=0.01)
    for line in made.rollouts:
        for p, kept in zip(line["budgets"], line["kept"], strict=True):
            shares = np.array(kept) / line["prompt_tokens"]
            np.testing.assert_allclose(shares, p, atol=1.01 / line["prompt_tokens"])


def test_one_threshold_for_all_layers_and_one_task(run):
    made = run(
        budgets={"per": "rollout"}, ppo={"kl_estimator": "k2"}, data={"mix": {"digits": 1.0}}
    )
    assert made.rollouts
    for line in made.rollouts:
        assert line["id"].startswith("digits/")
        assert all(len(set(p)) == 1 for p in line["budgets"])
        assert len({p[0] for p in line["budgets"]}) == 3
