"""`zipr1 profile --card` as tables: the bounds by length, and where the operations go. Needs no torch."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from zipr1.models.cost import Shape, tera


def tables(s: Shape, rows: list[dict[str, Any]], probes: int, visual: float) -> list[Any]:
    """The bounds over length, and where the operations of the longest prefill go."""
    batch = rows[0]["batch"]
    bounds = Table(
        title=f"{s.name}: bounds by counting, batch {batch}, {probes} probes, {visual:.0%} of tokens visual",
        title_justify="left",
        box=SIMPLE_HEAD,
        caption="operations (layer, prefill) or bytes (decode, KV cache), dense / sparse: the most at one rate",
        caption_justify="left",
    )
    for name in (
        "tokens",
        "kept",
        "skip",
        "layer",
        "prefill",
        "decode",
        "KV cache",
        "KV MiB",
    ):
        bounds.add_column(name, justify="left" if name == "skip" else "right", no_wrap=True)
    for i in range(0, len(rows), 4):
        one, whole, step, cache = rows[i : i + 4]
        bounds.add_row(
            f"{one['length']:,}",
            f"{one['keep']:.0%}",
            one["skip"],
            *(f"{r['bound']:.2f}x" for r in (one, whole, step, cache)),
            f"{cache['kv_bytes'] / 2**20:,.1f}",
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
