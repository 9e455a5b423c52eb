"""What `zipr1 eval --tasks list` shows: the benchmarks, their conditions and their groups. Needs no torch."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zipr1.core import hub
from zipr1.evaluate.suites import GROUPS, SUITES, TASK_FILES, WITH_LOGIN

WIDE = 110  # columns of a terminal that has room for kind and metric


def show(console: Console) -> None:
    console.print(suite_table(console.width >= WIDE))
    for name, members in GROUPS.items():
        console.print(Text.assemble((name, "bold"), f": {', '.join(members)}"))
    console.print("zipr1 eval --tasks NAME also takes any other task of lmms-eval", style="dim")
    console.print(
        f"lmms-eval's task files ask for a login to the hub ({hub.LOGIN}) for {', '.join(WITH_LOGIN)}",
        style="dim", highlight=False,
    )  # fmt: skip
    console.print(
        f"lmms-eval's own command line finds the embedded ones with --include_path {TASK_FILES}",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def as_json() -> dict[str, Any]:
    """The same for a program: `suites`, what each is measured with, and `groups`, the suites of each by name."""
    suites = [
        {
            "name": suite.name,
            "kind": suite.kind,
            "tasks": [task.name for task in suite.tasks],
            "metric": suite.metric,
            "range": [0, suite.top],
            "max_new_tokens": suite.max_new_tokens,
            "frames": suite.frames if suite.kind == "video" else None,
            "login": suite.name in WITH_LOGIN,
        }
        for suite in SUITES.values()
    ]
    return {"suites": suites, "groups": {name: list(group) for name, group in GROUPS.items()}}


def suite_table(wide: bool) -> Table:
    """A row a benchmark. wide: with its kind and its metric."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = ["name", "kind", "lmms-eval's task", "metric", "range", "answer"]
    shown = [name for name in names if wide or name not in ("kind", "metric")]
    for name in shown:
        table.add_column(name, overflow="fold")
    for suite in SUITES.values():
        more = f" +{len(suite.tasks) - 1}" if len(suite.tasks) > 1 else ""
        frames = f", {suite.frames} frames" if suite.kind == "video" else ""
        cells = {
            "name": suite.name,
            "kind": suite.kind,
            "lmms-eval's task": suite.tasks[0].name + more,
            "metric": suite.metric,
            "range": f"0-{suite.top:g}",
            "answer": f"{suite.max_new_tokens} tokens{frames}",
        }
        table.add_row(*(cells[name] for name in shown))
    return table
