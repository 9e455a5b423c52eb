"""A process that is killed before its n-th word to the file system: what a kill at any moment leaves behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

WORDS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def killed(root: Path, at: int, work: Callable[[], object]) -> bool:
    """`work` in another process that is killed before its `at`-th word about `root`; whether it was."""
    pid = os.fork()
    if not pid:
        events = 0

        def hook(name, arguments):
            nonlocal events
            if name in WORDS and str(root) in str(arguments):
                events += 1
                if events == at:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
