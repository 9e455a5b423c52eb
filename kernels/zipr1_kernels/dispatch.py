"""Which code runs an operation: plain torch, or a Triton kernel.

`auto`, the default, takes Triton for tensors on a GPU and torch otherwise, and torch too where an operation says so (a
head dimension without a shipped configuration, or torch's own fused attention being the faster). `use("torch")` and
`use("triton")` force one for a block of code, the environment variable ZIPR1_KERNELS for a process. There, names of
operations after the path are left to torch: `ZIPR1_KERNELS=auto,-select_top_p,-pack_indices`.

Triton compiles for GPUs; on a CPU its kernels run in Triton's interpreter, slowly, if TRITON_INTERPRET=1 was set before
they were imported. The interpreter shows that the logic is right, not what low precision does on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator

import torch

PATHS = ("auto", "torch", "triton")

# Those that have a faster form than plain torch on a GPU, by the name under which they ask `plan`.
OPS = (
    "probe_scores", "select_top_p", "select_top_k", "select_threshold", "pack_indices", "sparse_prefill", "kv_compact",
    "sparse_decode", "packed_attention", "norm_rope",
)  # fmt: skip

# Head dimensions with a shipped configuration, up to the next power of two.
MOST_DIM = 128


class _State:
    """path and off hold for the process: autograd computes checkpointed layers again in threads of its own, which have
    to take the path that the forward pass took. What `ran` tells is a thread's own."""

    def __init__(self) -> None:
        self.path, *switches = os.environ.get("ZIPR1_KERNELS", "auto").split(",")
        self.off = tuple(switches)
        self._own = threading.local()

    @property
    def ran(self) -> dict[str, str]:
        if not hasattr(self._own, "ran"):
            self._own.ran = {}
        found: dict[str, str] = self._own.ran
        return found


_state = _State()


@contextlib.contextmanager
def use(path: str) -> Iterator[None]:
    """Force a path, one of `PATHS`, within the block. It holds for all threads: force one at a time."""
    if path not in PATHS:
        raise ValueError(f"kernels path '{path}'; allowed: {', '.join(PATHS)}")
    before, _state.path = _state.path, path
    try:
        yield
    finally:
        _state.path = before


@contextlib.contextmanager
def without(*ops: str) -> Iterator[None]:
    """Leave these, some of `OPS`, to torch within the block, in all threads, as ZIPR1_KERNELS=auto,-op does."""
    before, _state.off = _state.off, (*_state.off, *(f"-{op}" for op in ops))
    try:
        yield
    finally:
        _state.off = before


def ran(op: str) -> str | None:
    """What `op` took last in this thread: `triton`, or `torch: ` and the reason; None before its first call."""
    return _state.ran.get(op)


def plan(
    op: str, *tensors: torch.Tensor, cannot: str | None = None, slower: str | None = None
) -> bool:
    """Whether the Triton kernel of `op` is to run on these tensors; the choice is remembered for `ran`.

    cannot: why there is no kernel for them; None: there is one. slower: why `auto` should take torch all the same.
    RuntimeError if Triton was forced and cannot run at all, ValueError if the tensors are on different devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        said = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: tensors are on {said}; move them to one device")
    on_gpu = next(iter(devices)).type == "cuda"
    if _state.path == "torch":
        reason = "forced"
    elif _state.path == "auto" and not on_gpu:
        reason = "not on a GPU"
    elif f"-{op}" in _state.off:
        reason = "switched off by ZIPR1_KERNELS"
    elif _state.path == "auto" and absent():
        reason = str(absent())
    elif _state.path == "auto" and slower:
        reason = slower
    else:  # forced, or the way things are on a GPU
        reason = cannot or ""
    trouble = None if reason else unusable(on_gpu)
    if trouble:
        raise RuntimeError(trouble)
    _state.ran[op] = f"torch: {reason}" if reason else "triton"
    return not reason


def automatic(op: str) -> bool:
    """Whether `op` may take what is fastest: no path is forced, and it is not switched off."""
    return _state.path == "auto" and f"-{op}" not in _state.off


def forced(path: str) -> bool:
    """Whether that path, one of `PATHS`, was asked for."""
    return _state.path == path


def library(op: str, *tensors: torch.Tensor, cannot: str | None = None, name: str = "") -> bool:
    """Whether `op`, which has no kernel of ours, is to run a library's special form of it on these tensors.

    cannot: why there is none for them. name: of the form. The choice is remembered for `ran`.
    """
    reason = cannot
    if _state.path == "torch":
        reason = "forced"
    elif _state.path == "triton":
        reason = "a kernel was asked for"
    elif f"-{op}" in _state.off:
        reason = "switched off by ZIPR1_KERNELS"
    elif tensors[0].device.type != "cuda":
        reason = "not on a GPU"
    _state.ran[op] = f"torch: {reason or name}"
    return not reason


def unusable(on_gpu: bool) -> str | None:
    """Why the path that was asked for cannot be taken on such a device, and the way out; None if it can."""
    if _state.path not in PATHS:
        return f"ZIPR1_KERNELS is '{_state.path}'; allowed: {', '.join(PATHS)}"
    strange = [
        switch for switch in _state.off if switch.removeprefix("-") not in OPS or switch[0] != "-"
    ]
    if strange:
        return f"ZIPR1_KERNELS has '{strange[0]}' after the path; allowed: -NAME, a minus and one of {', '.join(OPS)}"
    if _state.path != "triton":
        return None
    if not has_triton():
        return "Triton was asked for and is not installed: pip install triton"
    if on_gpu and absent():
        return f"Triton was asked for and {absent()}: install gcc, or set CC"
    if not on_gpu and not interpreted():
        return "Triton was asked for on a CPU; use a GPU, or set TRITON_INTERPRET=1 before Python starts"
    return None


def blocked(op: str, *tensors: torch.Tensor, pays: bool) -> bool:
    """Whether the blocked version of `op` is to run instead of the plain one; remembered for `ran`.

    It is for a CPU, has no gradient, and is not what `use("torch")` forces. pays: the problem is large enough.
    """
    on_cpu = tensors[0].device.type == "cpu"
    taken = pays and on_cpu and _state.path == "auto" and not graded(*tensors)
    if taken:
        _state.ran[op] = "torch: blocked, for a long prompt on a CPU"
    return taken


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in units of their own, which torch's fused attention uses."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    # Older versions of torch do not tell: none is assumed then.
    return tell is not None and bool(tell().get("amx_bf16"))


def graded(*tensors: torch.Tensor) -> bool:
    """Whether a gradient of any of them is wanted."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unfit(dtype: torch.dtype, *dims: int) -> str | None:
    """`cannot` of attention and scoring: dtypes and head dimensions without a shipped configuration."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {dtype}"
    return None if max(dims) <= MOST_DIM else f"head dimension {max(dims)} is above {MOST_DIM}"


def slow(dtype: torch.dtype) -> str | None:
    """`slower` of attention and scoring: the kernels' block sizes are for 16-bit inputs. In float32 they are right, and
    spill kilobytes of registers (kernels/bench/resources.py --dtype fp32).
    """
    return "float32 is faster in torch" if dtype == torch.float32 else None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def absent() -> str | None:
    """Why no kernel can be compiled on this machine; None if one can. Triton builds its launchers with a C compiler."""
    if not has_triton():
        return "Triton is not installed"
    return None if has_compiler() else "Triton finds no C compiler"


@functools.cache
def has_compiler() -> bool:
    """As Triton looks for one."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
