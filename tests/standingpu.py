"""A stand-in for a GPU: tensors that call themselves of another device and hold their values on the CPU.

Code runs as it would on a GPU, and what a GPU would have to do for it is counted: `launches`, operations that are more
than a new view; and `waits`, by file and line: a value that Python reads, a size that depends on values, a copy from or
to ordinary memory. The operations of zipr1_kernels count as the kernels that they launch and the waits that they have;
their plain versions do the work.

The device is named `meta`, which every build of torch knows. Nothing can be said by it about time.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zipr1_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from zipr1_kernels.select_top_p import kernel as selecting

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
OURS = (str(ROOT / "zipr1"), str(ROOT / "kernels"))

# Operations whose result has a size that depends on values.
SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount")
# Those that only make memory, or nothing at all.
FREE = (
    "empty",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_like",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "_local_scalar_dense",
)

# Those that are two: their first argument is copied, and the copy is changed.
TWICE = (
    "index_copy",
    "index_fill",
    "index_put",
    "index_add",
    "masked_fill",
    "scatter",
    "constant_pad_nd",
)

# Kernels that each operation launches on a GPU, with what its wrapper does before (kernels/zipr1_kernels/*/kernel.py);
# test_waits.py counts them. `packed_attention` is torch's own, which is one, and so is torch's RMS norm.
KERNELS = {
    "probe_scores": 3, "select_top_p": 1, "select_top_k": 2, "select_threshold": 1, "pack_indices": 3, "pack_each": 3,
    "kv_compact": 1,
    "sparse_prefill": 6, "packed_attention": 1, "sparse_decode": 2, "norm_rope": 1,
}  # fmt: skip
# What more it takes to sort a row that is too long to be searched; the sort itself counts as one.
SORTED = 4


class OnGpu(torch.Tensor):
    """A tensor of the stand-in; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        out.held = held
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the stand-in outside of its block")


class Gpu(TorchDispatchMode):
    """Inside, `DEVICE` works, and what it would do is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.waits: collections.Counter[str] = collections.Counter()
        self.quiet = 0

    def wait(self, why: str) -> None:
        if not self.quiet:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
            at = (
                f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"
                if frames
                else "?"
            )
            self.waits[f"{at} {why}"] += 1

    @contextlib.contextmanager
    def counted_as(self, launches: int, waits: int = 0) -> Iterator[None]:
        """What runs inside counts as that."""
        if not self.quiet:
            self.launches += launches
            for _ in range(waits):
                self.wait("sizes of the kept")
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, OnGpu) for x in before)
        target, name = there, func.overloadpacket.__name__
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if (there or target) and not self.quiet:
            self.note(name, before, args, kwargs, there, target)
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            alias = [r.alias_info for r in func._schema.returns]
            view = bool(alias) and all(a is not None and not a.is_write for a in alias)
            if not view and name not in FREE and any(x.numel() for x in made):
                self.launches += 1 + (name in TWICE)
        if not target:
            return out
        same = {id(x.held): x for x in before if isinstance(x, OnGpu)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return same[id(x)] if id(x) in same else OnGpu(x)

        return tree_map(wrapped, out)

    def note(
        self,
        name: str,
        before: list[Any],
        args: Any,
        kwargs: Any,
        there: bool,
        target: bool,
    ) -> None:
        """Notes what makes the host wait."""
        if name == "_local_scalar_dense":
            self.wait("a value is read")
        elif name in SIZES:
            self.wait(f"the size of {name}")
        elif name in ("index", "index_put", "index_put_"):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.wait("a boolean index")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None and len(before) == 1:
            self.wait("the size of repeat_interleave")
        elif name == "equal":
            self.wait("equal")
        elif name == "where" and not all(isinstance(x, OnGpu) for x in before):
            self.wait("a number of the host's is copied")
        elif name in ("_to_copy", "copy_") and self.crosses(name, before, there, target):
            if there and not target:
                self.wait("a copy to the host")
            elif not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))):
                self.wait("a copy from ordinary memory")

    @staticmethod
    def crosses(name: str, before: list[Any], there: bool, target: bool) -> bool:
        """Whether values go from one side to the other."""
        if not before or not before[-1].numel():
            return False
        if name == "copy_":
            return isinstance(before[0], OnGpu) != isinstance(before[1], OnGpu)
        return there != target


def _tolist(gpu: Gpu) -> Callable[[torch.Tensor], Any]:
    stock = torch.Tensor.tolist

    def tolist(x: torch.Tensor) -> Any:
        if isinstance(x, OnGpu):
            gpu.wait("tolist")
            return stock(x.held)
        return stock(x)

    return tolist


def _tensor(gpu: Gpu) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, which would make nothing on the device, for it does not ask the mode."""
    stock = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device) != DEVICE:
            return stock(data, device=device, **options)
        held = stock(data, **options)
        if held.numel():
            gpu.launches += not gpu.quiet
            gpu.wait("a copy from ordinary memory")
        return OnGpu(held)

    return tensor


def _kernel(gpu: Gpu, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        packs = name in ("pack_indices", "pack_each")
        launches = KERNELS[name] * (len(args) if packs else 1)
        if name in ("select_top_p", "select_top_k") and args[0].shape[1] > selecting.LONGEST:
            launches += SORTED
        with gpu.counted_as(launches, waits=packs):
            out = run(*args, **kwargs)
            for kept in (out if isinstance(out, tuple) else (out,)) if packs else ():
                _ = kept.flat, kept.starts, kept.places  # the kernel writes these along
            return out

    return counted


def _once(gpu: Gpu, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of torch that is one kernel on a GPU and several elsewhere."""

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        with gpu.counted_as(1):
            return stock(*args, **kwargs)

    return counted


@contextlib.contextmanager
def gpu() -> Iterator[Gpu]:
    """The stand-in is there inside."""
    counting = Gpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", _tolist(counting))
        patch.setattr(torch, "tensor", _tensor(counting))
        from zipr1.models.sparse import context, gate, packing, retain, rotation, rules, selection

        for module in (context, gate, packing, retain, rotation, rules, selection):
            for name in KERNELS:
                if hasattr(module, name):
                    patch.setattr(
                        module, name, _kernel(counting, name, getattr(zipr1_kernels, name))
                    )
        for name in ("scaled_dot_product_attention", "rms_norm"):
            patch.setattr(F, name, _once(counting, getattr(F, name)))
        with counting:
            yield counting


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights on the stand-in, tied ones still tied; inside its block."""
    there: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, OnGpu):
                if id(parameter) not in there:
                    there[id(parameter)] = torch.nn.Parameter(
                        OnGpu(parameter.detach()), parameter.requires_grad
                    )
                module._parameters[name] = there[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, OnGpu):
                module._buffers[name] = OnGpu(buffer)
    return model
