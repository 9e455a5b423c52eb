"""One PPO update: ratios of 1, replayed sets, gradients that lower what they should, the reference."""

from __future__ import annotations

import copy

import pytest
import tinymodels
import torch
from test_rollout import recipe, roll
from torch.utils._python_dispatch import TorchDispatchMode
from zipr1_kernels import pack_indices, sparse_prefill

from zipr1.core.errors import RunError
from zipr1.core.recipe import Budgets, Efficiency, Optim, Ppo, Probes, Sparse
from zipr1.models import sampling
from zipr1.models.batching import replay_masks
from zipr1.models.shared_prefill import shared_states
from zipr1.models.sparse.gate import gated_prefill
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.train import losses, optim
from zipr1.train import update as stepping
from zipr1.train.controller import Pressure
from zipr1.train.update import backward, flatten, look_up, token_scores, update

METHODS = ["answers", "cut", "pathwise", "cut+pathwise", "pathwise+through"]


def even(weight: float, layers: int) -> Pressure:
    return Pressure({}, {}, torch.full((layers,), weight))


def one_update(settings, batch, policy, weight=1.0, optimizer=None):
    """optimizer: one to go on with, or to leave the weights alone; by default the recipe's, new."""
    optimizer = optimizer or optim.build(policy.trainable(), settings.optim)
    pressure, order = even(weight, policy.layers), torch.Generator().manual_seed(0)
    return update(policy, settings, batch, optimizer, pressure, order)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_first_ratio_is_one_against_the_sampler(method, skip):
    sparse = Sparse(probes=Probes(recent=3, random=6), skip=skip, dense_below=0)
    settings = recipe(efficiency=Efficiency(method=method), sparse=sparse, ppo=Ppo(kl=0.0))
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
    replay = replay_masks(rows.kept, max(rows.lengths), policy.device)
    request = Request(settings.sparse, seed=batch.probe_seed, replay=replay, scores=True)
    with sparse_attention(policy.core, request) as run:
        logits, mask = policy.answer_logits(encoded, batch.features, rows.tokens, run)
    padded = torch.zeros(mask.shape, dtype=torch.long)
    for b, tokens in enumerate(rows.tokens):
        padded[b, : len(tokens)] = tokens
    from zipr1.train.losses import token_logprobs

    exact = token_logprobs(logits.detach(), padded)
    rows.old = [exact[b, : len(t)] for b, t in enumerate(rows.tokens)]
    said = backward(policy, settings, batch, rows, chosen, share=1.0)
    assert said["ratio_mean"] == 1.0 and said["ratio_max"] == 1.0


def test_micro_batches_do_not_change_the_gradient():
    grads = []
    for size in (64, 3):
        settings = recipe(efficiency=Efficiency(method="cut+pathwise"))
        policy, batch = roll(settings, tinymodels.mixed())
        small = settings.model_copy(
            update={"train": settings.train.model_copy(update={"micro_batch": size})}
        )
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(small, batch, policy, 1.0, optimizer)
        grads.append({n: p.grad.clone() for n, p in policy.trainable()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], atol=1e-5, rtol=1e-3)


def test_pathwise_lowers_the_token_ratio_and_answers_alone_do_not():
    ratios = {}
    for method in ("pathwise", "answers"):
        settings = recipe(
            efficiency=Efficiency(method=method, max_accuracy_drop=None),
            optim=Optim(lr=3e-3),
            ppo=Ppo(kl=0.0),
            budgets=Budgets(low=0.6, high=0.9, count=4),
        )
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            group.rollouts[0].rewards["correct"] = 1.0  # opens the gate
        optimizer = optim.build(policy.trainable(), settings.optim)
        for _ in range(5):
            one_update(settings, batch, policy, 3.0, optimizer)
        from zipr1.train.rollout import roll_out

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
        settings = recipe(efficiency=Efficiency(method=method), ppo=Ppo(kl=0.0))
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            for rollout in group.rollouts:
                rollout.rewards["correct"] = 0.0
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(settings, batch, policy, 3.0, optimizer)
        assert all(p.grad is None or not p.grad.any() for _, p in policy.trainable()), method


def reference_logits(policy, batch, rows, chosen):
    """`(B, T, V)` of the dense reference."""
    found = look_up(policy, batch, rows, chosen)
    width = max(len(rows.tokens[b]) for b in chosen)
    logits = found.logits(policy, slice(0, len(chosen) * width))
    return logits.view(len(chosen), width, -1)


def test_reference_scores_each_distinct_answer_once(monkeypatch):
    settings = recipe()
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    rows.tokens = [torch.tensor([40, 41])] * 8 + rows.tokens[8:]
    chosen = list(range(12))
    seen, heads = [], []
    states, head = policy.answer_states, policy.head

    def spy(encoded, features, answers, run=None, model=None):
        seen.append(len(answers))
        return states(encoded, features, answers, run, model)

    def spy_head(hidden, model=None):
        heads.append(hidden.shape[0])
        return head(hidden, model)

    monkeypatch.setattr(policy, "answer_states", spy)
    monkeypatch.setattr(policy, "head", spy_head)
    logits = reference_logits(policy, batch, rows, chosen)
    distinct = 2 + len({tuple(rows.tokens[b].tolist()) for b in range(8, 12)})
    assert seen == [distinct] and heads == [distinct * logits.shape[1]]
    monkeypatch.undo()
    for b in chosen:
        alone, _ = policy.answer_logits(
            [batch.encoded[rows.prompt[b]]], batch.features, [rows.tokens[b]]
        )
        torch.testing.assert_close(logits[b, : len(rows.tokens[b])], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[3, 1, 5, 2, 4, 1], [1] * 6], ids=["ragged", "one"])
@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@torch.no_grad()
def test_a_prompt_read_once_serves_all_its_answers(family, lengths):
    policy = tinymodels.shared(family)
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features, owner = policy.look(encoded), [0, 1, 1, 2, 3, 3]
    answers = [torch.arange(40, 40 + n) for n in lengths]
    got, mask = shared_states(policy, encoded, owner, features, answers, None)
    each = [encoded[i] for i in owner]
    wanted, same = policy.answer_states(each, features, answers)
    assert torch.equal(mask, same)
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-4, rtol=1e-4)


def test_the_reference_reads_a_prompt_of_many_answers_once():
    settings = recipe()
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    rows.tokens = [torch.tensor([40 + b, 41]) for b in range(16)]  # four distinct answers each
    seen = []
    hook = policy.twin.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    shared = reference_logits(policy, batch, rows, list(range(16)))
    longest = max(len(e) for e in batch.encoded)
    assert seen == [(4, longest), (16, 1)]
    hook.remove()
    few = [reference_logits(policy, batch, rows, [b])[0] for b in range(16)]
    torch.testing.assert_close(shared, torch.stack(few), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["full", "jeffreys", "k2"])
def test_logits_in_chunks_give_the_same_gradient(monkeypatch, estimator):
    settings = recipe(ppo=Ppo(kl=1.0, kl_estimator=estimator))
    grads, said = [], []
    # All at once; five tokens at a time, which does not divide their number; less than one token.
    for tokens in (10_000, 5, 0.5):
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            group.rollouts[0].rewards["correct"] = 1.0
        monkeypatch.setattr(losses, "LOGITS", int(tokens * policy.words))
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        said.append(one_update(settings, batch, policy, 1.0, optimizer))
        grads.append({n: p.grad.clone() for n, p in policy.trainable()})
    for other, values in zip(grads[1:], said[1:], strict=True):
        assert values == pytest.approx(said[0], rel=1e-4, abs=1e-6)
        for name, gradient in grads[0].items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside, with `words` in its last dimension, has had."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.most = words, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and self.words in value.shape:
                self.most = max(self.most, value.numel())
        return out


@pytest.mark.parametrize("estimator", ["full", "k2"])
def test_no_tensor_of_tokens_by_words_exists(monkeypatch, estimator):
    settings = recipe(ppo=Ppo(kl=1.0, kl_estimator=estimator))
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    words, count = policy.words, len(rows.tokens) * max(len(t) for t in rows.tokens)
    weight = words * policy.decoder.config.hidden_size
    monkeypatch.setattr(losses, "LOGITS", 3 * words)
    with Largest(words) as seen:
        backward(policy, settings, batch, rows, list(range(len(rows.tokens))), share=1.0)
    assert 3 * words < weight < count * words  # or the test could not tell them apart
    assert seen.most == weight


def test_token_scores_of_padding_are_skipped(monkeypatch):
    settings = recipe()
    policy, _ = roll(settings, tinymodels.mixed())
    monkeypatch.setattr(losses, "LOGITS", 2 * policy.words)
    states = torch.randn(2, 6, policy.decoder.config.hidden_size)
    mask = torch.arange(6)[None] < torch.tensor([[6], [1]])
    heads, head = [], policy.head
    monkeypatch.setattr(policy, "head", lambda x, m=None: heads.append(len(x)) or head(x, m))
    new, each = token_scores(
        policy, settings, states, torch.zeros(2, 6, dtype=torch.long), mask, None
    )
    assert heads == [2, 2, 2, 2]  # of twelve places four are padding that nothing reads
    assert (new[mask] < 0).all() and not each.any()


def test_kl_is_to_the_dense_reference_not_to_the_sparse_start():
    settings = recipe(ppo=Ppo(kl=1.0))
    policy, batch = roll(settings, tinymodels.mixed())
    said = one_update(settings, batch, policy)
    assert said["kl"] > 1e-4  # untrained, the sparse policy already differs from the dense model
    dense = recipe(
        sparse=Sparse(probes=Probes(recent=3, random=6), dense_below=10_000), ppo=Ppo(kl=1.0)
    )
    policy, batch = roll(dense, tinymodels.mixed())
    assert one_update(dense, batch, policy)["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_never_moves():
    settings = recipe(optim=Optim(lr=1e-2))
    policy, batch = roll(settings, tinymodels.mixed())
    before = copy.deepcopy(policy.twin.state_dict())
    start = {n: p.detach().clone() for n, p in policy.trainable()}
    one_update(settings, batch, policy)
    assert all(torch.equal(v, before[k]) for k, v in policy.twin.state_dict().items())
    assert any(not torch.equal(p, start[n]) for n, p in policy.trainable())


def test_epochs_and_minibatches_move_the_ratio():
    settings = recipe(optim=Optim(lr=1e-2), ppo=Ppo(epochs=2, minibatches=2, kl=0.0))
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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_dense_and_stays_where_it_was(lora):
    settings = recipe(optim=Optim(lr=1e-2), efficiency=Efficiency(method="pathwise"))
    policy, batch = roll(settings, tinymodels.mixed(), lora=lora)
    for group in batch.groups:
        group.rollouts[0].rewards["correct"] = 1.0
        for rollout in group.rollouts[1:]:
            # The same answer twice: the reference runs fewer rows than the policy.
            rollout.tokens, rollout.logprobs = group.rollouts[0].tokens, group.rollouts[0].logprobs
    rows = flatten(batch, settings, even(1.0, policy.layers))
    chosen = list(range(16))
    plain = tinymodels.shared()
    wanted, mask = plain.answer_logits(
        [batch.encoded[i] for i in rows.prompt], plain.look(batch.encoded), rows.tokens
    )
    before = reference_logits(policy, batch, rows, chosen)
    torch.testing.assert_close(before[mask], wanted[mask], atol=1e-4, rtol=1e-4)
    start = {n: p.detach().clone() for n, p in policy.trainable()}
    optimizer = optim.build(policy.trainable(), settings.optim)
    for _ in range(2):
        said = one_update(settings, batch, policy, 3.0, optimizer)
    assert "expected_ratio" in said
    moved = [n for n, p in policy.trainable() if not torch.equal(p, start[n])]
    assert any("q_proj" in n or "k_proj" in n for n in moved)
    after = reference_logits(policy, batch, rows, chosen)
    assert torch.equal(before, after)


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


def test_a_trained_tower_has_a_reference_of_its_own():
    settings = recipe(optim=Optim(lr=1e-2))
    policy, batch = roll(settings, tinymodels.mixed(), vision=True)
    rows = flatten(batch, settings, even(1.0, policy.layers))
    chosen = list(range(16))
    before = reference_logits(policy, batch, rows, chosen)
    one_update(settings, batch, policy)
    tower = [p for n, p in policy.trainable() if "visual" in n]
    assert tower and any(p.grad is not None and p.grad.any() for p in tower)
    again = policy.look(batch.encoded, model=policy.twin)
    assert all(torch.equal(again[k], batch.reference[k]) for k in again)
    assert torch.equal(before, reference_logits(policy, batch, rows, chosen))


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
            efficiency=Efficiency(method=method), ppo=Ppo(kl=1.0, policy_gradient=0.0)
        )
        policy, batch = roll(settings, tinymodels.mixed())
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        one_update(settings, batch, policy, 0.0, optimizer)
        grads[method] = {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}
    name = next(n for n in grads["pathwise"] if n.endswith("layers.0.self_attn.q_proj.weight"))
    difference = (grads["pathwise+through"][name] - grads["pathwise"][name]).abs().max()
    assert difference > 0.01 * grads["pathwise"][name].abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_the_last_layer_is_finished_where_it_is_read_and_nothing_changes(
    monkeypatch, skip, checkpointing
):
    """Answers, log-probabilities, the KL to the reference, and all gradients, beside the whole last layer."""
    sparse = Sparse(probes=Probes(recent=3, random=6), skip=skip, dense_below=0)
    method = Efficiency(method="cut+pathwise")
    settings = recipe(sparse=sparse, efficiency=method, ppo=Ppo(kl=1.0))

    def run():
        policy, batch = roll(settings, tinymodels.mixed())
        policy.settings = policy.settings.model_copy(
            update={"gradient_checkpointing": checkpointing}
        )
        if checkpointing:
            policy.core.gradient_checkpointing_enable({"use_reentrant": False})
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
    assert said == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert gradient.keys() == expected.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3)


def moved(settings):
    """A policy that is no longer its reference, and rollouts of it."""
    policy, batch = roll(settings, tinymodels.mixed())
    generator = torch.Generator().manual_seed(5)
    for _, parameter in policy.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, batch


def gradients(settings, policy, batch):
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    said = one_update(settings, batch, policy, 1.0, optimizer)
    return said, {n: p.grad.clone() for n, p in policy.trainable()}


def test_some_answers_are_held_to_the_reference_at_p_1():
    plain = recipe(ppo=Ppo(kl=0.7))
    policy, batch = moved(plain)
    _, without = gradients(plain, policy, batch)
    said, found = gradients(recipe(ppo=Ppo(kl=0.7, dense=0.25)), policy, batch)

    rows = flatten(batch, plain, even(1.0, policy.layers))
    four = [b for b in range(16) if (b + batch.probe_seed) % 4 == 0]
    assert len(four) == 4
    policy.core.zero_grad()
    each = []
    for b in four:  # one by one, with plain logits
        one = ([batch.encoded[rows.prompt[b]]], batch.features, [rows.tokens[b]])
        new, _ = policy.answer_logits(*one)
        with torch.no_grad():
            old, _ = policy.answer_logits(*one, model=policy.twin)
        each.append(losses.kl_full(new[0], old[0]).mean())
    (0.7 * sum(each) / 4).backward()
    assert said["kl_dense"] == pytest.approx(float(sum(each).detach()) / 4, rel=1e-4)
    assert said["kl_dense"] > 1e-3
    for name, parameter in policy.trainable():
        torch.testing.assert_close(
            found[name] - without[name], parameter.grad, atol=1e-5, rtol=1e-3
        )


def test_micro_batches_and_minibatches_read_the_same_answers_at_p_1(monkeypatch):
    asked, stock = [], stepping.backward_dense
    monkeypatch.setattr(
        stepping, "backward_dense", lambda *a: (asked[-1].append((a[4], a[5])), stock(*a))[1]
    )
    grads = []
    for size in (64, 3):
        settings = recipe(ppo=Ppo(kl=0.7, dense=0.25))
        settings = settings.model_copy(
            update={"train": settings.train.model_copy(update={"micro_batch": size})}
        )
        policy, batch = moved(settings)
        asked.append([])
        grads.append(gradients(settings, policy, batch)[1])
    whole, parts = asked
    assert len(whole) == 1 and whole[0][1] == 1
    assert sorted(b for rows, _ in parts for b in rows) == sorted(whole[0][0])
    assert sum(share for _, share in parts) == pytest.approx(1)
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], atol=1e-5, rtol=1e-3)
