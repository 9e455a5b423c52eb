"""The one error a user is meant to see.

A message says what came, what is allowed and what to do. The command line prints it as one line and exits
with `exit_code`: 2 for wrong input, 1 for a run that failed.
"""

from __future__ import annotations

import sys


class ZipError(Exception):
    """Base of all errors that are the input's or the machine's fault rather than ours."""

    exit_code = 1


class InputError(ZipError, ValueError):
    """Something given to zipr1 is wrong: a recipe key, a file, a row, an option."""

    exit_code = 2


class RunError(ZipError, RuntimeError):
    """A run that was given right input and could not go on: NaN loss, a full disk, an
    alarm (zipr1/train/alarms.py)."""


class Missing(InputError):
    """A model or data that is not on this machine: a run needs it, `--dry-run` plans without."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by Python, by a device or by torch on a CPU, whose error has no class of its own."""
    torch = sys.modules.get("torch")  # where it was never loaded, it refused nothing
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text
    )
