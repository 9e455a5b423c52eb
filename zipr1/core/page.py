"""Reports as one HTML file that needs nothing beside it: Jinja2 templates of assets/templates, filled and escaped."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jinja2
from rich.table import Table
from rich.text import Text

from zipr1.core.text import times


class Column(NamedTuple):
    """A column's heading, and whether its cells are aligned to the left."""

    text: str
    left: bool


class PageTable(NamedTuple):
    """A table as templates take it, all of it plain text; caption may be empty."""

    title: str
    caption: str
    columns: list[Column]
    rows: list[list[str]]


class Tile(NamedTuple):
    """One number of a page's statement: what it is, its value before and after, and what to know about it.

    before may be empty, where there is nothing that `after` came from.
    """

    name: str
    before: str
    after: str
    note: str


def compared(before: float, after: float, than: str = "dense") -> str:
    """Two times in words: `1.20x faster than dense`, `slower than dense (0.84x)`. than: what took `before`."""
    speedup = before / after
    if times(speedup) == "1.00x":
        return f"as fast as {than}"
    return (
        f"{times(speedup)} faster than {than}"
        if speedup > 1
        else f"slower than {than} ({times(speedup)})"
    )


def render(template: str, **values: Any) -> str:
    """A page. template: a file of assets/templates. values: what it names, all text of which is escaped."""
    return _templates().get_template(template).render(**values)


def page_table(table: Table) -> PageTable:
    """A table of the terminal's for a page."""
    return PageTable(
        _plain(table.title),
        _plain(table.caption),
        [Column(_plain(c.header), c.justify != "right") for c in table.columns],
        [[_plain(cell) for cell in row] for row in zip(*(c.cells for c in table.columns))],
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("zipr1", "assets/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plain(value: object) -> str:
    """A heading's or a cell's text; nothing for None."""
    if value is None:
        return ""
    return value.plain if isinstance(value, Text) else str(value)
