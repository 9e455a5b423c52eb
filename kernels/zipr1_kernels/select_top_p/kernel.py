"""Selection in Triton: which tokens of a row are kept, then a pass that packs them. One program a row.

Rows of up to LONGEST tokens are searched for the least score kept. Scores that are not negative keep their order when
their bits are read as integers, so the threshold is found digit by digit: eight passes over a row, each of which sums
the mass above sixteen thresholds. Tokens that tie with the threshold are kept by index as long as mass is wanting.
Longer rows are sorted by torch, which has the whole GPU for it, and one pass marks those that come first. Arguments as
in `select_top_p/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zipr1_kernels.kept import Kept
from zipr1_kernels.launch import Config, launch
from zipr1_kernels.select_top_p import LONGEST

SELECT = Config(1, 1024, 8, 1)
MARK = Config(1, 4096, 8, 1)
PACK = Config(1, 4096, 8, 1)

TOP_P, TOP_K, THRESHOLD = 0, 1, 2


@triton.jit
def _load(Scores, Cand, Always, b, n0, L, BLOCK: tl.constexpr):
    """Places, scores (0 but for candidates), which tokens are free to drop and which are kept whatever they score."""
    at = n0 + tl.arange(0, BLOCK)
    cand = tl.load(Cand + b * L + at, mask=at < L, other=0) != 0
    always = tl.load(Always + b * L + at, mask=at < L, other=0) != 0
    score = tl.load(Scores + b * L + at, mask=cand, other=0.0).to(tl.float32)
    # Adding 0 turns -0 into 0, whose bits are the least.
    return at, tl.maximum(score, 0.0) + 0.0, cand & (always == 0), cand & always


@triton.jit(do_not_specialize=["L"])
def select_kernel(Scores, Cand, Always, Budget, Keep, L, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Keep `(B, L)` uint8. Budget `(B,)` float32: p, the number of tokens, or the relative threshold."""
    b = tl.program_id(0)
    budget = tl.load(Budget + b)
    total = tl.zeros([], tl.float32)
    fixed = tl.zeros([], tl.float32)
    tokens = tl.zeros([], tl.float32)
    for n0 in range(0, L, BLOCK):
        _, score, free, held = _load(Scores, Cand, Always, b, n0, L, BLOCK)
        total += tl.sum(score, 0)
        fixed += tl.sum(tl.where(held, tl.where(MODE == 1, 1.0, score), 0.0), 0)
        tokens += tl.sum((free | held).to(tl.float32), 0)

    if MODE == 2:
        for n0 in range(0, L, BLOCK):
            at, score, free, held = _load(Scores, Cand, Always, b, n0, L, BLOCK)
            share = score / tl.where(total > 0, total, 1.0)
            kept = held | (free & (share * tokens >= budget))
            tl.store(Keep + b * L + at, kept.to(tl.uint8), mask=at < L)
    else:
        # What free tokens must add.
        need = budget - fixed
        if MODE == 0:
            need = budget * total - fixed
        prefix = tl.zeros([], tl.int32)
        digits = tl.arange(0, 16)
        for i in range(8):
            step = 1 << (28 - 4 * i)
            # In the first pass digits above 7 would overflow; no positive score has them.
            above = prefix + tl.where((i == 0) & (digits > 7), 7, digits) * step + (step - 1)
            # Summed over the block once, after the loop: within it that took a barrier for each block.
            masses = tl.zeros([16, BLOCK], tl.float32)
            for n0 in range(0, L, BLOCK):
                _, score, free, _ = _load(Scores, Cand, Always, b, n0, L, BLOCK)
                weight = tl.where(free, tl.where(MODE == 1, 1.0, score), 0.0)
                bits = score.to(tl.int32, bitcast=True)
                masses += tl.where(bits[None, :] > above[:, None], weight[None, :], 0.0)
            mass = tl.sum(masses, 1)
            # Masses fall with the digit: as many as are still enough is the first that is not.
            digit = tl.minimum(tl.sum((mass >= need).to(tl.int32), 0), 15)
            prefix += digit * step
        # Above the greatest integer is nothing, above -1 everything.
        prefix = tl.where(need > 0, prefix, 0x7FFFFFFF)
        if MODE == 0:
            # All stay where p is 1 (sums of rounded scores reach 1 early), and where no token has any mass.
            prefix = tl.where((budget >= 1.0) | (total <= 0.0), -1, prefix)
        mass_above = tl.zeros([], tl.float32)
        for n0 in range(0, L, BLOCK):
            _, score, free, _ = _load(Scores, Cand, Always, b, n0, L, BLOCK)
            weight = tl.where(free, tl.where(MODE == 1, 1.0, score), 0.0)
            mass_above += tl.sum(
                tl.where(score.to(tl.int32, bitcast=True) > prefix, weight, 0.0), 0
            )
        level = prefix.to(tl.float32, bitcast=True)
        each = tl.where(MODE == 1, 1.0, level)
        before = tl.zeros([], tl.int32)
        for n0 in range(0, L, BLOCK):
            at, score, free, held = _load(Scores, Cand, Always, b, n0, L, BLOCK)
            bits = score.to(tl.int32, bitcast=True)
            tie = (free & (bits == prefix)).to(tl.int32)
            rank = before + tl.cumsum(tie, 0) - 1
            wanted = mass_above + rank.to(tl.float32) * each < need
            kept = held | (free & ((bits > prefix) | ((tie != 0) & wanted)))
            tl.store(Keep + b * L + at, kept.to(tl.uint8), mask=at < L)
            before += tl.sum(tie, 0)


@triton.jit(do_not_specialize=["L"])
def mark_kernel(
    Scores, Cand, Always, Budget, Ranked, Order, Keep, L, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`select_kernel` of sorted rows. Ranked `(B, L)` float32 and Order `(B, L)` int64: scores of the tokens that are
    free to drop, falling, and their slots; then -inf."""
    b = tl.program_id(0)
    budget = tl.load(Budget + b)
    total = tl.zeros([], tl.float32)
    fixed = tl.zeros([], tl.float32)
    for n0 in range(0, L, BLOCK):
        at, score, free, held = _load(Scores, Cand, Always, b, n0, L, BLOCK)
        total += tl.sum(score, 0)
        fixed += tl.sum(tl.where(held, tl.where(MODE == 1, 1.0, score), 0.0), 0)
        tl.store(Keep + b * L + at, held.to(tl.uint8), mask=(at < L) & (free == 0))
    # What free tokens must add.
    need = budget - fixed
    if MODE == 0:
        need = budget * total - fixed
        # All stay where p is 1, and where no token has any mass.
        need = tl.where((budget >= 1.0) | (total <= 0.0), float("inf"), need)
    before = tl.zeros([], tl.float32)
    for n0 in range(0, L, BLOCK):
        at = n0 + tl.arange(0, BLOCK)
        score = tl.load(Ranked + b * L + at, mask=at < L, other=-float("inf"))
        slot = tl.load(Order + b * L + at, mask=at < L, other=0)
        free = score != -float("inf")
        weight = tl.where(free, tl.where(MODE == 1, 1.0, tl.maximum(score, 0.0)), 0.0)
        ahead = before + tl.cumsum(weight, 0) - weight
        tl.store(Keep + b * L + slot, (ahead < need).to(tl.uint8), mask=free)
        before += tl.sum(weight, 0)


@triton.jit(do_not_specialize=["L", "n"])
def pack_kernel(
    Keep, Count, Index, Flat, Starts, Places, L, n, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Index `(B, n)` int64: the kept slots in order, then the last one again. Flat, Starts, Places as in `Kept`."""
    b = tl.program_id(0)
    begin = tl.zeros([], tl.int64)
    for r0 in range(0, b, ROWS):
        rows = r0 + tl.arange(0, ROWS)
        begin += tl.sum(tl.load(Count + rows, mask=rows < b, other=0), 0)
    if b == 0:
        tl.store(Starts, begin.to(tl.int32))
    tokens = tl.load(Count + b)
    tl.store(Starts + b + 1, (begin + tokens).to(tl.int32))
    count = tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32)
    for n0 in range(0, L, BLOCK):
        at = n0 + tl.arange(0, BLOCK)
        kept = tl.load(Keep + b * L + at, mask=at < L, other=0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(Index + b.to(tl.int64) * n + place, at.to(tl.int64), mask=kept != 0)
        tl.store(Flat + begin + place, b.to(tl.int64) * L + at, mask=kept != 0)
        count += tl.sum(kept, 0)
        last = tl.maximum(last, tl.max(tl.where(kept != 0, at, 0), 0))
    for n0 in range(0, n, BLOCK):
        place = n0 + tl.arange(0, BLOCK)
        filler = tl.zeros([BLOCK], tl.int64) + last
        tl.store(Index + b.to(tl.int64) * n + place, filler, mask=(place >= count) & (place < n))
        packed = begin + tl.minimum(place, tl.maximum(tokens, 1) - 1)
        tl.store(Places + b.to(tl.int64) * n + place, packed, mask=place < n)


def _mask(
    mode: int, scores: torch.Tensor, budget: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    batch, length = scores.shape
    keep = torch.empty(batch, length, dtype=torch.bool, device=scores.device)
    row = (
        scores.detach().contiguous(),
        candidates.contiguous().view(torch.uint8),
        always.contiguous().view(torch.uint8),
        budget.to(torch.float32).contiguous(),
    )
    if mode == THRESHOLD or length <= LONGEST:
        launch(
            select_kernel, (batch,), *row, keep.view(torch.uint8), length,
            MODE=mode, BLOCK=SELECT.columns, **SELECT.options,
        )  # fmt: skip
        return keep
    free = torch.where(candidates > always, row[0].float(), -torch.inf)
    ranked, order = free.sort(dim=-1, descending=True, stable=True)
    launch(
        mark_kernel, (batch,), *row, ranked, order, keep.view(torch.uint8), length,
        MODE=mode, BLOCK=MARK.columns, **MARK.options,
    )  # fmt: skip
    return keep


def select_top_p(
    scores: torch.Tensor, p: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    return _mask(TOP_P, scores, p, candidates, always)


def select_top_k(
    scores: torch.Tensor, k: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function; exact below 2**24 tokens, whose counts fp32 holds."""
    return _mask(TOP_K, scores, k, candidates, always)


def select_threshold(
    scores: torch.Tensor, t: torch.Tensor, candidates: torch.Tensor, always: torch.Tensor
) -> torch.Tensor:
    """See the public function."""
    return _mask(THRESHOLD, scores, t, candidates, always)


def pack_each(*masks: torch.Tensor) -> tuple[Kept, ...]:
    """See the public function."""
    masks = tuple(keep.contiguous() for keep in masks)
    counts = [keep.sum(-1) for keep in masks]
    # The one wait; what follows of them costs the host less than four launches.
    known = iter((counts[0] if len(counts) == 1 else torch.cat(counts)).tolist())
    return tuple(
        _packed(keep, count, [next(known) for _ in keep])
        for keep, count in zip(masks, counts, strict=True)
    )


def _packed(keep: torch.Tensor, count: torch.Tensor, counts: list[int]) -> Kept:
    """count: `(B,)`, and the same as numbers."""
    batch, length = keep.shape
    most, least, total = max(counts), min(counts), sum(counts)
    index, places, flat = (
        torch.empty(size, dtype=torch.int64, device=keep.device)
        for size in ((batch, max(most, 1)), (batch, max(most, 1)), (total,))
    )
    starts = torch.empty(batch + 1, dtype=torch.int32, device=keep.device)
    launch(
        pack_kernel, (batch,), keep.view(torch.uint8), count, index, flat, starts, places, length, index.shape[1],
        BLOCK=PACK.columns, ROWS=64, **PACK.options,
    )  # fmt: skip
    kept = Kept(index, count, least, length, total)
    # They cost this kernel three stores, and would cost the properties of that name fifteen launches.
    vars(kept).update(flat=flat, starts=starts, places=places)
    return kept
