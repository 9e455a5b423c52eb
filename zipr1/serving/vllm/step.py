"""One step of the engine, layer by layer: which rows of the batch a layer runs, and its own lengths and slots. No vllm.

A row of the batch is a token. A request that is read (prefill) has all of its tokens in it, one that answers has its
last token; layers keep some of the former and the latter always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zipr1.core.errors import RunError
from zipr1.serving.vllm.layout import gap, slots, without_gaps
from zipr1.serving.vllm.ledger import Entry, Ledger


@dataclass(frozen=True)
class Part:
    """What a layer does of a step, in n of its rows, for R requests.

    rows: `(n,)` int64, ascending; None: all. starts: `(R + 1,)` int32 on the host, where each request's rows begin.
    lengths: `(R,)` int32, tokens it then has in this layer's cache. slots: `(n,)` int64 of the rows' keys and values.
    table: `(R, W)` int32 blocks. widest, longest: the most rows of a request, the most tokens in the cache.
    """

    rows: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    widest: int
    longest: int


@dataclass(frozen=True)
class Reading:
    """A request whose prompt is read: rows start .. end - 1. number: among the step's requests."""

    number: int
    start: int
    end: int
    entry: Entry


class Step:
    """starts `(R + 1,)`, lengths `(R,)`, table `(R, W)`: vLLM's, the same for all layers; padding may follow.
    tokens: rows that are no padding. size: slots of a block."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor,
        tokens: int,
        size: int,
        layers: int,
    ) -> None:
        bounds = starts.tolist()
        count = bounds.index(tokens)  # what follows is padding
        self.tokens = tokens
        self.starts, self.lengths = starts[: count + 1], lengths[:count]
        self.size = size
        self.reading: list[Reading] = []
        entries = []
        last = self.lengths.tolist()
        for number, first in enumerate(table[:count, 0].tolist()):
            entry, rows = ledger.of(first), bounds[number + 1] - bounds[number]
            if rows == last[number] and rows >= entry.prompt:
                entry.length, entry.kept = rows, []
                self.reading.append(Reading(number, bounds[number], bounds[number + 1], entry))
            elif rows > 1 or len(entry.kept) != layers:
                raise RunError(
                    f"zipr1: vLLM reads a prompt of {entry.prompt} tokens in parts, {rows} now; a prompt's tokens are "
                    "chosen as a whole: raise --max-num-batched-tokens, or serve dense"
                )
            entries.append(entry)
        ledger.read = [reading.entry for reading in self.reading]
        self.answering = [n for n, e in enumerate(entries) if e.kept]
        answering = [entries[n] for n in self.answering]
        # Of requests that answer, by layer: what they kept, and how many tokens came after.
        self.kept = torch.tensor([e.kept for e in answering], dtype=torch.int64).reshape(-1, layers)
        self.later = torch.tensor(
            [last[n] - entries[n].length for n in self.answering], dtype=torch.int64
        )
        gaps = torch.zeros(count, 2, dtype=torch.int64)
        for number, entry in zip(self.answering, answering, strict=True):
            gaps[number] = torch.tensor(gap(entry.length, entry.longest, size))
        gaps = gaps.to(table.device)
        self.table = without_gaps(table[:count], gaps[:, 0], gaps[:, 1])

    def parts(self) -> list[Part]:
        """Of every layer, where no prompt is read: all lengths are then known before a layer runs."""
        device = self.table.device
        # Contiguous by layer: kernels take a row's address and trust in what follows.
        lengths = (self.kept.T + self.later).contiguous()
        layers, requests = lengths.shape
        starts = torch.arange(requests + 1, dtype=torch.int32)
        row = torch.arange(requests).repeat(layers).to(device)
        place = (lengths - 1).flatten().to(device)
        own = slots(self.table, row, place, self.size).view(layers, requests)
        longest = lengths.amax(1).tolist()
        lengths = lengths.int().to(device)
        return [
            Part(None, starts, lengths[n], own[n], self.table, 1, longest[n]) for n in range(layers)
        ]

    def part(self, layer: int, choose: Callable[[int, int], torch.Tensor]) -> Part:
        """choose: rows start .. end - 1 of a prompt -> `(end - start,)` bool, what the layer keeps of it."""
        device = self.table.device
        lengths = torch.empty(len(self.lengths), dtype=torch.int64)
        lengths[self.answering] = self.kept[:, layer] + self.later
        counts = torch.ones_like(lengths)
        chosen = {}
        for reading in self.reading:
            entry = reading.entry
            prompt = min(entry.prompt, entry.length)
            mask = choose(reading.start, reading.start + prompt)
            answer = torch.arange(prompt, entry.length, device=device)
            rows = torch.cat([mask.nonzero()[:, 0], answer]) + reading.start
            chosen[reading.number] = rows
            entry.kept.append(len(rows))
            lengths[reading.number] = counts[reading.number] = len(rows)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=starts[1:])
        total = int(starts[-1])
        request = torch.arange(len(counts)).repeat_interleave(counts)
        # Of a prompt that is read the first place is 0; the one row of others comes last.
        place = torch.arange(total) - starts[request] + (lengths - counts)[request]
        own = self.starts.long()
        all_kept = total == self.tokens
        return Part(
            None
            if all_kept
            else torch.cat([chosen.get(n, own[n : n + 1]) for n in range(len(counts))]),
            starts.int(),
            lengths.int().to(device),
            slots(self.table, request.to(device), place.to(device), self.size),
            self.table,
            int(counts.max()),
            int(lengths.max()),
        )
