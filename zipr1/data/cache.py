"""The folder of clips that are drawn and of pictures that came inside of rows: files named by their content.

It may be removed whenever nothing runs; what is needed again is written again. Ranks and runs share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zipr1.core.errors import RunError
from zipr1.core.files import replacing


def cache_directory() -> Path:
    """$ZIPR1_CACHE, or ~/.cache/zipr1."""
    return Path(os.environ.get("ZIPR1_CACHE") or Path.home() / ".cache" / "zipr1")


@dataclass(frozen=True)
class KeptPicture:
    """An encoded picture that came inside of a row and lies in a file now. key: sha1 of its bytes."""

    key: str

    @property
    def path(self) -> Path:
        # A folder for each beginning, or one would have all of a hundred thousand files.
        return cache_directory() / "pictures" / self.key[:2] / self.key

    def read(self) -> bytes:
        """Raises RunError if somebody has removed the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{self.path}: a picture of the data is gone ({error.strerror}); start again, which brings it back"
            ) from error


def kept_picture(encoded: bytes) -> KeptPicture:
    """The picture in a file, so that nobody has to hold its bytes in memory."""
    name = hashlib.sha1(encoded).hexdigest()
    picture = KeptPicture(name)
    path = picture.path
    with _stored(path):
        if not path.is_file() or path.stat().st_size != len(encoded):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not `replacing`, which waits for the disk: of a hundred thousand pictures that takes minutes.
            temporary = path.with_name(f".tmp-{name}-{os.getpid()}-{threading.get_ident()}")
            temporary.write_bytes(encoded)
            os.replace(temporary, path)
    return picture


def kept_clip(name: str, write: Callable[[Path], None]) -> Path:
    """The file called `name`; `write` makes it where it is missing."""
    path = cache_directory() / name
    with _stored(path):
        if not path.is_file() or path.stat().st_size == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                write(temporary)
    return path


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path.parent}: clips and pictures cannot be stored there ({error.strerror or error}); set ZIPR1_CACHE to "
            "a folder"
        ) from error
