"""The dense reference: what it is, what it reads and how often, and the log-probabilities of answers beside it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tinymodels
import torch
from tinysteps import (
    close,
    even,
    gradients,
    moved,
    one_update,
    recipe,
    reference_logits,
    roll,
    with_train,
)
from torch.utils._python_dispatch import TorchDispatchMode

from zipr1.core.recipe import Efficiency, Optim, Ppo, Probes, Sparse
from zipr1.models.shared_prefill import shared_states
from zipr1.train import losses, optim
from zipr1.train.minibatch import flatten
from zipr1.train.reference import token_scores
from zipr1.train.update import backward, dense_rows


def test_reference_scores_each_distinct_answer_once():
    settings = recipe()
    policy, batch = roll(settings, tinymodels.mixed())
    rows = flatten(batch, settings, even(1.0, policy.layers))
    rows.tokens = [torch.tensor([40, 41])] * 8 + rows.tokens[8:]
    chosen = list(range(12))
    read, heads = [], []
    hooks = [
        policy.reference_model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: read.append(len(k["inputs_embeds"])), with_kwargs=True
        ),
        policy.reference_model.lm_head.register_forward_pre_hook(
            lambda m, a: heads.append(len(a[0]))
        ),
    ]
    logits = reference_logits(policy, batch, rows, chosen)
    for hook in hooks:
        hook.remove()
    distinct = 2 + len({tuple(rows.tokens[b].tolist()) for b in range(8, 12)})
    assert read == [distinct] and heads == [distinct * logits.shape[1]]
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
    features, owner = policy.encode_vision(encoded), [0, 1, 1, 2, 3, 3]
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
    hook = policy.reference_model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    shared = reference_logits(policy, batch, rows, list(range(16)))
    longest = max(len(e) for e in batch.encoded)
    assert seen == [(4, longest), (16, 1)]
    hook.remove()
    few = [reference_logits(policy, batch, rows, [b])[0] for b in range(16)]
    torch.testing.assert_close(shared, torch.stack(few), atol=1e-4, rtol=1e-4)


def test_kl_is_to_the_dense_reference_not_to_the_sparse_start():
    settings = recipe(ppo=Ppo(kl_coef=1.0))
    policy, batch = roll(settings, tinymodels.mixed())
    said = one_update(settings, batch, policy)
    assert said["kl"] > 1e-4  # untrained, the sparse policy already differs from the dense model
    dense = recipe(
        sparse=Sparse(probes=Probes(recent=3, random=6), dense_below=10_000), ppo=Ppo(kl_coef=1.0)
    )
    policy, batch = roll(dense, tinymodels.mixed())
    assert one_update(dense, batch, policy)["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_never_moves():
    settings = recipe(optim=Optim(lr=1e-2))
    policy, batch = roll(settings, tinymodels.mixed())
    before = copy.deepcopy(policy.reference_model.state_dict())
    start = {n: p.detach().clone() for n, p in policy.trainable()}
    one_update(settings, batch, policy)
    assert all(torch.equal(v, before[k]) for k, v in policy.reference_model.state_dict().items())
    assert any(not torch.equal(p, start[n]) for n, p in policy.trainable())


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
        [batch.encoded[i] for i in rows.prompt], plain.encode_vision(batch.encoded), rows.tokens
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


def test_a_trained_tower_has_a_reference_of_its_own():
    settings = recipe(optim=Optim(lr=1e-2))
    policy, batch = roll(settings, tinymodels.mixed(), vision=True)
    rows = flatten(batch, settings, even(1.0, policy.layers))
    chosen = list(range(16))
    before = reference_logits(policy, batch, rows, chosen)
    one_update(settings, batch, policy)
    tower = [p for n, p in policy.trainable() if "visual" in n]
    assert tower and any(p.grad is not None and p.grad.any() for p in tower)
    again = policy.encode_vision(batch.encoded, model=policy.reference_model)
    assert all(torch.equal(again[k], batch.reference[k]) for k in again)
    assert torch.equal(before, reference_logits(policy, batch, rows, chosen))


def test_some_answers_are_held_to_the_reference_at_p_1():
    plain = recipe(ppo=Ppo(kl_coef=0.7))
    policy, batch = moved(plain)
    _, without = gradients(plain, policy, batch)
    said, found = gradients(recipe(ppo=Ppo(kl_coef=0.7, dense_kl_fraction=0.25)), policy, batch)

    rows = flatten(batch, plain, even(1.0, policy.layers))
    four = [b for b in range(16) if (b + batch.probe_seed) % 4 == 0]
    assert len(four) == 4
    policy.model.zero_grad()
    each = []
    for b in four:  # one by one, with plain logits
        one = ([batch.encoded[rows.prompt[b]]], batch.features, [rows.tokens[b]])
        new, _ = policy.answer_logits(*one)
        with torch.no_grad():
            old, _ = policy.answer_logits(*one, model=policy.reference_model)
        each.append(losses.kl_full(new[0], old[0]).mean())
    (0.7 * sum(each) / 4).backward()
    assert said["kl_dense"] == pytest.approx(float(sum(each).detach()) / 4, rel=1e-4)
    assert said["kl_dense"] > 1e-3
    for name, parameter in policy.trainable():
        torch.testing.assert_close(
            found[name] - without[name], parameter.grad, atol=1e-5, rtol=1e-3
        )


def test_the_term_at_p_1_has_a_weight_of_its_own():
    """Its gradient is that of weight 0.7, times 2.1 / 0.7, whatever the weight of the sparse passes' divergence; not
    set, it is that one's. All rows or a quarter: the weight is of the mean, so equal rows would pull alike."""
    policy, batch = moved(recipe())

    def added(**changes):
        off = Ppo(**(changes | {"dense_kl_coef": None, "dense_kl_fraction": 0.0}))
        _, without = gradients(recipe(ppo=off), policy, batch)
        _, found = gradients(recipe(ppo=Ppo(**changes)), policy, batch)
        return {n: found[n] - without[n] for n in found}

    one = added(kl_coef=0.7, dense_kl_fraction=0.25)
    own = added(kl_coef=0.7, dense_kl_fraction=0.25, dense_kl_coef=2.1)
    close({n: 3 * g for n, g in one.items()}, own, atol=1e-5, rtol=1e-3)
    alone = added(kl_coef=0.0, dense_kl_fraction=0.25, dense_kl_coef=2.1)
    close(alone, own, atol=1e-5, rtol=1e-3)
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3
    off = Ppo(kl_coef=0.7, dense_kl_fraction=0.25, dense_kl_coef=0.0)
    assert dense_rows(recipe(ppo=off), batch, range(16)) == set()


def test_micro_batches_read_the_same_answers_at_p_1():
    """Passes of three rows, some of which have none of the four: the sum of what they say is the whole's."""
    settings = recipe(ppo=Ppo(kl_coef=0.7, dense_kl_fraction=0.25))
    runs = []
    for size in (64, 3):
        policy, batch = moved(settings)
        runs.append(gradients(with_train(settings, micro_batch=size), policy, batch))
    (whole, one), (parts, other) = runs
    assert whole["kl_dense"] > 1e-3
    assert parts["kl_dense"] == pytest.approx(whole["kl_dense"], rel=1e-4)
    close(one, other, atol=1e-5, rtol=1e-3)


def test_which_answers_are_read_at_p_1():
    """One in four of the step's rows, whatever the minibatch they fall into, and others in another step."""
    settings = recipe(ppo=Ppo(kl_coef=0.7, dense_kl_fraction=0.25))
    batch = SimpleNamespace(probe_seed=7)
    assert dense_rows(settings, batch, range(16)) == {1, 5, 9, 13}
    assert dense_rows(settings, batch, [2, 5, 6, 13]) == {5, 13}
    assert dense_rows(settings, SimpleNamespace(probe_seed=8), range(16)) == {0, 4, 8, 12}
    for share, rows in ((0.7, 7000), (0.4, 4000), (1.0, 10000)):
        asked = recipe(ppo=Ppo(kl_coef=0.7, dense_kl_fraction=share))
        assert len(dense_rows(asked, batch, range(10000))) == rows
    for off in (Ppo(kl_coef=0.7), Ppo(kl_coef=0.0, dense_kl_fraction=0.25)):
        assert dense_rows(recipe(ppo=off), batch, range(16)) == set()


@pytest.mark.parametrize("estimator", ["full", "jeffreys", "k2"])
def test_logits_in_chunks_give_the_same_gradient(monkeypatch, estimator):
    settings = recipe(ppo=Ppo(kl_coef=1.0, kl_estimator=estimator))
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
    settings = recipe(ppo=Ppo(kl_coef=1.0, kl_estimator=estimator))
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
