"""What is wrong with an export before anything is loaded. Light: no torch here."""

from __future__ import annotations

from pathlib import Path

from zipr1.core.checksums import COMPLETE, is_complete
from zipr1.core.errors import InputError
from zipr1.core.files import check_folder
from zipr1.core.runs import checkpoint_of, run_of

FORMAT_NAMES = ("merged", "adapter")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


def check_request(run: Path, folder: Path, format: str, dtype: str, checkpoint: str | None) -> None:
    """Raises InputError for names that nobody knows, a run or a checkpoint that is not there, and a folder that cannot
    be new."""
    if format not in FORMAT_NAMES:
        raise InputError(f"--format {format}: unknown; allowed: {', '.join(FORMAT_NAMES)}")
    if dtype not in DTYPE_NAMES:
        raise InputError(f"--dtype {dtype}: unknown; allowed: {', '.join(DTYPE_NAMES)}")
    find_checkpoint(run, checkpoint)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(
            f"--to {folder}: is there already and is never overwritten; name a new folder, or remove that one"
        )
    check_folder(folder.parent, "--to")


def find_checkpoint(path: Path, checkpoint: str | None) -> tuple[Path, Path]:
    """The run that `path` is or is a checkpoint of (RUN/best), and the folder of the checkpoint.

    checkpoint: `best`, `last`, a step, or None: the last. Raises InputError if there is no such run or checkpoint, and
    for a checkpoint asked of another one.
    """
    if (path / COMPLETE).is_file() and (root := run_of(path)) is not None:
        if checkpoint is not None:
            raise InputError(
                f"--checkpoint {checkpoint}: {path} is a checkpoint itself; give its run, or leave --checkpoint out"
            )
        return root, path
    if not (path / "recipe.yaml").is_file() or not (path / "run.json").is_file():
        what = "it has no recipe.yaml and run.json"
        if not path.is_dir():
            what = "this is a file" if path.exists() else "there is no such folder"
        raise InputError(
            f"{path}: not a run directory ({what}); give a folder that zipr1 train wrote, such as runs/tiny-..."
        )
    last = path / "last" if checkpoint in (None, "last") else checkpoint_of(path, str(checkpoint))
    if not last.exists() or not is_complete(last):
        raise InputError(
            f"{path}: the run has no complete checkpoint yet; resume it with zipr1 train RECIPE --resume {path}"
        )
    return path, last
