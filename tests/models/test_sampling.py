"""Prefill and decoding steps: one code for training, evaluation and profiling, and what it promises."""

from __future__ import annotations

import pytest
import tinymodels
import torch
from policychecks import sparse

from zipr1.models import sampling
from zipr1.models.shared_prefill import shared_states
from zipr1.models.sparse.last_layer import last_column
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.profiling import measure, subject


@pytest.fixture
def calls(monkeypatch):
    """Names of the shared functions, as they are called."""
    made = []
    for name in ("prefill", "decode_step"):
        stock = getattr(sampling, name)

        def watched(*args, name=name, stock=stock, **kwargs):
            made.append(name)
            return stock(*args, **kwargs)

        monkeypatch.setattr(sampling, name, watched)
    return made


def test_training_evaluation_and_profiling_run_the_same_code(calls):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    answers = [torch.tensor([40, 41])] * 4

    def ran(work):
        calls.clear()
        work()
        return list(calls)

    decoder_calls = []
    hook = policy.decoder.register_forward_pre_hook(lambda *a: decoder_calls.append(1))
    try:
        # Rollouts, and answers of an evaluation: dense and sparse.
        for request in (None, Request(sparse())):
            made = ran(lambda r=request: policy.generate(encoded, features, r, 3))
            assert made[0] == "prefill" and set(made[1:]) == {"decode_step"}
        assert ran(lambda: policy.answer_states(encoded, features, answers)) == ["prefill"]
        shared = ran(lambda: shared_states(policy, encoded, [0, 1, 2, 3], features, answers, None))
        assert shared == ["prefill", "decode_step"]
        built = subject.load("tiny", None, "cpu", "float32", None)
        built.model = policy.model
        inputs = built.random(40, 2)
        for request in (None, Request(sparse())):
            variant = measure.Variant("attention", None, request)
            assert ran(lambda v=variant: measure.prefill(built, inputs, v)) == ["prefill"]
            _, cache = measure.prefill(built, inputs, variant)
            step = measure.stepper(built, inputs, variant, cache)
            assert ran(step) == ["decode_step"]
        calls.clear()
        decoder_calls.clear()
        policy.generate(encoded, features, Request(sparse()), 3)
        assert len(calls) == len(decoder_calls)  # the decoder is called from nowhere else
    finally:
        hook.remove()


@pytest.mark.parametrize("request_of", [None, "attention", "layer"])
@torch.no_grad()
def test_where_it_is_read_a_narrow_prefill_is_the_whole_one(request_of):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    inputs, valid = policy.rows(encoded, policy.encode_vision(encoded), None, left=True)
    request = None if request_of is None else Request(sparse(0.7, skip=request_of))
    worked = []
    mlp = policy.decoder.layers[-1].mlp.down_proj
    hook = mlp.register_forward_pre_hook(lambda m, x: worked.append(x[0][..., 0].numel()))
    states = []
    try:
        for read_at in (None, last_column(valid)):
            with sparse_attention(policy.model, request) as run:
                hidden, _ = sampling.prefill(policy.model, inputs, valid, run, read_at=read_at)
            states.append(hidden[:, -1])
    finally:
        hook.remove()
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)
    assert worked[1] == len(encoded) < worked[0]


@torch.no_grad()
def test_steps_after_a_prefill_are_the_longer_prefill():
    """Dense, left-padded: three tokens at once and one by one, beside reading all of them as a prompt."""
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    answers = [torch.tensor([40, 41, 42])] * 4
    inputs, valid = policy.rows(encoded, features, answers, left=True)
    wanted, _ = sampling.prefill(policy.model, inputs, valid)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    for sizes in ([3], [1, 1, 1]):
        end = valid.shape[1] - 3
        first = {"inputs_embeds": embeds[:, :end], "position_ids": positions[..., :end]}
        _, cache = sampling.prefill(policy.model, first, valid[:, :end])
        for size in sizes:
            part = {
                "inputs_embeds": embeds[:, end : end + size],
                "position_ids": positions[..., end : end + size],
            }
            end += size
            got = sampling.decode_step(policy.model, part, cache, valid[:, :end])
            torch.testing.assert_close(got, wanted[:, end - size : end], atol=1e-4, rtol=1e-4)


def test_a_run_whose_block_has_ended_is_refused():
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    with sparse_attention(policy.model, Request(sparse())) as run:
        pass
    with pytest.raises(AssertionError, match="has ended"):
        policy.answer_states(encoded, features, [torch.tensor([40])] * 4, run)
