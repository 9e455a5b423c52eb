"""Files written whole: whoever reads one sees the old or the new content, never a part of it. And their hashes."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from zipr1.core import watch
from zipr1.core.errors import InputError, RunError

# Bytes of a file that one thread hashes at a time.
BLOCK = 2**24


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix, to write to; the file takes the place of `path` when the block ends well.

    For any writer of one file. Several processes and threads may write the same path: the last one wins, whole. When
    the block raises, nothing is left behind and `path` is as it was. The folder must exist.
    """
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".tmp-{path.stem}-{writer}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """A text file in UTF-8, replaced at once."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(folder: Path, option: str) -> None:
    """Raise InputError where `folder` cannot be made or written; nothing is made. option: named in the error."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: this is a file; give a folder to {option}")
    if not there.is_dir():
        raise InputError(
            f"{option} {folder}: cannot be written ({there} is a file); give another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{option} {folder}: cannot be written (no right to write in {there}); give another folder"
        )


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with watch.slow(os.fstat(descriptor).st_size):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, then: str = "resume") -> Iterator[None]:
    """What the disk refuses inside becomes one line with the path. then: what to do when there is space again."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a library's own word for something else
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{path}: cannot be written ({reason}); free some space or mend the permissions, then {then}"
        ) from error


def digest(path: Path) -> str:
    """A hash of the file's content, in hexadecimal: SHA-256 of the CRC-32 of its blocks of BLOCK bytes in their order.

    It finds accidents: each flipped bit, and of larger damage all but one in four billion. CRC-32 takes a third of the
    time that SHA-256 takes, and blocks are hashed in threads, for a checkpoint may have a hundred gigabytes.
    """
    with path.open("rb") as file:
        starts = range(0, os.fstat(file.fileno()).st_size, BLOCK)

        def one(start: int) -> bytes:
            return zlib.crc32(os.pread(file.fileno(), BLOCK, start)).to_bytes(4)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return hashlib.sha256(b"".join(threads.map(one, starts))).hexdigest()
