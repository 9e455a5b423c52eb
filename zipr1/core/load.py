"""Recipes from YAML: files and `a.b=c` overrides to a `Recipe`, unknown keys refused with the nearest name.

Keys that had another name once are read under it too. A key written twice is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zipr1.core import recipes
from zipr1.core.config import assignment, override, parse, problem, read, show
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe

log = logging.getLogger("zipr1")

# Old names of keys, and today's.
OLD_NAMES = {
    "budgets.count": "budgets.num_generations",
    "data.emphasis": "data.hard_kind_boost",
    "efficiency.reach": "efficiency.target_at",
    "optim.schedule": "optim.lr_scheduler_type",
    "ppo.dense": "ppo.dense_kl_fraction",
    "ppo.kl": "ppo.kl_coef",
    "ppo.scale": "ppo.scale_rewards",
    "rewards.correct": "rewards.check",
    "train.prompts": "train.prompts_per_step",
}
# The values of `optim.schedule`, of which one meant something else, and those of `optim.lr_scheduler_type`.
OLD_SCHEDULES = {
    "one_cycle": "cosine",
    "cosine": "cosine_with_min_lr",
    "constant": "constant_with_warmup",
}
# Keys that runs were written with and that nothing reads any more.
GONE = (
    "efficiency.step",
    "efficiency.max_multiplier",
    "efficiency.controller.task_ema_rate",
)
# What runs did before they could be asked for anything else, where that is not what a new one does.
BEFORE = {"train.average": 0.0, "ppo.loss_per": "answer"}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, or the shipped one of that name, with `a.b=c` overrides on top (c is YAML).

    Old names of keys go on working; one warning tells them all, with the new ones.
    """
    values, old = _read(recipes.find(path), str(path))
    keys = [text.partition("=")[0] for text in overrides]
    _refuse_both("command line", [key for key in keys if OLD_NAMES.get(key) in keys])
    overridden = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals and key in OLD_NAMES:
            old.append(key)
            if key == "optim.schedule":
                value = OLD_SCHEDULES.get(value.strip(" '\""), value)
            text = f"{OLD_NAMES[key]}={value}"
        overridden.append(override(values, text))
        values, more = _renamed(values, "command line")  # of `ppo={kl: 1}`
        old += more
    _tell(str(path), old)
    return _validated(values, str(path), overridden)


def load_written(path: str | Path) -> Recipe:
    """A recipe.yaml that zipr1 itself wrote, such as a run's, with all the keys of its time: old names are read, and
    keys that are gone are passed over, without a word; a key that did not exist yet is what the run did without it."""
    values, _ = _read(Path(path), str(path))
    for key in GONE:
        section, name = _section_of(values, key)
        section.pop(name, None)
    for key, value in BEFORE.items():
        section, name = _section_of(values, key)
        if section:
            section.setdefault(name, value)
    return _validated(values, str(path), [])


def names_code(check: str) -> bool:
    """Whether a check is a function in a file of one's own, `path.py:function`, and no name of ours."""
    return ".py:" in check


def code_in(recipe: Recipe) -> dict[str, Any]:
    """The keys that make code run, and their values."""
    code: dict[str, Any] = {}
    if recipe.model.trust_remote_code:
        code["model.trust_remote_code"] = True
    if names_code(recipe.rewards.check):
        code["rewards.check"] = recipe.rewards.check
    return code


def refuse_unasked(named: Mapping[str, Any], path: str | Path, overrides: Sequence[str]) -> None:
    """Raises InputError if `overrides` do not name too what is `named` by a run's own recipe `path`: keys, and their
    values, that make code run or read files outside of the run.

    A run may have come from somewhere else: what is run and read there is the user's to say.
    """
    said: dict[str, Any] = {}
    for text in overrides:
        override(said, text)
    said, _ = _renamed(said, "command line")
    unasked = {key: value for key, value in named.items() if key not in _flat(said)}
    if unasked:
        shown = ", ".join(f"{key}: {show(value)}" for key, value in unasked.items())
        keys = " ".join(assignment(key, value) for key, value in unasked.items())
        raise InputError(
            f"{path}: {shown}: code that would run, or files outside of the run, are for you to name, since a run may "
            "have come from somewhere else: give your recipe (zipr1 train RECIPE --resume DIR), or repeat on the "
            f"command line: {keys}"
        )


def validate(
    values: Mapping[str, Any], source: str = "recipe", overridden: Sequence[str] = ()
) -> Recipe:
    """A `Recipe` from plain values, or one InputError that lists every problem.

    source: named in front of each problem; keys in `overridden` are blamed on the command line instead.
    """
    renamed, old = _renamed(values, source)
    _tell(source, old)
    return _validated(renamed, source, [OLD_NAMES.get(key, key) for key in overridden])


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for every value that differs."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {show(a.get(key))} -> {show(b.get(key))}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _read(path: Path, source: str) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe file by today's names, and the old names that it has. source: named in errors."""
    values = parse(read(path), source)
    if not isinstance(values, dict):
        holds = "nothing" if values is None else show(values)
        raise InputError(
            f"{source}: the file holds {holds}; a recipe is a mapping of keys such as `seed: 0`"
        )
    return _renamed(values, source)


def _renamed(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The values by today's names, and the old names among them. Raises InputError for a key under both."""
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    found, twice = [], []
    for old, new in OLD_NAMES.items():
        section, old_key = old.split(".")
        part, new_key = out.get(section), new.partition(".")[2]
        if not isinstance(part, dict) or old_key not in part:
            continue
        found.append(old)
        if new_key in part:
            twice.append(old)
        value = part.pop(old_key)
        if old == "optim.schedule" and isinstance(value, str):
            value = OLD_SCHEDULES.get(value, value)
        part[new_key] = value
    _refuse_both(source, twice)
    return out, found


def _section_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that the key `a.b.c` is in, to be changed in place (an empty one where there is none), and `c`."""
    *sections, name = key.split(".")
    part: Any = values
    for section in sections:
        part = part.get(section) if isinstance(part, dict) else None
    return (part if isinstance(part, dict) else {}), name


def _refuse_both(source: str, twice: Sequence[str]) -> None:
    if twice:
        both = ", ".join(f"{old} and {OLD_NAMES[old]}" for old in dict.fromkeys(twice))
        raise InputError(
            f"{source}: {both} are the old and the new name of one key; keep the new one"
        )


def _tell(source: str, old: Sequence[str]) -> None:
    if old:
        pairs = ", ".join(f"{name} -> {OLD_NAMES[name]}" for name in sorted(set(old)))
        log.warning("%s: old names of recipe keys, which go on working: %s", source, pairs)


def _validated(values: Mapping[str, Any], source: str, overridden: Sequence[str]) -> Recipe:
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"] if part != "[key]")
            blamed = any(
                f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for o in overridden
            )
            line = problem(key, item, Recipe, OLD_NAMES)
            problems.append(f"{'command line' if blamed else source}: {line}")
        raise InputError("; ".join(problems)) from None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
