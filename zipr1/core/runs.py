"""Run directories by time: which one is meant where none is named."""

from __future__ import annotations

from pathlib import Path

RUNS = Path("runs")


def find_model(given: str | None, runs: Path = RUNS) -> tuple[str, str]:
    """The model to use and a line that says why: the one given, else the newest trained run, else `tiny`."""
    if given is not None:
        return given, f"model: {given}"
    trained = [path for path in runs.glob("*") if (path / "last" / "model").is_dir()]
    if not trained:
        return "tiny", "model: tiny, the embedded one (no run in runs/; choose with --model)"
    newest = max(trained, key=lambda path: (path / "last").stat().st_mtime)
    return str(newest), f"model: {newest}, the last run (choose with --model)"
