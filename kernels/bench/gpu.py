"""Ten minutes on a GPU: are the kernels right, how fast are they, and what do prefill, profile and training take?

    python kernels/bench/gpu.py [--out runs/gpu] [--seconds 560] [--small] [--only ops tests]

Each part is a process group of its own with a limit; one that hangs, dies or leaves its GPU in error takes nothing else
along. Rows are added to rows.jsonl as they come. An operation that a check finds wrong is switched off in later parts
(`ZIPR1_KERNELS=auto,-NAME`). Later parts get what time is left. The exit code is 0 whatever the parts found, 2 where
there is no GPU. `--small` runs every part on a CPU, in Triton's interpreter, at sizes that say nothing about speed: it
shows that this script works.

At most eight files: env.json, rows.jsonl, tests.xml, log.txt, profile.json, run.json, trace.json, summary.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Kept back from the last part for the table and for files to be copied; what a part needs to say anything at all.
RESERVE, LEAST = 8.0, 5.0
LOG_BYTES = 4 * 2**20

# Operations that a check looks at, in one process each: one that breaks the GPU leaves the others their answer.
CHECKED = {
    "probe_scores": ("probe_scores",),
    "select_top_p": ("select_top_p", "select_top_k", "select_threshold", "pack_indices"),
    "sparse_prefill": ("sparse_prefill",),
    "kv_compact": ("kv_compact",),
    "sparse_decode": ("sparse_decode",),
    "packed_attention": ("packed_attention",),
    "norm_rope": ("norm_rope",),
}


class Part(NamedTuple):
    """A process: a function of gpu_parts.py, what of it, and seconds at most (on a GPU)."""

    name: str
    seconds: float
    which: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.which}".strip()


# What stands in one line runs at once; only there is nothing timed.
WAVES = [
    [Part("machine", 20)],
    [
        *(Part("ops", 80, op) for op in CHECKED),
        Part("tests", 90),
        Part("shapes", 80),
        Part("memcheck", 80),
    ],
    [Part("timing", 60, "attention")],
    [Part("timing", 25, "scoring")],
    [Part("timing", 20, "decoding")],
    [Part("timing", 35, "configurations")],
    [Part("waits", 30)],
    [Part("profile", 80)],
    [Part("tiny", 60)],
    [Part("step", 90)],
]


class Running:
    """A part under way: its process group, and a thread that copies its output to the log."""

    def __init__(self, part: Part, limit: float, run: Session) -> None:
        self.part, self.began, self.limit = part, time.monotonic(), limit
        self.last = ""
        command = [sys.executable, str(HERE / "gpu_parts.py"), part.name, part.which]
        command += ["--rows", str(run.rows_path), "--out", str(run.out)]
        # It ends by itself a little earlier than it is ended.
        command += ["--seconds", str(max(LEAST, limit - 3)), *(["--small"] if run.small else [])]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=run.environment(part),
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._copy, args=(run,), daemon=True)
        self.reader.start()

    def _copy(self, run: Session) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self.last = line.strip()
            run.log(f"[{self.part.title}] {line.rstrip()}")

    def over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() - self.began > self.limit

    def finish(self) -> str | None:
        """What went wrong; None if it ended well. Whatever it started ends with it."""
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one in the driver may not die
            self.process.wait(2)
        self.reader.join(2)
        if code == 0:
            return None
        if code is None:
            return f"ended after {self.limit:.0f} s; its last words: {self.last[:150]}"
        return f"exit code {code}: {self.last[:200]}"


class Session:
    """One call of this script: its folder, its end, and what is known so far."""

    def __init__(self, out: Path, seconds: float, small: bool) -> None:
        self.out, self.small = out, small
        self.end = time.monotonic() + seconds
        self.rows_path = out / "rows.jsonl"
        self.off: list[str] = []
        self.lock = threading.Lock()
        self.logged = 0
        out.mkdir(parents=True, exist_ok=True)
        for name in ("rows.jsonl", "log.txt"):
            (out / name).write_text("")

    def log(self, line: str) -> None:
        with self.lock:
            if self.logged < LOG_BYTES:
                self.logged += len(line) + 1
                with (self.out / "log.txt").open("a") as file:
                    file.write(line + "\n")

    def row(self, part: Part, name: str, **values: Any) -> None:
        line = {"part": part.name, "which": part.which, "name": name, **values}
        with self.rows_path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for line in self.rows_path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # a part was ended while it wrote
                continue
        return found

    def environment(self, part: Part) -> dict[str, str]:
        own = dict(os.environ)
        before = own.get("PYTHONPATH")
        own["PYTHONPATH"] = os.pathsep.join(
            [*([before] if before else []), str(ROOT), str(ROOT / "kernels")]
        )
        own |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        own["ZIPR1_KERNELS"] = ",".join(["auto", *(f"-{op}" for op in self.off)])
        if self.small:
            own["CUDA_VISIBLE_DEVICES"] = ""
            own["TRITON_INTERPRET"] = "1" if part.name in ("ops", "shapes", "tests") else "0"
        return own

    def wave(self, parts: list[Part]) -> None:
        """Run parts at once, each to its own limit."""
        running = []
        for part in parts:
            left = self.end - time.monotonic() - RESERVE
            limit = min(part.seconds, left)
            if limit < LEAST:
                self.row(part, "not run", ok=None, note="no time was left")
                continue
            running.append(Running(part, limit, self))
        while running:
            for one in [one for one in running if one.over()]:
                running.remove(one)
                wrong = one.finish()
                seconds = round(time.monotonic() - one.began, 1)
                ok = wrong is None
                self.row(one.part, "whole part", ok=ok, seconds=seconds, note=wrong or "")
                print(f"{one.part.title}: {wrong or 'done'} ({seconds} s)", flush=True)
            time.sleep(0.05)
        self.off = wrong_operations(self.rows())


def wrong_operations(rows: list[dict[str, Any]]) -> list[str]:
    """Operations that a check found wrong, or whose check died, or was ended before it had found anything right."""
    found = set()
    right = {row["op"] for row in rows if row["part"] == "ops" and row["ok"] and "op" in row}
    for row in rows:
        if row.get("ok") is not False or row["part"] not in ("ops", "shapes"):
            continue
        if "op" in row:
            found.add(row["op"])
        elif row["part"] == "ops":
            late = str(row.get("note")).startswith("ended after")
            found |= set(CHECKED.get(row["which"], ())) - (right if late else set())
    return sorted(found)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def summary(rows: list[dict[str, Any]], off: list[str], seconds: float) -> str:
    """The table: how each part went, what is wrong, times by length, and the other parts' rows."""
    lines = [
        f"{seconds:.0f} s. Switched off as wrong: {', '.join(off) or 'nothing'}.",
        "",
        "| part | rows | wrong | s | |",
        "|---|---|---|---|---|",
    ]
    titles = list(dict.fromkeys((row["part"], row["which"]) for row in rows))
    for title in titles:
        own = [row for row in rows if (row["part"], row["which"]) == title]
        ends = [row for row in own if row["name"] in ("whole part", "not run")]
        real = [row for row in own if row not in ends]
        bad = sum(row.get("ok") is False for row in real)
        end = ends[-1] if ends else {}
        note = str(end.get("note", ""))[:90]
        name = " ".join(title).strip()
        lines.append(
            f"| {name} | {len(real)} | {bad} | {number(end.get('seconds', ''))} | {note} |"
        )
    wrong = [r for r in rows if r.get("ok") is False and r["name"] != "whole part"]
    lines += ["", *(f"WRONG {line(row)}" for row in wrong[:25])]
    times = [row for row in rows if "p50_ms" in row]
    places = sorted({(row["batch"], row["length"]) for row in times})
    if times:
        heads = " | ".join(f"{length}x{batch}" for batch, length in places)
        lines += ["", f"| p50 ms, tokens x rows | {heads} |", "|---" * (len(places) + 1) + "|"]
        for name in dict.fromkeys(row["name"] for row in times):
            at = {(r["batch"], r["length"]): r["p50_ms"] for r in times if r["name"] == name}
            cells = " | ".join(number(at[p]) if p in at else "" for p in places)
            lines.append(f"| {name} | {cells} |")
    others = ("machine", "tests", "memcheck", "waits", "profile", "tiny", "step")
    told = [r for r in rows if r["part"] in others and r["name"] not in ("whole part", "not run")]
    lines += ["", *(line(row) for row in told if row.get("ok") is not False)]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    hidden = ("part", "which", "name", "ok")
    values = ", ".join(f"{k} {number(v)}" for k, v in row.items() if k not in hidden and v != "")
    return f"{row['part']} {row['which']} {row['name']}: {values}".replace("  ", " ")[:170]


def has_gpu() -> bool:
    """Asked of a process of its own, so that this one holds no memory of the GPU."""
    ask = "import torch; raise SystemExit(not torch.cuda.is_available())"
    try:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False  # a driver that does not answer
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--small", action="store_true", help="every part on a CPU, tiny")
    parser.add_argument("--only", nargs="+", choices=sorted({p.name for w in WAVES for p in w}))
    arguments = parser.parse_args()
    began = time.monotonic()
    run = Session(arguments.out.resolve(), arguments.seconds, arguments.small)
    if not arguments.small and not has_gpu():
        print("error: torch finds no CUDA device; --small runs every part on a CPU")
        return 2
    for parts in WAVES:
        chosen = [p for p in parts if not arguments.only or p.name in arguments.only]
        if run.small and len(chosen) > 2:  # two at a time, for a machine with few cores
            for start in range(0, len(chosen), 2):
                run.wave(chosen[start : start + 2])
        elif chosen:
            run.wave(chosen)
    table = summary(run.rows(), run.off, time.monotonic() - began)
    (run.out / "summary.md").write_text(table + "\n")
    print(f"\n{table}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
