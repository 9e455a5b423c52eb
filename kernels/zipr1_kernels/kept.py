"""Which tokens stay, as indices: the argument that attention and compaction share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from zipr1_kernels import checks


@dataclass(frozen=True)
class Kept:
    """The kept slots of each sample, ascending. Made by `pack_indices` from a mask, or by `Kept.of` from indices.

    index: `(B, n)` int64, n the largest count; entries from count[b] on are padding, which repeats the row's last
    kept slot. count: `(B,)` int64, at least 1 (0 for an empty row of a mask). least: the smallest count. length: slots
    that were chosen among. total: the sum of the counts; None where the maker does not know it, and a GPU waits for it.

    The constructors validate, so the operations never read values back, for which a GPU would wait.
    """

    index: torch.Tensor
    count: torch.Tensor
    least: int
    length: int
    total: int | None = None

    @classmethod
    def of(cls, index: torch.Tensor, count: torch.Tensor, length: int) -> Kept:
        """Checked indices of one's own; whatever stands from count[b] on is replaced by padding.

        Args:
            index: `(B, n)` integer, its first count[b] entries strictly ascending in 0..length-1.
            count: `(B,)` integer in 1..n.

        Raises ValueError that names the first bad row. A GPU waits for the host once.
        """
        if index.ndim != 2 or count.shape != index.shape[:1] or not index.shape[1]:
            raise ValueError(
                f"index has shape {tuple(index.shape)} and count {tuple(count.shape)}; expected (B, n) and (B,)"
            )
        checks.integer("index", index)
        checks.integer("count", count)
        if index.device != count.device:
            raise ValueError(f"index is on {index.device} and count on {count.device}; move one")
        index, count = index.long(), count.long()
        width = index.shape[1]
        place = torch.arange(width, device=index.device)
        real = place < count[:, None]
        outside = (real & ((index < 0) | (index >= length))).any(1)
        unordered = (real[:, 1:] & (index[:, 1:] <= index[:, :-1])).any(1)
        miscounted = (count < 1) | (count > width)
        flawed = (outside | unordered | miscounted).any().long()
        bad, most, least, total = torch.stack(
            [flawed, count.max(), count.min(), count.sum()]
        ).tolist()
        if bad:
            for flaw, rows in (
                (f"a count outside 1..{width}", miscounted),
                (f"an index outside 0..{length - 1}", outside),
                ("indices that do not ascend; sort them and drop repeated ones", unordered),
            ):
                if bool(rows.any()):
                    raise ValueError(f"row {int(rows.int().argmax())} of index has {flaw}")
        return cls(
            index.masked_fill(~real, 0).cummax(1).values[:, :most].contiguous(),
            count,
            least,
            length,
            total,
        )

    @classmethod
    def from_mask(cls, keep: torch.Tensor) -> Kept:
        """Of a mask `(B, L)` bool, in plain torch: for one that lies on the CPU, whatever runs the operations."""
        count = keep.sum(-1)
        most, least, total = torch.stack([count.max(), count.min(), count.sum()]).tolist()
        rows, slots = keep.nonzero(as_tuple=True)
        rank = keep.cumsum(-1)[rows, slots] - 1
        index = torch.zeros(len(keep), max(most, 1), dtype=torch.int64, device=keep.device)
        index[rows, rank] = slots
        # Slots ascend and padding is 0, so a running maximum repeats the last kept slot.
        return cls(index.cummax(-1).values, count, least, keep.shape[1], total)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """What `moved` moves: what a device would have to compute of `index` and `count` goes along."""
        return self.index, self.count, self.flat, self.starts

    def moved(
        self, index: torch.Tensor, count: torch.Tensor, flat: torch.Tensor, starts: torch.Tensor
    ) -> Kept:
        """The same on another device, where `parts` are these."""
        there = Kept(index, count, self.least, self.length, self.total)
        vars(there).update(flat=flat, starts=starts)
        return there

    @property
    def everything(self) -> bool:
        """Whether every slot of every row is kept."""
        return self.least == self.length

    @property
    def ragged(self) -> bool:
        return self.least < self.index.shape[1]

    @cached_property
    def real(self) -> torch.Tensor:
        """`(B, n)` bool: True but for padding."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.count[:, None]

    @cached_property
    def starts(self) -> torch.Tensor:
        """`(B + 1,)` int32: where each row's tokens start among the kept ones of all rows, and their number."""
        return F.pad(self.count.cumsum(0, dtype=torch.int32), (1, 0))

    @cached_property
    def flat(self) -> torch.Tensor:
        """`(sum of counts,)` int64: the kept slots of all rows among the `B * length` of the flattened batch."""
        rows, width = self.index.shape
        start = torch.arange(rows, device=self.index.device)[:, None] * self.length
        if not self.ragged:
            return (self.index + start).flatten()
        if self.total is None:
            return (self.index + start)[self.real]
        # With their number known, no value has to be looked at.
        row = torch.arange(rows, device=self.index.device).repeat_interleave(
            self.count, output_size=self.total
        )
        place = torch.arange(self.total, device=self.index.device) - self.starts[row]
        return (self.index + start).flatten().index_select(0, row * width + place)

    @cached_property
    def packed(self) -> Kept:
        """The same tokens where `kv_compact` puts them: the first count[b] of n slots."""
        n = self.index.shape[1]
        place = torch.arange(n, device=self.index.device)
        return Kept(place.minimum(self.count[:, None] - 1), self.count, self.least, n, self.total)

    @cached_property
    def places(self) -> torch.Tensor:
        """`(B, n)` int64: where the tokens of `index` stand among the kept ones of all rows."""
        return self.starts[:-1, None] + self.packed.index

    @cached_property
    def keep(self) -> torch.Tensor:
        """`(B, length)` bool."""
        mask = torch.zeros(len(self.index), self.length, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(1, self.index, True)


def check(tokens: Kept, batch: int, length: int) -> None:
    """ValueError unless `tokens` were chosen among `length` slots of `batch` rows."""
    if not isinstance(tokens, Kept):
        raise ValueError(
            f"kept is a {type(tokens).__name__}; make it with pack_indices(mask) or Kept.of(index, count, length)"
        )
    if len(tokens.index) != batch or tokens.length != length:
        raise ValueError(
            f"kept was chosen among {tokens.length} slots of {len(tokens.index)} rows; "
            f"expected {length} slots of {batch} rows"
        )
