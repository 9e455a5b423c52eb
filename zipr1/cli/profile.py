"""`zipr1 profile --card`: what a token ratio can be worth, by counting."""

from __future__ import annotations

from typing import Annotated, TypeVar

import typer

N = TypeVar("N", int, float)


def profile(
    model: Annotated[
        str,
        typer.Option(
            help="A bundled config such as qwen2.5-vl-7b, a model folder, a run, or tiny."
        ),
    ] = "tiny",
    lengths: Annotated[
        list[str] | None, typer.Option(help="Prompt tokens: 4096,16384. Default: four, by model.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Shares of tokens kept: 0.1,0.25. Default: 0.25.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    probes: Annotated[int, typer.Option(min=1, help="Queries that score the prompt.")] = 128,
    visual: Annotated[
        float, typer.Option(help="Share of the prompt that is visual tokens: counts the tower.")
    ] = 0.0,
    card: Annotated[
        bool, typer.Option("--card", help="Count operations and bytes; nothing is loaded or run.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End stdout with the rows as one line of JSON.")
    ] = False,
) -> None:
    """Bounds of what sparsity can gain in prefill, decoding and memory, counted from a model's config."""
    from rich.console import Console

    from zipr1 import card as cards
    from zipr1.errors import InputError
    from zipr1.jsontext import dumps

    if not card:
        raise InputError(
            "zipr1 profile counts but does not measure yet: add --card; "
            "python kernels/bench/run.py measures the attention"
        )
    shape = cards.shape_of(model)
    sizes = numbers("--lengths", lengths, int) or cards.default_lengths(shape)
    shares = numbers("--keep", keep, float) or [0.25]
    rows = cards.card(shape, sizes, shares, probes, batch, visual)
    console = Console(stderr=as_json)
    for table in cards.tables(shape, rows, probes, visual):
        console.print(table)
    if as_json:
        print(dumps({"model": shape.name, "rows": rows}), flush=True)


def numbers(option: str, given: list[str] | None, kind: type[N]) -> list[N]:
    """The values of an option that may be repeated or given as a comma list."""
    from zipr1.errors import InputError

    words = [word for item in given or [] for word in item.split(",") if word.strip()]
    try:
        return [kind(word) for word in words]
    except ValueError:
        raise InputError(
            f"{option} {','.join(words)}: give numbers with commas between them"
        ) from None
