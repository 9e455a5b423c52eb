"""What `zipr1 profile` is asked for, and what is wrong with it before anything is loaded. Light: no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.core.runs import names_nothing
from zipr1.models import cost


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile. lengths, keeps: empty for defaults. seconds: of timing for each variant, at least 5 turns."""

    model: str
    lengths: Sequence[int] = ()
    keeps: Sequence[float] = ()
    batches: Sequence[int] = (1,)
    layers: int | None = None
    probes: int | None = None
    image: Path | None = None
    video: Path | None = None
    device: str | None = None
    dtype: str = "auto"
    count: bool = False
    seconds: float = 3.0


def check(request: ProfileRequest) -> None:
    """Raise InputError for requests that contradict themselves, and for numbers that no model can be given."""
    if request.image is not None and request.video is not None:
        raise InputError("--image and --video were both given; profile one after the other")
    if request.lengths and (request.image is not None or request.video is not None):
        raise InputError(
            "--lengths makes random prompts and --image or --video real ones; give one"
        )
    for path in (request.image, request.video):
        if path is not None and not path.is_file():
            raise InputError(f"{path}: no such file; check the path")
    if names_nothing(request.model) and request.model not in cost.bundled():
        raise cost.unknown(request.model)
    check_numbers(request.lengths, request.keeps, request.batches)
    _check_sizes(request)
    if request.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(
            f"--dtype {request.dtype}: allowed: auto, float32, bfloat16, float16; leave it out for auto"
        )


def _check_sizes(request: ProfileRequest) -> None:
    """Raise InputError for layers and lengths that the model has not, as far as that is known without opening it, and
    for pictures that random weights cannot see."""
    name, bundled = request.model, request.model in cost.bundled()
    if request.layers is not None and not bundled:
        raise InputError(
            f"--layers is for a bundled config with random weights and {name} has weights; leave it out"
        )
    if bundled and (request.image is not None or request.video is not None):
        raise InputError(
            "random weights of a bundled config have no tokenizer for --image or --video; give --lengths, or --model "
            "with a model folder"
        )
    if not bundled and name != "tiny":
        return
    shape = cost.shape_of(name)
    if request.layers is not None and not 1 <= request.layers <= shape.layers:
        raise InputError(f"--layers {request.layers} is outside 1..{shape.layers}, what {name} has")
    if max(request.lengths, default=1) > shape.limit:
        raise InputError(
            f"--lengths {max(request.lengths)} is outside 1..{shape.limit}, what {name} was made for"
        )


def check_numbers(lengths: Sequence[int], keeps: Sequence[float], batches: Sequence[int]) -> None:
    """Raise InputError for lengths and batches below 1, and shares outside of (0, 1]."""
    for option, values in (("--lengths", lengths), ("--batch", batches)):
        if min(values, default=1) < 1:
            raise InputError(f"{option} {min(values)}: give 1 or more")
    for keep in keeps:
        if not 0 < keep <= 1:
            raise InputError(f"--keep {keep:g}: outside (0, 1]; give shares of the tokens: 0.25")
