"""What an evaluation leaves behind, written benchmark by benchmark, so that a kill costs only the one under way.

DIR/eval.json               what was measured: model, values of p, conditions
    benchmarks/<name>.json  one benchmark, complete once it is there
    results.json  report.md  report.html  pareto.png  layers.png
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from zipr1.core import records
from zipr1.core.errors import InputError, RunError
from zipr1.core.files import write_whole
from zipr1.core.folders import RUNS
from zipr1.core.jsontext import dumps, loads, plain
from zipr1.core.records import Count, Interval, Record, wrong
from zipr1.core.text import reason

log = logging.getLogger("zipr1")


class Row(records.Row):
    """All of a row that an evaluation writes; what two evaluations are compared by is in core."""

    p: Annotated[float, Field(gt=0, le=1)]
    kv_bytes: float
    seconds: float
    dense_kv_bytes: float
    dense_seconds: float
    speedup: float | None = None
    dense_first_token_ms: float | None = None
    dense: float | None
    difference: float | None
    difference_ci: Interval | None
    base: float | None = None
    base_difference: float | None = None
    base_difference_ci: Interval | None = None
    untrained: float | None = None
    untrained_token_ratio: float | None = None


# A page holds them as they are.
Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


class Conditions(Record):
    max_new_tokens: Count | None
    frames: Count
    fps: float | None
    frame_pixels: Count | None


class Example(Record):
    question: str
    target: str
    said: dict[str, str]
    right: dict[str, float | None]
    p: float
    before: str
    after: str
    token_ratio: dict[str, float]
    pictures: dict[str, Base64]
    first: bool

    @model_validator(mode="after")
    def _both(self) -> Example:
        if not {self.before, self.after} <= self.said.keys():
            raise ValueError("no answer of `before` or of `after`")
        return self


class Benchmark(Record):
    """What of benchmarks/<name>.json is read."""

    task: str
    kind: Literal["image", "video"]
    average: Annotated[float, Field(gt=0)]
    rows: Annotated[list[Row], Field(min_length=1)]
    notes: list[str]
    conditions: Conditions
    prompt_tokens: float
    decoding_seconds: float
    vision_seconds: float
    layers: dict[Annotated[str, Field(pattern=r"^([0-9.]+(e-[0-9]+)?|base, sparse)$")], list[float]]
    lmms_eval: str | None = None
    gallery: list[Example]


class Failed(Record):
    """The same of one that failed."""

    task: str
    error: str


def identity(path: str) -> str:
    """A hash that changes with a model's files: their names, sizes and times; of a hub id, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    seen = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def default_root(model: str, meta: dict[str, Any], base: Path = RUNS) -> Path:
    """`runs/eval-<model>-<hash of meta>`: the same command goes on where it stopped."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name or model).strip("-")
    digest = hashlib.sha256(json.dumps(plain(meta), sort_keys=True).encode()).hexdigest()[:8]
    return base / f"eval-{name}-{digest}"


class Folder:
    """One evaluation's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, output: Path, meta: dict[str, Any]) -> Folder:
        """A new folder, or the one in which the same evaluation was begun.

        Raises InputError for a folder that holds something else.
        """
        meta = plain(meta)
        folder = cls(output)
        written = output / "eval.json"
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: this is a file; give a folder to --output")
        try:
            if written.is_file():
                old = loads(written.read_bytes())
                if not isinstance(old, dict):
                    raise ValueError("eval.json: a JSON object is expected")
                changed = sorted(k for k in {*old, *meta} if old.get(k) != meta.get(k))
                if changed:
                    first = changed[0]
                    raise InputError(
                        f"{output}: holds another evaluation ({', '.join(changed)} differ; {first} was "
                        f"{old.get(first)!r} and is {meta.get(first)!r}); give another --output"
                    )
            else:
                if output.exists() and any(not p.name.startswith(".") for p in output.iterdir()):
                    raise InputError(
                        f"{output}: is not empty and holds no evaluation; give another --output"
                    )
                # Nothing else before eval.json: a kill leaves a folder that is still empty.
                output.mkdir(parents=True, exist_ok=True)
                folder.write("eval.json", dumps(meta, indent=2) + "\n")
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{output}: cannot be used ({error}); give another --output") from None
        return folder

    def done(self, name: str) -> bool:
        """Whether this benchmark has a result here; failed ones are tried again, and those that cannot be read."""
        result = self.read(name)
        return result is not None and "error" not in result

    def read(self, name: str) -> dict[str, Any] | None:
        path = self.root / "benchmarks" / f"{name}.json"
        try:
            values = loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            trouble: str | None = reason(error)
        else:
            failed = isinstance(values, dict) and "error" in values
            trouble = wrong(values, Failed if failed else Benchmark)
        if trouble:
            log.warning("%s: is not as it was written (%s), and is not used", path, trouble)
            return None
        return dict(values)

    def save(self, name: str, values: dict[str, Any]) -> None:
        self.write(f"benchmarks/{name}.json", dumps(values) + "\n")

    def write(self, name: str, text: str) -> None:
        """A whole file, replaced at once."""
        path = self.root / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}); free some space, then run again"
            ) from None
