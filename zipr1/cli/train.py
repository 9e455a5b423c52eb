"""`zipr1 train RECIPE`: reads the recipe, hands it to `zipr1/train`, prints the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file such as recipes/tiny.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe values to change: train.steps=50"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The run's folder (without it, a new one under runs/)."
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="auto goes on with the run in --output if there is one; DIR goes on with that run.",
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1 (without it, cuda where there is one)."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Same as model.dtype=...: auto, float32, bfloat16, float16.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, roll out once, write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the summary as one line of JSON.")
    ] = False,
) -> None:
    """Train a model to need fewer tokens, as RECIPE says.

    Prints progress and a table of accuracy and tokens before and after; everything else is in the run's folder.
    """
    from rich.console import Console

    from zipr1.cli.log import quiet_unless_first, show_log
    from zipr1.core.load import load

    changes = [*(overrides or []), *([f"model.dtype={dtype}"] if dtype is not None else [])]
    quiet_unless_first()
    run = load(recipe, changes)

    from zipr1.core import distributed
    from zipr1.core.jsontext import dumps

    # With --json, stdout is for the machine; of several ranks the first one speaks.
    console = Console(stderr=as_json, quiet=not distributed.is_first())
    show_log(console)
    if dry_run:
        from zipr1.train import dry_run as plan

        result = plan.dry_run(run, device, console)
    else:
        from zipr1.train import loop

        result = loop.run(run, output, resume, device, sys.argv, console, recipe.stem)
    if as_json and distributed.is_first():
        print(dumps(result), flush=True)
