"""What this machine can do: the rates that turn counted operations into a bound on time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from zipr1.core import activity
from zipr1.models.cost import Shape, Work
from zipr1.profiling.counting import attention_flops

# Phases whose operations run at the rate of attention; the others are products of matrices.
ATTENTION = ("attention",)


@dataclass(frozen=True)
class Rates:
    """matrix, attention: operations a second. copy: bytes a second, read and written."""

    matrix: float
    attention: float
    copy: float

    def seconds(self, work: dict[str, Work]) -> float:
        """The least time for this work by phase, whatever else a machine must do set aside.

        A phase takes its operations or its bytes, whichever is longer.
        """
        total = 0.0
        for name, one in work.items():
            rate = self.attention if name in ATTENTION else self.matrix
            total += max(one.flops / rate, one.bytes / self.copy)
        return total

    def row(self) -> dict[str, float]:
        return {
            "matrix_tflops": self.matrix / 1e12,
            "attention_tflops": self.attention / 1e12,
            "copy_gb_s": self.copy / 1e9,
        }


def fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least 3 calls, after one to warm up."""
    best, spent = float("inf"), 0.0
    calls = 0
    while calls < 4 or spent < seconds:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        took = time.perf_counter() - start
        spent += took
        calls += 1
        if calls > 1:
            best = min(best, took)
    return best


def wait(device: torch.device) -> None:
    """Until all that was asked of a GPU is done; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(
    s: Shape, length: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> Rates:
    """The machine's rates at this model's sizes: its MLP's product, its dense attention, a copy of 256 MB.

    length: tokens, at most 4,096 of which are used. seconds: for each rate, at least 3 tries, of which the best counts:
    a slow try must not make a bound look near.
    """
    tokens = min(length, 4096)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    what = "measuring the machine's own rates"
    activity.tell(what, 0, 3)
    x, w = make(tokens, s.hidden), make(s.mlp, s.hidden)
    matrix = 2 * tokens * s.hidden * s.mlp / fastest(lambda: F.linear(x, w), device, seconds)
    activity.tell(what, 1, 3)
    q = make(1, s.q_heads, tokens, s.dim)
    k, v = make(1, s.heads, tokens, s.dim), make(1, s.heads, tokens, s.dim)
    grouped = s.q_heads != s.heads
    flops = attention_flops(q.shape, k.shape, v.shape, True)
    took = fastest(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped),
        device,
        seconds,
    )
    activity.tell(what, 2, 3)
    source = torch.empty(2**28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / fastest(lambda: target.copy_(source), device, seconds)
    return Rates(matrix, flops / took, copy)
