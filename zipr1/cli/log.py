"""Notes and warnings of the library, shown as plain lines between a command's own output."""

from __future__ import annotations

import logging
import os

from rich.console import Console
from rich.logging import RichHandler


def quiet_unless_first() -> None:
    """Before `show_log`, warnings are plain lines on stderr: of several processes the first alone writes them."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        logging.getLogger("zipr1").setLevel(logging.ERROR)


def show_log(console: Console) -> None:
    """Print what `zipr1` logs from INFO on, through `console`, so that a live display is not torn."""
    log = logging.getLogger("zipr1")
    log.setLevel(logging.INFO)
    for old in [h for h in log.handlers if isinstance(h, RichHandler)]:
        log.removeHandler(old)
    log.addHandler(
        RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, markup=False
        )
    )
