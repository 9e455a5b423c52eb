"""What this installation is and runs on, as plain values: for bug reports."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from zipr1_kernels import unusable

from zipr1.core.machine import free_memory, git_commit, hardware, versions
from zipr1.core.text import number, size


def about() -> dict[str, Any]:
    """Versions by package, the commit, processor, memory, each GPU, and which code the kernels' operations run."""
    git, own = git_commit(), hardware()
    found: dict[str, Any] = {
        "system": platform.platform(),
        **{name: version or "not installed" for name, version in versions().items()},
        "commit": "installed copy" if git is None else git["commit"] + " changed" * git["changed"],
        "cpu": f"{own['cpu']}, {number(own['cpus'], 'core')}, {number(own['threads'], 'thread')}",
        "memory": f"{size(own['memory_bytes'])}, {size(free_memory() or 0)} free",
        "torch CUDA": torch.version.cuda or "a CPU build",
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{gpu.name}, {size(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}"
    why = unusable(True) if torch.cuda.is_available() else "no GPU"
    asked = os.environ.get("ZIPR1_KERNELS")
    found["kernels"] = (f"torch: {why}" if why else "triton") + (
        f", ZIPR1_KERNELS={asked}" if asked else ""
    )
    return found
