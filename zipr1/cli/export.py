"""`zipr1 export RUN --to DIR`: a trained run as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zipr1.cli.log import busy, show_log
from zipr1.cli.options import Checkpoint, Device

if TYPE_CHECKING:
    from rich.text import Text


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A folder that zipr1 train wrote, or a checkpoint in it: RUN/best."
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to", "--output", "-o", metavar="DIR", help="The new folder; never overwritten."
        ),
    ],
    checkpoint: Checkpoint = None,
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
    device: Device = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload the folder to the hub, too, into a private repository. Default: nowhere.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the result as one line of JSON.")
    ] = False,
) -> None:
    """Make a plain Hugging Face folder of a trained run, checked against it.

    For example: zipr1 export runs/mine --to plain

    Any tool takes it for an ordinary dense model; zipr1.load runs it sparse.
    """
    from zipr1.export.hub import check as check_hub
    from zipr1.export.hub import upload
    from zipr1.export.request import check_request

    if push is not None:
        check_hub(push)
    check_request(run, to, format, dtype, checkpoint)
    with busy(as_json) as console:
        show_log(console)
        from zipr1.export import session as exports

        result = exports.export(run, to, format, dtype, device, checkpoint)
        if push is not None:
            result["pushed"] = upload(to, push)
    for line in export_text(result).split("\n"):
        code = line.plain.startswith(" ")  # is copied
        console.print(line, soft_wrap=code or not console.is_terminal)
    if as_json:
        from zipr1.core.jsontext import dumps

        print(dumps(result), flush=True)


def export_text(result: Mapping[str, Any]) -> Text:
    """What `zipr1 export` says when it is done: what was checked, and how to use the folder."""
    from rich.text import Text

    from zipr1.core.text import size

    check, to = result["check"], result["to"]
    stopped = f", which {result['stopped']}" if result["stopped"] else ""
    pushed = f"uploaded: {result['pushed']}\n" if result.get("pushed") else ""
    whom = (
        "peft takes it with its base"
        if result["format"] == "adapter"
        else "Everything else takes it"
    )
    said = f"same answers on {check['same_text']} of {check['n']}"
    return Text.assemble(
        (to, "bold green"),
        f": {result['format']}, {result['dtype']}, {size(result['bytes'])}, "
        f"step {result['step']} of the run{stopped}\n"
        f"checked against the run on {check['n']} {check['questions']}: {said}, logits within "
        f"{check['logits_error']:.1e} (allowed: {check['limit']:g})\n\n"
        "Run it sparse:\n"
        "  import zipr1\n"
        f'  model, processor = zipr1.load("{to}")  # p = {result["p"]:g}\n'
        f"{pushed}{whom} for an ordinary dense model; its README.md tells what was measured.",
    )
