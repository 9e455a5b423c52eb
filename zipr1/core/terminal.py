"""The terminal, which shows text as it is: names of files, answers and messages hold brackets and colons of their own.

Rich would read `[b]` as bold and `:boom:` as a picture. Styles are given as `rich.text.Text` or `style=`, never in the
text itself; tests/test_layout.py sees to it that every console is made here.
"""

from __future__ import annotations

from typing import IO

from rich.console import Console


def console(file: IO[str] | None = None, *, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that takes text as text. file: None is stdout, or stderr, whatever those are when it prints."""
    return Console(file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False)
