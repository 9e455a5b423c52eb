"""What a profile shows: tables for the terminal, figures, and one page with all of it and its conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from zipr1.core.files import write_whole, writing
from zipr1.core.jsontext import dumps
from zipr1.core.page import Tile, compared, page_table, render
from zipr1.core.text import mib, number, size, times
from zipr1.models.cost import tera
from zipr1.profiling import plots

Row = Mapping[str, Any]
# Order of a layer's phases wherever they are listed.
PHASES = (
    "projections", "attention", "mlp", "norms", "scoring", "selection", "gathers", "other",
)  # fmt: skip


def table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    out = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in columns:
        left = name in ("skip", "phase")
        out.add_column(name, justify="left" if left else "right", no_wrap=True)
    return out


def rows_of(result: Mapping[str, Any], phase: str) -> list[Row]:
    return [row for row in result["rows"] if row["phase"] == phase and "error" not in row]


def place(row: Row) -> list[str]:
    skip = "dense" if row["skip"] == "none" else row["skip"]
    keep = f"{row['keep']:.0%}" if row["keep"] >= 0.1 else f"{row['keep']:.1%}"
    tokens = f"{row['length']:,}"
    return [tokens if row["batch"] == 1 else f"{row['batch']} x {tokens}", keep, skip]


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.1 else f"{value:.2f}"


def spread(row: Row) -> str:
    """Half the distance from the 20th to the 80th percentile, of the median."""
    return f"{(row['ms_p80'] - row['ms_p20']) / 2 / row['ms']:.0%}"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Prefill, decoding and memory, where a layer's time goes, and with counted operations the rates."""
    model = result["model"]
    firsts = {_key(r): r for r in rows_of(result, "ttft")}
    whole = {_key(r): r for r in rows_of(result, "prefill")}
    guess = any(r["extrapolated"] for r in firsts.values())
    first = table(
        "Prefill",
        ("tokens", "kept", "skip", "layer ms", "±", "faster", "bound", "added", "TTFT ms"),
        "faster: dense / this; bound: the most that this machine's rates allow; added: selection, moving rows, "
        f"Python and the rest, of the layer's time; TTFT: all {model['all_layers']} layers and the logits"
        f"{', extrapolated from ' + str(model['layers']) if guess else ''}; ±: half of p20 to p80",
    )
    for row in rows_of(result, "prefill_layer"):
        sparse = row["skip"] != "none"
        first.add_row(
            *place(row),
            ms(row["ms"]),
            spread(row),
            times(row["speedup"]) if sparse else "",
            times(row["bound"]) if sparse else "",
            f"{row['overhead']:.1%}" if sparse else "",
            ms(firsts[_key(row)]["ms"]),
        )
    caches = {_key(r): r for r in rows_of(result, "kv_cache")}
    steps = rows_of(result, "decode")
    python = {r["batch"]: f"{ms(r['python_ms'])} ms" for r in steps}
    if len(python) > 1:
        python = {b: f"{text} at batch {b}" for b, text in python.items()}
    second = table(
        "Decoding and memory",
        (
            "tokens",
            "kept",
            "skip",
            "step ms",
            "±",
            "tok/s",
            "faster",
            "bound",
            "KV MiB",
            "peak",
        ),
        f"a step: {model['layers']} layers and the logits; Python and launches take at least "
        f"{', '.join(python.values())} of it; KV: of {model['all_layers']} layers; peak: MiB of tensors alive at once "
        "in prefill, without weights",
    )
    for row in steps:
        sparse = row["skip"] != "none"
        second.add_row(
            *place(row),
            ms(row["ms"]),
            spread(row),
            f"{row['tokens_per_s']:,.0f}",
            times(row["speedup"]) if sparse else "",
            times(row["bound"]) if sparse else "",
            mib(caches[_key(row)]["kv_bytes"]),
            mib(whole[_key(row)]["peak_bytes"]),
        )
    out = [first, second]
    parts = phase_table(result)
    if parts is not None:
        out.append(parts)
    if model["counted"]:
        out.append(rate_table(result))
    return out


def phase_table(result: Mapping[str, Any]) -> Table | None:
    """Milliseconds of one layer by phase, at the longest length and the least batch and keep ratio."""
    chosen = longest(result)
    if not chosen:
        return None
    out = table(
        f"A layer's prefill in ms, {place(chosen[0])[0]} tokens",
        ("phase", *("dense" if r["skip"] == "none" else f"skip: {r['skip']}" for r in chosen)),
        "other: rotary embedding, residual sums, Python; norms: with the rotary tables and the last norm",
    )
    for phase in PHASES:
        if any(phase in r["phases"] for r in chosen):
            out.add_row(
                phase,
                *(ms(r["phases"].get(phase, 0.0)) if phase in r["phases"] else "" for r in chosen),
            )
    out.add_section()
    out.add_row("all", *(ms(sum(r["phases"].values())) for r in chosen))
    return out


def rate_table(result: Mapping[str, Any]) -> Table:
    """Counted operations over time, beside the machine's own rates."""
    machine = result["machine"]
    top = machine["matrix_tflops"]
    out = table(
        "Operations counted and their rate",
        (
            "phase",
            "tokens",
            "kept",
            "skip",
            "counted",
            "card",
            "TFLOP/s",
            "matrix",
            "copy",
        ),
        f"this machine: {top:.3g} TFLOP/s in the MLP's product, {machine['attention_tflops']:.3g} in dense attention,"
        f" {machine['copy_gb_s']:.1f} GB/s copied; matrix, copy: shares of the first and last (reading alone can be "
        "faster than copying); card: the least that the method needs",
    )
    for phase, name in (("prefill_layer", "layer"), ("decode", "step")):
        for row in rows_of(result, phase):
            rate = row["tflops"] or 0.0
            out.add_row(
                name,
                *place(row),
                tera(row["counted_flops"]),
                tera(row["card_flops"]),
                f"{rate:.3g}",
                f"{rate / top:.0%}",
                f"{row['copy_share']:.0%}" if "copy_share" in row else "",
            )
    return out


def notes(result: Mapping[str, Any]) -> list[str]:
    """The conditions of every number, what failed and what to beware of."""
    model, machine = result["model"], result["machine"]
    hardware = machine["hardware"]
    device = (
        hardware["device_name"] or f"{hardware['cpu']}, {number(hardware['threads'], 'thread')}"
    )
    versions = machine["versions"]
    text = (
        f"{model['name']}, {model['layers']} of {model['all_layers']} layers, {model['dtype']}, weights: "
        f"{model['weights']}; {device}; torch {versions['torch']}, transformers {versions['transformers']}; input: "
        f"{model['input']}; {model['probes']} probes; dense: torch's fastest attention; medians, dense and sparse by "
        "turns in one process"
    )
    out = [text]
    if model["p"] is not None:
        out.append(f"kept: what p = {model['p']:g} keeps of this prompt, mean over layers")
    timed = [r for r in result["rows"] if "turns" in r]
    if timed:
        out.append(
            f"turns a row: {min(r['turns'] for r in timed)} to {max(r['turns'] for r in timed)}"
        )
    noisy = [r for r in timed if r["noisy"]]
    if noisy:
        out.append(
            f"the machine was noisy: in {len(noisy)} of {len(timed)} rows the spread is over 10 % or the medians of "
            "both halves differ by more than it; close other programs and run again"
        )
    for row in result["rows"]:
        if "error" in row:
            out.append(f"{row['length']:,} tokens, batch {row['batch']}: {row['error']}")
    return out


def longest(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a layer at the longest length: dense and both ways to skip at the least keep ratio."""
    layers = rows_of(result, "prefill_layer")
    if not layers:
        return []
    length = max(r["length"] for r in layers)
    batch = min(r["batch"] for r in layers if r["length"] == length)
    here = [r for r in layers if (r["length"], r["batch"]) == (length, batch)]
    out = [r for r in here if r["skip"] == "none"][:1]
    for skip in ("attention", "layer"):
        same = [r for r in here if r["skip"] == skip]
        out += sorted(same, key=lambda r: float(r["keep"]))[:1]
    return out


def leading(result: Mapping[str, Any]) -> tuple[Row, Row] | None:
    """The rows of the time to the first token that stand for everything: dense, and the faster way to skip, both at the
    longest length, the least batch and the least keep ratio. None where nothing was measured."""
    layers = longest(result)
    firsts = {_key(row): row for row in rows_of(result, "ttft")}
    there = [firsts[_key(row)] for row in layers if _key(row) in firsts]
    sparse = [row for row in there if row["skip"] != "none"]
    if not sparse or there[0]["skip"] != "none":
        return None
    return there[0], min(sparse, key=lambda row: float(row["ms"]))


def advice(result: Mapping[str, Any]) -> str:
    """Why sparse is not faster, and which command shows where it is; empty where it is faster."""
    lead = leading(result)
    if lead is None or lead[1]["speedup"] > 1:
        return ""
    length = lead[1]["length"]
    return (
        f"Sparse is not faster here: at {length:,} tokens, choosing tokens and moving rows costs more than they save. "
        "Longer prompts and larger models gain: zipr1 profile --model qwen2.5-vl-3b --lengths 1024"
    )


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """profile.json, the figures and report.html, into `folder`, which is made. Returns the page's path."""
    path = folder / "report.html"
    with writing(folder, "run again"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "profile.json", dumps(result) + "\n")
        write_whole(path, page(result, plots.draw(result, longest(result), folder)))
    return path


def show(result: Mapping[str, Any], console: Console) -> None:
    """The tables and the conditions of their numbers, on the terminal."""
    for one in tables(result):
        console.print(one)
    for note in [one for one in (advice(result), *notes(result)) if one]:
        console.print(note, style="dim", highlight=False, markup=False)


def page(result: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The whole report. figures: SVG text."""
    lead = leading(result)
    name = result["model"]["name"]
    return render(
        "profile.html",
        title=f"zipr1 profile: {name}",
        name=name,
        headline=_headline(lead),
        lead=_lead(result, lead),
        advice=advice(result),
        tiles=[] if lead is None else _tiles(result, *lead),
        figures=list(figures),
        tables=[page_table(one) for one in tables(result)],
        notes=notes(result),
    )


def _headline(lead: tuple[Row, Row] | None) -> str:
    if lead is None:
        return "Nothing was measured"
    words = compared(lead[0]["ms"], lead[1]["ms"])
    return f"{words[0].upper()}{words[1:]} to the first token"


def _lead(result: Mapping[str, Any], lead: tuple[Row, Row] | None) -> str:
    if lead is None:
        return ""
    row = lead[1]
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    source = result["model"]["input"]
    return (
        f"From dense to sparse with skip: {row['skip']}; {row['length']:,} tokens{batch}, {source}."
    )


def _tiles(result: Mapping[str, Any], dense: Row, sparse: Row) -> list[Tile]:
    """Tokens, time to the first token, decoding and memory, at the place of both rows."""
    kept = place(sparse)[1]
    tiles = [
        Tile("tokens kept", "100%", kept, "of the prompt, mean over layers"),
        Tile(
            "to the first token", f"{ms(dense['ms'])} ms", f"{ms(sparse['ms'])} ms",
            compared(dense["ms"], sparse["ms"]),
        ),
    ]  # fmt: skip
    steps = {_key(row): row for row in rows_of(result, "decode")}
    caches = {_key(row): row for row in rows_of(result, "kv_cache")}
    old, new = steps.get(_key(dense)), steps.get(_key(sparse))
    if old is not None and new is not None:
        words = compared(old["ms"], new["ms"])
        tiles.append(
            Tile("decoding, tokens a second", f"{old['tokens_per_s']:,.0f}", f"{new['tokens_per_s']:,.0f}", words)
        )  # fmt: skip
    if _key(sparse) in caches:
        cache = caches[_key(sparse)]
        saved = f"{1 - cache['kv_bytes'] / cache['dense_kv_bytes']:.1%} saved"
        tiles.append(
            Tile("keys and values", size(cache["dense_kv_bytes"]), size(cache["kv_bytes"]), saved)
        )  # fmt: skip
    return tiles


def _key(row: Row) -> tuple[Any, ...]:
    return row["length"], row["batch"], row["keep"], row["skip"]
