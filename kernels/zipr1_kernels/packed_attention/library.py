"""Attention of packed rows by a library on a GPU: FlashAttention 3 or 4 where it is installed, else torch's own.

FlashAttention 3 is for Hopper and 4 for what came after it, and for a Hopper without 3. torch's is FlashAttention 2, of
which torch 2.10 to 2.13 changed the signature from release to release: how it is told to be causal, whether it takes a
scale, and whether it must be told that key heads are shared. No GPU has compared them yet.
Arguments as in `packed_attention/__init__.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from zipr1_kernels.kept import Kept

log = logging.getLogger(__name__)

# What the widths of heads are multiples of.
STEP = 8


class Provider(NamedTuple):
    """name: as `ran` tells it. widest: of a head. run: its function, and `call`, which knows its signature."""

    name: str
    widest: int
    run: Callable[..., Any]
    call: Callable[..., torch.Tensor]


def providers(device: torch.device) -> tuple[Provider, ...]:
    """The libraries for a device, the best first."""
    return _providers(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0)


@functools.cache
def _providers(major: int) -> tuple[Provider, ...]:
    """major: of the GPU's compute capability; 0: no GPU."""
    found = []
    for version, module, widest in _installed(major):
        try:
            run = importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            log.warning("FlashAttention %d is installed and does not load (%s)", version, error)
            continue
        found.append(Provider(f"FlashAttention {version}", widest, run, _by_flash))
    if major == 0 or major >= 8:  # an older GPU raises an error when it is called
        with contextlib.suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            found.append(Provider("its variable-length attention", 256, varlen_attn, _by_torch))
    return tuple(found)


def _installed(major: int) -> list[tuple[int, str, int]]:
    """Versions of FlashAttention for such a GPU, the best first: its number, its module, its widest head."""
    found = []
    if major == 9 and importlib.util.find_spec("flash_attn_interface") is not None:
        found.append((3, "flash_attn_interface", 256))
    if major >= 9 and _distributed("flash-attn-4"):  # version 2 brings a folder of that name too
        found.append((4, "flash_attn.cute", 128))
    return found


def _distributed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Provider | str:
    """The library for these tensors, or why there is none."""
    known = providers(q.device)
    if not known:
        return "this torch has no variable-length attention"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"no variable-length attention for {q.dtype}"
    dim = max(q.shape[-1], v.shape[-1])
    for provider in known:
        if dim <= provider.widest:
            return provider
    return f"head dimension {dim} is above {max(provider.widest for provider in known)}"


def packed_attention(
    provider: Provider,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Kept,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """See the public function."""
    dim, values = q.shape[-1], v.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    # Widths that differ, or that it does not know, are filled up with zeros, which change no product.
    width = -(-max(dim, values) // STEP) * STEP
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    # FlashAttention 4 takes the stream and the kind of the current GPU, as Triton does.
    there = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
    with there:
        out = provider.call(provider.run, q, k, v, kept.starts, kept.index.shape[1], scale)
    return out[..., :values]


@functools.cache
def _arguments(run: Callable[..., Any]) -> frozenset[str]:
    """Names, looked up once: every layer of every pass asks."""
    return frozenset(inspect.signature(run).parameters)


def _by_torch(
    run: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    known = _arguments(run)
    options: dict[str, Any] = {}
    if "is_causal" in known:
        options["is_causal"] = True
    else:
        options["window_size"] = (-1, 0)
    if "scale" in known:
        options["scale"] = scale
    else:  # it divides by the root of the width
        q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out: torch.Tensor = run(q, k, v, starts, starts, longest, longest, **options)
    return out


def _by_flash(
    run: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    options = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "softmax_scale": scale,
        "causal": True,
    }
    # Some versions read the longest row off the starts.
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    known = _arguments(run)
    options |= {name: n for name, n in lengths.items() if name in known}
    out = run(q, k, v, **options)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # beside it the normalisers
    return result
