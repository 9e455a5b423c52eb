"""`zipr1 export RUN --to DIR`: a trained run as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that zipr1 train wrote.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The new folder; never overwritten.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="merged|adapter",
            help="merged: a whole model, for any tool. adapter: what a LoRA run trained, for peft.",
        ),
    ] = "merged",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of the weights: float32, bfloat16, float16, or auto: as they were trained.",
        ),
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 (without it, cuda where there is one).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the result as one line of JSON.")
    ] = False,
) -> None:
    """Make a plain Hugging Face folder of a trained run, checked against it.

    Any tool takes it for an ordinary dense model; zipr1.load runs it sparse.
    """
    from rich.console import Console

    from zipr1.cli.log import show_log
    from zipr1.core.jsontext import dumps
    from zipr1.export import session as exports

    console = Console(stderr=as_json)
    show_log(console)
    with console.status(f"exporting {run}"):
        result = exports.export(run, to, format, dtype, device)
    for line in export_text(result).splitlines():
        console.print(line, soft_wrap=line.startswith(" "), highlight=False)  # code is copied
    if as_json:
        print(dumps(result), flush=True)


def export_text(result: Mapping[str, Any]) -> str:
    """What `zipr1 export` says when it is done: what was checked, and how to use the folder."""
    from rich.markup import escape

    from zipr1.core.text import size

    check, to = result["check"], result["to"]
    said = f"same answers on {check['same_text']} of {check['n']}"
    return (
        f"[bold green]{escape(to)}[/]: {result['format']}, {result['dtype']}, {size(result['bytes'])}, "
        f"step {result['step']} of the run\n"
        f"checked against the run on {check['n']} {check['questions']}: {said}, logits within "
        f"{check['logits_error']:.1e} (allowed: {check['limit']:g})\n\n"
        "Run it sparse:\n"
        "  import zipr1\n"
        f'  model, processor = zipr1.load("{escape(to)}")  # p = {result["p"]:g}\n'
        "Everything else takes it for an ordinary dense model; its README.md tells what was measured."
    )
