"""From how many prompt tokens on scoring, selection and attention of the kept take less time than dense attention.

By the kind of device, at 25 % kept. cpu: measured on two cores (kernels/bench/results.csv). amx: bfloat16 on a CPU with
units for it, measured on one thread (docs/results.md, attention on a CPU). cuda: an estimate for one row on an H100,
from counted operations and launches; no GPU has measured it. Shorter prompts may gain there too where whole layers are
skipped, or many rows run together.
"""

from __future__ import annotations

import torch

from zipr1_kernels import dispatch

BREAK_EVEN = {"cpu": 384, "amx": 1024, "cuda": 4096}


def break_even(device: torch.device, dtype: torch.dtype) -> int:
    """Of a model whose weights are of that dtype there; kinds that are not named count as GPUs."""
    kind = device.type
    if kind == "cpu" and dtype == torch.bfloat16 and dispatch.has_amx():
        kind = "amx"
    return BREAK_EVEN.get(kind, BREAK_EVEN["cuda"])
