"""Operations and memory of a forward pass, counted while it runs.

Operations: torch's own counter, with formulas of ours for fused attention, which it counts as 0 on a CPU and as if
every query saw every key elsewhere. Count inside of `zipr1_kernels.use("torch")`, the plain path of the operations:
Triton's kernels are invisible to the counter, and do the same products.

Memory: the bytes of all tensors alive at once, made inside the context. A GPU's own allocator knows better and is
asked instead.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def attention_flops(q: Any, k: Any, v: Any, causal: bool) -> int:
    """Both products of attention, shapes `(B, HQ, Lq, D)`, `(B, H, Lk, D)`, `(B, H, Lk, DV)`; causal from the first
    slot on: query i sees min(i + 1, Lk) keys."""
    batch, heads, queries, dim = q
    keys, values = k[2], v[3]
    if causal:
        full = min(queries, keys)
        seen = full * (full + 1) // 2 + (queries - full) * keys
    else:
        seen = queries * keys
    return int(2 * batch * heads * seen * (dim + values))


def _cpu(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return attention_flops(q, k, v, causal)


def _flash(
    q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
) -> int:
    return attention_flops(q, k, v, causal)


def _biased(
    q: Any, k: Any, v: Any, bias: Any = None, lse: bool = False, dropout: float = 0.0,
    causal: bool = False, *_: Any, **named: Any,
) -> int:  # fmt: skip
    return attention_flops(q, k, v, named.get("is_causal", causal))


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_efficient_attention: _biased,
    aten._scaled_dot_product_cudnn_attention: _biased,
}


class Count:
    """flops: operations counted so far."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    @property
    def flops(self) -> int:
        return int(self._counter.get_total_flops())


@contextlib.contextmanager
def operations() -> Iterator[Count]:
    """Count the operations of what runs inside (forward; a multiplication and an addition are two)."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        yield Count(counter)


class Memory(TorchDispatchMode):
    """peak: most bytes alive at once of storages made inside, of any device."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in before or key in self._known:
                continue
            self._known[key] = storage.nbytes()
            self._held += storage.nbytes()
            weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._held)
        return out

    def _free(self, key: int) -> None:
        self._held -= self._known.pop(key, 0)


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Any]:
    """Bytes at the peak, in `.peak` afterwards, without what was there before."""
    if device.type != "cuda":
        with Memory() as mode:
            yield mode
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    used = Memory()
    yield used
    torch.cuda.synchronize(device)
    used.peak = torch.cuda.max_memory_allocated(device) - start
