"""Mistakes in a recipe as one clear line: what came, what is allowed, and the nearest name. Not what is allowed itself:
that is in the classes of zipr1/core/recipe.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from zipr1.core.config import show


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
    limit = next((f"{context[k]:g}" for k in ("gt", "ge", "lt", "le") if k in context), "")
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
