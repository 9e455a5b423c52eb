"""Options that several commands take, said in one way."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1. Default: cuda where there is one.", show_default=False),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(metavar="best|last|STEP", help="Of the run. Default: last.", show_default=False),
]
