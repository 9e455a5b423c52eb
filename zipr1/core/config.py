"""YAML text and `a.b=c` overrides -> plain values, and the mistakes in them as one clear line each.

`1e-4` is a number (PyYAML alone reads a string), a key written twice is an error, and nothing is ever executed. What
a recipe may hold is not here: that is in the classes of zipr1/core/recipe.py.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from zipr1.core.errors import InputError
from zipr1.core.text import one_line

# Values in a YAML text at most, each written out wherever an alias stands for it: a kilobyte of aliases of aliases can
# stand for billions.
MOST = 100_000


def read(path: Path) -> str:
    """The text of a recipe file."""
    if path.is_dir():
        raise InputError(
            f"{path}: this is a folder; give a recipe file such as {path / 'recipe.yaml'}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a recipe") from None
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
    except RecursionError:
        raise InputError(f"{source}: not YAML: nested too deep; write fewer brackets") from None
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


def assignment(key: str, value: str | bool) -> str:
    """The override that gives `key` a value, as it is typed in a shell."""
    text = json.dumps(value, ensure_ascii=False)
    with contextlib.suppress(InputError):
        if isinstance(value, str) and parse(value, "") == value:
            text = value
    return shlex.quote(f"{key}={text}")


def show(value: Any) -> str:
    """A value as it may stand in a message: one line, not long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):
        # Itself inside of itself by an alias, thousands of digits, a date for a key, or nested too deep.
        text = (
            f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__} that cannot be shown"
        )
    text = one_line(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def problem(
    key: str, item: Any, root: type[BaseModel], old_names: Mapping[str, str] | None = None
) -> str:
    """What is wrong with `key`, and what to write. item: an entry of pydantic's `ValidationError.errors()`.

    old_names: other names of keys, which people may have in mind, and today's.
    """
    kind, came, context = item["type"], show(item.get("input")), item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key, root, old_names or {})}"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    bounds = [context[k] for k in ("gt", "ge", "lt", "le") if k in context]
    limit = next((f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in bounds), "")
    allowed = {
        "model_type": "a mapping of keys is allowed",
        "dict_type": "a mapping of names to values is allowed",
        "list_type": "a list is allowed",
        "int_type": "a whole number is allowed",
        "float_type": "a number is allowed",
        "bool_type": "true or false is allowed",
        "string_type": "text is allowed; put it in quotes",
        "finite_number": "a finite number is allowed",
        "literal_error": f"allowed: {context.get('expected')}",
        "greater_than": f"a number above {limit} is allowed",
        "greater_than_equal": f"{limit} or more is allowed",
        "less_than": f"a number below {limit} is allowed",
        "less_than_equal": f"{limit} or less is allowed",
    }.get(kind, item["msg"])
    return f"{key}: got {came}; {allowed}"


def _nearest(key: str, root: type[BaseModel], old_names: Mapping[str, str]) -> str:
    """What to write instead of an unknown key: a neighbour, the same name elsewhere, or the list."""
    *section, name = key.split(".")
    here: type[BaseModel] = root
    for part in section:
        here = _section_of(here, part) or here
    prefix = "".join(f"{part}." for part in section)
    beside = {
        old.rpartition(".")[2]: new for old, new in old_names.items() if old.startswith(prefix)
    }
    near = difflib.get_close_matches(name, [*here.model_fields, *(beside if section else ())], n=1)
    if near:
        return f"did you mean {beside.get(near[0], prefix + near[0])}?"
    keys = {key: key for key in _keys(root)} | dict(old_names)
    near = [k for k in keys if k.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(name, keys, n=1)
    if near:
        return f"did you mean {keys[near[0]]}?"
    return f"allowed here: {', '.join(here.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name in section.model_fields:
        found.append(prefix + name)
        inner = _section_of(section, name)
        if inner:
            found += _keys(inner, f"{prefix}{name}.")
    return found


def _section_of(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    if name not in section.model_fields:
        return None
    annotation = section.model_fields[name].annotation
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number, refuses a key written twice, and aliases that stand for too much."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MOST:
            raise yaml.composer.ComposerError(
                None, None, f"its aliases stand for more than {MOST:,} values", node.start_mark
            )
        return node

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


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in `node` with its aliases written out, MOST + 1 if there are more; what it holds of itself counts as one.
    known: of nodes, by id."""
    if id(node) not in known:
        known[id(node)] = 1
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = min(MOST + 1, 1 + sum(_written_out(part, known) for part in parts))
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
