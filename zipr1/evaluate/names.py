"""The names that `--tasks` takes: our suites and groups, and lmms-eval's own tasks, read from its files. Nothing of
lmms-eval is imported: that takes seconds, and a wrong name is told at once."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from zipr1.core import extras
from zipr1.core.errors import InputError
from zipr1.evaluate.suites import LMMS_EVAL, Suite, resolve

# A key at the start of a line of a task file that gives a name, and the value beside it.
NAMED = re.compile(r"""^["']?(task|group|tag)["']?[ \t]*:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)
NAME = re.compile(r"""["']([^"'\n]+)["']|(\w[\w.+-]*)""")


def suites_of(names: Sequence[str]) -> list[Suite]:
    """As `resolve`, with lmms-eval's own tasks among what is known. Raises InputError where it is not installed."""
    try:
        return resolve(names)
    except InputError:
        return resolve(names, own_tasks())


@functools.cache
def own_tasks() -> tuple[str, ...]:
    """The names of lmms-eval's own tasks, groups and tags, sorted."""
    found: set[str] = set()
    for path in (lmms_eval_folder() / "tasks").rglob("*yaml*"):
        if path.suffix in (".pyc", ".py") or not path.is_file():
            continue
        for key, value in NAMED.findall(path.read_text(encoding="utf-8-sig", errors="replace")):
            lines = value.split("\n")
            # Of a group, `task` lists its members, each of which has a file of its own.
            inside = lines[:1] if key == "task" else lines
            for line in inside:
                found |= {quoted or plain for quoted, plain in NAME.findall(line.partition("#")[0])}
    return tuple(sorted(found))


def lmms_eval_folder() -> Path:
    """Where lmms-eval is installed. Raises InputError, with what to install, where it is not."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"zipr1 eval needs lmms-eval: {how_to_install()}")
    return Path(spec.submodule_search_locations[0])


def how_to_install() -> str:
    return f"{extras.install('eval')} and pip install --no-deps lmms-eval=={LMMS_EVAL} (make install does both)"
