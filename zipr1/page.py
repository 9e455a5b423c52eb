"""One HTML page that needs nothing beside it: text, tables and pictures inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from rich.console import Console
from rich.table import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #e4e4e4 }
.left { text-align: left } .scroll { overflow-x: auto }
.note { color: #666; font-size: 13px; max-width: 75ch }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 .2rem }
"""


class Page:
    """A report, block after block; `write` puts it into a file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.blocks: list[str] = []

    def heading(self, text: str) -> None:
        self.blocks.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.blocks.append(f'<p class="note">{html.escape(text)}</p>')

    def picture(self, path: Path, words: str) -> None:
        """A PNG, put into the page. words: what it shows, for those who cannot see it and as its caption."""
        data = base64.b64encode(path.read_bytes()).decode()
        said = html.escape(words)
        self.blocks.append(f'<img alt="{said}" src="data:image/png;base64,{data}">')
        self.text(words)

    def table(self, table: Table) -> None:
        """A table of the terminal's, with its title and caption."""
        self.heading(_plain(table.title))
        kinds = ["" if c.justify == "right" else ' class="left"' for c in table.columns]
        cells = [list(column.cells) for column in table.columns]
        head = "".join(
            f"<th{k}>{html.escape(_plain(c.header))}</th>"
            for k, c in zip(kinds, table.columns, strict=True)
        )
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td{k}>{html.escape(_plain(v))}</td>" for k, v in zip(kinds, row, strict=True)
            )
            + "</tr>"
            for row in zip(*cells, strict=True)
        )
        self.blocks.append(f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>')
        if table.caption:
            self.text(_plain(table.caption))

    def write(self, path: Path) -> Path:
        title = html.escape(self.title)
        text = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
            f"<h1>{title}</h1>{''.join(self.blocks)}</html>"
        )
        path.write_text(text, encoding="utf-8")
        return path


def _plain(value: object) -> str:
    """Text without the terminal's markup."""
    if isinstance(value, str):
        from rich.text import Text

        return Text.from_markup(value).plain
    with Console(width=200).capture() as captured:
        Console(width=200).print(value)
    return captured.get().strip()
