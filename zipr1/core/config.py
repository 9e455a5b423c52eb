"""YAML with the sharp edges off: files and `a.b=c` overrides to plain values, every fault one clear line.

`1e-4` is a number (PyYAML alone reads a string), a key written twice is an error, and nothing is ever executed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from zipr1.core.errors import InputError
from zipr1.core.text import one_line


def read(path: Path) -> str:
    """The text of a recipe file."""
    if path.is_dir():
        raise InputError(
            f"{path}: this is a folder; give a recipe file such as {path / 'recipe.yaml'}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        there = f"recipes here: {', '.join(found)}" if found else "there is no recipe in ./recipes"
        raise InputError(f"{path}: no such file; {there}; give the path of a recipe") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason}); a recipe is a YAML file"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def parse(text: str, source: str) -> Any:
    """YAML text as plain values; `source` is named in the error."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise InputError(f"{source}{line}: not YAML: {one_line(what)}; mend this line") from None
    except ValueError as error:  # such as the date 2026-99-99
        raise InputError(
            f"{source}: not YAML: {one_line(error)}; put the value in quotes"
        ) from None


def override(values: dict[str, Any], text: str) -> str:
    """Puts `a.b=c` into `values`; returns the key."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(part.isidentifier() for part in parts):
        raise InputError(
            f"command line: `{text}`: an override is written key=value, such as train.steps=10"
        )
    parsed = parse(value, f"command line: `{text}`")
    for depth, part in enumerate(parts[:-1], start=1):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise InputError(
                f"command line: `{text}`: {'.'.join(parts[:depth])} is {show(values)}, "
                "which has no keys of its own; set it as a whole"
            )
    values[parts[-1]] = parsed
    return key


def show(value: Any) -> str:
    """A value as it may stand in a message: one line, not long."""
    text = one_line(repr(value) if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` is written twice; keep one", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
