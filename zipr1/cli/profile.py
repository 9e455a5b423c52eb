"""`zipr1 profile`: what a token ratio is worth, counted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

N = TypeVar("N", int, float)


def profile(
    model: Annotated[
        str | None,
        typer.Option(
            help="A bundled config such as qwen2.5-vl-7b (random weights), a run, a model folder, a hub id or tiny. "
            "Default: the last run, else tiny.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(help="Prompt tokens, random ones: 4096,16384.", show_default=False),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Shares of tokens kept, exactly: 0.1,0.25. Default: 0.25; with a real prompt what the model keeps.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Prompts at once: 1,8. Default: 1.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Decoder layers of a bundled config to build and time. Default: 2 on a CPU, on a GPU what fits.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Profile a question about this picture.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Profile a question about this clip.")] = None,
    measure_tflops: Annotated[
        bool,
        typer.Option("--measure-tflops", help="Count operations too, and give rates in TFLOP/s."),
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Count operations and bytes; nothing is loaded or run.")
    ] = False,
    visual: Annotated[
        float,
        typer.Option(help="With --card: share of the prompt that is visual tokens, for the tower."),
    ] = 0.0,
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Queries that score the prompt. Default: the model's own, else 128.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for each row; at least 5 turns are taken.")
    ] = 3.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16."),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for profile.json, report.html and figures. Default: a new one under runs/.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with profile.json as one line.")
    ] = False,
) -> None:
    """Prefill, decoding and memory, dense beside sparse: measured, with what could be gained at most."""
    from rich.console import Console

    from zipr1.core.errors import InputError
    from zipr1.core.folders import find_model
    from zipr1.core.jsontext import dumps

    console = Console(stderr=as_json)
    name, why = find_model(model)
    if model is None:
        console.print(why, highlight=False, markup=False)
    sizes, shares = numbers("--lengths", lengths, int), numbers("--keep", keep, float)
    batches = numbers("--batch", batch, int) or [1]
    if min(batches) < 1:
        raise InputError(f"--batch {min(batches)}: give 1 or more")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype}: allowed: auto, float32, bfloat16, float16")
    measured = {
        "--measure-tflops": measure_tflops,
        "--layers": layers,
        "--image": image,
        "--video": video,
    }
    alone = [option for option, value in measured.items() if value]
    if card and alone:
        raise InputError(f"--card counts and runs nothing; leave out {alone[0]}")
    if visual and not card:
        raise InputError("--visual is for --card; to measure the tower give --image or --video")
    if card:
        from zipr1.profiling.card_table import count

        result, tables = count(name, sizes, shares, batches, probes or 128, visual)
        for table in tables:
            console.print(table)
    else:
        from zipr1.core.folders import claimed
        from zipr1.profiling import report
        from zipr1.profiling.session import ProfileRequest
        from zipr1.profiling.session import profile as measure

        request = ProfileRequest(
            name, sizes, shares, batches, layers, probes, image, video, device, dtype,
            measure_tflops, seconds,
        )  # fmt: skip
        with claimed(output, name="profile") as folder:
            with console.status("profile") as status:
                result = measure(request, lambda text: status.update(f"profile: {text}"))
            page = report.write(result, folder)
        report.show(result, console)
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(dumps(result), flush=True)


def numbers(option: str, given: list[str] | None, kind: type[N]) -> list[N]:
    """The values of an option that may be repeated or given as a comma list."""
    from zipr1.core.errors import InputError

    words = [word for item in given or [] for word in item.split(",") if word.strip()]
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise InputError(
            f"{option} {','.join(words)}: give numbers with commas between them"
        ) from None
