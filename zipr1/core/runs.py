"""Which run, and which of its checkpoints, a command is to use: read from the run's folder, nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from zipr1.core.checksums import COMPLETE, is_complete
from zipr1.core.errors import InputError
from zipr1.core.folders import RUNS
from zipr1.core.load import load_written
from zipr1.core.records import read

NAMED = ("best", "last")


def names_nothing(model: str) -> bool:
    """Whether a name is neither `tiny`, nor a path that is there, nor of the form of a hub id (owner/name)."""
    if model == "tiny" or Path(model).exists():
        return False
    return model.startswith((".", "/", "~")) or model.count("/") != 1


def find_model(
    given: str | None, runs: Path = RUNS, checkpoint: str | None = None
) -> tuple[str, str]:
    """The model to use and a line that says why: the one given, else the newest finished run, else `tiny`.

    checkpoint: of the run, as `--checkpoint` takes it. A run that did not finish is taken where no other is there, and
    the line says so. Raises InputError for a checkpoint that is not there.
    """
    if given is not None:
        root = run_of(Path(given))
        stopped = root and how_it_stopped(root)
        path, why = given, f"; this run {stopped}" if stopped else ""
        if checkpoint is None:
            return given, f"model: {given}{why}"
    else:
        trained = [path for path in runs.glob("*") if (path / "last" / "model").is_dir()]
        trained.sort(key=lambda path: (path / "last").stat().st_mtime, reverse=True)
        if not trained:
            if checkpoint is not None:
                raise InputError(
                    f"--checkpoint {checkpoint}: no run in {runs}/; name one: --model RUN"
                )
            return "tiny", "model: tiny, the embedded one (no run in runs/; choose with --model)"
        newest = trained[0]
        finished = next((path for path in trained if not how_it_stopped(path)), None)
        chosen = finished or newest
        why = ", the last run"
        if finished is None:
            why += f", which {how_it_stopped(newest)}"
        elif finished != newest:
            why = f", the last finished run: {newest} is newer and {how_it_stopped(newest)}"
        path = str(chosen)
        why += " (choose with --model)"
    if checkpoint is not None:
        path = str(checkpoint_of(Path(path), checkpoint))
    return path, f"model: {path}{why}"


def checkpoint_of(run: Path, name: str) -> Path:
    """`run/best`, `run/last` or the folder of step `name`. Raises InputError where it is not there or not complete."""
    if not (run / "checkpoints").is_dir():
        raise InputError(
            f"--checkpoint {name}: {run} is no run; name a folder that zipr1 train wrote"
        )
    folder = run / name if name in NAMED else run / "checkpoints" / f"step-{_step(name):06d}"
    if not is_complete(folder):
        steps = sorted(p.name for p in (run / "checkpoints").glob("step-*") if is_complete(p))
        there = [n for n in NAMED if (run / n).exists()] + [str(int(s[5:])) for s in steps]
        raise InputError(
            f"--checkpoint {name}: not in {run}; there: {', '.join(there) or 'no complete checkpoint yet'}"
        )
    return folder


def run_of(path: Path) -> Path | None:
    """The run that `path` is or is a checkpoint of; None for anything else."""
    whole = path.resolve()
    near = [(path, path)] if path.is_dir() else []
    if (path / COMPLETE).is_file():
        near += [(path.parent, whole.parent), (whole.parent.parent, whole.parent.parent)]
    for shown, root in near:
        if (root / "run.json").is_file() and (root / "recipe.yaml").is_file():
            return shown
    return None


def how_it_stopped(run: Path) -> str:
    """Empty for a finished run; for another where it stopped, as the end of a sentence: `stopped at step 9 of 60`."""
    try:
        steps = load_written(run / "recipe.yaml").train.steps
        summary = run / "summary.json"
        if summary.is_file() and (read(summary, "").get("steps") or 0) >= steps:
            return ""
    except InputError:
        return "cannot be read in full"
    name = (run / "last").resolve().name
    done = int(name[5:]) if name.startswith("step-") and name[5:].isdigit() else 0
    return f"stopped at step {done} of {steps}" if done < steps else "was stopped before its end"


def _step(name: str) -> int:
    if not name.isdecimal():
        raise InputError(f"--checkpoint {name}: give best, last, or the number of a step")
    return int(name)
