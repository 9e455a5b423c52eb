"""The table of docs/models.md: which families are asked which kinds of question through which doors, by the tests.

`python tests/doors.py` writes it, and tests/test_doors_table.py compares it. A test says with `@pytest.mark.door(...)`
through which door it goes and with `@pytest.mark.asked(family, kinds...)`, mostly at a parameter, what it asks there.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/doors.py: begin -->\n", "<!-- end -->\n"
DOORS = ("train", "load", "eval", "export", "vLLM")
KINDS = ("pictures", "clips", "several media", "text")
Cells = dict[str, dict[str, set[str]]]


class Collector:
    """A plugin of pytest: what marked tests ask, by family and kind, and through which doors."""

    def __init__(self) -> None:
        self.cells: Cells = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            for door in item.iter_markers("door"):
                for asked in item.iter_markers("asked"):
                    family, *kinds = asked.args
                    assert door.args[0] in DOORS and set(kinds) <= set(KINDS), item.nodeid
                    for kind in kinds:
                        self.cells.setdefault(family, {}).setdefault(kind, set()).add(door.args[0])


def families() -> tuple[str, ...]:
    from zipr1.models.families import FAMILIES

    return tuple(FAMILIES)


def table(cells: Cells) -> str:
    assert set(cells) == set(families()), "each family has its tests"
    head = ["family", *KINDS]
    rows = [head, ["---"] * len(head)]
    for family in families():
        doors = [cells[family].get(kind, set()) for kind in KINDS]
        rows.append(
            [f"`{family}`", *(", ".join(d for d in DOORS if d in own) or "-" for own in doors)]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def marked() -> list[str]:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.door(" in p.read_text()]
    return sorted(str(p) for p in files)


def page(written: str, made: str) -> str:
    """The page with the table in its place."""
    before, _, rest = written.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def main() -> int:
    collector = Collector()
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = pytest.main(["--collect-only", "-q", *marked()], plugins=[collector])
    if code:
        print(told.getvalue())
        return int(code)
    written = PAGE.read_text()
    made = page(written, table(collector.cells))
    if "--check" not in sys.argv:
        PAGE.write_text(made)
    return int("--check" in sys.argv and written != made)


def check() -> bool:
    """Whether the page says what the tests do."""
    command = [sys.executable, str(Path(__file__)), "--check"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
