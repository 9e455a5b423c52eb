"""A look inside a run: what it says, by hand, and that it leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import tinymodels
import torch
from tinyruns import start, steps, write
from tinysteps import even, gradients, recipe, roll

from zipr1.core.recipe import Budgets, Efficiency, Ppo, Train
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.train import diagnosis
from zipr1.train.controller import Check, EfficiencyController
from zipr1.train.diagnosis import diagnose, masses
from zipr1.train.minibatch import flatten


def length(found):
    return float(torch.stack([g.square().sum() for g in found.values()]).sum().sqrt())


def test_the_norm_of_each_loss_is_that_of_an_update_with_it_alone(monkeypatch):
    """All sixteen rows: an update whose other losses are off has just this gradient."""
    monkeypatch.setattr(diagnosis, "ROWS", 16)
    ppo = {"policy_gradient": 0.3, "kl_coef": 0.7, "dense_kl_fraction": 1.0, "dense_kl_coef": 0.4}
    method, drawn = (
        Efficiency(method="cut+pathwise"),
        Budgets(low=0.6, high=0.9, num_generations=4, sampling="independent"),
    )
    whole = recipe(ppo=Ppo(**ppo), efficiency=method, budgets=drawn)
    policy, batch = roll(whole, tinymodels.mixed())
    generator = torch.Generator().manual_seed(5)
    # No longer the reference, and all that was kept can still be chosen.
    for _, parameter in policy.trainable():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    for group in batch.groups:
        group.rollouts[0].rewards["correct"] = 1.0  # opens the gate
    said = diagnose(policy, whole, batch, even(2.0, policy.layers))["gradients"]
    off = dict.fromkeys(("policy_gradient", "kl_coef", "dense_kl_fraction"), 0.0)

    def alone(weight, method="answers", **changes):
        settings = recipe(
            ppo=Ppo(**(off | changes)),
            efficiency=Efficiency(method=method),
            budgets=drawn,
            rewards={"reduction": 0.0},
            optim={"max_grad_norm": 1e6},
        )
        return length(gradients(settings, policy, batch, weight)[1])

    assert list(said) == ["policy_gradient", "kl", "pathwise", "cut", "dense_kl"]
    assert said["policy_gradient"] == pytest.approx(alone(0.0, policy_gradient=0.3), rel=1e-3)
    assert said["kl"] == pytest.approx(alone(0.0, kl_coef=0.7), rel=1e-3)
    dense = alone(0.0, dense_kl_fraction=1.0, dense_kl_coef=0.4)
    assert said["dense_kl"] == pytest.approx(dense, rel=1e-3)
    batch.cut_logprobs, kept = [torch.zeros(4) for _ in batch.groups], batch.cut_logprobs
    assert said["pathwise"] == pytest.approx(alone(2.0, "pathwise"), rel=1e-3)
    batch.cut_logprobs = kept
    assert said["cut"] == pytest.approx(alone(2.0, "cut"), rel=1e-3)
    assert min(said.values()) > 1e-5


def test_a_loss_that_the_recipe_has_not_is_not_told():
    policy, batch = roll(recipe(), tinymodels.mixed())
    settings = recipe(ppo=Ppo(policy_gradient=0.0, kl_coef=0.0), efficiency={"method": "pathwise"})
    said = diagnose(policy, settings, batch, even(1.0, policy.layers))
    assert list(said["gradients"]) == ["pathwise"]


def test_a_look_leaves_nothing_behind():
    """Neither gradients nor random numbers nor weights; the step's own update is the same to the last bit."""
    settings = recipe(ppo=Ppo(dense_kl_fraction=0.5))
    policy, batch = roll(settings, tinymodels.mixed())
    batch.groups[0].rollouts[0].rewards["correct"] = 1.0
    plain, wanted = gradients(settings, policy, batch)
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in policy.trainable()}
    assert diagnose(policy, settings, batch, even(1.0, policy.layers))["gradients"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, weights[n]) for n, p in policy.trainable())
    again, found = gradients(settings, policy, batch)
    assert again == plain and all(torch.equal(found[n], g) for n, g in wanted.items())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_are_the_same_with_and_without(tmp_path, kind):
    from safetensors.torch import load_file

    tinymodels.make().save(tmp_path / "model")
    changes = {"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}} if kind == "lora" else {}
    file = write(tmp_path / "r.yaml", tmp_path / "model", **changes)
    found = {}
    for every in (0, 2):
        start(file, tmp_path / f"{every}", f"train.diagnose_every={every}")
        saved = sorted((tmp_path / f"{every}" / "last" / "model").rglob("*.safetensors"))
        found[every] = [load_file(path) for path in saved]
        rows = steps(tmp_path / f"{every}")
        assert ["diagnosis" in row for row in rows] == (
            [True, False, True] if every else [False] * 3
        )
    for one, other in zip(found[0], found[2], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_where_scores_lie_by_hand():
    """Two rows of which the second has three tokens, and two layers. The first layer: shares of the first token .5 and
    .2, the largest .5 and .6; cut points between .6 and .9: one of four and two of three."""
    real = torch.tensor([[True] * 4, [True, True, True, False]])
    one = LayerRecord(
        real,
        torch.tensor([[2.0, 1.0, 0.5, 0.5], [1.0, 3.0, 1.0, 9.0]]),
        torch.tensor([[0.0, 0.5, 0.7, 0.95], [0.8, 0.0, 0.7, 0.7]]),
    )
    two = LayerRecord(
        real,
        torch.tensor([[1.0, 0.0, 0.0, 0.0], [8.0, 1.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.65, 0.9, 2.0]]),
    )
    found = masses(Record(real, [one, two]), 0.6, 0.9)
    assert found["first_token_by_layer"] == pytest.approx([0.35, 0.9])
    assert found["top_token_by_layer"] == pytest.approx([0.55, 0.9])
    assert found["first_token"] == pytest.approx(0.625)
    assert found["top_token"] == pytest.approx(0.725)
    assert found["window"] == pytest.approx((1 / 4 + 2 / 3 + 0 + 1 / 3) / 4)


def test_each_layer_beside_its_set_point():
    """Half way to a tenth of what it was: 0.9 * 0.1 ** 0.5 / 0.9 ** 0.5."""
    settings = recipe(efficiency=Efficiency(target=0.1, target_at=1.0, max_accuracy_drop=None))
    policy, batch = roll(settings, tinymodels.mixed())
    controller = EfficiencyController(settings.efficiency, 3)
    controller.update([Check("digits", "digits/a", 0.0, (0.9, 0.8, 0.1))], 0.0)
    assert controller.set_points()["digits"] == pytest.approx([0.9, 0.8, 0.1])
    batch.checks = [
        Check("digits", "digits/a", 0.0, (r, r / 2, r / 3)) for r in (0.6, 0.3, 0.6, 0.3)
    ]
    controller.update(batch.checks, 0.5)
    said = diagnose(policy, settings, batch, controller)["by_layer"]["digits"]
    assert said["kept"] == pytest.approx([0.45, 0.225, 0.15])
    assert said["set_point"] == pytest.approx([(0.9 * 0.1) ** 0.5, (0.8 * 0.1) ** 0.5, 0.1])


@pytest.mark.parametrize("rule", ["top_k", "random"])
def test_other_rules_have_no_window_of_their_own(rule):
    settings = recipe(
        sparse={"rule": rule, "p": 0.5, "dense_below": 0}, efficiency={"method": "answers"}
    )
    policy, batch = roll(settings, tinymodels.mixed())
    said = diagnose(policy, settings, batch, even(1.0, policy.layers))
    assert ("top_token" in said) == (rule == "top_k")
    json.dumps(said)


def test_rows_are_drawn_and_fit_into_one_pass():
    settings = recipe(train=Train(micro_batch=3))
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    chosen = diagnosis.some_rows(rows, batch, policy, settings)
    assert len(chosen) == len(set(chosen)) == 3
    batch.probe_seed += 1
    assert chosen != diagnosis.some_rows(rows, batch, policy, settings)
