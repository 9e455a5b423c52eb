"""What the Triton wrappers share. Imported by kernel.py files alone, for it needs Triton."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton

# Read when the kernels are decorated, hence once: the interpreter computes in numpy, which has no bfloat16.
INTERPRETED = bool(triton.knobs.runtime.interpret)

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """Block sizes (rows of queries, columns of keys) and how Triton is to compile for them."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# By compute capability (80, 90), then by padded head dimension.
Tables = dict[int, dict[int, Config]]


def table(tables: Tables, device: torch.device) -> dict[int, Config]:
    """The configurations for a device: those of sm_90 on a Hopper, else those of sm_80, which fit everywhere."""
    return tables[capability(device)]


@functools.cache
def capability(device: torch.device) -> int:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return 90 if hopper else 80


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor. Triton itself takes the current device, whose
    address space is another than that of tensors on a second GPU."""
    with on(args[0].device):
        kernel[grid](*args, **options)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, that GPU is the current one; nothing for a CPU, where the interpreter runs."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def padded(dim: int) -> int:
    """A head dimension as kernels see it: the next power of two, at least 16, the least that tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its last dimension is contiguous and no two elements share memory, else a copy."""
    shared = any(not step and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if shared or x.stride(-1) != 1 else x


def precision(dtype: torch.dtype) -> str:
    """Of products: fp32 inputs are multiplied as such and not as tf32, which the tests' tolerances do not allow."""
    return "ieee" if dtype == torch.float32 else "tf32"
