"""zipr1.load, zipr1.sparse and zipr1.stats on transformers' own models: what works, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tinymodels
import tinyruns
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

import zipr1
from zipr1.core.errors import InputError
from zipr1.data.media import load_media
from zipr1.models.open import resolve
from zipr1.models.sparse.attention import ATTENTION
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request

GREEDY = {"max_new_tokens": 6, "do_sample": False}
FREE = {"dense_below": 0, "probes": {"recent": 8, "random": 4}}


@pytest.fixture(scope="module")
def loaded(exported):
    """The exported run and its processor, sparse; tests leave it as they find it."""
    return zipr1.load(exported, device="cpu")


@pytest.fixture
def plain():
    """The embedded model as transformers loads it, dense."""
    return AutoModelForImageTextToText.from_pretrained(
        resolve("tiny"), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def encode(processor, prompts):
    return processor.apply_chat_template(
        [tinyruns.chat(p) for p in prompts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )


def answers(model, processor, inputs, **options):
    out = model.generate(**inputs, **(GREEDY | options))
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def hooks(model):
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def expected(run, prompts, settings):
    """Answers and kept counts as training and evaluation make them."""
    policy = tinyruns.policy_of(run)
    media = [[load_media(m, 16) for m in p.media] for p in prompts]
    encoded = [policy.encode(p, m, 1000) for p, m in zip(prompts, media, strict=True)]
    request = None if settings is None else Request(settings)
    made = policy.generate(encoded, policy.encode_vision(encoded), request, 6)
    return [policy.processor.decode(t) for t in made.tokens], made.counts


def test_a_loaded_run_answers_as_its_evaluation_does(run, exported):
    prompts = tinyruns.questions()
    wanted, counts = expected(run, prompts, tinyruns.recipe().sparse)
    for path in (run, exported):
        model, processor = zipr1.load(path, device="cpu")
        inputs = encode(processor, prompts)
        assert answers(model, processor, inputs) == wanted
        stats = zipr1.stats(model)
        assert stats.kept.tolist() == counts.tolist()
        assert stats.lengths.tolist() == inputs["attention_mask"].sum(1).tolist()
        share = (counts / stats.lengths[:, None]).mean()
        assert stats.token_ratio == pytest.approx(float(share)) and 0 < share < 1
        assert f"{share:.1%} kept" in str(stats) and "5 prompts" in str(stats)


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
def test_both_families_answer_as_the_policy(family, tmp_path):
    policy = tinymodels.make(family)
    policy.save(tmp_path)
    model, processor = zipr1.load(tmp_path, 0.7, device="cpu", **FREE)
    prompts = [tinymodels.prompt(0, "image"), tinymodels.prompt(1, "video", 3)]
    encoded = tinymodels.encode(policy, prompts)
    settings = model._zipr1.settings
    wanted = policy.generate(encoded, policy.encode_vision(encoded), Request(settings), 6)
    chats = [tinyruns.chat(p) for p in prompts]
    chats[1][0]["content"][0]["fps"] = prompts[1].media[0].fps
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True)
    assert ("second_per_grid_ts" in inputs) == (family == "qwen2_5_vl")
    out = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for b, tokens in enumerate(wanted.tokens):
        assert out[b, : len(tokens)].tolist() == tokens.tolist()
    assert zipr1.stats(model).kept.tolist() == wanted.counts.tolist()
    assert zipr1.stats(model).token_ratio < 1


def test_budgets_by_load_and_by_block(run, exported):
    prompts = tinyruns.questions()
    model, processor = zipr1.load(exported, 0.6, device="cpu")
    inputs = encode(processor, prompts)
    tight = tinyruns.recipe().sparse.model_copy(update={"p": 0.6})
    assert answers(model, processor, inputs) == expected(run, prompts, tight)[0]
    least = zipr1.stats(model).token_ratio
    with zipr1.sparse(model, budget=0.95):
        loose = tight.model_copy(update={"p": 0.95})
        assert answers(model, processor, inputs) == expected(run, prompts, loose)[0]
        assert zipr1.stats(model).token_ratio > least
        with zipr1.sparse(model, budget=1):
            assert answers(model, processor, inputs) == expected(run, prompts, None)[0]
            assert zipr1.stats(model).token_ratio == 1.0
    answers(model, processor, inputs)
    assert zipr1.stats(model).token_ratio == least


@torch.no_grad()
def test_budget_one_is_bit_for_bit_the_stock_model(plain):
    model, processor = zipr1.load("tiny", 1.0, device="cpu")
    inputs = encode(processor, tinyruns.questions())
    wanted = plain(**inputs).logits
    assert torch.equal(model(**inputs).logits, wanted)
    for way in ("sdpa", "eager"):
        plain.set_attn_implementation(way)
        own = plain(**inputs).logits
        with zipr1.sparse(plain, budget=1.0):
            assert torch.equal(plain(**inputs).logits, own)
        with zipr1.sparse(plain, budget=0.7, **FREE):
            assert not torch.equal(plain(**inputs).logits, own)
        assert plain.config.text_config._attn_implementation == way


@torch.no_grad()
def test_a_block_leaves_a_stock_model_as_it_was(plain, run):
    _, processor = zipr1.load("tiny", device="cpu")
    inputs = encode(processor, tinyruns.questions())
    before = hooks(plain)
    wanted = plain(**inputs).logits
    with zipr1.sparse(plain, 0.7, skip="layer", **FREE):
        assert not torch.equal(plain(**inputs).logits, wanted)
    with pytest.raises(RuntimeError, match="stop"), zipr1.sparse(plain, 0.7, skip="layer", **FREE):
        raise RuntimeError("stop")
    assert torch.equal(plain(**inputs).logits, wanted)
    assert plain.config.text_config._attn_implementation == "sdpa"
    assert "generate" not in vars(plain)
    assert before == hooks(plain)
    twin = copy.deepcopy(plain)
    with zipr1.sparse(twin, 0.7, **FREE):
        assert not torch.equal(twin(**inputs).logits, wanted)
        assert torch.equal(plain(**inputs).logits, wanted)
    assert pickle.loads(pickle.dumps(plain))(**inputs).logits.equal(wanted)


@torch.no_grad()
def test_a_dense_model_beside_a_sparse_one_is_not_disturbed(plain):
    """Both use our attention, and the dense one has padding, which only its mask tells."""
    model, processor = zipr1.load("tiny", 0.7, device="cpu", **FREE)
    inputs = encode(processor, tinyruns.questions())
    wanted = plain(**inputs).logits
    plain.set_attn_implementation({"text_config": ATTENTION})
    with zipr1.sparse(model, 0.8):
        first = model(**inputs).logits

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.get_decoder().layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(plain(**inputs).logits, wanted)
        assert torch.equal(model(**inputs).logits, first)


def test_threads_with_a_model_each_and_with_one_model(loaded):
    model, processor = loaded
    other, _ = zipr1.load("tiny", 0.7, device="cpu", skip="layer", **FREE)
    few, many = (encode(processor, tinyruns.questions()[s]) for s in (slice(0, 2), slice(1, 5)))
    jobs = [(model, few), (model, many), (other, few), (other, many)]
    wanted = [m.generate(**i, **GREEDY).tolist() for m, i in jobs]
    counts = []
    for m, i in jobs:
        m.generate(**i, **GREEDY)
        counts.append(zipr1.stats(m).kept.tolist())

    def work(turn):
        m, i = jobs[turn]
        for _ in range(4):
            assert m.generate(**i, **GREEDY).tolist() == wanted[turn]
            assert zipr1.stats(m).kept.tolist() == counts[turn]

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(work, range(len(jobs)), timeout=60))


def test_a_pass_that_failed_frees_the_model(loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    wanted = answers(model, processor, inputs)
    with pytest.raises(InputError, match="KV cache"):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=500))
    said = []
    thread = threading.Thread(target=lambda: said.append(answers(model, processor, inputs)))
    thread.start()
    thread.join(30)
    assert said == [wanted]


def test_a_padded_batch_is_its_rows_one_by_one(loaded):
    model, processor = loaded
    prompts = tinyruns.questions()
    together = answers(model, processor, encode(processor, prompts))
    counts = zipr1.stats(model).kept
    for b, prompt in enumerate(prompts):
        assert answers(model, processor, encode(processor, [prompt])) == [together[b]]
        assert zipr1.stats(model).kept[0].tolist() == counts[b].tolist()


def test_sampling_beams_and_returned_sequences(plain, loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:3])
    torch.manual_seed(1)
    first = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    torch.manual_seed(1)
    again = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert first.shape[0] == 9 and torch.equal(first, again)
    kept = zipr1.stats(model).kept
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[3])
    greedy = model.generate(**inputs, **GREEDY, num_beams=1)
    one = encode(processor, tinyruns.questions()[:1])
    beams = [
        model.generate(**some, max_new_tokens=4, do_sample=False, num_beams=3)
        for some in (one, inputs)
    ]
    assert beams[1].shape[0] == greedy.shape[0] == 3
    width = one["input_ids"].shape[1]
    padding = inputs["input_ids"].shape[1] - width
    alone, batched = beams[0][0, width:].tolist(), beams[1][0, width + padding :].tolist()
    assert batched[: len(alone)] == alone
    # All kept through the sparse path, cache and all: transformers' own beams.
    forced = Request(model._zipr1.settings.model_copy(update={"p": 1.0}), force=True)
    plain.set_attn_implementation({"text_config": ATTENTION})
    options = {**inputs, "max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    wanted = plain.generate(**options)
    with sparse_attention(plain, forced):
        assert torch.equal(plain.generate(**options), wanted)


def test_streaming(loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    wanted = answers(model, processor, inputs)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})  # fmt: skip
    thread.start()
    assert "".join(streamer).strip() == wanted[0]
    thread.join(30)


def test_pipelines(loaded):
    model, processor = loaded
    prompts = tinyruns.questions()[:2]
    wanted = answers(model, processor, encode(processor, prompts))
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [tinyruns.chat(p) for p in prompts]
    for chat in chats:
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = Image.fromarray(part["image"])
    made = pipe(text=chats, generate_kwargs=dict(GREEDY), return_full_text=False)
    assert [row[0]["generated_text"].strip() for row in made] == wanted
    assert zipr1.stats(model).token_ratio < 1


def test_a_second_turn_goes_on_with_the_same_cache(loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, PrunedCache)
    kept = [layer.keys.shape[2] for layer in cache.layers]
    asked = "\n<|im_start|>user\nhow many red digits are there?<|im_end|>\n<|im_start|>assistant\n"
    following = processor.tokenizer(asked, return_tensors="pt")["input_ids"]
    longer = torch.cat([first.sequences, following], dim=1)
    types = torch.zeros_like(longer, dtype=torch.int)
    types[:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
    second = model.generate(
        input_ids=longer, mm_token_type_ids=types, past_key_values=cache, **GREEDY
    )
    # Neither turn has seen its own last token: what came since is held, the first turn's last token included.
    new = second.shape[1] - first.sequences.shape[1]
    assert new > following.shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + new for n in kept]
    with (
        pytest.raises(InputError, match=r"past_key_values were pruned and budget is 1\.0"),
        zipr1.sparse(model, budget=1.0),
    ):
        model.generate(input_ids=longer, mm_token_type_ids=types, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding .prompt_lookup_num_tokens"),
        ({"assistant_model": "itself"}, "assisted decoding .assistant_model"),
        ({"prefill_chunk_size": 16}, "chunked prefill .prefill_chunk_size"),
        ({"use_cache": False}, "use_cache=False"),
    ],
)
def test_what_cannot_work_is_refused_by_name(loaded, plain, options, named):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    if "assistant_model" in options:
        options = {"assistant_model": plain}
    with pytest.raises(InputError, match=f"generate: {named}"):
        model.generate(**inputs, **GREEDY, **options)
    if "assistant_model" not in options:
        config = copy.deepcopy(model.generation_config)
        for name, value in options.items():
            setattr(config, name, value)
        with pytest.raises(InputError, match=f"generate: {named}"):
            model.generate(**inputs, generation_config=config, max_new_tokens=2)
    answers(model, processor, inputs)


def test_a_static_cache_works_where_everything_is_kept(loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    with zipr1.sparse(model, budget=1.0):
        wanted = answers(model, processor, inputs)
        assert answers(model, processor, inputs, prompt_lookup_num_tokens=2) == wanted


def test_more_that_is_refused_by_name(loaded):
    model, processor = loaded
    inputs = encode(processor, tinyruns.questions()[:1])
    used = DynamicCache(config=model.config)
    with zipr1.sparse(model, budget=1.0):
        model(**inputs, past_key_values=used)
    with pytest.raises(InputError, match="needs its own KV cache and got a DynamicCache"):
        model(**inputs, past_key_values=used)
    with pytest.raises(InputError, match="continuous batching"):
        model.generate_batch([[1, 2]])
    with pytest.raises(InputError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(InputError, match=r"zipr1.stats: .* has not seen a prompt"):
        zipr1.stats(zipr1.load("tiny", device="cpu")[0])
    with pytest.raises(InputError, match="the model is a Linear"):
        zipr1.stats(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: zipr1.load("tiny", 1.5), r"zipr1.load: sparse.p: got 1.5; 1 or less"),
        (lambda m: zipr1.load("tiny", kept=3), r"zipr1.load: sparse.kept: unknown key"),
        (lambda m: zipr1.load("tiny", dtype="int8"), r"zipr1.load: dtype 'int8'; allowed"),
        (lambda m: zipr1.load("./nowhere"), r"nowhere does not exist"),
        (lambda m: zipr1.sparse(m, 0), r"zipr1.sparse: sparse.p: got 0.0; a number above 0"),
        (lambda m: zipr1.sparse(m, 0.9, rule="best"), r"zipr1.sparse: sparse.rule: got 'best'"),
    ],
)
def test_wrong_settings_are_named(loaded, call, message):
    with pytest.raises(InputError, match=message):
        call(loaded[0])


def test_adapters_in_memory():
    policy = tinymodels.make(lora=True)
    with zipr1.sparse(policy.peft_model, 0.6, **FREE):
        policy.peft_model(input_ids=torch.arange(20, 60)[None], mm_token_type_ids=torch.zeros(1, 40))  # fmt: skip
    assert zipr1.stats(policy.model).token_ratio < 1


def test_short_prompts_say_why_they_stay_dense():
    model, processor = zipr1.load("tiny", device="cpu", dense_below=384)
    answers(model, processor, encode(processor, tinyruns.questions()[:1]))
    assert "1 stayed dense, being shorter than dense_below = 384" in str(zipr1.stats(model))


def test_the_processor_takes_paths_pictures_arrays_and_frames(loaded, tmp_path):
    _, processor = loaded
    prompts = tinyruns.questions()
    pixels = prompts[0].media[0].source
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = encode(processor, prompts[:1])
    chat = tinyruns.chat(prompts[0])
    options = {"add_generation_prompt": True, "tokenize": True}
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels):
        chat[0]["content"][0]["image"] = source
        got = processor.apply_chat_template(chat, **options)
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    for images in (Image.fromarray(pixels), [pixels], [[pixels]]):
        got = processor(text=text, images=images)
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    clip, fps = load_media(prompts[3].media[0], 16)
    wanted = encode(processor, prompts[3:4])
    chat = tinyruns.chat(prompts[3])
    for source in (clip, [Image.fromarray(f) for f in clip]):
        chat[0]["content"][0] |= {"video": source, "fps": fps}
        got = processor.apply_chat_template(chat, **options)
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, t: p(text=t), "more placeholders than there are images"),
        (lambda p, t: p(text="hello", images=[np.zeros((64, 64, 3), np.uint8)]), "no placeholder"),
        (lambda p, t: p(text=t, images="https://x.y/z.png"), "download the image"),
        (lambda p, t: p(text=t, images=np.zeros((64, 64))), "in memory: float64"),
        (lambda p, t: p(), "text is missing"),
        (lambda p, t: p(text="hi", return_tensors="np"), "return_tensors='np'; allowed: 'pt'"),
        (lambda p, t: p(text="hi", truncation=True), "truncation is not handled"),
        (
            lambda p, t: p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]),
            "has no source",
        ),
    ],
)
def test_wrong_inputs_are_named(loaded, call, message):
    processor = loaded[1]
    text = "<|vision_start|><|image_pad|><|vision_end|>which digit is red?"
    with pytest.raises(InputError, match=message):
        call(processor, text)


def test_a_saved_processor_is_a_stock_folder(loaded, exported, tmp_path):
    loaded[1].save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (exported / path.name).read_bytes()
