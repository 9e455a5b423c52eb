"""Blocks of `zipr1.sparse`, nested, interleaved and in several threads: the newest that has not ended is in force, and
the last one to end leaves the model as it was."""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import tinyruns
import torch
from transformers import AutoModelForImageTextToText

import zipr1
from zipr1.core.errors import InputError
from zipr1.models.open import resolve
from zipr1.models.sparse.patch import our_attention, sparse_attention
from zipr1.models.sparse.request import Request

FREE = {
    "rule": "top_p",
    "keep_last": 4,
    "normalise": True,
    "dense_below": 0,
    "probes": {"recent": 8, "random": 4},
}
# Settings that patch a model differently. All are given: a block inherits what it does not say from the one in force.
KINDS = {
    "dense": {"budget": 1.0, "skip": "attention", "kv": "evict", **FREE},
    "loose": {"budget": 0.9, "skip": "attention", "kv": "evict", **FREE},
    "tight": {"budget": 0.5, "skip": "attention", "kv": "evict", **FREE},
    "layer": {"budget": 0.7, "skip": "layer", "kv": "evict", **FREE},
    "retain": {"budget": 0.6, "skip": "layer", "kv": "retain", **FREE},
}


def stock():
    """The embedded model as transformers loads it, dense."""
    return AutoModelForImageTextToText.from_pretrained(
        resolve("tiny"), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@pytest.fixture(scope="module")
def inputs():
    _, processor = zipr1.load("tiny", device="cpu")
    chats = [tinyruns.chat(p) for p in tinyruns.questions()[:3]]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True
    )


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=True).logits


@pytest.fixture(scope="module")
def expected(inputs):
    """Logits under each of KINDS, each by a model that never saw another block; None: by one that saw none."""
    found = {None: logits(stock(), inputs)}
    for name, settings in KINDS.items():
        model = stock()
        with zipr1.sparse(model, **settings):
            found[name] = logits(model, inputs)
    assert torch.equal(found["dense"], found[None])
    different = [found[name] for name in ("dense", "loose", "tight", "layer", "retain")]
    for i, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[i + 1 :])
    return found


def snapshot(model):
    """Everything of a model's modules that a patch could change: own attributes by identity, hooks, attention."""
    state = {}
    for name, module in model.named_modules():
        # Where the last conversation's positions stand: transformers' own, changed by each of its passes.
        own = {k: id(v) for k, v in vars(module).items() if k != "rope_deltas"}
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        state[name] = own, hooks, implementation, type(module)
    config = model.config
    state["configs"] = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]  # fmt: skip
    return state


def enter(model, name):
    block = zipr1.sparse(model, **KINDS[name])
    block.__enter__()
    return block


def test_the_first_of_two_interleaved_blocks_may_end_first(inputs, expected):
    model = stock()
    before = snapshot(model)
    first = enter(model, "loose")
    second = enter(model, "tight")
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, inputs), expected["tight"])
    assert float(zipr1.stats(model).settings.p) == 0.5
    second.__exit__(None, None, None)
    assert torch.equal(logits(model, inputs), expected[None])
    assert snapshot(model) == before
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), expected[None])


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_blocks(inputs, expected, seed):
    """Blocks begin and end at random; a list is the model of what must be in force."""
    draw = random.Random(seed)
    model = stock()
    before = snapshot(model)
    running: list[tuple[str, object]] = []
    for _ in range(12):
        if running and draw.random() < 0.45:
            _, block = running.pop(draw.randrange(len(running)))
            block.__exit__(None, None, None)
        else:
            name = draw.choice(list(KINDS))
            running.append((name, enter(model, name)))
        top = running[-1][0] if running else None
        assert torch.equal(logits(model, inputs), expected[top]), (top, [n for n, _ in running])
    draw.shuffle(running)
    for _, block in running:
        block.__exit__(None, None, None)
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected[None])


def test_blocks_of_two_threads_overlap(inputs, expected):
    model = stock()
    before = snapshot(model)
    begun, go_on = threading.Event(), threading.Event()
    found = {}

    def other():
        with zipr1.sparse(model, **KINDS["loose"]):
            found["alone"] = logits(model, inputs)
            begun.set()
            assert go_on.wait(30)
            found["beside"] = logits(model, inputs)  # the newest block counts for all threads
            found["stats"] = zipr1.stats(model).settings.p

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(30)
    with zipr1.sparse(model, **KINDS["layer"]):
        assert torch.equal(logits(model, inputs), expected["layer"])
        go_on.set()
        thread.join(30)
        assert not thread.is_alive()
        assert torch.equal(
            logits(model, inputs), expected["layer"]
        )  # the other's end changed nothing
    assert torch.equal(found["alone"], expected["loose"])
    assert torch.equal(found["beside"], expected["layer"]) and found["stats"] == 0.7
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected[None])


def test_many_threads_begin_and_end_blocks_while_others_run(inputs, expected):
    model = stock()
    before = snapshot(model)

    def work(seed):
        draw = random.Random(seed)
        for _ in range(5):
            with zipr1.sparse(model, **KINDS[draw.choice(list(KINDS))]):
                made = logits(model, inputs)
            # A pass is of one block, from its first layer to its last.
            assert any(torch.equal(made, one) for one in expected.values())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4), timeout=120))
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected[None])


@pytest.mark.parametrize("name", ["tight", "layer", "retain"])
def test_a_block_begins_while_another_thread_runs_the_dense_model(inputs, expected, name):
    """That pass ends as it began: what the sparse one has left in the patched modules is not its own."""
    model = stock()
    before = snapshot(model)
    inside, go_on = threading.Event(), threading.Event()
    found = []

    def pause(*_):
        inside.set()
        assert go_on.wait(30)

    hook = model.get_decoder().layers[0].register_forward_pre_hook(pause)
    thread = threading.Thread(target=lambda: found.append(logits(model, inputs)))
    thread.start()
    assert inside.wait(30)
    hook.remove()
    with zipr1.sparse(model, **KINDS[name]):
        assert torch.equal(logits(model, inputs), expected[name])
        go_on.set()
        thread.join(30)
    assert torch.equal(found[0], expected[None])
    assert snapshot(model) == before


def test_nested_blocks_and_an_exception_inside(inputs, expected):
    model = stock()
    before = snapshot(model)
    with zipr1.sparse(model, **KINDS["layer"]):

        def stopped():
            with zipr1.sparse(model, **KINDS["retain"]), zipr1.sparse(model, **KINDS["dense"]):
                assert torch.equal(logits(model, inputs), expected["dense"])
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            stopped()
        assert torch.equal(logits(model, inputs), expected["layer"])
    assert snapshot(model) == before


def test_a_pass_that_fails_inside_a_block(inputs, expected):
    """Whatever stops a pass, Ctrl-C included, another thread's pass does not wait for ever, nor the block's end."""
    model = stock()
    before = snapshot(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    made = []
    with zipr1.sparse(model, **KINDS["tight"]):
        hook = model.get_decoder().layers[2].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, inputs)
        hook.remove()
        thread = threading.Thread(target=lambda: made.append(logits(model, inputs)))
        thread.start()
        thread.join(30)
    assert torch.equal(made[0], expected["tight"])
    assert snapshot(model) == before


def test_blocks_on_top_of_a_loaded_model(inputs, expected):
    """It is sparse from the start, by a block that never ends; others come and go above it."""
    model, _ = zipr1.load("tiny", 0.9, device="cpu", skip="attention", **FREE)
    assert torch.equal(logits(model, inputs), expected["loose"])
    settings = model._zipr1.settings
    first, second = enter(model, "tight"), enter(model, "layer")
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, inputs), expected["layer"])
    second.__exit__(None, None, None)
    assert model._zipr1.settings == settings
    assert torch.equal(logits(model, inputs), expected["loose"])
    fresh, _ = zipr1.load("tiny", 0.9, device="cpu", skip="attention", **FREE)
    shapes = [
        {n: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in one.named_modules()}
        for one in (model, fresh)
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_what_others_have_patched_is_there_again(inputs, expected):
    """Forwards and `generate` that were a model's own before are its own again, as the same objects."""
    model = stock()
    decoder, layer = model.get_decoder(), model.get_decoder().layers[0]
    for module in (decoder, layer, layer.self_attn.o_proj, layer.mlp):
        stock_forward = module.forward
        module.forward = lambda *a, f=stock_forward, **k: f(*a, **k)
    model.generate = model.generate
    before = snapshot(model)
    assert "forward" in before["model.language_model"][0] and "generate" in before[""][0]
    first, second = enter(model, "layer"), enter(model, "retain")
    first.__exit__(None, None, None)
    assert snapshot(model) != before
    second.__exit__(None, None, None)
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected[None])


@torch.no_grad()
def decoded(model, inputs):
    """Logits of one more token after a prompt."""
    cache = model(**inputs, use_cache=True).past_key_values
    following = torch.full((3, 1), 40)
    return model(input_ids=following, past_key_values=cache, use_cache=True).logits


def test_a_block_of_the_library_inside_one_of_zipr1_sparse(inputs, expected):
    """`sparse_attention` (what a policy runs in) inside a block: the inner settings count, whatever the outer."""
    model = stock()
    before = snapshot(model)
    with zipr1.sparse(model, **KINDS["tight"]):
        tight = model._zipr1.settings
        step = decoded(model, inputs)
    for outer in ("dense", "layer", "retain"):
        with zipr1.sparse(model, **KINDS[outer]):
            with our_attention(model), sparse_attention(model, Request(tight)) as run:
                assert torch.equal(logits(model, inputs), expected["tight"])
                assert run.record is not None and len(run.record.layers) == 4
                assert torch.equal(decoded(model, inputs), step)
            assert torch.equal(logits(model, inputs), expected[outer])
    assert snapshot(model) == before


def test_a_loaded_model_that_nobody_uses_is_freed():
    model, processor = zipr1.load("tiny", 0.9, device="cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(zipr1.sparse(model, 0.5))
    gone = weakref.ref(model)
    del model, processor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("skip", ["layer", "attention"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_a_sparse_model_whose_attention_was_changed_is_refused(skip, other):
    """Another attention knows nothing of kept tokens: its answers would be wrong without a word."""
    model, processor = zipr1.load("tiny", budget=0.5, device="cpu", dense_below=0, skip=skip)
    ids = processor.tokenizer("which digit is red ?", return_tensors="pt")["input_ids"]
    wanted = model(input_ids=ids).logits
    model.set_attn_implementation(other)
    with pytest.raises(InputError, match=f"attention was changed to '{other}' while it is sparse"):
        model(input_ids=ids)
    model.set_attn_implementation({"text_config": "zipr1"})
    assert torch.equal(model(input_ids=ids).logits, wanted)
