"""Kept tokens as rows of a flattened batch: work that looks at each token alone is done on them and on no other.

`PackedRows` takes tokens out of a batch and puts results back; `computed_at` makes a module do its work on some rows
of its input only, of which the attention of the same layer tells it by a `Handover`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from zipr1_kernels import Kept, kv_compact

from zipr1.core.phases import phase


@dataclass(frozen=True)
class PackedRows:
    """The kept tokens of a batch one after the other, n = the sum of the rows' counts. own: whether `unpack` may write
    into what it is given."""

    kept: Kept
    own: bool = False

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, L, ...)` -> `(1, n, ...)`, the kept ones."""
        with phase("gathers"):
            return x.flatten(0, 1).index_select(0, self.kept.flat)[None]

    def unpack(self, packed: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
        """`over` `(B, L, hidden)` with `packed` `(1, n, hidden)` in the kept tokens' places."""
        with phase("gathers"):
            rows = over.flatten(0, 1)
            put = rows.index_copy_ if self.own else rows.index_copy
            return put(0, self.kept.flat, packed[0]).view_as(over)

    def by_row(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads of packed tokens `(n, H, D)` -> `(B, H, longest, D)`; padding repeats a row's last token."""
        if self.kept.ragged:
            return kv_compact(key, value, self.kept)
        shape = self.kept.index.shape
        return key.unflatten(0, shape).transpose(1, 2), value.unflatten(0, shape).transpose(1, 2)


@dataclass(frozen=True)
class OutputRows:
    """Which tokens the rest of a layer works on once its attention is done: int64 indices into the flattened `(B * L)`
    input of the output projection and of the MLP. None: all of them."""

    o_proj: torch.Tensor | None = None
    mlp: torch.Tensor | None = None


class Handover:
    """What the attention of a layer leaves for the output projection and the MLP of the same layer, of the same pass.

    By thread: beside a sparse pass, another thread may be in the middle of a dense one that began before the model was
    patched, and that one must find nothing.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], OutputRows] = {}

    def leave(self, layer: int, rows: OutputRows) -> None:
        self._rows[threading.get_ident(), layer] = rows

    def find(self, layer: int) -> OutputRows:
        """All rows, if nothing was left in this thread."""
        return self._rows.get((threading.get_ident(), layer), OutputRows())

    def clear(self) -> None:
        """Forget what was left in this thread."""
        me = threading.get_ident()
        for key in [key for key in list(self._rows) if key[0] == me]:
            del self._rows[key]


def computed_at(
    stock: Callable[[torch.Tensor], torch.Tensor], rows: Callable[[], torch.Tensor | None]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a module that looks at each token alone, `(B, L, n)` -> `(B, L, hidden)`: `stock` at the rows that
    `rows()` names when it is called, and 0 elsewhere; everywhere where it names none."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        at = rows()
        if at is None:
            return stock(x)
        with phase("gathers"):
            few = x.flatten(0, 1).index_select(0, at)[None]
        out = stock(few)[0]
        with phase("gathers"):
            full = out.new_zeros(x.shape[0] * x.shape[1], out.shape[-1])
            return full.index_copy_(0, at, out).view(*x.shape[:2], -1)

    return forward
