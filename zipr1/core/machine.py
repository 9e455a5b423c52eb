"""What a run runs on: versions, hardware, commit, which are written to run.json, and what its process moves."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The package's own folder: its commit is asked of git.
HERE = Path(__file__).resolve().parents[1]

PACKAGES = (
    "zipr1",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "accelerate",
    "datasets",
    "av",
    "decord",
    "lmms-eval",
)


def describe(
    command: Sequence[str] = (),
    device: str | None = None,
    seed: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """run.json: the versions, seed, command, hardware, git commit (None outside a checkout), the time, and `more`."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(device),
        "git": git_commit(),
        **more,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware(device: str | None = None) -> dict[str, Any]:
    """CPUs this process may use, memory in bytes, and the accelerator's name and memory if `device` is one."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": cpus,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "device": device or "cpu",
        "device_name": None,
        "device_memory_bytes": None,
    }
    if device and device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"device_name": properties.name, "device_memory_bytes": properties.total_memory}
    return found


def git_commit() -> dict[str, Any] | None:
    """The commit of the checkout that this code is in, and whether it had changes; None for an installed copy."""
    commit = _git(HERE, "log", "-1", "--format=%H", "--", ".")
    head = _git(HERE, "rev-parse", "HEAD")
    if not commit or not head:
        return None
    return {"commit": head, "changed": bool(_git(HERE, "status", "--porcelain", "--", "."))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_memory() -> int | None:
    """Bytes that a program may still take without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def moved() -> int:
    """Bytes that this process has read and written, whatever from; 0 where the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return sum(
            int(line.split(":")[1]) for line in lines if not line.startswith(("sys", "canc"))
        )
    except (OSError, ValueError, IndexError):
        return 0
