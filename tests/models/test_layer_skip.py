"""What a skipped layer scores with: queries at the probes of that layer, and keys of all tokens, as the layer itself
would make them."""

import itertools
from dataclasses import replace

import policychecks
import pytest
import standingpu
import tinymodels
import torch

from zipr1.core.recipe import Probes
from zipr1.models.sparse.layer_skip import projections
from zipr1.models.sparse.packing import PackedRows
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.models.sparse.rotation import Rotation
from zipr1.models.sparse.selection import ProbeRange, Selector


@pytest.mark.parametrize("audit", [(), (1,)])
@torch.no_grad()
def test_queries_and_keys_are_the_layers_own(audit):
    policy = tinymodels.shared()
    decoder, layers, length = policy.decoder, policy.layers, 20
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, 64, generator=generator)
    candidates = torch.arange(length) >= torch.tensor([0, 6])[:, None]
    settings = policychecks.sparse(probes=Probes(recent=2, random=3))
    asking = ProbeRange.of(candidates)
    selector = Selector(
        Request(settings, audit=audit), candidates, asking, layers, torch.device("cpu")
    )
    positions = torch.arange(length).expand(3, 2, -1) + torch.tensor([0, 5])[:, None]
    place = decoder.rotary_emb(hidden, positions)
    rotation = Rotation(place, 2, selector.index)
    probes, _ = asking.slots(layers, 0, settings.probes)
    assert len({tuple(x.flatten().tolist()) for x in probes}) == layers, "each layer has its own"
    for number, layer in enumerate(decoder.layers):
        seen = {}

        def attend(module, query, key, value, *args, seen=seen, **kwargs):
            seen["q"], seen["k"] = query, key
            return query.transpose(1, 2), None

        with pytest.MonkeyPatch.context() as patch:
            from zipr1.models.sparse.attention import ATTENTION, AttentionInterface

            patch.setitem(AttentionInterface._global_mapping, ATTENTION, attend)
            layer(hidden, attention_mask=None, position_embeddings=place)
        heads = projections(layer, hidden, rotation)
        torch.testing.assert_close(heads.keys(), seen["k"], atol=1e-6, rtol=1e-5)
        got = heads.queries(selector.index[number])
        rows = [0, 1, *audit]
        got = got.unflatten(0, (len(rows), -1))  # (P, R, HQ, D)
        for b in range(2):
            want = seen["q"][b, :, probes[number, b]].transpose(0, 1)
            torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)
        # All that is asked, of whatever row: the slot says where it stands.
        slots = selector.index[number].view(len(rows), -1) - torch.tensor(rows)[:, None] * length
        for p, b in enumerate(rows):
            want = seen["q"][b, :, slots[p]].transpose(0, 1)
            torch.testing.assert_close(got[p], want, atol=1e-6, rtol=1e-5)


def halves(q, k, cos, sin):
    """As models of the Llama kind have it."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    return turned(q), turned(k)


def pairs(q, k, cos, sin):
    """Another kind, which turns neighbours against each other."""
    cos, sin = cos[:, None], sin[:, None]

    def turned(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin

    return turned(q), turned(k)


@pytest.mark.parametrize(("rotate", "changed"), [(halves, [-3, -4, 1, 2]), (pairs, [-2, 1, -4, 3])])
def test_places_of_all_layers_are_taken_once_and_heads_are_turned_as_the_model_turns_them(
    rotate, changed
):
    """By hand: x = (1, 2, 3, 4) becomes x * cos + what changes places * sin."""
    whole = torch.arange(2 * 6 * 4.0).view(2, 1, 6, 4)
    cos, sin = whole
    rotation = Rotation((cos, sin), 2, torch.tensor([[0, 7], [5, 11]]))
    x = torch.tensor([1.0, 2, 3, 4])

    def by_hand(slots):
        return [(x * cos[0, i % 6] + torch.tensor(changed) * sin[0, i % 6]).tolist() for i in slots]

    for slots in ([0, 7], [5, 11], [3]):
        want = [[part[0, i % 6].tolist() for i in slots] for part in (cos, sin)]
        assert [part[0].tolist() for part in rotation.at(torch.tensor(slots))] == want

    def check(rotation, x):
        for layer, slots in enumerate(([0, 7], [5, 11])):
            turned = rotation.probes(x.expand(1, 2, 3, 4), layer, None, rotate)
            assert turned.shape == (1, 2, 3, 4), "three heads of two probes"
            assert turned[0].transpose(0, 1).tolist() == [by_hand(slots)] * 3
        turned = rotation.keys(x.expand(2, 6, 1, 4), None, rotate)
        assert turned[:, :, 0].flatten(0, 1).tolist() == by_hand(range(12))

    check(rotation, x)
    with standingpu.gpu():  # by another sum, of whole numbers here
        there = [standingpu.OnGpu(part) for part in (cos, sin, torch.tensor([[0, 7], [5, 11]]))]
        check(Rotation((there[0], there[1]), 2, there[2]), standingpu.OnGpu(x))


@torch.no_grad()
def test_layers_write_into_what_nobody_else_sees(monkeypatch):
    """What a caller gave, and what hooks or transformers keep, stays as it was."""
    policy = tinymodels.make()
    request = Request(policychecks.sparse(0.6, skip="layer"))
    embeds = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    before = embeds.clone()
    places, decoder = [], policy.decoder

    def run(**options):
        with sparse_attention(policy.model, request):
            return decoder(inputs_embeds=embeds, use_cache=False, **options)

    unpack = PackedRows.unpack

    def noted(self, packed, over):
        out = unpack(self, packed, over)
        places.append((over.data_ptr(), out.data_ptr()))
        return out

    monkeypatch.setattr(PackedRows, "unpack", noted)
    alone = run().last_hidden_state
    assert torch.equal(embeds, before)
    assert len(places) == policy.layers and len({x for pair in places for x in pair}) == 1
    assert places[0][0] != embeds.data_ptr()
    with torch.enable_grad(), sparse_attention(policy.model, replace(request, scores=True)) as kept:
        graded = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        sum(layer.scores.square().sum() for layer in kept.record.layers).backward()
    torch.testing.assert_close(alone, graded.detach(), rtol=0, atol=0)
    # Collected: each is what the layer returned, and the first what was given.
    seen = run(output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], before) and torch.equal(seen[-1], alone)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    policy = tinymodels.make()  # without the hooks that transformers leaves behind
    decoder = policy.decoder
    # Hooks, of whatever module, and of all: what they were shown stays as it was.
    for hang in (
        decoder.layers[0].register_forward_hook,
        decoder.embed_tokens.register_forward_hook,
        decoder.layers[1].input_layernorm.register_forward_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        shown = []

        def note(module, given, out, shown=shown):
            shown += [(x, x.clone()) for x in (*given, out) if isinstance(x, torch.Tensor)]

        hung = hang(note)
        with sparse_attention(policy.model, request):
            decoder(input_ids=torch.arange(20).expand(2, -1), use_cache=False)
        hung.remove()
        assert shown and all(torch.equal(now, then) for now, then in shown)
