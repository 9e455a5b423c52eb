"""`zipr1 profile --card`: what a prefill costs, counted, and its tables: bounds by length, where operations go.

Loads and runs nothing, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from zipr1.core.text import mib, times
from zipr1.models import cost
from zipr1.models.cost import Shape, tera


def count(
    model: str,
    lengths: Sequence[int],
    keeps: Sequence[float],
    batches: Sequence[int],
    probes: int,
    visual: float,
) -> tuple[dict[str, Any], list[Table]]:
    """The rows of every batch size as one result, and the tables of each. Empty lengths and keeps: the defaults.

    Raises InputError for a model, a length or a share that is none.
    """
    shape = cost.shape_of(model)
    rows: list[dict[str, Any]] = []
    shown: list[Table] = []
    for batch in batches:
        here = cost.card(
            shape,
            list(lengths) or cost.default_lengths(shape),
            list(keeps) or [0.25],
            probes,
            batch,
            visual,
        )
        rows += here
        shown += tables(shape, here, probes, visual)
    return {"model": shape.name, "rows": rows}, shown


def tables(s: Shape, rows: list[dict[str, Any]], probes: int, visual: float) -> list[Table]:
    """The bounds over length, and where the operations of the longest prefill go."""
    batch = rows[0]["batch"]
    bounds = Table(
        title=f"{s.name}: bounds by counting, batch {batch}, {probes} probes, {visual:.0%} of tokens visual",
        title_justify="left",
        box=SIMPLE_HEAD,
        caption="layer, prefill, decode: times faster at most, by operations (a decoding step by bytes) at one rate; "
        "KV saved: of the bytes of keys and values",
        caption_justify="left",
    )
    for name in (
        "tokens",
        "kept",
        "skip",
        "layer",
        "prefill",
        "decode",
        "KV saved",
        "KV MiB",
    ):
        bounds.add_column(name, justify="left" if name == "skip" else "right", no_wrap=True)
    for i in range(0, len(rows), 4):
        one, whole, step, cache = rows[i : i + 4]
        bounds.add_row(
            f"{one['length']:,}",
            f"{one['keep']:.0%}",
            one["skip"],
            *(times(row["bound"]) for row in (one, whole, step)),
            f"{1 - 1 / cache['bound']:.1%}",
            mib(cache["kv_bytes"]),
        )
    longest = max(row["length"] for row in rows)
    least = min(row["keep"] for row in rows)
    chosen = [
        r for r in rows if r["phase"] == "prefill" and r["length"] == longest and r["keep"] == least
    ]
    spent = Table(
        title=f"operations of a prefill of {longest:,} tokens, {least:.0%} kept",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    spent.add_column("phase")
    runs = {
        "dense": chosen[0]["dense_phases"],
        **{f"skip: {r['skip']}": r["phases"] for r in chosen},
    }
    for name in runs:
        spent.add_column(name, justify="right")
    for phase in chosen[0]["phases"]:
        spent.add_row(phase, *(tera(phases[phase]["flops"]) for phases in runs.values()))
    spent.add_section()
    spent.add_row(
        "all", *(tera(sum(w["flops"] for w in phases.values())) for phases in runs.values())
    )
    return [bounds, spent]
