"""What the JSON files of a run hold, as far as anything reads it; whoever reads one looks here whether it is so.

A person may have changed a file, a copy may be damaged, another version may have written it. Keys that are not named
here may hold anything. Numbers that were NaN or infinite are null in these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from zipr1.core.config import problem
from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads

Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0)]
Position = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Complete(Record):
    """complete.json of a checkpoint; its files are looked at in checksums.py."""

    step: Count


class Run(Record):
    """run.json."""

    versions: dict[str, str | None] = {}
    hardware: dict[str, Any] = {}
    resumed: list[dict[str, Any]] = []


class Answers(Record):
    """One of the two parts of before.json: of each held-out question its name, how right the answer was, the share of
    tokens that each layer kept, and the answer; of some, by their number, the positions that each layer kept."""

    ids: list[str]
    correct: list[Share]
    layer_ratios: list[list[Share]]
    said: list[str]
    heldout: float
    kept: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], list[list[Position]]] = {}
    first_token_ms: float = 0.0
    kv_bytes: float = 0.0


class Pressure(Record):
    """What the controller and the constraint remember, by task or kind; of `start` and `sum` a number for each layer.
    guard: running means of what guard questions say."""

    lost: dict[str, float] = {}
    guard: dict[str, dict[str, dict[str, float]]] = {}
    asked: dict[str, Count] = {}
    fallen: dict[str, Share] = {}
    turns: dict[str, Count] = {}
    back: dict[str, bool] = {}
    answers: dict[str, Annotated[float, Field(ge=0, le=7)]] = {}
    rate: Share = 1.0
    drifted: Count = 0
    start: dict[str, list[Annotated[float, Field(gt=0)]]] = {}
    sum: dict[str, list[float]] = {}


class Merit(Record):
    """Of the best checkpoint: whether the guard found it to hold, and the steps done then."""

    holds: bool = False
    step: Count = 0


class State(Record):
    """state.json of a checkpoint."""

    stage: Count = 0
    skill: float = 0.0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    pressure: Pressure = Pressure()
    right: dict[str, Share] = {}
    merit: Merit = Merit()
    averaged: Count = 0


class Part(Record):
    accuracy: float | None = None
    accuracy_ci: Interval | None = None
    token_ratio: float | None = None
    n: Count | None = None
    token_ratio_by_layer: list[float] | None = None


class Block(Record):
    before: Part | None = None
    after: Part | None = None
    dense_accuracy: float | None = None
    dense_accuracy_ci: Interval | None = None
    difference: float | None = None
    difference_ci: Interval | None = None


class Summary(Block):
    """summary.json."""

    by_task: dict[str, Block] | None = None
    steps: Count | None = None
    rollouts: Count | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None


class AfterAnswers(Answers):
    """The same after training, with what was asked."""

    picture: list[str]
    task: list[str]
    question: list[str]
    answer: list[str]


class After(Record):
    """after.json, as far as two runs are compared."""

    after: AfterAnswers


Amount = Annotated[float, Field(ge=0, le=1e18)]
Score = Annotated[float, Field(ge=-1e9, le=1e9)]


class Row(Record):
    """One benchmark at one p, in results.json and in the benchmark's own file. top: the highest score."""

    task: str
    p: Share
    n: Count
    sparse: Score | None
    top: Annotated[float, Field(gt=0, le=1e9)]
    token_ratio: Amount
    kv_bytes: Amount | None
    first_token_ms: Amount | None = None


class Results(Record):
    """results.json."""

    rows: list[Row]


class UnitsOfScore(Record):
    """What a score is made of, as evaluate/units.py says; score: by p."""

    name: list[str]
    weight: list[Amount]
    cluster: list[str]
    score: dict[str, list[Share] | None]


class Sample(Record):
    """One question with, by p, what was said and how right that is."""

    name: str
    question: str
    target: str
    said: dict[str, str]
    right: dict[str, Share | None]


class Benchmark(Results):
    """A benchmark's file of an evaluation, as far as two evaluations are compared."""

    units: UnitsOfScore
    samples: list[Sample]


FORMS: dict[str, Any] = {
    "complete.json": Complete,
    "run.json": Run,
    "before.json": dict[str, Answers],
    "state.json": State,
    "summary.json": Summary,
}


def read_json(path: Path) -> dict[str, Any]:
    """Any JSON object. Raises InputError."""
    try:
        values = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no readable JSON ({error}); the run directory is damaged"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a JSON object is expected; the run directory is damaged")
    return values


def read(path: Path, then: str) -> dict[str, Any]:
    """The values of a run's JSON file, by the name of `path` one of FORMS.

    then: what to do where it is not as it should be. Raises InputError, with the place in the file.
    """
    values = read_json(path)
    check(values, path, then)
    return values


def check(values: dict[str, Any], path: Path, then: str) -> None:
    """Raises InputError unless the values are what a file of the name of `path` holds."""
    trouble = wrong(values, FORMS[path.name])
    if trouble:
        raise InputError(f"{path}: {trouble}; the file was changed or is damaged: {then}")


def wrong(values: Any, form: Any) -> str | None:
    """What is wrong with the values, the first thing of it; None where they have the form."""
    try:
        TypeAdapter(form).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return problem(".".join(map(str, first["loc"])), first, Record)
    return None
