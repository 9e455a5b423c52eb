"""torch's variable-length attention on a GPU, by whatever signature this torch gives it.

torch 2.10 to 2.13 changed it from release to release: how it is told to be causal, whether it takes a scale, and
whether it must be told that key heads are shared. Arguments as in `packed_attention/__init__.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zipr1_kernels.kept import Kept

# The widest head that flash attention takes, and what its widths are multiples of.
MOST, STEP = 256, 8


@functools.cache
def function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found


def cannot(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why it cannot run on these tensors; None if it can."""
    if function() is None:
        return "this torch has no variable-length attention"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"torch has no variable-length attention for {q.dtype}"
    widest = max(q.shape[-1], v.shape[-1])
    return None if widest <= MOST else f"head dimension {widest} is above {MOST}"


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept, *, scale: float | None = None
) -> torch.Tensor:
    """See the public function."""
    run = function()
    assert run is not None
    dim, values = q.shape[-1], v.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    # Widths that differ, or that it does not know, are filled up with zeros, which change no product.
    width = -(-max(dim, values) // STEP) * STEP
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    known = inspect.signature(run).parameters
    options: dict[str, Any] = {}
    if "is_causal" in known:
        options["is_causal"] = True
    else:
        options["window_size"] = (-1, 0)
    if "scale" in known:
        options["scale"] = scale
    else:  # it divides by the root of the width
        q = q * (scale * width**0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = kept.index.shape[1]
    out: torch.Tensor = run(q, k, v, kept.starts, kept.starts, longest, longest, **options)
    return out[..., :values]
