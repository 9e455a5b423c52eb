"""Files that other libraries read: whatever those raise of files that are not as they wrote them becomes one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zipr1.core.errors import InputError, ZipError, out_of_memory
from zipr1.core.text import reason


@contextlib.contextmanager
def foreign(what: str, hint: str) -> Iterator[None]:
    """An InputError, `what (the reason); hint`, for what transformers, peft or tokenizers raise inside.

    They raise anything, Exception itself among it. Only their code may run inside: our own faults are to be seen.
    """
    try:
        yield
    except ZipError:
        raise
    except Exception as error:  # tokenizers raises that class
        if out_of_memory(error):
            raise
        raise InputError(f"{what} ({reason(error, 300) or type(error).__name__}); {hint}") from None
