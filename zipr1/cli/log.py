"""What a command says: its console, the notes and warnings of the library between its own lines, what it is doing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from zipr1.core import activity, launcher, terminal


def quiet_unless_first() -> None:
    """Before `show_log`, warnings are plain lines on stderr: of several processes the first alone writes them."""
    if not launcher.is_first():
        logging.getLogger("zipr1").setLevel(logging.ERROR)


def console_of(as_json: bool) -> Console:
    """Where a command prints. With --json stdout is for the machine, and people read stderr.

    Its file is fixed, so that it is heard while sys.stdout is swallowed.
    """
    file = sys.stderr if as_json else sys.stdout
    return terminal.console(file, quiet=not launcher.is_first())


def tell_model(given: str | None, line: str, as_json: bool) -> None:
    """Print which model is used, `line` of `find_model`: where the user named none, or a run that did not finish."""
    if given is None or ";" in line:
        console_of(as_json).print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def busy(as_json: bool, first: str = "loading PyTorch") -> Iterator[Console]:
    """The console of a command that takes long: what it is doing is shown from the first moment on."""
    console = console_of(as_json)
    with activity.shown(console):
        activity.tell(first)
        yield console


def show_log(console: Console) -> None:
    """Print what `zipr1` logs from INFO on, through `console`, so that a live display is not torn."""
    log = logging.getLogger("zipr1")
    log.setLevel(logging.INFO)
    for old in [h for h in log.handlers if isinstance(h, _Printed)]:
        log.removeHandler(old)
    log.addHandler(_Printed(console))


class _Printed(logging.Handler):
    """Whole words in a terminal; a message is one line in a file."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        wrapped = not self._console.is_terminal
        self._console.print(self.format(record), soft_wrap=wrapped, highlight=False)
