"""Options that several commands take, said in one way."""

from __future__ import annotations

from typing import Annotated

import typer

from zipr1.core.errors import InputError

# Kinds of device that torch knows and that a model may run on; whether this one is here, torch has to say.
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")


def _device(value: str | None) -> str | None:
    kind, colon, number = (value or "cpu").partition(":")
    if kind not in DEVICES or (colon and not number.isdecimal()):
        raise InputError(f"--device {value}: give cpu, cuda, or one GPU by its number: cuda:1")
    return value


Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1. Default: cuda where there is one.",
        show_default=False,
        callback=_device,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(metavar="best|last|STEP", help="Of the run. Default: last.", show_default=False),
]
