"""What a launcher (torchrun, accelerate) tells a process about the others. Known before torch is loaded."""

from __future__ import annotations

import os

from zipr1.core.errors import InputError


def size() -> int:
    """Processes that the launcher speaks of; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Of several processes the first alone prints."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def check(parallel: str) -> None:
    """Whether accelerate started what the user asked it for; its own settings are not read. parallel: the recipe's
    `train.parallel`. Raises InputError."""
    told = os.environ
    # Without a GPU and without --multi_gpu it starts one process, with an address for the others but no number.
    if "ACCELERATE_MIXED_PRECISION" in told and "MASTER_ADDR" in told and "WORLD_SIZE" not in told:
        raise InputError(
            "accelerate was asked for several processes and started one; add --multi_gpu, which is right on CPUs too, "
            "or use torchrun"
        )
    if size() > 1 and told.get("ACCELERATE_USE_FSDP") == "true" and parallel != "fsdp":
        raise InputError(
            f"accelerate was started with --use_fsdp and train.parallel is {parallel}; add train.parallel=fsdp, or "
            "start it with --multi_gpu"
        )
    if told.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise InputError(
            "accelerate was started with --use_deepspeed; start it with --multi_gpu, and set train.parallel=fsdp to "
            "cut up the weights"
        )
