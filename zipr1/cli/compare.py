"""`zipr1 compare A B`: two runs or two evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipr1.cli.log import busy


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run, or a folder of zipr1 eval.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What it is compared with, of its kind.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for report.html and comparison.json. Default: a new one under runs/.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with comparison.json as one line.")
    ] = False,
) -> None:
    """Two runs or two evaluations on one page, paired where the questions are the same.

    For example: zipr1 compare runs/first runs/second

    Nothing is measured again: the folders hold every answer.
    """
    from zipr1.core.files import check_folder

    if output is not None:
        check_folder(output, "--output")
    with busy(as_json, "reading both folders") as console:
        from zipr1.core.folders import claimed
        from zipr1.evaluate import compare as reading
        from zipr1.evaluate import compared

        one, other = reading.read(a), reading.read(b)
        pairs = reading.compare(one, other)
        with claimed(output, name="compare") as folder:
            path = compared.write(one, other, pairs, folder)
        console.print(compared.table(one, other, pairs, console.width))
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    if as_json:
        from zipr1.core.jsontext import dumps

        print(dumps(compared.as_json(one, other, pairs)), flush=True)
