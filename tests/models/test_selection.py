"""Probe positions, selection rules and the record of what was kept."""

import pytest
import torch
from zipr1_kernels import dispatch

from zipr1.core.recipe import Probes, Sparse
from zipr1.models.sparse.hashing import mix, splitmix64, uniforms
from zipr1.models.sparse.probes import probe_positions, probe_slots
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.request import Request, dense_below, settled
from zipr1.models.sparse.rules import RULES, Draw, select
from zipr1.models.sparse.selection import (
    AUDIT_PROBES,
    AUDIT_SEED,
    Heads,
    ProbeRange,
    Selector,
)


def test_splitmix64_known_values():
    # First outputs of SplitMix64 seeded with 0 and 1234567 (Vigna's reference implementation).
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


def test_mix_depends_on_each_key_and_their_order():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (0, 0, 0)]
    assert len({mix(*key) for key in keys}) == len(keys)


def test_uniforms_are_spread_and_differ_by_key():
    x, y = (uniforms(mix(0, layer), torch.arange(20000)) for layer in (0, 1))
    counts = torch.histc(x, 20, 0, 1)
    # 1,000 in each of 20 cells: chi-square, 19 degrees of freedom, 99.9 % below 43.8.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1].abs() < 0.03


def test_probes_are_recent_and_one_per_stratum():
    for seed in range(20):
        got = probe_positions(103, (2,), seed=seed, recent=3, random=10)[0].tolist()
        assert got[-3:] == [100, 101, 102]
        assert [x // 10 for x in got[:-3]] == list(range(10))


def test_probes_pinned_so_that_a_recorded_rollout_replays_on_any_machine():
    assert probe_positions(50, (1,), seed=7, recent=2, random=4)[0].tolist() == [
        1,
        21,
        34,
        44,
        48,
        49,
    ]


def test_probes_reach_every_position_and_change_with_layer_and_seed():
    drawn = [tuple(probe_positions(40, (layer,), seed, 2, 4)[0].tolist())
             for layer in range(4) for seed in range(40)]  # fmt: skip
    assert {x for row in drawn for x in row} == set(range(40))
    assert len(set(drawn)) > 150


@pytest.mark.parametrize(("length", "recent", "random"), [(5, 3, 8), (11, 3, 8), (1, 1, 0)])
def test_short_prompts_probe_everything(length, recent, random):
    assert probe_positions(length, (0,), 0, recent, random)[0].tolist() == list(range(length))


@pytest.mark.parametrize(("recent", "random"), [(4, 0), (0, 4)])
def test_one_kind_of_probe_may_be_absent(recent, random):
    assert probe_positions(30, (0,), 0, recent, random).shape[1] == 4


def test_probe_slots_do_not_depend_on_padding_or_batch():
    probes = Probes(recent=2, random=3)
    lengths, offsets = [20, 3, 12], [0, 17, 8]
    both, valid = probe_slots(lengths, offsets, [0, 1], 5, probes)
    slots = both[1]
    assert slots.shape == valid.shape == (3, 5) and not torch.equal(both[0], slots)
    for b, (length, offset) in enumerate(zip(lengths, offsets)):
        alone = probe_positions(length, (1,), 5, 2, 3)[0]
        assert (slots[b][valid[b]] - offset).tolist() == alone.tolist()
    assert valid.sum(-1).tolist() == [5, 3, 5]
    assert slots[1].tolist() == [17, 18, 19, 19, 19]


def test_prompts_too_short_to_gain_stay_dense_by_the_kind_of_device(monkeypatch):
    """384 and 1,024 on CPUs are measured (docs/results.md), 4,096 on a GPU estimated; what is set holds everywhere."""
    single, half = torch.float32, torch.bfloat16
    for device, dtype, units, below in (
        ("cpu", single, False, 384), ("cpu", single, True, 384), ("cpu", half, False, 384), ("cpu", half, True, 1024),
        ("cuda:1", single, True, 4096), ("cuda:1", half, True, 4096), ("mps", half, False, 4096),
    ):  # fmt: skip
        monkeypatch.setattr(dispatch, "has_amx", lambda units=units: units)
        where = torch.device(device)
        assert dense_below(Sparse(), where, dtype) == below
        assert [dense_below(Sparse(dense_below=n), where, dtype) for n in (0, 7)] == [0, 7]
        if device == "cpu":
            weight = torch.zeros(1, dtype=dtype)
            wanted = Sparse(p=0.5, dense_below=below)
            assert settled(Sparse(p=0.5), weight) == wanted
            assert Request(Sparse(p=0.5)).settled(weight).settings == wanted
    candidates = torch.arange(400) < torch.tensor([383, 384])[:, None]
    request = Request(Sparse())
    selector = Selector(request, candidates, ProbeRange.of(candidates), 2, torch.device("cpu"))
    assert selector.dense.tolist() == [True, False]


def test_the_audit_is_the_mass_that_probes_of_its_own_give_to_the_kept():
    """Each layer and audited row by itself, with softmax in loops; probes that took part in the choice are left out."""
    layers, length, heads, dim = 2, 24, 2, 4
    candidates = torch.arange(length) >= torch.tensor([0, 9, 2])[:, None]
    request = Request(Sparse(p=0.6, dense_below=0, probes=Probes(recent=2, random=3)), audit=(2, 1))
    asking = ProbeRange.of(candidates)
    selector = Selector(request, candidates, asking, layers, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    shares = torch.zeros(layers, 2)
    left_out = 0
    for layer in range(layers):
        q, k = (torch.randn(3, heads, length, dim, generator=generator) for _ in range(2))
        keep = selector.choose(layer, Heads.given(q, k, 0.7)).keep
        for place, row in enumerate(request.audit):
            start, count = asking.offsets[row], asking.lengths[row]
            fresh = probe_positions(count, (layer,), AUDIT_SEED, 0, AUDIT_PROBES)[0].tolist()
            used = probe_positions(count, (layer,), 0, 2, 3)[0].tolist()
            mass = torch.zeros(length)
            seen = torch.zeros(length)
            for at in fresh:
                left_out += at in used
                if at not in used:
                    visible = slice(start, start + at + 1)
                    seen[visible] += 1
                    for h in range(heads):
                        mass[visible] += (k[row, h, visible] @ q[row, h, start + at] * 0.7).softmax(
                            0
                        )
            mass /= seen.clamp_min(1)
            shares[layer, place] = mass[keep[row]].sum() / mass.sum()
    assert left_out > 0 and bool((shares < 1).all())
    torch.testing.assert_close(selector.record.probe_audit_mass(), shares.mean(0))


def batch():
    g = torch.Generator().manual_seed(0)
    candidates = torch.arange(20) >= torch.tensor([0, 5, 15])[:, None]
    always = candidates & (torch.arange(20) >= 18)
    return torch.rand(3, 20, generator=g), candidates, always


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_all_at_one_and_the_always_kept_at_any_p(rule):
    scores, candidates, always = batch()
    full = select(rule, scores, torch.ones(3), candidates, always, Draw())
    assert torch.equal(full, candidates)
    before = 0
    for p in (0.01, 0.3, 0.6, 0.9):
        keep = select(rule, scores, torch.full((3,), p), candidates, always, Draw())
        assert (always <= keep).all()
        assert (keep <= candidates).all()
        assert keep.sum() >= before
        before = keep.sum()
    assert before > always.sum()


@pytest.mark.parametrize("rule", ["top_k", "random"])
def test_share_rules_keep_the_ceiling(rule):
    scores, candidates, always = batch()
    keep = select(rule, scores, torch.tensor([0.55, 0.5, 0.1]), candidates, always, Draw())
    assert keep.sum(-1).tolist() == [11, 8, 2]  # of 20, 15 and 5; 2 are always kept


def test_threshold_drops_what_is_below_one_minus_p_of_uniform():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])  # 1.6, 0.4, 1.2, 0.8 of uniform
    every = torch.ones(1, 4, dtype=torch.bool)
    keep = select("threshold", scores, torch.tensor([0.3]), every, ~every, Draw())
    assert keep.tolist() == [[True, False, True, True]]


def test_random_ignores_scores_and_padding_and_changes_with_the_draw():
    scores, candidates, _ = batch()
    none = torch.zeros_like(candidates)
    p = torch.full((3,), 0.5)
    left = select("random", scores, p, candidates, none, Draw(1, 2))
    right = select("random", -scores, p, candidates.flip(-1), none, Draw(1, 2))
    for b in range(3):
        assert torch.equal(left[b][candidates[b]], right[b][candidates.flip(-1)[b]])
    assert not torch.equal(left, select("random", scores, p, candidates, none, Draw(2, 2)))
    assert not torch.equal(left, select("random", scores, p, candidates, none, Draw(1, 3)))


def test_record_by_hand():
    first = torch.tensor([[False, True, True, True], [True, True, True, True]])
    second = torch.tensor([[False, False, True, False], [True, False, False, True]])
    record = Record(first, [LayerRecord(first), LayerRecord(second)])
    assert record.lengths.tolist() == [3, 4]
    torch.testing.assert_close(record.layer_ratios(), torch.tensor([[1, 1 / 3], [1, 0.5]]))
    torch.testing.assert_close(record.token_ratio(), torch.tensor([2 / 3, 0.75]))
    assert record.layers[1].counts.tolist() == [1, 2]
    positions = record.kept_positions()
    assert [[x.tolist() for x in row] for row in positions] == [
        [[0, 1, 2], [1]],
        [[0, 1, 2, 3], [0, 3]],
    ]
    assert positions[0][0].dtype == torch.int32
