"""One PPO update: ratios of 1, replayed sets, gradients that lower what they should, what changes no gradient."""

from __future__ import annotations

import signal

import pytest
import tinymodels
import torch
from tinysteps import (
    close,
    even,
    gradients,
    one_update,
    recipe,
    roll,
    with_train,
)
from zipr1_kernels import pack_indices, sparse_prefill

from zipr1.core import signals
from zipr1.core.errors import RunError
from zipr1.core.recipe import Budgets, Efficiency, Optim, Ppo, Probes, Sparse
from zipr1.models import sampling
from zipr1.models.batching import replay_masks
from zipr1.models.sparse.gate import gated_prefill
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.train import optim
from zipr1.train.losses import token_logprobs
from zipr1.train.minibatch import flatten
from zipr1.train.rollout import roll_out
from zipr1.train.update import backward

METHODS = ["answers", "cut", "pathwise", "cut+pathwise", "pathwise+through"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_first_ratio_is_one_against_the_sampler(method, skip):
    sparse = Sparse(probes=Probes(recent=3, random=6), skip=skip, dense_below=0)
    settings = recipe(efficiency=Efficiency(method=method), sparse=sparse, ppo=Ppo(kl_coef=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    said = one_update(settings, batch, policy)
    assert said["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert said["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert said["clip_fraction"] == 0
    if "cut" in method:
        assert said["cut_ratio_mean"] == pytest.approx(1, abs=1e-3)


def test_first_ratio_is_exactly_one_against_the_same_forward():
    settings = recipe()
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    chosen = list(range(len(rows.tokens)))
    encoded = [batch.encoded[i] for i in rows.prompt]
    replay = replay_masks(rows.kept, max(rows.lengths))
    request = Request(settings.sparse, seed=batch.probe_seed, replay=replay, scores=True)
    with sparse_attention(policy.model, request) as run:
        logits, mask = policy.answer_logits(encoded, batch.features, rows.tokens, run)
    padded = torch.zeros(mask.shape, dtype=torch.long)
    for b, tokens in enumerate(rows.tokens):
        padded[b, : len(tokens)] = tokens
    exact = token_logprobs(logits.detach(), padded)
    rows.old = [exact[b, : len(t)] for b, t in enumerate(rows.tokens)]
    said = backward(policy, settings, batch, rows, chosen, share=1.0)
    assert said["ratio_mean"] == 1.0 and said["ratio_max"] == 1.0


def test_how_far_sampler_and_trainer_are_apart_is_logged():
    """The sampler's numbers moved by 0.5 on one row of sixteen and by -0.25 on another: the mean over rows is
    0.75 / 16, in passes of any size. Two minibatches: of the first alone, for the second has learned."""
    settings = recipe(ppo=Ppo(kl_coef=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    assert gradients(settings, policy, batch)[0]["sampler_mismatch"] < 1e-5
    batch.groups[0].rollouts[1].logprobs += 0.5
    batch.groups[3].rollouts[0].logprobs -= 0.25
    for size in (64, 3):
        said, _ = gradients(with_train(settings, micro_batch=size), policy, batch)
        assert said["sampler_mismatch"] == pytest.approx(0.75 / 16, abs=1e-4)
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:8].tolist()
    expected = (0.5 * (1 in shuffled) + 0.25 * (12 in shuffled)) / 8
    asked = recipe(ppo=Ppo(kl_coef=0.0, epochs=2, minibatches=2), optim=Optim(lr=1e-2))
    assert one_update(asked, batch, policy)["sampler_mismatch"] == pytest.approx(expected, abs=1e-4)


def test_rounding_parts_the_sampler_from_the_trainer_in_bfloat16():
    settings = recipe(ppo=Ppo(kl_coef=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    policy.model.to(torch.bfloat16)
    batch.features = {key: value.bfloat16() for key, value in batch.features.items()}
    prompts = [group.prompt for group in batch.groups]
    batch = roll_out(policy, settings, prompts, batch.encoded, batch.features, 3)
    said, _ = gradients(settings, policy, batch)
    assert 1e-5 < said["sampler_mismatch"] < 0.1


def test_what_clipping_takes_is_logged():
    """Of a gradient that is four times as long as allowed, three quarters; of one within, nothing."""
    settings = recipe(ppo=Ppo(kl_coef=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    batch.groups[0].rollouts[0].rewards["correct"] = 1.0  # something to learn
    norm = gradients(settings, policy, batch)[0]["grad_norm"]
    for most, lost in ((norm / 4, 0.75), (2 * norm, 0.0)):
        asked = recipe(ppo=Ppo(kl_coef=0.0), optim=Optim(max_grad_norm=most))
        said, _ = gradients(asked, policy, batch)
        assert said["grad_clipped"] == pytest.approx(lost, abs=1e-4)


def test_micro_batches_do_not_change_the_gradient():
    settings = recipe(efficiency=Efficiency(method="cut+pathwise"))
    found = []
    for size in (64, 3):
        policy, batch = roll(settings, tinymodels.mixed())
        found.append(gradients(with_train(settings, micro_batch=size), policy, batch)[1])
    close(*found, atol=1e-5, rtol=1e-3)


def test_pathwise_lowers_the_token_ratio_and_answers_alone_do_not():
    ratios = {}
    for method in ("pathwise", "answers"):
        settings = recipe(
            efficiency=Efficiency(method=method, max_accuracy_drop=None),
            optim=Optim(lr=3e-3),
            ppo=Ppo(kl_coef=0.0),
            budgets=Budgets(low=0.6, high=0.9, num_generations=4),
        )
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            group.rollouts[0].rewards["correct"] = 1.0  # opens the gate
        optimizer = optim.build(policy.trainable(), settings.optim)
        for _ in range(5):
            one_update(settings, batch, policy, 3.0, optimizer)
        after = roll_out(
            policy, settings, [g.prompt for g in batch.groups], batch.encoded, batch.features, 3
        )
        ratios[method] = [
            sum(r.token_ratio for g in b.groups for r in g.rollouts) / 16 for b in (batch, after)
        ]
    assert ratios["pathwise"][1] < ratios["pathwise"][0] - 0.05
    assert abs(ratios["answers"][1] - ratios["answers"][0]) < 0.03


def test_all_wrong_groups_get_no_efficiency_gradient():
    for method in METHODS:
        settings = recipe(efficiency=Efficiency(method=method), ppo=Ppo(kl_coef=0.0))
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            for rollout in group.rollouts:
                rollout.rewards["correct"] = 0.0
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(settings, batch, policy, 3.0, optimizer)
        assert all(p.grad is None or not p.grad.any() for _, p in policy.trainable()), method


def test_epochs_and_minibatches_move_the_ratio():
    settings = recipe(optim=Optim(lr=1e-2), ppo=Ppo(epochs=2, minibatches=2, kl_coef=0.0))
    policy, batch = roll(settings, tinymodels.mixed())
    calls = policy.vision_calls
    for group in batch.groups:
        group.rollouts[0].rewards["correct"] = 1.0  # something to learn
    said = one_update(settings, batch, policy)
    assert said["ratio_max"] > 1 + 1e-3
    assert policy.vision_calls == calls  # a frozen tower serves every epoch


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    settings = recipe(ppo=Ppo(policy_gradient=1.0))
    policy, batch = roll(settings, tinymodels.mixed())
    batch.groups[0].rollouts[0].logprobs += float("nan")
    batch.groups[0].rollouts[0].rewards["correct"] = 1.0
    start = {n: p.detach().clone() for n, p in policy.trainable()}
    with pytest.raises(RunError, match=r"loss is nan.*optim.lr"):
        one_update(settings, batch, policy)
    assert all(torch.equal(p, start[n]) for n, p in policy.trainable())


def test_an_update_alone_lets_no_signal_wait():
    """Only a run knows where its end is; outside of one a signal ends the program at once."""
    settings = recipe()
    policy, batch = roll(settings, tinymodels.mixed())
    one_update(settings, batch, policy)
    with pytest.raises(signals.Stopped):
        signals.handle(signal.SIGTERM)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    grads, runs = [], []
    for checkpointing in (False, True):
        settings = recipe(efficiency=Efficiency(method="cut+pathwise"))
        policy, batch = roll(settings, tinymodels.mixed(), checkpointing=checkpointing)
        for group in batch.groups:
            group.rollouts[0].rewards["correct"] = 1.0
        calls = []
        policy.decoder.layers[0].mlp.register_forward_pre_hook(
            lambda *a, calls=calls: calls.append(1)
        )
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(settings, batch, policy, 1.0, optimizer)
        grads.append({n: p.grad.clone() for n, p in policy.trainable()})
        runs.append(len(calls))
        assert not policy.decoder.layers[0].training
    assert runs == [1, 2]  # the reference is another model
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_the_last_layer_is_finished_where_it_is_read_and_nothing_changes(
    monkeypatch, skip, checkpointing
):
    """Answers, log-probabilities, the KL to the reference, and all gradients, beside the whole last layer."""
    sparse = Sparse(probes=Probes(recent=3, random=6), skip=skip, dense_below=0)
    method = Efficiency(method="cut+pathwise")
    settings = recipe(sparse=sparse, efficiency=method, ppo=Ppo(kl_coef=1.0))

    def run():
        policy, batch = roll(settings, tinymodels.mixed())
        policy.settings = policy.settings.model_copy(
            update={"gradient_checkpointing": checkpointing}
        )
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = flatten(batch, settings, even(1.0, policy.layers))
        seen: list[int] = []
        mlp = policy.decoder.layers[-1].mlp
        hook = mlp.gate_proj.register_forward_pre_hook(
            lambda m, x: seen.append(x[0][..., 0].numel())
        )
        said = backward(policy, settings, batch, rows, list(range(len(rows.tokens))), 1.0)
        hook.remove()
        gradient = {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}
        rollouts = [r for g in batch.groups for r in g.rollouts]
        return rollouts, said, gradient, max(seen), sum(len(t) for t in rows.tokens)

    short, said, gradient, most, answers = run()
    prefill = sampling.prefill
    monkeypatch.setattr(sampling, "prefill", lambda *a, read_at, **k: prefill(*a, **k))
    whole, wanted, expected, before, _ = run()
    assert most == answers < before
    for a, b in zip(short, whole, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)
    numbers = {name: float(value) for name, value in wanted.items()}
    assert {name: float(value) for name, value in said.items()} == pytest.approx(
        numbers, rel=1e-4, abs=1e-5
    )
    assert gradient.keys() == expected.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3)


def weighted(q, k, v, keep, factor, scale):
    """Causal attention whose keys weigh `factor` times as much and whose outputs are multiplied by it, by hand."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(-1, -2) * scale).exp() * factor[:, None, None, :]
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() & keep[:, None, None, :]
    share = logits * seen
    out = share / share.sum(-1, keepdim=True).clamp_min(1e-30) @ v
    return out * factor[:, None, :, None] * keep[:, None, :, None]


def test_the_gate_is_the_weight_of_a_token_as_key_and_as_output():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    keep = torch.rand(2, 7, generator=generator) < 0.6
    keep[:, 0] = True
    gate = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    kept = pack_indices(keep)
    out = gated_prefill(q, k, v, kept, gate, 0.3)
    torch.testing.assert_close(out, sparse_prefill(q, k, v, kept, scale=0.3))
    toward = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (got,) = torch.autograd.grad((out * toward).sum(), gate)
    factor = torch.ones(2, 7, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad((weighted(q, k, v, keep, factor, 0.3) * toward).sum(), factor)
    torch.testing.assert_close(got, want)
    assert not got[~keep].any() and got[keep].abs().min() > 0


def test_losses_reach_the_scores_only_through_the_gate():
    # With nothing else to learn from, a model that differs from its dense reference moves what it keeps.
    grads = {}
    for method in ("pathwise", "pathwise+through"):
        settings = recipe(
            efficiency=Efficiency(method=method), ppo=Ppo(kl_coef=1.0, policy_gradient=0.0)
        )
        policy, batch = roll(settings, tinymodels.mixed())
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(settings, batch, policy, 0.0, optimizer)
        grads[method] = {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}
    name = next(n for n in grads["pathwise"] if n.endswith("layers.0.self_attn.q_proj.weight"))
    difference = (grads["pathwise+through"][name] - grads["pathwise"][name]).abs().max()
    assert difference > 0.01 * grads["pathwise"][name].abs().max()
