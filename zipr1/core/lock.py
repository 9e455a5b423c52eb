"""One process for each folder that is written: a lock that ends with the process that holds it, however it ends.

It is `flock` on the file `.lock` in the folder, or beside a folder that is still to be made. Linux tells it to NFS
servers and to most cluster file systems, so that it holds between machines; a mount that keeps locks to its own machine
(`local_lock` of NFS, `localflock` of Lustre) does not, and one that has no locks at all is told in a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.core.jsontext import dumps, loads

NAME = ".lock"  # in a folder
# What a file system without locks answers; EWOULDBLOCK alone means that another process has it.
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

log = logging.getLogger("zipr1")


@contextlib.contextmanager
def locked(path: Path, folder: Path) -> Iterator[None]:
    """Inside, the lock file `path` of `folder` is this process's. The folder that it lies in must exist.

    Raises InputError at once, with the process and the machine that hold it, if another one does.
    """
    descriptor = _acquire(path, folder)
    try:
        yield
    finally:
        # Removed while it is held: who waited for this file finds it gone from its name, and takes the next one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, folder: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written ({error.strerror}); give another folder"
            ) from None
        try:
            _flock(descriptor, folder)
            if _is_still(descriptor, path):
                about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                os.ftruncate(descriptor, 0)
                with contextlib.suppress(OSError):  # a full disk: it is locked all the same
                    os.write(descriptor, dumps(about).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed by who held it before: there may be a new one


def _flock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another zipr1 writes here ({_holder(descriptor)}); wait for it, stop it, or give "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        log.warning(
            "%s: no lock on this file system (%s): start nothing else in this folder",
            folder,
            error.strerror,
        )


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the file that was opened is the one that has the name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        about = loads(os.pread(descriptor, 4096, 0))
        return f"process {int(about['pid'])} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has only just begun"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
