"""complete.json of a checkpoint: which files it has, their sizes and their hashes, and whether they are still so."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zipr1.core.files import digest, sync, write_whole
from zipr1.core.jsontext import dumps, loads

COMPLETE = "complete.json"


def write(folder: Path, step: int) -> None:
    """Waits until every file of the folder is on the disk, and writes complete.json."""
    files = {}
    with ThreadPoolExecutor(1) as beside:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / COMPLETE):
            hashing = beside.submit(
                digest, path
            )  # of what is in memory still, while the disk takes it
            sync(path)
            about = {"bytes": path.stat().st_size, "crc32": hashing.result()}
            files[path.relative_to(folder).as_posix()] = about
    write_whole(folder / COMPLETE, dumps({"step": step, "files": files}, indent=2))


def is_complete(folder: Path) -> bool:
    """Whether every file that complete.json names is there with its size."""
    return _problem(folder, "", False) is None


def problem(folder: Path, part: str = "") -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is as it was written. Reads every byte.

    part: only files whose names begin with it.
    """
    return _problem(folder, part, True)


def _problem(folder: Path, part: str, whole: bool) -> str | None:
    try:
        files = loads((folder / COMPLETE).read_bytes())["files"]
        expected = {str(name): _about(about) for name, about in files.items()}
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (
        OSError,
        ArithmeticError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        return f"{COMPLETE} is not as it was written ({type(error).__name__})"
    for name, (size, known) in expected.items():
        if not name.startswith(part):
            continue
        if name.startswith("/") or ".." in name.split("/"):
            return f"{COMPLETE} names {name}, which is outside of the checkpoint"
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes and was written with {size}"
            if whole and known is not None and digest(path) != known:
                return f"{name} is not as it was written: its hash is another"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError:
            return f"{COMPLETE} names {name!r}, which no file can be called"
    return None


def _about(about: Any) -> tuple[int, str | None]:
    """Size and hash of a file. Checkpoints of the first version have sizes alone, and those of the next one hashes of
    another kind, which are not looked at."""
    if isinstance(about, int):
        return about, None
    known = about.get("crc32")
    return int(about["bytes"]), None if known is None else str(known)
