"""Text inside of a Markdown file: names, answers and messages stay what they are, whatever they hold.

`text` for anywhere in a line or a cell of a table, `code` for a span of code outside of tables.
"""

from __future__ import annotations

import re

from zipr1.core.text import one_line

# What begins emphasis, code, links and pictures, and what ends a cell; underscores inside of a word do not.
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
# What begins a heading, a line, a list.
_STARTS = re.compile(r"^(?=#|=|--|[+-](?:\s|$))|^(\d+)(?=[.)](?:\s|$))")


def text(value: object) -> str:
    """On one line, with every character shown as it is."""
    line = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKS.sub(lambda mark: f"\\{mark[0]}", line)
    return _STARTS.sub(lambda start: f"{start[1] or ''}\\", line)


def code(value: object) -> str:
    """A span of code on one line; a run of backticks in it makes those around it one longer."""
    line = one_line(value)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    room = " " if "`" in line else ""
    return f"{fence}{room}{line}{room}{fence}"
