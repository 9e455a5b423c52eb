"""docs/recipe.md is what the code says, and says it of every key."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from zipr1.core import load, reference
from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.section import Section

PAGE = Path(__file__).parents[2] / "docs/recipe.md"


def test_the_page_is_that_of_the_code():
    said = "out of date: python -m zipr1.core.reference > docs/recipe.md"
    assert PAGE.read_text() == reference.page(), said


def test_every_key_is_on_it_with_a_meaning_of_its_own():
    rows = {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if "| `" in line[:4]}
    values = Recipe().model_dump()
    values["model"]["lora"] = {"rank": 16, "alpha": 32, "dropout": 0.0}
    flat = load._flat(values)
    flat = {k: v for k, v in flat.items() if not isinstance(v, dict) or not v}
    assert set(flat) <= set(rows)
    assert all(len(line.strip("| ").split(" | ")[-1]) >= 4 for line in rows.values())


def test_what_a_section_says_by_hand():
    class Small(Section):
        """Of two things.

        first, second: how many there are,
            in all.
        name: of them.
        """

        first: Annotated[int, Field(ge=1, lt=9)] = 2
        second: Annotated[float, Field(gt=0)] | None = None
        name: Literal["a", "b"] = "a"

    about, meanings = reference.explained(Small)
    assert about == "Of two things."
    assert meanings["first"] == meanings["second"] == "how many there are, in all."
    assert meanings["name"] == "of them."
    fields = Small.model_fields
    assert reference.bounds_text(fields["first"].metadata) == "at least 1, below 9"
    assert reference.type_text(fields["second"].annotation) == "number or null"
    assert reference.bounds_text(reference._inner(fields["second"].annotation)) == "above 0"
    assert reference.type_text(fields["name"].annotation) == "`a` or `b`"


@pytest.mark.parametrize(("key", "value"), [("sparse.p", "1.5"), ("train.steps", "0")])
def test_a_bound_on_the_page_is_the_bound_that_holds(key, value):
    with pytest.raises(InputError, match=key):
        load.load("tiny", [f"{key}={value}"])
