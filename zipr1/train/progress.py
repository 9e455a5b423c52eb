"""What people look at: progress while a run trains, tables and pictures when it is done.

`Progress` and `curves` read the same values as metrics.jsonl holds; a key that a line lacks is left out. Every share
is in [0, 1] there and printed in per cent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zipr1.core import activity
from zipr1.core.curves import set_point_gaps
from zipr1.core.text import duration

# Key in metrics.jsonl (dots go into sections), label, how it is written.
SHOWN = (
    ("loss", "loss", "number"),
    ("reward", "reward", "number"),
    ("rewards", "", "number"),
    ("accuracy", "accuracy", "share"),
    ("dense_accuracy", "dense accuracy", "share"),
    ("token_ratio", "tokens kept", "share"),
    ("kl", "KL to dense", "number"),
    ("efficiency_weight", "efficiency weight", "number"),
    ("lr", "learning rate", "small"),
    ("heldout_mass", "held-out mass", "share"),
    ("grad_clipped", "gradient clipped", "share"),
    ("sampler_mismatch", "sampler, trainer apart", "small"),
    ("informative", "informative groups", "share"),
    ("truncated", "truncated answers", "share"),
    ("answer_tokens", "answer tokens", "number"),
)
# The same of a look inside, under `diagnosis`.
LOOKED = (
    ("window", "tokens in the window", "share"),
    ("first_token", "mass of first token", "share"),
    ("top_token", "mass of one token", "share"),
    ("gradients.policy_gradient", "norm: policy gradient", "number"),
    ("gradients.kl", "norm: KL", "number"),
    ("gradients.pathwise", "norm: pathwise", "number"),
    ("gradients.cut", "norm: cut", "number"),
    ("gradients.dense_kl", "norm: KL at p = 1", "number"),
)
SEEN = SHOWN[-6:]  # those that a look inside tells with its own
BRIEF = {"loss", "accuracy", "token_ratio", "kl"}  # of these a plain line tells


class Progress:
    """A live bar, whose time runs, and a small table of the newest step; plain lines where nobody watches, one for each
    tenth of the steps, and of the same form one a minute (activity.py), also within a step that takes longer.

    with Progress(console, total=300) as progress:
        progress.update(step, metrics)      # step counts from 0, after it is done
    """

    def __init__(self, console: Console, total: int, title: str = "training", start: int = 0):
        self.console = console
        self.total = total
        self.title = title
        self.done = start
        self._start = start
        self._began = self._last = time.monotonic()
        self._metrics: Mapping[str, Any] = {}
        self._live = (
            Live(console=console, get_renderable=self._view, refresh_per_second=4)
            if console.is_terminal and not console.is_dumb_terminal
            else None
        )

    def __enter__(self) -> Progress:
        self.begin()
        if self._live:
            activity.tell("")
            self._live.start()
        else:
            activity.tell(self._line())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
        else:
            activity.tell("")

    def begin(self) -> None:
        """The first step begins now: seconds before it, such as those of the rehearsal, are not a step's."""
        self._began = self._last = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows `metrics`, those of the step that just ended."""
        before, self.done = self.done, step + 1
        # A look inside is shown until the next one.
        self._metrics = {"diagnosis": self._metrics.get("diagnosis"), **metrics}
        self._last = time.monotonic()
        if self._live:
            self._live.refresh()
            return
        activity.tell(self._line())
        every = max(1, round(self.total / 10))
        first = before == self._start
        tenth = self.done // every > before // every
        if first or tenth or self.done == self.total:
            self.console.print(self._line(), soft_wrap=True, highlight=False)
            activity.spoke()
        if "diagnosis" in metrics:
            cells = _shown(metrics, SEEN) + inside(metrics)
            line = "  ".join(f"{label} {value}" for label, value in cells)
            self.console.print(f"inside, step {self.done}: {line}", soft_wrap=True, highlight=False)
            activity.spoke()

    @property
    def seconds_per_step(self) -> float | None:
        steps = self.done - self._start
        return (self._last - self._began) / steps if steps else None

    def _left(self) -> str:
        """How long it will take; before the first step's end, how long that has taken."""
        pace, running = self.seconds_per_step, time.monotonic() - self._last
        if pace is None:
            return f"first step: {duration(running)}"
        steps = self.total - self.done
        # Of the step that runs, what is over is over; one that is late holds the clock.
        return f"{duration(pace * steps - min(running, pace if steps else 0.0))} left"

    def _line(self) -> str:
        parts = [f"{self.title} {self.done}/{self.total}"]
        brief = [shown for shown in SHOWN if shown[0] in BRIEF]
        parts += [f"{label} {value}" for label, value in _shown(self._metrics, brief)]
        parts += [
            f"data {share} of the time"
            for name, share in _time(self._metrics)
            if name == "time: data"
        ]
        if self.seconds_per_step is not None:
            parts += [f"{self.seconds_per_step:.2f} s/step", self._left()]
        return "  ".join(parts)

    def _view(self) -> Group:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(f"{self.title} {self.done}/{self.total}", style="bold"),
            ProgressBar(total=self.total, completed=self.done, complete_style="cyan"),
            Text(self._left(), style="cyan"),
        )
        cells = _shown(self._metrics) + inside(self._metrics) + _time(self._metrics)
        if self.seconds_per_step is not None:
            cells.append(("seconds a step", f"{self.seconds_per_step:.2f}"))
        columns = 3 if self.console.width >= 100 else 2
        body = Table.grid(expand=True, padding=(0, 1))
        for _ in range(columns):
            body.add_column(ratio=3, style="dim", no_wrap=True)
            body.add_column(ratio=1, min_width=9, justify="right", no_wrap=True)
        for i in range(0, len(cells), columns):
            row = cells[i : i + columns]
            body.add_row(*(text for cell in row for text in cell))
        # An empty line for what the keyboard echoes: at the end of a full one, `^C` would begin another, and the first
        # would be drawn twice.
        return Group(head, body, "")


def inside(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What guard questions say, in points with their standard error, and the newest look inside: label and value."""
    cells = []
    for task, seen in (metrics.get("guard") or {}).items():
        for label, key, error in (("lost", "lost", "error"), ("p = 1", "drift", "drift_error")):
            cells.append((f"{task}, {label}", f"{100 * seen[key]:.1f}±{100 * seen[error]:.1f}"))
    looked = metrics.get("diagnosis")
    if not isinstance(looked, Mapping):
        return cells
    cells += _shown(looked, LOOKED)
    gaps = set_point_gaps(looked)
    if gaps.size:
        cells.append(("layers off their set point", f"{100 * np.abs(gaps).max():.1f} pts"))
    return cells


def summary_table(summary: Mapping[str, Any]) -> Table:
    """summary.json as a table: for each task and in all, the dense base, then the policy before and after."""
    table = Table(
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=_title(summary),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    for name in ("", "n", "dense", "before", "after"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    by_task = summary.get("by_task") or {}
    blocks = [*by_task.items(), ("all", summary)] if len(by_task) != 1 else [("all", summary)]
    for number, (task, block) in enumerate(blocks):
        last = number == len(blocks) - 1
        before, after = block.get("before") or {}, block.get("after") or {}
        style = "bold" if last and number else ""
        table.add_row(
            Text(task, style=style or "bold"),
            str(after.get("n") or before.get("n") or ""),
            _with_interval(block.get("dense_accuracy"), block.get("dense_accuracy_ci")),
            *(_with_interval(s.get("accuracy"), s.get("accuracy_ci")) for s in (before, after)),
        )
        table.add_row(
            Text(" tokens kept", style="dim"),
            "",
            _written(1.0, "share"),
            _written(before.get("token_ratio"), "share"),
            Text(_written(after.get("token_ratio"), "share"), style="bold green"),
        )
    return table


def constraint_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the summary says of the accuracy constraint, a line for each task and one for all; none without one."""
    blocks = [*(summary.get("by_task") or {}).items(), ("all, by their shares", summary)]
    lines = []
    for task, block in blocks:
        said = block.get("constraint")
        if not said:
            continue
        points = f"{100 * abs(said['lost']):.2f}"
        way = "gained" if said["lost"] < 0 and points != "0.00" else "lost"
        line = (
            f"{task}: {said['verdict']}, {points} points {way} "
            f"(standard error {100 * said['error']:.2f}), {100 * said['allowed']:g} allowed"
        )
        if said["verdict"] == "not shown" and said["questions"] is not None:
            line += f"; {said['questions']:,} questions would show it"
        lines.append(line)
    return lines


def _title(summary: Mapping[str, Any]) -> str:
    parts = [str(summary["model"])] if summary.get("model") else []
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} steps")
    if summary.get("seconds") is not None:
        parts.append(duration(summary["seconds"]))
    if summary.get("p") is not None:
        parts.append(f"p = {summary['p']}")
    return ", ".join(parts)


def _time(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The share of a step's time that each part takes. `data`: waiting for media to be decoded."""
    parts = metrics.get("seconds")
    if not isinstance(parts, Mapping) or not (total := sum(parts.values())):
        return []
    return [(f"time: {name}", _written(value / total, "share")) for name, value in parts.items()]


def _shown(
    metrics: Mapping[str, Any], keys: Sequence[tuple[str, str, str]] = SHOWN
) -> list[tuple[str, str]]:
    cells = []
    for key, label, kind in keys:
        value = _look(metrics, key)
        if isinstance(value, Mapping):
            cells += [(f"reward: {k}", _written(v, kind)) for k, v in value.items()]
        elif value is not None:
            cells.append((label, _written(value, kind)))
    return cells


def _look(metrics: Mapping[str, Any], key: str) -> Any:
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _written(value: Any, kind: str) -> str:
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        return "-"
    if kind == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.2e}" if kind == "small" else f"{value:.4f}"


def _with_interval(value: Any, interval: Any) -> str:
    text = _written(value, "share")
    if text == "-" or not interval:
        return text
    low, high = (f"{100 * x:.1f}" if x < 0.9995 else "100" for x in interval)
    return f"{text} ({low}-{high})"
