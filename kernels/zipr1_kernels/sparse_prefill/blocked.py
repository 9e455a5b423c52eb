"""Sparse prefill of long prompts on a CPU: a block of kept queries at a time, from the input straight into the output.

Beside gathering everything and calling torch's fused attention it saves the packed copies, the writing of zeros, and in
a ragged batch the padding; in float32, at 1,024 kept of 4,096 tokens, a quarter of the time (kernels/bench/run.py).

It always computes in float32. Where a CPU has units for products of bfloat16 (AMX), gathering and torch's fused
attention take a fifth to a half of its time (1,024 to 8,192 tokens, 10 to 50 % of them kept, one thread).
"""

from __future__ import annotations

import math
import mmap
import sys

import torch

from zipr1_kernels import dispatch
from zipr1_kernels.kept import Kept

# Kept queries in a block; with the heads that share a key head they are the rows of one product.
BLOCK = 64
# Kept tokens from which this is the faster, where it can be.
LEAST = 384
# Bytes from which the allocator asks the system for fresh pages anyway (glibc's largest threshold).
LAZY = 2**25


def least(dtype: torch.dtype) -> float:
    """Kept tokens from which this is the faster of the two on this machine; infinite where it never is."""
    return math.inf if dtype == torch.bfloat16 and dispatch.has_amx() else LEAST


def sparse_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function; on a CPU, and without a gradient."""
    batch, q_heads, length, dim = q.shape
    heads = k.shape[1]
    groups, values = q_heads // heads, v.shape[3]
    scale = dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = _zeros(q, batch, length, q_heads, values)
    n = kept.index.shape[1]
    logits, weights = (torch.empty(BLOCK * groups * n, dtype=dtype) for _ in range(2))
    late = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)[:, None]  # row i, key j: j > i
    for b, count in enumerate(kept.count.tolist()):
        slots = kept.index[b, :count]
        for h in range(heads):
            keys = k[b, h, slots].to(dtype).mT
            held = v[b, h, slots].to(dtype)
            mine = slice(h * groups, (h + 1) * groups)
            for start in range(0, count, BLOCK):
                end = min(start + BLOCK, count)
                rows = slots[start:end]
                queries = (q[b, mine].transpose(0, 1)[rows].to(dtype) * scale).view(-1, dim)
                x, w = (buffer[: len(queries) * end].view(-1, end) for buffer in (logits, weights))
                torch.mm(queries, keys[:, :end], out=x)
                corner = x.view(end - start, groups, end)[:, :, start:]
                corner.masked_fill_(late[: end - start, :, : end - start], -torch.inf)
                torch.softmax(x, -1, out=w)
                found = (w @ held[:end]).view(-1, groups, values)
                out[b, rows, mine] = found.to(out.dtype)
    return out.transpose(1, 2)


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Zeros of that dtype, on the CPU.

    Large ones are fresh pages of the system, which are zero until they are written: with a quarter of the rows written,
    33 MB took 2.3 ms instead of the 8.4 ms of `torch.zeros`, which writes them all (2 cores).
    """
    size = math.prod(shape) * like.element_size()
    if size < LAZY or sys.platform != "linux":
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
