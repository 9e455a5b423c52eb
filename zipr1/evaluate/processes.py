"""Several processes that share one evaluation: `torchrun --nproc-per-node 2 -m zipr1 eval ...`.

Only questions are shared out; every process scores all answers, so one and several processes score alike. lmms-eval
is told that it runs alone, for its own sharing changes the order of samples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from zipr1.core import distributed

T = TypeVar("T")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def start() -> None:
    """Join the other processes, if a launcher started several. Raises InputError if they cannot be reached."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        distributed.meet("gloo", timedelta(hours=12))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> str | None:
    """This process's own GPU where several share a machine; None leaves the choice open."""
    if world() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def gather(value: T) -> list[T]:
    """What every process holds, in the order of ranks, on every process."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def agree(failure: str | None) -> str | None:
    """The first failure of any process, known to all of them."""
    return next((f for f in gather(failure) if f is not None), None)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, the environment looks like that of a single process."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
