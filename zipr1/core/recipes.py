"""The recipes that come with zipr1, by name: the folder recipes/ of the repository, which a wheel brings along.

What a recipe may hold is in recipe.py, and reading one is in load.py.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from zipr1.core.config import read
from zipr1.core.errors import InputError
from zipr1.core.files import write_whole

# A link to recipes/ in a checkout, a folder in an installed wheel.
SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "recipes"
# The first line of each: what is trained on what | hardware | time.
IN_SHORT = re.compile(r"# In short: ([^|\n]+) \| ([^|\n]+) \| ([^|\n]+)\n")


class InShort(NamedTuple):
    """A line of the list: `name` is what `zipr1 train` takes."""

    name: str
    what: str
    hardware: str
    time: str


def names() -> list[str]:
    """Those for the embedded model first: they run anywhere."""
    found = [path.stem for path in SHIPPED.glob("*.yaml")]
    return sorted(found, key=lambda name: (not name.startswith("tiny"), name))


def find(given: str | Path) -> Path:
    """The file of a recipe: a path, or a name such as `tiny`.

    `recipes/tiny.yaml` is the shipped one where no such file is here. Raises InputError for what is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    here = path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml")
    if here and path.stem in names():
        return SHIPPED / f"{path.stem}.yaml"
    if path.exists():  # a folder: read() says so
        return path
    if "=" in str(given):
        raise InputError(
            f"{given}: the recipe comes first, then values: zipr1 train tiny {given}; zipr1 train lists recipes"
        )
    near = difflib.get_close_matches(path.stem, names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"{given}: no such file and no recipe of that name; {hint}give the path of a YAML file, or one of: "
        f"{', '.join(names())}"
    )


def in_short() -> list[InShort]:
    """Every shipped recipe in a line."""
    found = []
    for name in names():
        match = IN_SHORT.match(read(SHIPPED / f"{name}.yaml"))
        assert match, name  # a test reads them all
        found.append(InShort(name, *match.groups()))
    return found


def copy(given: str | Path, folder: Path = Path()) -> Path:
    """Puts a recipe into `folder`, to be edited; returns the new file. Never overwrites one."""
    source = find(given)
    target = folder / source.name
    if target.exists():
        raise InputError(f"{target}: is there already and is never overwritten; rename that one")
    write_whole(target, read(source))
    return target
