"""`zipr1 eval`: benchmarks through lmms-eval, dense beside sparse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zipr1.cli.log import busy, console_of, tell_model
from zipr1.cli.options import Checkpoint, Device
from zipr1.cli.profile import numbers


def evaluate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Recipe values: sparse.skip=attention data.max_frames=32"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run or its checkpoint (RUN/best), a model folder, a hub id, or tiny. Default: the last finished "
            "run, else tiny.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Benchmarks: mmbench,videomme, or image, video, paper13; list shows all. Default: "
            "digits,moving_digits.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="First questions of each benchmark; 0 takes all. Default: 400 of the embedded pictures, 200 of the "
            "embedded clips and totals, all of the others.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P,P",
            help="Values of p: 0.975,0.94; 1.0 is dense. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder. Default: one under runs/, named by what is measured.",
            show_default=False,
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Local copies: a folder for each of the thirteen, with parquet and mp4 files. Default: the hub's "
            "cache.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    base: Annotated[
        bool, typer.Option(help="Measure the untouched model that a run was trained from, too.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the results as one line of JSON.")
    ] = False,
) -> None:
    """Scores and savings of a model, dense beside sparse, on lmms-eval's benchmarks.

    For example: zipr1 eval --tasks mmbench,videomme --budget 1.0,0.975,0.94 --limit 200

    Finished benchmarks are kept: the same command goes on where it was stopped.
    """
    names = [
        name.strip()
        for item in tasks or ["digits,moving_digits"]
        for name in item.split(",")
        if name.strip()
    ]
    if "list" in names:
        from zipr1.evaluate import listing

        listing.show(console_of(as_json))
        if as_json:
            from zipr1.core.jsontext import dumps

            print(dumps(listing.as_json()), flush=True)
        return
    p_values = numbers("--budget", budget, float)

    from zipr1.core import launcher
    from zipr1.core.files import check_folder
    from zipr1.core.runs import find_model
    from zipr1.evaluate.request import EvalRequest, check

    if output is not None:
        check_folder(output, "--output")
    path, why = find_model(model, checkpoint=checkpoint)
    request = EvalRequest(
        path, names, p_values, limit, output, data_root, device, overrides or [], base
    )
    check(request)
    tell_model(model, why, as_json)
    with busy(as_json) as console:
        from zipr1.evaluate import session

        result = session.run(request, sys.argv, console)
    if as_json and launcher.is_first():
        from zipr1.core.jsontext import dumps

        print(dumps(result), flush=True)
