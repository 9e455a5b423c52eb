"""The policy against transformers' own models: dense equality, pruning, decoding, batches, adapters."""

from __future__ import annotations

import copy

import pytest
import tinymodels
import torch
from transformers import DynamicCache, StaticCache

from zipr1.core.errors import InputError
from zipr1.core.recipe import Probes, Sparse
from zipr1.core.types import Prompt
from zipr1.models.batching import replay_masks
from zipr1.models.sparse import attention as bridge
from zipr1.models.sparse.attention import Request, sparse_attention
from zipr1.models.sparse.cache import PrunedCache

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
            if policy.core.config.model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor([visual.seconds])
        inputs[pixels], inputs[grid] = visual.patches, torch.tensor([visual.grid])
    return inputs


def stock(policy):
    """The same weights on transformers' plain SDPA path."""
    model = copy.deepcopy(policy.core)
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@pytest.mark.parametrize("forced", [False, True], ids=["bypass", "forced"])
@torch.no_grad()
def test_everything_kept_is_the_dense_model(family, forced):
    policy = tinymodels.shared(family)
    plain = stock(policy)
    prompts = tinymodels.mixed()
    encoded = tinymodels.encode(policy, prompts)
    features = policy.look(encoded)
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
        with sparse_attention(policy.core, one):
            logits, _ = policy.answer_logits([e], features, [ours.tokens[b]], one)
        longer = torch.cat([e.ids, ours.tokens[b]])[None]
        inputs |= {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        extra = torch.zeros(1, len(ours.tokens[b]), dtype=torch.int)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], extra], dim=1)
        wanted = plain(**inputs).logits[:, len(e) - 1 : -1].float()
        blocked = list(policy.processor.placeholder.values())
        wanted[..., blocked] = logits[..., blocked]
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert (request.record is not None) == forced
    if forced:
        assert ours.counts.tolist() == [[len(e)] * policy.layers for e in encoded]


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_cached_decoding_is_the_teacher_forced_sparse_forward(family, skip):
    policy = tinymodels.shared(family)
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.look(encoded)
    settings = sparse(0.7, skip=skip)
    answers = policy.generate(encoded, features, Request(settings), 6)
    assert (answers.counts < torch.tensor([[len(e)] for e in encoded])).all()
    width = max(len(e) + len(t) for e, t in zip(encoded, answers.tokens, strict=True))
    for replay in (None, replay_masks(answers.kept, width, policy.device)):
        request = Request(settings, replay=replay)
        with sparse_attention(policy.core, request):
            logits, mask = policy.answer_logits(encoded, features, answers.tokens, request)
        for b, tokens in enumerate(answers.tokens):
            logprobs = logits[b, : len(tokens)].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logprobs, answers.logprobs[b], atol=1e-4, rtol=0)
        assert mask.sum(1).tolist() == [len(t) for t in answers.tokens]
        kept = request.record.kept_positions(torch.zeros(len(encoded), dtype=torch.long))
        assert all(
            torch.equal(a, c) for row, want in zip(kept, answers.kept, strict=True)
            for a, c in zip(row, want, strict=True)
        )  # fmt: skip


@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one(skip):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.look(encoded)
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


@torch.no_grad()
def test_dropped_tokens_are_not_read(monkeypatch):
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.look(encoded)
    clean = policy.generate(encoded, features, Request(sparse()), 6)
    attend, compact = bridge.sparse_prefill, bridge.kv_compact
    poisoned = []

    def poison(q, k, v, kept, scale):
        gone = ~kept.keep[:, None, :, None]
        poisoned.append(int(gone.sum()))
        q, k, v = (x.masked_fill(gone, float("nan")) for x in (q, k, v))
        poison.kv = k, v
        return attend(q, k, v, kept, scale=scale)

    monkeypatch.setattr(bridge, "sparse_prefill", poison)
    monkeypatch.setattr(bridge, "kv_compact", lambda k, v, kept: compact(*poison.kv, kept))
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
    features = policy.look(encoded)
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
        request.valid = request.prompt = valid
        with pytest.MonkeyPatch.context() as patch, sparse_attention(policy.core, request):
            if skip == "attention":
                patch.setattr(torch.nn.functional, "linear", watch)
            policy.decoder(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    kept = int(request.record.layers[1].keep.sum())
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
    features = policy.look(encoded)
    inputs, valid = policy.rows(encoded, features, None, left=True)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    request = Request(sparse(skip=skip), valid=valid, prompt=valid)
    cache = PrunedCache()
    addresses = []
    with sparse_attention(policy.core, request):
        policy.decoder(**inputs, past_key_values=cache, use_cache=True)
        before = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
        for step in range(12):
            policy.core.model(
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
        for n, m in policy.core.named_modules()
    }
    with (
        pytest.raises(RuntimeError, match="stop"),
        sparse_attention(policy.core, Request(sparse(skip="layer"))),
    ):
        raise RuntimeError("stop")
    after = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for n, m in policy.core.named_modules()
    }
    assert before == after


@torch.no_grad()
def test_transformers_generate_prunes_its_cache():
    policy = tinymodels.shared()
    prompts = [tinymodels.prompt(0, "image"), tinymodels.prompt(2, "image", 4)]
    encoded = tinymodels.encode(policy, prompts)
    ours = policy.generate(encoded, policy.look(encoded), Request(sparse()), 6)
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
    with sparse_attention(policy.core, Request(sparse())):
        out = policy.core.generate(
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
    ours = policy.generate([encoded], policy.look([encoded]), Request(sparse(0.6)), 4)
    assert len(ours.tokens[0]) > 1
    with sparse_attention(policy.core, Request(sparse(0.6))):
        out = policy.core(**stock_inputs(policy, encoded), use_cache=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == len(encoded)
        assert cache.layers[0].keys.shape[2] < len(encoded)
        for step, token in enumerate(ours.tokens[0][:-1]):
            out = policy.core(input_ids=token[None, None], past_key_values=cache, use_cache=True)
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
    policy.core(**inputs, past_key_values=used, use_cache=True)
    for cache in (used, StaticCache(config=policy.decoder.config, max_cache_len=200)):
        with (
            pytest.raises(InputError, match="KV cache"),
            sparse_attention(policy.core, Request(sparse())),
        ):
            policy.core(**inputs, past_key_values=cache, use_cache=True)


def test_the_vision_tower_runs_once_per_picture():
    policy = tinymodels.make()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    calls = []
    policy.core.model.visual.register_forward_hook(
        lambda m, a, k, o: calls.append(1), with_kwargs=True
    )
    features = policy.look([*encoded, *encoded])
    assert (
        policy.vision_calls == 4 and len(calls) == 2
    )  # one call for the images, one for the videos
    policy.look(encoded, known=features)
    assert policy.vision_calls == 4 and len(calls) == 2


def test_adapter_off_is_the_base_and_starts_as_it():
    policy = tinymodels.make(lora=True)
    base = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    answers = [torch.tensor([40, 41])] * 4
    wanted, _ = base.answer_logits(encoded, base.look(encoded), answers)
    features = policy.look(encoded)
    start, _ = policy.answer_logits(encoded, features, answers)
    torch.testing.assert_close(start, wanted, atol=1e-5, rtol=1e-5)
    assert all("language_model" in n and "lora_" in n for n, _ in policy.trainable())
    for _, parameter in policy.trainable():
        parameter.data += 0.1
    moved, _ = policy.answer_logits(encoded, features, answers)
    assert (moved - wanted).abs().max() > 0.1
    with policy.reference() as model:
        back, _ = policy.answer_logits(encoded, features, answers, None, model)
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_gradient_checkpointing_changes_no_gradient(skip):
    grads = []
    for checkpointing in (False, True):
        policy = tinymodels.make(checkpointing=checkpointing)
        policy.core.train()
        encoded = tinymodels.encode(policy, tinymodels.mixed())
        features = policy.look(encoded)
        request = Request(sparse(skip=skip), scores=True)
        with sparse_attention(policy.core, request):
            logits, _ = policy.answer_logits(
                encoded, features, [torch.tensor([40, 41])] * 4, request
            )
            cuts = sum(layer.cut.clamp(max=1).sum() for layer in request.record.layers)
            (logits.log_softmax(-1)[..., 7].sum() + cuts).backward()
        assert len(request.record.layers) == policy.layers
        grads.append({n: p.grad for n, p in policy.trainable()})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert gradient is not None and torch.equal(gradient, grads[1][name]), name


def test_short_prompts_stay_dense():
    policy = tinymodels.shared()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    features = policy.look(encoded)
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
    features = policy.look(encoded)
    assert features[encoded[1].picture].shape[0] == sum(v.tokens for v in encoded[1].visuals)
    together = policy.generate(encoded, features, Request(sparse()), 4)
    for b, e in enumerate(encoded):
        alone = policy.generate([e], policy.look([e]), Request(sparse()), 4)
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
    features = policy.look(encoded)

    def mass(rows, audit):
        request = Request(sparse(0.6, skip=skip), audit=audit)
        return policy.generate([encoded[b] for b in rows], features, request, 1).heldout

    alone = torch.cat([mass([b], [0]) for b in range(4)])
    assert len(alone.unique()) > 1 and bool((alone < 1).any())
    torch.testing.assert_close(mass(range(4), [2, 0]), alone[[2, 0]])
    assert mass(range(4), []) is None
