"""`zipr1 profile`: what a token ratio is worth, counted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from zipr1.cli.log import busy, show_log, tell_model
from zipr1.cli.options import Checkpoint, Device
from zipr1.core.errors import InputError

N = TypeVar("N", int, float)


def profile(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A bundled config such as qwen2.5-vl-7b (random weights), a run, a model folder, a hub id or tiny. "
            "Default: the last finished run, else tiny.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N",
            help="Prompt tokens, random ones: 4096,16384. Default: a real prompt; of a bundled config, four lengths.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE,SHARE",
            help="Shares of tokens kept, exactly: 0.1,0.25. Default: 0.25; with a real prompt what the model keeps.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(metavar="N,N", help="Prompts at once: 1,8. Default: 1.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Decoder layers of a bundled config to build and time. Default: 2 on a CPU, on a GPU what fits.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Profile a question about this picture. Default: an embedded clip.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Profile a question about this clip. Default: an embedded one.",
            show_default=False,
        ),
    ] = None,
    measure_tflops: Annotated[
        bool,
        typer.Option("--measure-tflops", help="Count operations too, and give rates in TFLOP/s."),
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Count operations and bytes; nothing is loaded or run.")
    ] = False,
    visual: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="With --card: share of the prompt that is visual tokens, for the tower.",
        ),
    ] = 0.0,
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Queries that score the prompt. Default: the model's own, else 128.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.0, help="Time for each row; at least 5 turns are taken."
        ),
    ] = 3.0,
    device: Device = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.",
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for profile.json, report.html and figures. Default: a new one under runs/.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with profile.json as one line.")
    ] = False,
) -> None:
    """Prefill, decoding and memory, dense beside sparse: measured, with what could be gained at most.

    For example: zipr1 profile --model qwen2.5-vl-3b --lengths 1024 --keep 0.25
    """
    from zipr1.core.files import check_folder
    from zipr1.core.runs import find_model
    from zipr1.profiling.request import ProfileRequest, check

    sizes, shares = numbers("--lengths", lengths, int), numbers("--keep", keep, float)
    batches = numbers("--batch", batch, int) or [1]
    measured = {
        "--measure-tflops": measure_tflops,
        "--layers": layers,
        "--image": image,
        "--video": video,
        "--output": output,
    }
    alone = [option for option, value in measured.items() if value]
    if card and alone:
        raise InputError(f"--card counts, and runs and writes nothing; leave out {alone[0]}")
    if visual and not card:
        raise InputError("--visual is for --card; to measure the tower give --image or --video")
    name, why = find_model(model, checkpoint=checkpoint)
    request = ProfileRequest(
        name, sizes, shares, batches, layers, probes, image, video, device, dtype, measure_tflops,
        seconds,
    )  # fmt: skip
    check(request)
    if output is not None:
        check_folder(output, "--output")
    tell_model(model, why, as_json)
    with busy(as_json) as console:
        show_log(console)
        if card:
            from zipr1.profiling.card_table import count

            result, tables = count(name, sizes, shares, batches, probes or 128, visual)
            for table in tables:
                console.print(table)
        else:
            from zipr1.core import activity
            from zipr1.core.folders import claimed
            from zipr1.profiling import report
            from zipr1.profiling.session import profile as measure

            with claimed(output, name="profile") as folder:
                result = measure(request)
                activity.tell("drawing the report")
                page = report.write(result, folder)
            activity.tell("")
            report.show(result, console)
            console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        from zipr1.core.jsontext import dumps

        print(dumps(result), flush=True)


def numbers(option: str, given: list[str] | None, kind: type[N]) -> list[N]:
    """The values of an option that may be repeated or given as a comma list."""
    words = [word for item in given or [] for word in item.split(",") if word.strip()]
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise InputError(
            f"{option} {','.join(words)}: give numbers with commas between them"
        ) from None
