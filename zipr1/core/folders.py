"""Which folder a run takes, which one is meant, and that it is one process's alone while it is written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from zipr1.core import lock
from zipr1.core.errors import InputError, RunError

RUNS = Path("runs")


def new_folder(name: str, base: Path = RUNS) -> Path:
    """Makes a folder that nobody else has: `runs/<name>-<date>-<time>`, with a counter where that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for tail in ("", *(f"-{i}" for i in range(2, 1000))):
        path = base / f"{stem}{tail}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"{path}: cannot be made ({error.strerror}); name a folder with --output"
            ) from None
        return path
    raise RunError(f"{base}: a thousand runs called {stem} are there; clear some away")


@contextlib.contextmanager
def claimed(output: Path | None, resume: str = "auto", name: str = "run") -> Iterator[Path]:
    """The folder that `RunDir.open` would take; inside, no other process can have it.

    Raises InputError for a folder that another process writes, with its number and its machine, for a folder that
    cannot be written, and for a `resume` that is no run. A folder that was made here and stays empty goes again.
    """
    folder = folder_of(output, resume)
    made = folder is None or not folder.exists()
    if folder is None:
        folder = new_folder(name)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: this is a file; give a folder to --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); give another --output"
        ) from None
    try:
        with lock.locked(folder / lock.NAME, folder):
            yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def folder_of(output: Path | None, resume: str) -> Path | None:
    """The folder of a run that is named by `--output` or `--resume`, or None for a new one."""
    if resume in ("auto", "never"):
        return output
    if output is not None and output.resolve() != Path(resume).resolve():
        raise InputError(
            f"--resume {resume} and --output {output} name two folders; a run goes on in its own: "
            "leave --output out"
        )
    if not (Path(resume) / "recipe.yaml").is_file():
        raise InputError(f"{resume}: not a run directory (no recipe.yaml); check --resume")
    return Path(resume)
