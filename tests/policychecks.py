"""What a policy must do on any path of the kernels: test_policy.py runs these checks on the usual one,
test_triton_paths.py on Triton; other families by their own tests. Each takes its parameters and asserts."""

from __future__ import annotations

import copy

import tinymodels
import torch

from zipr1.core.recipe import Probes, Sparse
from zipr1.models.batching import replay_masks
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request

PROBES = Probes(recent=3, random=6)


def sparse(p: float = 0.8, **changes) -> Sparse:
    return Sparse(**{"p": p, "probes": PROBES, "dense_below": 0} | changes)


def stock_inputs(policy, encoded):
    """What transformers' processor would hand to the model: one sample, unpadded."""
    ids = encoded.ids[None]
    image, video = policy.processor.placeholder["image"], policy.processor.placeholder["video"]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": ((ids == image).int() + 2 * (ids == video).int()),
    }
    for visual in encoded.visuals:
        pixels, grid = ("pixel_values", "image_grid_thw")
        if visual.kind == "video":
            pixels, grid = ("pixel_values_videos", "video_grid_thw")
            if policy.model.config.model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor([visual.seconds])
        inputs[pixels], inputs[grid] = visual.patches, torch.tensor([visual.grid])
    return inputs


def stock(policy):
    """The same weights on transformers' plain SDPA path."""
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    return model


@torch.no_grad()
def everything_kept_is_the_dense_model(family, forced):
    policy = tinymodels.shared(family)
    plain = stock(policy)
    prompts = tinymodels.mixed()
    encoded = tinymodels.encode(policy, prompts)
    features = policy.encode_vision(encoded)
    request = Request(sparse(1.0), force=forced)
    ours = policy.generate(encoded, features, request, 8)
    for b, e in enumerate(encoded):
        inputs = stock_inputs(policy, e)
        theirs = plain.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=policy.processor.end_ids,
            suppress_tokens=list(policy.processor.placeholder.values()),
        )[0, len(e) :]  # fmt: skip
        assert ours.tokens[b].tolist() == theirs.tolist()[: len(ours.tokens[b])]
        one = Request(sparse(1.0), force=forced)
        with sparse_attention(policy.model, one) as run:
            logits, _ = policy.answer_logits([e], features, [ours.tokens[b]], run)
        longer = torch.cat([e.ids, ours.tokens[b]])[None]
        inputs |= {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        extra = torch.zeros(1, len(ours.tokens[b]), dtype=torch.int)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], extra], dim=1)
        wanted = plain(**inputs).logits[:, len(e) - 1 : -1].float()
        blocked = list(policy.processor.placeholder.values())
        wanted[..., blocked] = logits[..., blocked]
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert (ours.record is not None) == forced
    if forced:
        assert ours.counts.tolist() == [[len(e)] * policy.layers for e in encoded]


@torch.no_grad()
def cached_decoding_is_the_teacher_forced_sparse_forward(family, skip):
    policy = tinymodels.shared(family)
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    settings = sparse(0.7, skip=skip)
    answers = policy.generate(encoded, features, Request(settings), 6)
    assert (answers.counts < torch.tensor([[len(e)] for e in encoded])).all()
    width = max(len(e) + len(t) for e, t in zip(encoded, answers.tokens, strict=True))
    for replay in (None, replay_masks(answers.kept, width)):
        request = Request(settings, replay=replay)
        with sparse_attention(policy.model, request) as run:
            logits, mask = policy.answer_logits(encoded, features, answers.tokens, run)
        for b, tokens in enumerate(answers.tokens):
            logprobs = logits[b, : len(tokens)].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logprobs, answers.logprobs[b], atol=1e-4, rtol=0)
        assert mask.sum(1).tolist() == [len(t) for t in answers.tokens]
        kept = run.record.kept_positions()
        assert all(
            torch.equal(a, c) for row, want in zip(kept, answers.kept, strict=True)
            for a, c in zip(row, want, strict=True)
        )  # fmt: skip


@torch.no_grad()
def a_batch_is_its_samples_one_by_one(skip):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    settings = sparse(skip=skip)
    thresholds = torch.tensor([[0.9, 0.6, 0.7], [0.5, 0.8, 0.9], [0.95, 0.7, 0.6], [1.0, 0.5, 0.7]])
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    together = policy.generate(encoded, features, Request(settings, thresholds), 6, uniforms)
    for b, e in enumerate(encoded):
        request = Request(settings, thresholds[b : b + 1])
        alone = policy.generate([e], features, request, 6, uniforms[b : b + 1])
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert alone.counts.tolist()[0] == together.counts.tolist()[b]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[b], atol=1e-4, rtol=0)


def gradient_checkpointing_changes_no_gradient(skip):
    grads = []
    for checkpointing in (False, True):
        policy = tinymodels.make(checkpointing=checkpointing)
        policy.model.train()
        encoded = tinymodels.encode(policy, tinymodels.mixed())
        features = policy.encode_vision(encoded)
        request = Request(sparse(skip=skip), scores=True)
        with sparse_attention(policy.model, request) as run:
            logits, _ = policy.answer_logits(encoded, features, [torch.tensor([40, 41])] * 4, run)
            cuts = sum(layer.cut.clamp(max=1).sum() for layer in run.record.layers)
            (logits.log_softmax(-1)[..., 7].sum() + cuts).backward()
        assert len(run.record.layers) == policy.layers
        grads.append({n: p.grad for n, p in policy.trainable()})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert gradient is not None and torch.equal(gradient, grads[1][name]), name


@torch.no_grad()
def below_one_it_prunes_and_replays(policy, prompts, settings, skip):
    """Rows of a batch drop tokens, and scored again with what they kept they have the log-probabilities they had."""
    encoded = tinymodels.encode(policy, prompts)
    features = policy.encode_vision(encoded)
    settings = settings.model_copy(update={"skip": skip})
    answers = policy.generate(encoded, features, Request(settings), 5)
    assert (answers.counts < torch.tensor([[len(e)] for e in encoded])).all()
    width = max(len(e) + len(a) for e, a in zip(encoded, answers.tokens, strict=True))
    request = Request(settings, replay=replay_masks(answers.kept, width))
    with sparse_attention(policy.model, request) as run:
        logits, _ = policy.answer_logits(encoded, features, answers.tokens, run)
    for b, tokens in enumerate(answers.tokens):
        logprobs = logits[b, : len(tokens)].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, answers.logprobs[b], atol=1e-3, rtol=0)
