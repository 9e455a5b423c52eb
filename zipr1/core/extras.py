"""What to install for an optional part: the packages themselves, for zipr1 need not be on any index."""

from __future__ import annotations

import importlib.metadata
import re
import shlex


def install(extra: str) -> str:
    """The `pip install` command of an extra of pyproject.toml, such as `data`: of what is missing, else of all."""
    try:
        declared = importlib.metadata.requires("zipr1") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return f"pip install '.[{extra}]' in zipr1's own folder"
    marked = re.compile(rf"""extra == ["']{extra}["']""")
    wanted = [line.partition(";")[0].strip() for line in declared if marked.search(line)]
    if not wanted:  # an extra that is newer than what was installed
        return f"pip install '.[{extra}]' in zipr1's own folder"
    missing = [package for package in wanted if not _installed(package)]
    return f"pip install {shlex.join(missing or wanted)}"


def _installed(requirement: str) -> bool:
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
