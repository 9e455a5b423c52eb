"""Files that other libraries read: whatever those raise of files that are not as they wrote them becomes one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from zipr1.core.errors import InputError, ZipError
from zipr1.core.text import reason


@contextlib.contextmanager
def foreign(what: str, hint: str) -> Iterator[None]:
    """An InputError, `what (the reason); hint`, for what transformers, peft or tokenizers raise inside.

    They raise anything, Exception itself among it. Only their code may run inside: our own faults are to be seen.
    """
    try:
        yield
    except (ZipError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (tokenizers raises that class)
        raise InputError(f"{what} ({reason(error, 300) or type(error).__name__}); {hint}") from None
