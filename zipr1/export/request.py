"""What is wrong with an export before anything is loaded. Light: no torch here."""

from __future__ import annotations

from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.core.files import check_folder

FORMAT_NAMES = ("merged", "adapter")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


def check_request(run: Path, folder: Path, format: str, dtype: str) -> None:
    """Raises InputError for names that nobody knows, a run that is not there, and a folder that cannot be new."""
    if format not in FORMAT_NAMES:
        raise InputError(f"--format {format}: unknown; allowed: {', '.join(FORMAT_NAMES)}")
    if dtype not in DTYPE_NAMES:
        raise InputError(f"--dtype {dtype}: unknown; allowed: {', '.join(DTYPE_NAMES)}")
    if not run.is_dir():
        what = "this is a file" if run.exists() else "there is no such folder"
        raise InputError(
            f"{run}: not a run directory ({what}); give a folder that zipr1 train wrote, such as runs/tiny-..."
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(
            f"--to {folder}: is there already and is never overwritten; name a new folder, or remove that one"
        )
    check_folder(folder.parent, "--to")
