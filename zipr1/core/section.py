"""What every section of a recipe is made of: strict types, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Every number has an upper bound, above anything of use and below what overflows: the largest 32-bit integer where
# nothing else is known. tests/core/test_bounds.py tries the bounds of all keys.
LARGEST = 2**31 - 1

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=1, le=100_000_000)]
Prompts = Annotated[int, Field(ge=1, le=10_000_000)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
