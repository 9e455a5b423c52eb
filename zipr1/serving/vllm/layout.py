"""Where a request's kept keys and values lie in the blocks of its KV cache. Tensors and numbers only, no vllm.

vLLM gives a request one list of blocks for all layers, long enough for all of its tokens. Each layer packs the keys and
values it keeps, in order, into the first slots of these blocks, and goes on behind them while the answer grows. What
the longest layer does not reach is a gap of whole blocks in the middle of the list, which can be given back: to the
left of it lies what was kept, to the right lie the blocks that vLLM adds later.
"""

from __future__ import annotations

import torch


def gap(length: int, longest: int, size: int) -> tuple[int, int]:
    """The blocks that a request does not need once it was read: index of the first, and how many.

    length: tokens read. longest: of them kept in the layer that keeps the most. size: slots of a block. With n more
    tokens vLLM's list has room for length + n; without the gap there is still room for longest + n.
    """
    return -(-longest // size), (length - longest) // size


def without_gaps(table: torch.Tensor, first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`table` `(R, W)` of block ids with blocks first .. first + count - 1 of each row left out; what lies to the right
    moves up, and the end repeats the last column. first, count: `(R,)` int64."""
    column = torch.arange(table.shape[1], device=table.device)
    source = column + count[:, None] * (column >= first[:, None])
    return table.gather(1, source.clamp_max(table.shape[1] - 1))


def slots(table: torch.Tensor, row: torch.Tensor, place: torch.Tensor, size: int) -> torch.Tensor:
    """Slot of each token in the cache, `(n,)` int64. row: its row of `table` `(R, W)`. place: its place among what its
    request has in this layer, 0 for the first. Both `(n,)` int64."""
    return table[row, place // size].long() * size + place % size
