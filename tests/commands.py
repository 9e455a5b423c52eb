"""`zipr1 ARGUMENTS` in this process, and what it said."""

from __future__ import annotations

import contextlib
import io
import re
import sys

import pytest

from zipr1.cli import main


def call(*arguments: object) -> tuple[int, str]:
    """Exit code, and all that was printed on stdout and stderr, its white space made single spaces: long lines are
    broken. An exception that is not SystemExit goes through: it would have been a traceback."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["zipr1", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        sys.argv = before
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    return int(left.value.code or 0), " ".join(said.split())
