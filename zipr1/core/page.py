"""One HTML page that needs nothing beside it: text, tables and pictures inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from rich.console import Console
from rich.table import Table

STYLE = """
:root { color-scheme: light; --ink: #1d2330; --soft: #667085; --line: #e3e7ee; --good: #12715b; --blue: #1f77b4; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); margin: 0;
       background: #f6f7f9; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
.soft { color: var(--soft); font-size: 13px; }
.card, .tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.card { overflow-x: auto; }
.card svg { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: var(--soft); padding: 6px 10px; border-bottom: 2px solid var(--line);
     white-space: nowrap; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .left { text-align: left; }
tr.mean td { font-weight: 600; background: #fafbfc; }
code { background: #eef1f5; border-radius: 4px; padding: 1px 5px; font-size: 12.5px; overflow-wrap: anywhere; }
li { margin: 3px 0; }
img { max-width: 100%; height: auto; display: block; margin: 16px 0 4px; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole HTML page that needs no script and no network. style: rules besides the common ones."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


class Page:
    """A report, block after block; `write` puts it into a file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.blocks: list[str] = []

    def heading(self, text: str) -> None:
        self.blocks.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.blocks.append(f'<p class="soft">{html.escape(text)}</p>')

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
        self.blocks.append(f'<div class="card"><table><tr>{head}</tr>{rows}</table></div>')
        if table.caption:
            self.text(_plain(table.caption))

    def write(self, path: Path) -> Path:
        heading = f"<h1>{html.escape(self.title)}</h1>"
        text = document(self.title, heading + "".join(self.blocks))
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
