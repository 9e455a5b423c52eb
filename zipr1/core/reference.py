"""docs/recipe.md, made of the classes of zipr1/core/recipe.py: `python -m zipr1.core.reference > docs/recipe.md`.

A class docstring explains its keys, each on a line of its own: `key, other key: what it means.` Lines that go on are
indented, and what comes before the first key is about the whole section.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from zipr1.core.methods import METHODS
from zipr1.core.recipe import Recipe
from zipr1.core.section import Section

HEAD = """# Every key of a recipe

Made from the code by `python -m zipr1.core.reference > docs/recipe.md`; a test fails where the two differ.

A recipe is a YAML file, and what it leaves out has the default here. On the command line a key is changed by
`key=value`: `zipr1 train tiny train.steps=50 sparse.p=0.9`. Unknown keys are refused with the nearest name.
[Choosing](choosing.md) says which of them to change, and what the words mean.
"""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}


def page() -> str:
    """docs/recipe.md."""
    lines = [HEAD]
    for name, section in sections(Recipe):
        about, meanings = explained(section)
        lines += [f"## {name or 'The run'}", ""]
        lines += [f"{about}\n"] if about else []
        lines += ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if _section_in(field.annotation) and not name:
                continue  # a part of this page of its own
            cells = [
                f"`{name}.{key}`" if name else f"`{key}`",
                type_text(field.annotation),
                _default(field.get_default(call_default_factory=True)),
                bounds_text([*field.metadata, *_inner(field.annotation)]),
                meanings[key],
            ]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        if name == "efficiency":
            lines += ["", *(f"* `{method}`: {what}" for method, what in METHODS.items())]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def sections(root: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The section and those in it, with the names that their keys begin with."""
    yield name, root
    for key, field in root.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from sections(inner, f"{name}.{key}" if name else key)


def explained(section: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What a section's docstring says of the whole, and of each key. KeyError later where a key is not explained."""
    about: list[str] = []
    meanings: dict[str, str] = {}
    keys: list[str] = []
    for line in inspect.cleandoc(section.__doc__ or "").split("\n"):
        begins = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if begins and set(begins[1].split(", ")) <= set(section.model_fields):
            keys = begins[1].split(", ")
            meanings |= dict.fromkeys(keys, begins[2])
        elif keys and line.startswith(" "):
            meanings |= {key: f"{meanings[key]} {line.strip()}" for key in keys}
        else:
            about.append(line)
    for key, field in section.model_fields.items():
        if _section_in(field.annotation):
            meanings.setdefault(key, "a section")
    return " ".join(" ".join(about).split()), meanings


def type_text(annotation: Any) -> str:
    """A type in words: `number`, one of the allowed values, `list of ...`, `... or null`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else type_text(one) for one in inner)
    if origin is list:
        return f"list of: {type_text(inner[0])}"
    if origin is dict:
        return f"mapping of names to: {type_text(inner[1])}"
    return "section" if _section_in(annotation) else WORDS[annotation]


def bounds_text(metadata: list[Any]) -> str:
    """`at least 0, below 1`; empty where every value is allowed."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(
        f"{said} {getattr(rule, name):,}"
        for name, said in words.items()
        for rule in metadata
        if getattr(rule, name, None) is not None
    )


def _inner(annotation: Any) -> list[Any]:
    """The bounds inside of `X | None`, `list[X]` and `dict[str, X]`."""
    found: list[Any] = []
    for one in typing.get_args(annotation):
        if typing.get_origin(one) is typing.Annotated:
            for rule in typing.get_args(one)[1:]:
                found += getattr(rule, "metadata", [])
        elif typing.get_origin(one) is not None:
            found += _inner(one)
    return found


def _section_in(annotation: Any) -> type[BaseModel] | None:
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, Section):
            return one
    return None


def _default(value: Any) -> str:
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if isinstance(value, str) else str(value)


if __name__ == "__main__":
    print(page(), end="")
