"""Reports as one HTML file that needs nothing beside it: Jinja2 templates of assets/templates, filled and escaped."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich.table import Table
from rich.text import Text


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


def render(template: str, **values: Any) -> str:
    """A page. template: a file of assets/templates. values: what it names, all text of which is escaped."""
    return _templates().get_template(template).render(**values)


def embedded(picture: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


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
