"""`zipr1 train RECIPE`: reads the recipe, hands it to `zipr1/train`, prints the result. Without one it lists them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zipr1.cli.log import busy, console_of, quiet_unless_first, show_log
from zipr1.cli.options import Device


def _names(incomplete: str) -> list[str]:
    """For the completion of a shell."""
    from zipr1.core import recipes

    return [name for name in recipes.names() if name.startswith(incomplete)]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, or a recipe that comes with zipr1, by its name. Without one they are listed.",
            show_default=False,
            autocompletion=_names,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Recipe values to change: train.steps=50", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The run's folder. Default: a new one under runs/.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="auto goes on with the run in --output if there is one; DIR goes on with that run, and RECIPE may be "
            "left out then. train.steps may grow.",
        ),
    ] = "auto",
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="model.dtype: auto, float32, bfloat16, float16. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, roll out once, write nothing.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Only put RECIPE into this folder, to be edited.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the summary as one line of JSON.")
    ] = False,
) -> None:
    """Train a model to need fewer tokens, as RECIPE says.

    For example: zipr1 train tiny train.steps=50

    Prints progress and a table of accuracy and tokens before and after; everything else is in the run's folder.
    """
    from zipr1.core import recipes
    from zipr1.core.folders import folder_of

    given = list(overrides or [])
    by_run = resume not in ("auto", "never") and (recipe is None or _is_change(recipe))
    if by_run:
        given = [*([recipe] if recipe is not None else []), *given]
        recipe = f"{folder_of(None, resume)}/recipe.yaml"
    if recipe is None:
        _list(as_json)
        return
    if copy:
        _copy(recipe, as_json)
        return
    from zipr1.core import launcher
    from zipr1.core.load import code_in, load, refuse_unasked
    from zipr1.core.rundir import RunDir
    from zipr1.train.validate import check, check_sources

    changes = [*given, *([f"model.dtype={dtype}"] if dtype is not None else [])]
    quiet_unless_first()
    run = load(recipe, changes)
    if by_run:
        from zipr1.data.sources import files_in

        refuse_unasked(code_in(run) | files_in(run.data, Path(recipe).parent), recipe, given)
    if not dry_run:
        # By every process: one that ended alone would leave the others waiting.
        RunDir.check(run, output, resume)
    if (
        launcher.size() == 1
    ):  # several judge it together, when they have met: one line tells what is wrong
        check(run)
        if not dry_run:
            check_sources(run)
    with busy(as_json) as console:
        show_log(console)
        if dry_run:
            from zipr1.train import dry_run as plan

            result = plan.dry_run(run, device, console)
        else:
            from zipr1.train import loop

            name = recipes.find(recipe).stem
            result = loop.run(run, output, resume, device, sys.argv, console, name)
    if as_json and launcher.is_first():
        from zipr1.core.jsontext import dumps

        print(dumps(result), flush=True)


def _is_change(text: str) -> bool:
    return "=" in text and not Path(text).is_file()


def _list(as_json: bool) -> None:
    """The recipes that come with zipr1, a line each."""
    from rich.table import Table

    from zipr1.core import recipes
    from zipr1.core.jsontext import dumps

    found = recipes.in_short()
    if as_json:
        print(dumps([recipe._asdict() for recipe in found]))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("recipe", "what is trained", "hardware", "time"):
        table.add_column(name, no_wrap=True)
    for recipe in found:
        table.add_row(*recipe)
    console = console_of(as_json)
    console.print(table)
    console.print(
        "\nHours are counted for A100s, not measured. Train one: zipr1 train tiny\n"
        "Put one here to edit it: zipr1 train tiny --copy",
        highlight=False,
    )


def _copy(recipe: str, as_json: bool) -> None:
    from zipr1.core import recipes
    from zipr1.core.jsontext import dumps

    file = recipes.copy(recipe)
    if as_json:
        print(dumps({"file": str(file)}))
    else:
        line = f"{file}: edit it, then: zipr1 train {file}"
        console_of(as_json).print(line, highlight=False, markup=False, soft_wrap=True)
