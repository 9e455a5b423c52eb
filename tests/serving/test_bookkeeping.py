"""Blocks, slots and who is who: small tensors against what a list of tokens would say. Needs no vllm."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipr1.core.errors import RunError
from zipr1.core.recipe import Sparse
from zipr1.serving.vllm.choose import keep
from zipr1.serving.vllm.layout import gap, slots, without_gaps
from zipr1.serving.vllm.ledger import Ledger
from zipr1.serving.vllm.step import Step


def step_of(new=(), resumed=(), finished=()):
    """What the ledger reads of a SchedulerOutput: (name, prompt length, blocks), (name, blocks), names."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=n, prompt_len=length, block_ids=(list(b),))
            for n, length, b in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["goes on", *[n for n, _ in resumed]],
            new_block_ids=[None, *[(list(b),) for _, b in resumed]],
            resumed_req_ids={n for n, _ in resumed},
        ),
        finished_req_ids=set(finished),
    )


def test_the_gap_by_hand():
    assert gap(length=10, longest=10, size=4) == (3, 0)  # all kept
    assert gap(length=10, longest=3, size=4) == (1, 1)  # 7 tokens less are one whole block less
    assert gap(length=100, longest=25, size=16) == (2, 4)
    assert gap(length=15, longest=1, size=16) == (1, 0)  # shorter than a block


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 17), st.integers(0, 60))
def test_what_is_left_of_the_blocks_is_enough_and_not_a_block_too_many(
    length, longest, size, later
):
    longest = min(longest, length)
    first, count = gap(length, longest, size)
    blocks = list(range(-(-(length + later) // size)))  # as many as vLLM gives for these tokens
    assert first + count <= -(-length // size)  # the gap lies in what the prompt was given
    left = blocks[:first] + blocks[first + count :]
    assert len(left) * size >= longest + later
    assert (len(left) - 1) * size < longest + later + size - 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5))
def test_rows_of_a_block_table_without_their_gaps(gaps):
    width = 12
    table = torch.arange(width * len(gaps)).view(-1, width)
    first, count = (torch.tensor(x) for x in zip(*gaps))
    found = without_gaps(table, first, count).tolist()
    for row, (f, c), got in zip(table.tolist(), gaps, found):
        wanted = row[:f] + row[f + c :]
        assert got == wanted + [row[-1]] * (width - len(wanted))


def test_slots_by_hand():
    table = torch.tensor([[7, 2], [5, 9]])
    row, place = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 3, 4, 5])
    assert slots(table, row, place, size=4).tolist() == [28, 31, 8, 37]


def read(ledger, masks, **given):
    """Two layers of a step; masks: by layer, what is kept of each prompt that is read, in order."""
    step = Step(ledger, layers=2, size=4, **given)
    if not step.reading:
        ledger.end()
        return step.parts()
    parts = []
    for layer, of_layer in enumerate(masks):
        left = iter(of_layer)
        parts.append(
            step.part(layer, lambda start, end, left=left: torch.tensor(next(left)).bool())
        )
    ledger.end()
    return parts


def test_a_prompt_is_read_beside_a_request_that_answers():
    ledger = Ledger(2)
    ledger.begin(step_of(new=[("a", 9, [3, 4, 5])]))
    parts = read(
        ledger,
        [[[1, 0, 0, 0, 0, 0, 0, 0, 1]], [[1, 1, 1, 1, 1, 0, 0, 0, 1]]],
        starts=torch.tensor([0, 9, 9]),  # a row of padding follows
        lengths=torch.tensor([9, 0]),
        table=torch.tensor([[3, 4, 5, 0], [0, 0, 0, 0]]),
        tokens=9,
    )
    assert [p.rows.tolist() for p in parts] == [[0, 8], [0, 1, 2, 3, 4, 8]]
    assert [p.starts.tolist() for p in parts] == [[0, 2], [0, 6]]
    assert [p.lengths.tolist() for p in parts] == [[2], [6]]
    assert [p.slots.tolist() for p in parts] == [[12, 13], [12, 13, 14, 15, 16, 17]]
    assert ledger.report() == {"a": (9, 6)}

    # "a" says its second token: the blocks behind the longest layer (6 tokens, 2 blocks) are gone from its row, none
    # here, for 9 - 6 tokens are less than a block. "b" is read in front of it.
    ledger.begin(step_of(new=[("b", 2, [8])]))
    (first, second) = read(
        ledger,
        [[[0, 1]], [[1, 1]]],
        starts=torch.tensor([0, 2, 3]),
        lengths=torch.tensor([2, 10]),
        table=torch.tensor([[8, 0, 0, 0], [3, 4, 5, 0]]),
        tokens=3,
    )
    assert first.rows.tolist() == [1, 2]
    assert second.rows is None  # all are kept
    assert first.lengths.tolist() == [1, 3]
    assert second.lengths.tolist() == [2, 7]
    assert first.slots.tolist() == [8 * 4, 3 * 4 + 2]
    assert second.slots.tolist() == [8 * 4, 8 * 4 + 1, 4 * 4 + 2]
    assert ledger.report() == {"b": (2, 2)}
    assert ledger.prompts == 2
    assert ledger.shares == pytest.approx([2 / 9 + 1 / 2, 6 / 9 + 1])


def test_blocks_of_the_gap_are_stepped_over():
    ledger = Ledger(2)
    ledger.begin(step_of(new=[("a", 16, [3, 4, 5, 6])]))
    some = [1] * 3 + [0] * 12 + [1]
    given = {"starts": torch.tensor([0, 16]), "tokens": 16, "lengths": torch.tensor([16])}
    read(ledger, [[some], [some]], table=torch.tensor([[3, 4, 5, 6, 0]]), **given)
    # 4 of 16 kept: one block of four is needed. The next token goes into the block that vLLM adds for token 17.
    ledger.begin(step_of())
    given = {"starts": torch.tensor([0, 1]), "tokens": 1, "lengths": torch.tensor([17])}
    (part, _) = read(ledger, [[], []], table=torch.tensor([[3, 4, 5, 6, 11]]), **given)
    assert part.table[0, :2].tolist() == [3, 11]
    assert part.slots.tolist() == [11 * 4]
    assert part.lengths.tolist() == [5]


def test_where_all_answer_each_layer_has_its_lengths_and_its_next_slots():
    """Two requests: "a" keeps 3 and 9 of 12, "b" 1 and 2 of 6; they have said 2 and 5 tokens before this one."""
    ledger = Ledger(2)
    ledger.begin(step_of(new=[("a", 12, [3, 4, 5]), ("b", 6, [8, 9])]))
    masks = [[[1] * 3 + [0] * 9, [1] + [0] * 5], [[1] * 9 + [0] * 3, [1, 1] + [0] * 4]]
    read(
        ledger,
        masks,
        starts=torch.tensor([0, 12, 18]),
        lengths=torch.tensor([12, 6]),
        table=torch.tensor([[3, 4, 5], [8, 9, 0]]),
        tokens=18,
    )
    ledger.begin(step_of())
    # vLLM's lists have room for 15 and 12 tokens. "a" keeps all of its blocks (9 of 12: none is whole), "b" gives one
    # of four tokens back, its second.
    first, second = read(
        ledger,
        [[], []],
        starts=torch.tensor([0, 1, 2, 2]),  # a row of padding follows
        lengths=torch.tensor([15, 12, 0]),
        table=torch.tensor([[3, 4, 5, 6], [8, 9, 7, 0], [0, 0, 0, 0]]),
        tokens=2,
    )
    assert first.rows is second.rows is None
    for tensor in (second.starts, second.lengths, second.slots, second.table):
        assert tensor.is_contiguous()
    assert first.starts.tolist() == second.starts.tolist() == [0, 1, 2]
    assert first.lengths.tolist() == [3 + 3, 1 + 6]
    assert second.lengths.tolist() == [9 + 3, 2 + 6]
    assert first.table.tolist() == second.table.tolist() == [[3, 4, 5, 6], [8, 7, 0, 0]]
    assert first.slots.tolist() == [4 * 4 + 1, 7 * 4 + 2]
    assert second.slots.tolist() == [5 * 4 + 3, 7 * 4 + 3]
    assert (first.widest, first.longest) == (1, 7)
    assert (second.widest, second.longest) == (1, 12)


def test_after_a_preemption_the_prompt_alone_is_chosen_from():
    ledger = Ledger(2)
    ledger.begin(step_of(new=[("a", 4, [3])]))
    given = {"starts": torch.tensor([0, 4]), "tokens": 4, "lengths": torch.tensor([4])}
    read(ledger, [[[0, 0, 1, 1]], [[0, 0, 0, 1]]], table=torch.tensor([[3, 0]]), **given)
    # Its block goes to "b"; when "a" comes back it has said two tokens.
    ledger.begin(step_of(new=[("b", 1, [3])]))
    given = {"starts": torch.tensor([0, 1]), "tokens": 1, "lengths": torch.tensor([1])}
    read(ledger, [[[1]], [[1]]], table=torch.tensor([[3, 0]]), **given)
    ledger.begin(step_of(resumed=[("a", [7, 8])], finished=["b"]))
    given = {"starts": torch.tensor([0, 6]), "tokens": 6, "lengths": torch.tensor([6])}
    parts = read(ledger, [[[0, 0, 1, 1]], [[0, 0, 0, 1]]], table=torch.tensor([[7, 8]]), **given)
    assert [p.rows.tolist() for p in parts] == [[2, 3, 4, 5], [3, 4, 5]]
    assert ledger.of(7).kept == [4, 3]
    assert ledger.report() == {"a": (6, 4)}
    with pytest.raises(RunError, match="belongs to no request"):
        ledger.of(3)


@pytest.mark.parametrize(("rows", "read"), [(4, 8), (4, 4), (1, 1), (1, 9)])
def test_a_prompt_read_in_parts_is_an_error(rows, read):
    """The first part is not taken for a whole prompt, nor the last, of one token, for an answer."""
    ledger = Ledger(2)
    ledger.begin(step_of(new=[("a", 9, [3])]))
    with pytest.raises(RunError, match=f"reads a prompt of 9 tokens in parts, {rows} now"):
        Step(
            ledger,
            starts=torch.tensor([0, rows]),
            lengths=torch.tensor([read]),
            table=torch.tensor([[3, 4]]),
            tokens=rows,
            size=4,
            layers=2,
        )


def test_several_groups_of_blocks_are_an_error():
    step = step_of()
    step.scheduled_new_reqs = [SimpleNamespace(req_id="a", prompt_len=3, block_ids=([1], [2]))]
    with pytest.raises(RunError, match="2 groups of blocks"):
        Ledger(1).begin(step)


def test_scores_of_several_ranks_choose_together():
    """Four query heads on two keys, or two of each on one rank and two on the other: the same tokens."""
    torch.manual_seed(0)
    query, key = 3 * torch.randn(40, 4, 8), 3 * torch.randn(40, 2, 8)
    settings = Sparse(p=0.7, dense_below=0)
    whole = keep(query.__getitem__, key, 1, settings, 0.3)
    parts = []

    def noted(scores):
        parts.append(scores)
        return scores

    alone = [
        keep(query[:, 2 * r : 2 * r + 2].__getitem__, key[:, r : r + 1], 1, settings, 0.3, noted)
        for r in (0, 1)
    ]
    assert not all(torch.equal(x, whole) for x in alone)
    together = keep(query[:, :2].__getitem__, key[:, :1], 1, settings, 0.3, lambda s: s + parts[1])
    assert 0 < whole.sum() < 40
    assert torch.equal(together, whole)
