"""The policy against transformers' own models: dense equality, pruning, decoding, batches, adapters."""

from __future__ import annotations

import dataclasses

import policychecks
import pytest
import tinymodels
import torch
from policychecks import PROBES, sparse, stock, stock_inputs
from transformers import DynamicCache, StaticCache

from zipr1.core.errors import InputError
from zipr1.core.recipe import Lora
from zipr1.core.types import Prompt
from zipr1.models.policy import load_policy
from zipr1.models.sparse import context
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import PromptBatch, Request


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@pytest.mark.parametrize("forced", [False, True], ids=["bypass", "forced"])
def test_everything_kept_is_the_dense_model(family, forced):
    policychecks.everything_kept_is_the_dense_model(family, forced)


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_cached_decoding_is_the_teacher_forced_sparse_forward(family, skip):
    policychecks.cached_decoding_is_the_teacher_forced_sparse_forward(family, skip)


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_batch_is_its_samples_one_by_one(skip):
    policychecks.a_batch_is_its_samples_one_by_one(skip)


@torch.no_grad()
def test_dropped_tokens_are_not_read(monkeypatch):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    clean = policy.generate(encoded, features, Request(sparse()), 6)
    attend, compact = context.sparse_prefill, context.kv_compact
    poisoned = []

    def poison(q, k, v, kept, scale):
        gone = ~kept.keep[:, None, :, None]
        poisoned.append(int(gone.sum()))
        q, k, v = (x.masked_fill(gone, float("nan")) for x in (q, k, v))
        poison.kv = k, v
        return attend(q, k, v, kept, scale=scale)

    monkeypatch.setattr(context, "sparse_prefill", poison)
    monkeypatch.setattr(context, "kv_compact", lambda k, v, kept: compact(*poison.kv, kept))
    dirty = policy.generate(encoded, features, Request(sparse()), 6)
    assert len(poisoned) == policy.layers and min(poisoned) > 0
    for a, b in zip(clean.logprobs, dirty.logprobs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_skipped_work_is_not_done(skip):
    """Rows that go through each projection, seen at F.linear's door: the projections' own inputs."""
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    rows: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, a, name=name: rows.setdefault(name, []).append(a[0].shape[:-1].numel())
        )
        for name, module in policy.decoder.layers[1].named_modules()
        if name.endswith(("_proj", "layernorm"))
    ]
    if skip == "attention":
        # A hook stands before whatever narrows the input, so here the product itself is watched.
        weight = policy.decoder.layers[1].self_attn.o_proj.weight
        linear = torch.nn.functional.linear

        def watch(x, w, *rest):
            if w is weight:
                rows["self_attn.o_proj"] = [x.shape[:-1].numel()]
            return linear(x, w, *rest)

    try:
        request = Request(sparse(skip=skip))
        inputs, valid = policy.rows(encoded, features, None, left=True)
        with pytest.MonkeyPatch.context() as patch, sparse_attention(policy.model, request) as run:
            if skip == "attention":
                patch.setattr(torch.nn.functional, "linear", watch)
            policy.decoder(**inputs, sparse_batch=PromptBatch(valid), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    kept = int(run.record.layers[1].keep.sum())
    probes = valid.shape[0] * (PROBES.recent + PROBES.random)
    everything = valid.numel()
    assert kept + probes < everything
    if skip == "layer":
        wanted = {
            "self_attn.q_proj": [probes, kept],
            "self_attn.k_proj": [everything, kept],
            "input_layernorm": [everything, kept],
        }
        rest = [kept]
    else:
        wanted = {"self_attn.o_proj": [kept]}
        rest = [everything]
    names = ["q", "k", "v", "o"]
    names = [f"self_attn.{name}_proj" for name in names]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names += ["input_layernorm", "post_attention_layernorm"]
    assert rows == {name: wanted.get(name, rest) for name in names}


@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_decoding_writes_behind_the_cache(skip):
    """Steps share one allocation until its room is used up; what was cached before never changes."""
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    inputs, valid = policy.rows(encoded, features, None, left=True)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    cache, batch = PrunedCache(), PromptBatch(valid)
    addresses = []
    with sparse_attention(policy.model, Request(sparse(skip=skip))):
        policy.decoder(**inputs, sparse_batch=batch, past_key_values=cache, use_cache=True)
        before = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
        for step in range(12):
            policy.model.model(
                inputs_embeds=embeds[:, -1:],
                position_ids=positions[..., -1:] + step + 1,
                past_key_values=cache,
                use_cache=True,
            )
            addresses.append([x.keys.data_ptr() for x in cache.layers])
    assert addresses == [addresses[0]] * 12
    assert cache.get_seq_length() == valid.shape[1] + 12
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        n = keys.shape[2]
        assert layer.keys.shape[2] == layer.values.shape[2] == n + 12
        assert torch.equal(layer.keys[:, :, :n], keys)
        assert torch.equal(layer.values[:, :, :n], values)
        assert layer.valid.shape[1] == n + 12 and bool(layer.valid[:, n:].all())


@torch.no_grad()
def test_nothing_stays_behind_on_exit():
    policy = tinymodels.make()
    before = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for n, m in policy.model.named_modules()
    }
    with (
        pytest.raises(RuntimeError, match="stop"),
        sparse_attention(policy.model, Request(sparse(skip="layer"))),
    ):
        raise RuntimeError("stop")
    after = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for n, m in policy.model.named_modules()
    }
    assert before == after


@torch.no_grad()
def test_transformers_generate_prunes_its_cache():
    policy = tinymodels.shared()
    prompts = [tinymodels.prompt(0, "image"), tinymodels.prompt(2, "image", 4)]
    encoded = tinymodels.encode(policy, prompts)
    ours = policy.generate(encoded, policy.encode_vision(encoded), Request(sparse()), 6)
    longest = max(len(e) for e in encoded)
    ids = torch.zeros(2, longest, dtype=torch.long)
    mask = torch.zeros(2, longest, dtype=torch.long)
    for b, e in enumerate(encoded):
        ids[b, longest - len(e) :], mask[b, longest - len(e) :] = e.ids, 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == policy.processor.placeholder["image"]).int(),
        "pixel_values": torch.cat([e.visuals[0].patches for e in encoded]),
        "image_grid_thw": torch.tensor([e.visuals[0].grid for e in encoded]),
    }
    with sparse_attention(policy.model, Request(sparse())):
        out = policy.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
            eos_token_id=policy.processor.end_ids,
            suppress_tokens=list(policy.processor.placeholder.values()),
        )  # fmt: skip
    cache = out.past_key_values
    assert isinstance(cache, PrunedCache)
    assert cache.prompt_counts().tolist() == ours.counts.tolist()
    assert all(layer.keys.shape[2] < longest for layer in cache.layers)
    for b, tokens in enumerate(ours.tokens):
        assert out.sequences[b, longest:].tolist()[: len(tokens)] == tokens.tolist()


@torch.no_grad()
def test_positions_stay_those_of_the_whole_prompt():
    """Decoding by hand without position_ids: transformers derives them from the cache's logical length."""
    policy = tinymodels.shared()
    (encoded,) = tinymodels.encode(policy, [tinymodels.prompt(1, "video", 3)])
    ours = policy.generate([encoded], policy.encode_vision([encoded]), Request(sparse(0.6)), 4)
    assert len(ours.tokens[0]) > 1
    with sparse_attention(policy.model, Request(sparse(0.6))):
        out = policy.model(**stock_inputs(policy, encoded), use_cache=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == len(encoded)
        assert cache.layers[0].keys.shape[2] < len(encoded)
        for step, token in enumerate(ours.tokens[0][:-1]):
            out = policy.model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            logprobs = out.logits[0, -1]
            blocked = list(policy.processor.placeholder.values())
            logprobs[blocked] = -1e9
            got = logprobs.float().log_softmax(-1)[ours.tokens[0][step + 1]]
            torch.testing.assert_close(got, ours.logprobs[0][step + 1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_other_caches_are_refused():
    policy = tinymodels.shared()
    (encoded,) = tinymodels.encode(policy, [tinymodels.prompt(0, "image")])
    inputs = stock_inputs(policy, encoded)
    used = DynamicCache(config=policy.decoder.config)
    policy.model(**inputs, past_key_values=used, use_cache=True)
    for cache in (used, StaticCache(config=policy.decoder.config, max_cache_len=200)):
        with (
            pytest.raises(InputError, match="KV cache"),
            sparse_attention(policy.model, Request(sparse())),
        ):
            policy.model(**inputs, past_key_values=cache, use_cache=True)


def test_the_vision_tower_runs_once_per_picture():
    policy = tinymodels.make()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    calls = []
    policy.model.model.visual.register_forward_hook(
        lambda m, a, k, o: calls.append(1), with_kwargs=True
    )
    features = policy.encode_vision([*encoded, *encoded])
    assert (
        policy.vision_calls == 4 and len(calls) == 2
    )  # one call for the images, one for the videos
    policy.encode_vision(encoded, known=features)
    assert policy.vision_calls == 4 and len(calls) == 2


def test_adapter_off_is_the_base_and_starts_as_it():
    policy = tinymodels.make(lora=True)
    base = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    answers = [torch.tensor([40, 41])] * 4
    wanted, _ = base.answer_logits(encoded, base.encode_vision(encoded), answers)
    features = policy.encode_vision(encoded)
    start, _ = policy.answer_logits(encoded, features, answers)
    torch.testing.assert_close(start, wanted, atol=1e-5, rtol=1e-5)
    assert all("language_model" in n and "lora_" in n for n, _ in policy.trainable())
    for _, parameter in policy.trainable():
        parameter.data += 0.1
    moved, _ = policy.answer_logits(encoded, features, answers)
    assert (moved - wanted).abs().max() > 0.1
    with policy.reference() as model:
        back, _ = policy.answer_logits(encoded, features, answers, model=model)
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_gradient_checkpointing_changes_no_gradient(skip):
    policychecks.gradient_checkpointing_changes_no_gradient(skip)


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_two_passes_before_one_backward_are_computed_again_each_as_it_was(skip):
    """With checkpointing the layers of both run again, the first pass's with what its own attention has left."""
    grads = []
    for checkpointing in (False, True):
        policy = tinymodels.make(checkpointing=checkpointing)
        encoded = tinymodels.encode(policy, tinymodels.mixed())
        features = policy.encode_vision(encoded)
        with (
            sparse_attention(policy.model, Request(sparse(skip=skip))) as run,
            policy.recomputing(),
        ):
            total, counts = 0.0, []
            for few in (encoded[:1], encoded[1:]):
                logits, _ = policy.answer_logits(
                    few, features, [torch.tensor([40])] * len(few), run
                )
                total = total + logits.log_softmax(-1)[..., 7].sum()
                counts.append(run.record)
            total.backward()
        assert [len(record.lengths) for record in counts] == [1, 3]
        assert [len(record.layers) for record in counts] == [policy.layers] * 2
        grads.append({n: p.grad for n, p in policy.trainable() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], msg=name)


def test_a_request_is_never_written_to():
    """Its fields cannot be set, and what one run kept is not seen by another run of the same request."""
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    request = Request(sparse(0.6))
    before = dict(vars(request))
    first = policy.generate(encoded[:2], features, request, 1)
    second = policy.generate(encoded[2:], features, request, 1)
    assert first.record is not second.record
    assert first.record.lengths.tolist() == [len(e) for e in encoded[:2]]
    assert vars(request) == before
    for name in before:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(request, name, None)


def test_short_prompts_stay_dense():
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)
    limit = sorted(len(e) for e in encoded)[2]
    answers = policy.generate(encoded, features, Request(sparse(dense_below=limit)), 2)
    for e, counts in zip(encoded, answers.counts.tolist(), strict=True):
        assert (counts == [len(e)] * policy.layers) == (len(e) < limit)


@torch.no_grad()
def test_several_pictures_none_and_both_kinds_in_one_batch():
    policy = tinymodels.shared()
    image, clip = tinymodels.prompt(0, "image"), tinymodels.prompt(1, "video")
    two = Prompt(
        "two",
        [
            {
                "role": "user",
                "content": [
                    {"type": "video"},
                    {"type": "image"},
                    {"type": "text", "text": "which?"},
                ],
            }
        ],
        (*clip.media, *image.media),
        "two",
    )
    text = Prompt("text", [{"role": "user", "content": "what color is the two?"}], (), "red")
    encoded = tinymodels.encode(policy, [text, two, image])
    features = policy.encode_vision(encoded)
    assert features[encoded[1].picture].shape[0] == sum(v.tokens for v in encoded[1].visuals)
    together = policy.generate(encoded, features, Request(sparse()), 4)
    for b, e in enumerate(encoded):
        alone = policy.generate([e], policy.encode_vision([e]), Request(sparse()), 4)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert alone.counts[0].tolist() == together.counts[b].tolist()
    plain = stock(policy)
    inputs = stock_inputs(policy, encoded[1])
    logits, _ = policy.answer_logits([encoded[1]], features, [torch.tensor([40])])
    wanted = plain(**inputs).logits[0, -1]
    free = [i for i in range(len(wanted)) if i not in policy.processor.placeholder.values()]
    torch.testing.assert_close(logits[0, 0, free], wanted[free], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_a_row_is_audited_alone_as_with_the_others(skip):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.encode_vision(encoded)

    def mass(rows, audit):
        request = Request(sparse(0.6, skip=skip), audit=audit)
        return policy.generate([encoded[b] for b in rows], features, request, 1).probe_audit_mass

    alone = torch.cat([mass([b], [0]) for b in range(4)])
    assert len(alone.unique()) > 1 and bool((alone < 1).any())
    torch.testing.assert_close(mass(range(4), [2, 0]), alone[[2, 0]])
    assert mass(range(4), []) is None


def test_dropout_of_adapters_waits_for_supervised_steps():
    adapters = Lora(rank=2, alpha=4, dropout=0.5)
    wanted = tinymodels.settings("qwen2_5_vl").model_copy(update={"lora": adapters})
    policy = load_policy(wanted, "cpu", seed=0)
    assert not any(module.training for module in policy.peft_model.modules())
