"""Every number of the recipe is bounded by what the code can do with it: beyond is one line, within works.

Keys are found in the classes of the recipe, so that a new one is tried without being named here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import tinymodels
import tinyruns
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from rich.console import Console

from zipr1.core.errors import InputError, RunError
from zipr1.core.load import load, validate
from zipr1.core.recipe import Recipe
from zipr1.core.section import LARGEST
from zipr1.train import dry_run as plan
from zipr1.train import loop
from zipr1.train.page import RunPage
from zipr1.train.validate import MOST_EMBEDDED, check

QUIET = Console(quiet=True)
WHOLE = [0, -1, 2**31, 2**63, 10**24, math.nan, math.inf]
REAL = [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-30, 1e20, 2**31, 2**63, 10**24, 10**400]


def numbers(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type, list[Any]]]:
    """Key, int or float, and bounds of every number of a section and of those inside; of lists and mappings the key is
    that of an entry."""
    for name, field in section.model_fields.items():
        yield from _of(f"{prefix}{name}", field.annotation, list(field.metadata))


def _of(key: str, kind: Any, bounds: list[Any]) -> Iterator[tuple[str, type, list[Any]]]:
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        more = [x for one in more for x in (getattr(one, "metadata", None) or [one])]
        yield from _of(key, kind, bounds + more)
    elif kind in (int, float):
        yield key, kind, bounds
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from numbers(kind, f"{key}.")
    elif get_origin(kind) is list:
        yield from _of(f"{key}[]", get_args(kind)[0], [])
    elif get_origin(kind) is dict:
        yield from _of(f"{key}{{}}", get_args(kind)[1], [])
    else:
        for one in get_args(kind):
            yield from _of(key, one, bounds)


KEYS = {key: (kind, bounds) for key, kind, bounds in numbers(Recipe)}
CONTEXT = {  # what the others must be for a value of this key to stand alone
    "budgets.low": {"high": 1.0},
    "budgets.high": {"low": 5e-324, "low_end": None},
    "budgets.low_end": {"high": 1.0},
    "sparse.probes.recent": {"random": 1},
    "sparse.probes.random": {"recent": 1},
}


def recipe(key: str, value: Any) -> dict[str, Any]:
    """Values of a recipe with one number set."""
    *sections, name = key.split(".")
    last: Any = CONTEXT.get(key, {})
    if name.endswith("[]"):
        name, value = name[:-2], [value, 0.5] if "betas" in name else [value]
    elif name.endswith("{}"):
        name, value = name[:-2], {"digits": value}
    values: dict[str, Any] = {**last, name: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def limit(bounds: list[Any], kinds: tuple[type, ...]) -> float | None:
    found = [getattr(b, k.__name__.lower()) for b in bounds for k in kinds if isinstance(b, k)]
    return found[0] if found else None


def test_numbers_are_found():
    assert {"seed", "model.lora.rank", "optim.betas[]", "data.mix{}", "data.fps"} <= KEYS.keys()
    assert {"efficiency.controller.decay", "sparse.probes.random"} <= KEYS.keys()
    assert len(KEYS) > 60


@pytest.mark.parametrize("key", KEYS)
def test_every_number_has_two_bounds(key):
    _, bounds = KEYS[key]
    low, high = limit(bounds, (Ge, Gt)), limit(bounds, (Le, Lt))
    assert low is not None and high is not None, key
    assert low >= 0 and high <= LARGEST


@pytest.mark.parametrize("key", KEYS)
def test_what_is_out_of_bounds_is_one_line(key, tmp_path):
    """Through a file and the command line alike: the key, what came, and what is allowed."""
    kind, bounds = KEYS[key]
    low, high = limit(bounds, (Ge, Gt)), limit(bounds, (Le, Lt))
    assert low is not None and high is not None
    for value in WHOLE if kind is int else REAL:
        bad = not math.isfinite(value) if isinstance(value, float) else False
        bad = bad or not low <= value <= high
        bad = bad or (value == low and any(isinstance(b, Gt) for b in bounds))
        bad = bad or (value == high and any(isinstance(b, Lt) for b in bounds))
        if not bad:
            validate(recipe(key, value))
            continue
        with pytest.raises(InputError) as told:
            validate(recipe(key, value), "r.yaml")
        line = str(told.value)
        name = key.rstrip("[]{}")
        assert line.startswith(f"r.yaml: {name}") and ": got " in line and " allowed" in line
        assert "\n" not in line and len(line) < 200
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(recipe(key, value)))
        with pytest.raises(InputError) as told:
            load(path)
        assert name in str(told.value)


# --- within the bounds, on a model and data that are here

# Largest values that take as long as they say, and what is tried in their place; and those that the model or other keys
# bound more closely, each tried alone below.
LONG = {
    "budgets.num_generations": 64,
    "budgets.answers_per_budget": 2,
    "ppo.epochs": 8,
    "train.prompts_per_step": 16,
    "model.lora.rank": 256,
}
ALONE = ("train.max_new_tokens", "data.prompts", "data.heldout_prompts", "data.max_prompt_tokens",
         "sparse.dense_below", "budgets.low", "budgets.low_end", "model.min_pixels")  # fmt: skip
SECTIONS = sorted({key.partition(".")[0] for key in KEYS} - {"supervised"})


def extreme(key: str, least: bool) -> Any:
    """The largest value of a number that is allowed, or the least."""
    kind, bounds = KEYS[key]
    low, high = limit(bounds, (Ge, Gt)), limit(bounds, (Le, Lt))
    assert low is not None and high is not None
    if least:
        return 1e-30 if any(isinstance(b, Gt) for b in bounds) else kind(low)
    high = math.nextafter(high, 0) if any(isinstance(b, Lt) for b in bounds) else high
    return kind(LONG.get(key, high))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds") / "model"
    tinymodels.make().save(folder)
    return folder


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in more.items():
        old = out.get(key)
        out[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return out


def base(path: Path, model: Path) -> dict[str, Any]:
    """A recipe of one small step."""
    tinyruns.write(
        path, model, data={"prompts": 4, "heldout_prompts": 1},
        budgets={"num_generations": 2}, train={"steps": 1, "prompts_per_step": 1, "max_new_tokens": 2},
        evaluation={"before": False, "after": False},
    )  # fmt: skip
    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("section", SECTIONS)
def test_all_numbers_of_a_section_at_their_bounds(section, least, model, tmp_path, monkeypatch):
    """A dry run and a step of training work, or the step ends in one line: a loss may overflow."""
    monkeypatch.setattr(RunPage, "_write", lambda self, *a: None)
    monkeypatch.setattr(RunPage, "_curves", lambda self: None)
    values = base(tmp_path / "base.yaml", model)
    for key in KEYS:
        if key.partition(".")[0] == section and not (key in ALONE or (least and key in LONG)):
            values = merged(values, recipe(key, extreme(key, least)))
    if section == "data" and least:
        values = merged(values, {"data": {"mix": {"digits": 1.0}}})  # no shares at all are refused
    settings = validate(values)
    plan.dry_run(settings, "cpu", QUIET)
    if section == "train" and not least:  # a thousand million steps
        monkeypatch.setattr(loop, "train", lambda *a, **b: None)
    said = ""
    try:
        loop.run(settings, tmp_path / "run", "never", "cpu", [], QUIET)
    except RunError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("key", ALONE)
def test_what_the_model_or_other_keys_bound_is_one_line(key, model, tmp_path):
    kind, _ = KEYS[key]
    largest = 0.99 if kind is float else extreme(key, least=False)
    values = merged(base(tmp_path / "base.yaml", model), recipe(key, largest))
    if kind is float or key == "data.max_prompt_tokens":
        plan.dry_run(validate(values), "cpu", QUIET)
        return
    with pytest.raises(InputError) as told:
        plan.dry_run(validate(values), "cpu", QUIET)
    line = str(told.value)
    assert "\n" not in line and ("pixels" in line or "tokens" in line or key in line), line


def test_what_was_accepted_without_a_word():
    for key, value in {
        "train.steps": 10**20, "data.heldout_prompts": 10**8, "optim.lr": 1e20,
        "train.max_new_tokens": 10**9, "seed": 10**24, "train.temperature": 1e-30,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=key):
            validate(recipe(key, value))


def test_embedded_questions_and_answers_of_a_step_are_bounded_together():
    check(validate({"data": {"prompts": MOST_EMBEDDED}}))
    with pytest.raises(
        InputError, match=r"data\.prompts: got 100,001; .* 100,000 or less is allowed"
    ):
        check(validate({"data": {"prompts": MOST_EMBEDDED + 1}}))
    with pytest.raises(InputError, match=r"data\.heldout_prompts: got 100,001"):
        check(validate({"data": {"heldout_prompts": MOST_EMBEDDED + 1, "heldout": "validation"}}))
    rows = {"source": "a.jsonl", "heldout": "b.jsonl"}
    check(validate({"data": {"prompts": 10_000_000, "heldout_prompts": 10_000_000, **rows}}))
    said = r"65,536 x budgets\.num_generations 17 x budgets\.answers_per_budget 1 are 1,114,112"
    with pytest.raises(InputError, match=said):
        check(validate({"train": {"prompts_per_step": 65_536}, "budgets": {"num_generations": 17}}))


def test_lessons_of_sums_alone_come_to_an_end():
    from zipr1.data.digits import tasks
    from zipr1.data.pages import tasks as pages

    for family in (tasks, pages):
        made = family.lesson(0, 0, 2, 0.5, LARGEST, 1.0, 1000)
        assert len(made) == 2
