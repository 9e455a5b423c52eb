"""`kv: retain` and conversations: nothing is lost, each turn chooses again, and only what is chosen is attended to."""

from __future__ import annotations

import pytest
import tinyruns
import torch
import torch.nn.functional as F

import zipr1
from zipr1.core.errors import InputError
from zipr1.core.recipe import Probes, Sparse
from zipr1.models.sparse.attention import EXPANDS
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.packing import Handover
from zipr1.models.sparse.record import LayerRecord
from zipr1.models.sparse.request import Request
from zipr1.models.sparse.retain import RetainedCache, Turn
from zipr1.models.sparse.selection import Heads, Selector

GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
ASKED = ("how many red digits are there?", "which digit is blue?")


@pytest.fixture(scope="module")
def loaded(exported):
    return zipr1.load(exported, 0.8, device="cpu")


def turn(model, processor, chat, cache=None, **options):
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    out = model.generate(**inputs, past_key_values=cache, **(GREEDY | options))
    said = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # fmt: skip
    return said.strip(), out.past_key_values, inputs


def converse(model, processor, prompt, keep=True):
    """Three turns; what was said, what was kept, and the cache."""
    chat, said, stats, cache = tinyruns.chat(prompt)[:1], [], [], None
    for following in (*ASKED, None):
        text, cache, _ = turn(model, processor, chat, cache if keep else None)
        said.append(text)
        stats.append(zipr1.stats(model))
        chat = [
            *chat,
            {"role": "assistant", "content": text},
            {"role": "user", "content": following},
        ]
    return said, stats, cache


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_single_turn_is_that_of_evict(loaded, skip):
    model, processor = loaded
    chats = [tinyruns.chat(p) for p in tinyruns.questions()]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    made = []
    for kv in ("evict", "retain"):
        with zipr1.sparse(model, kv=kv, skip=skip):
            out = model.generate(**inputs, **GREEDY, output_logits=True)
            made.append((out, zipr1.stats(model)))
            beams = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)
            made[-1] += (beams.sequences,)
    (evict, before, one), (retain, after, two) = made
    assert torch.equal(evict.sequences, retain.sequences) and torch.equal(one, two)
    assert torch.equal(before.kept, after.kept) and before.token_ratio < 0.9
    for a, b in zip(evict.logits, retain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    kept, whole = evict.past_key_values.kv_bytes(), retain.past_key_values.kv_bytes()
    assert kept < whole
    longest = inputs["input_ids"].shape[1]
    layer = retain.past_key_values.layers[2]
    assert layer.whole[0].shape[2] == longest
    assert layer.keys.shape[2] == int(after.kept[:, 2].max()) + len(retain.logits) - 1


def test_everything_kept_is_the_dense_conversation(loaded):
    model, processor = loaded
    prompt = tinyruns.questions()[0]
    with zipr1.sparse(model, budget=1.0):
        wanted, _, dense = converse(model, processor, prompt)
        again, _, _ = converse(model, processor, prompt, keep=False)
    with zipr1.sparse(model, kv="retain", dense_below=10_000):  # shorter conversations stay whole
        said, stats, cache = converse(model, processor, prompt)
    assert said == wanted == again
    assert isinstance(cache, RetainedCache) and cache.get_seq_length() == dense.get_seq_length()
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        said_since = ours.keys[:, :, ours.chosen :]
        keys = torch.cat([ours.whole[0], said_since], dim=2)
        torch.testing.assert_close(keys, theirs.keys, atol=1e-4, rtol=1e-4)
    assert [s.token_ratio for s in stats] == [1.0] * 3


def test_each_turn_chooses_among_everything(loaded):
    model, processor = loaded
    prompt = tinyruns.questions()[0]
    with zipr1.sparse(model, kv="retain"):
        _, stats, cache = converse(model, processor, prompt)
    lengths = [int(s.lengths[0]) for s in stats]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2]
    assert cache.layers[0].whole[0].shape[2] == lengths[2]
    assert len({tuple(s.kept[0].tolist()) for s in stats}) > 1
    # At the first layer keys do not depend on what was dropped: those of the whole conversation, sent anew.
    chat = tinyruns.chat(prompt)[:1]
    with zipr1.sparse(model, budget=1.0):
        _, fresh, _ = turn(model, processor, chat)
    first = fresh.layers[0].keys[:, :, : lengths[0]]
    torch.testing.assert_close(cache.layers[0].whole[0][:, :, : lengths[0]], first)
    with zipr1.sparse(model, kv="evict"):
        _, stats, pruned = converse(model, processor, prompt)
    assert pruned.kv_bytes() < cache.kv_bytes()
    assert torch.equal(stats[0].kept, stats[2].kept)  # later turns of evict choose nothing


def reference(query, key, value, keep, past, scale):
    """One query at a time: softmax over the kept keys up to its own place."""
    rows, heads, new, dim = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(rows, new, heads, dim, dtype=torch.float64)
    for b in range(rows):
        for i in range(new):
            if not keep[b, past + i]:
                continue
            places = [j for j in range(past + i + 1) if keep[b, j]]
            for h in range(heads):
                logits = key[b, h // group, places].double() @ query[b, h, i].double() * scale
                out[b, i, h] = logits.softmax(0) @ value[b, h // group, places].double()
    return out


@pytest.mark.parametrize("past", [0, 9])
def test_attention_of_a_turn_against_loops(past, monkeypatch):
    torch.manual_seed(3)
    rows, heads, new, dim = 2, 4, 6, 8
    query = torch.randn(rows, heads, new, dim)
    key, value = torch.randn(2, rows, 2, past + new, dim)
    keep = torch.rand(rows, past + new) < 0.5
    keep[:, -1] = True
    cache = RetainedCache(Choosing((0,), 0))
    settings = Sparse(skip="layer", dense_below=0)
    valid = torch.ones(rows, past + new, dtype=torch.bool)
    one = Turn(
        Request(settings), cache, valid, past, Handover(), Choosing((0,), 0), torch.device("cpu")
    )
    monkeypatch.setattr(Selector, "choose", lambda *a: LayerRecord(keep))
    wanted = reference(query, key, value, keep, past, 0.3)
    gone = ~keep[:, None, :, None]
    # What was not chosen is not read.
    key, value = key.masked_fill(gone, float("nan")), value.masked_fill(gone, float("nan"))
    got = one.attend(0, query, key, value, 0.3)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    rest = [b * new + i for b in range(rows) for i in range(new) if keep[b, past + i]]
    left = one.handover.find(0)
    assert left.o_proj.tolist() == left.mlp.tolist() == rest
    assert cache.layers[0].prompt_counts.tolist() == keep.sum(1).tolist()


def test_a_turn_on_a_gpu_shares_no_heads_beside_its_mask(monkeypatch):
    """For which torch has no fused kernel. The result is the same."""
    seen, real = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    test_attention_of_a_turn_against_loops(9, monkeypatch)
    monkeypatch.setitem(EXPANDS, "cpu", True)
    test_attention_of_a_turn_against_loops(9, monkeypatch)
    assert seen == [(2, 2, True), (4, 4, False)]


def test_a_turns_probes_are_its_own_tokens(monkeypatch):
    """The last 3 of the turn's 5 tokens score all 12; checked against column sums of a softmax by hand."""
    torch.manual_seed(4)
    past, new, dim, scale = 7, 5, 8, 0.5
    query, key = torch.randn(1, 2, new, dim), torch.randn(1, 1, past + new, dim)
    probes = Probes(recent=3, random=0)
    settings = Sparse(p=0.7, keep_last=1, dense_below=0, normalise=False, probes=probes)
    valid = torch.ones(1, past + new, dtype=torch.bool)
    one = Turn(
        Request(settings),
        RetainedCache(Choosing((0,), 0)),
        valid,
        past,
        Handover(),
        Choosing((0,), 0),
        torch.device("cpu"),
    )
    keep = one.selector.choose(0, Heads.given(query, key, scale)).keep
    scores = torch.zeros(past + new)
    for i in range(new - 3, new):
        for h in range(2):
            logits = key[0, 0, : past + i + 1] @ query[0, h, i] * scale
            scores[: past + i + 1] += logits.softmax(0)
    torch.testing.assert_close(one.record.layers[0].scores[0], scores, atol=1e-5, rtol=1e-5)
    kept, mass = {past + new - 1}, scores[-1]
    for j in scores.argsort(descending=True).tolist():
        if mass >= 0.7 * scores.sum():
            break
        if j not in kept:
            kept.add(j)
            mass = mass + scores[j]
    assert keep[0].nonzero()[:, 0].tolist() == sorted(kept) and len(kept) < past + new


@pytest.mark.parametrize("kv", ["evict", "retain"])
def test_conversations_that_take_turns_do_not_mix(loaded, kv):
    """transformers keeps one conversation's place offset on the model; the other's pictures must not move it."""
    model, processor = loaded
    image, clip = tinyruns.questions()[0], tinyruns.questions()[4]
    with zipr1.sparse(model, kv=kv):
        alone, _, _ = converse(model, processor, image)
        chat = tinyruns.chat(image)[:1]
        first, cache, _ = turn(model, processor, chat)
        turn(model, processor, tinyruns.chat(clip)[:1])  # another shape of picture, another offset
        chat += [{"role": "assistant", "content": first}, {"role": "user", "content": ASKED[0]}]
        offset = model.model.rope_deltas.clone()
        second, _, _ = turn(model, processor, chat, cache)
        assert not torch.equal(model.model.rope_deltas, offset)
    assert [first, second] == alone[:2]


def test_what_a_later_turn_cannot_bring_is_named(loaded):
    model, processor = loaded
    chat = tinyruns.chat(tinyruns.questions()[0])[:1]
    with zipr1.sparse(model, kv="retain"):
        _, cache, inputs = turn(model, processor, chat)
        with pytest.raises(
            InputError, match=r"past_key_values hold \d+ tokens and the conversation has"
        ):
            model.generate(**inputs, past_key_values=cache, **GREEDY)
        longer = [
            *chat,
            {"role": "assistant", "content": "red"},
            *tinyruns.chat(tinyruns.questions()[1])[:1],
        ]
        with pytest.raises(InputError, match="a later turn brings a picture"):
            turn(model, processor, longer, cache)
        two = processor.apply_chat_template([chat, chat], tokenize=True)
        with pytest.raises(InputError, match="2 conversations cannot go on together"):
            model.generate(**two, past_key_values=cache, **GREEDY)
        kinds = inputs.pop("mm_token_type_ids")
        with pytest.raises(InputError, match="mm_token_type_ids are missing"):
            model.generate(**inputs, past_key_values=cache, **GREEDY)
        inputs["mm_token_type_ids"] = kinds
        with zipr1.sparse(model, kv="evict"):
            _, pruned, _ = turn(model, processor, chat)
        with pytest.raises(InputError, match="needs its own KV cache and got a PrunedCache"):
            model(**inputs, past_key_values=pruned)
    with pytest.raises(InputError, match="needs its own KV cache and got a RetainedCache"):
        model(**inputs, past_key_values=cache)
