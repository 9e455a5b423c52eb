"""The theoretical card: operations and bytes of a model's phases, dense and sparse, and what they bound.

Counted, never measured; no weight and no network is needed, only a config. The conventions, for `l` prompt tokens of
which `n` are kept in a layer:

* a product of (a, b) by (b, c) is 2 a b c operations; causal attention over x tokens is 2 * HQ * D * x * (x + 1);
* `skip: attention`: Q, K, V and the MLP of all tokens; the output projection of the kept ones (it is linear and the
  others' input is 0); `skip: layer`: K of all tokens, Q of the kept ones and the probes, V, O and MLP of the kept ones;
* scoring is the product of the probes' queries with all keys; selection moves bytes and counts no operations;
* bytes are the weights once and every phase's inputs and outputs once, the least that a phase can move.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads

# The most visual tokens of one picture, by the default max_pixels of Qwen2-VL and Qwen2.5-VL (12,845,056 of 28 x 28
# each).
PICTURE = 16384

# Families whose sizes say all that is counted here.
SIZED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

Skip = Literal["none", "attention", "layer"]


class Work(NamedTuple):
    """Operations and bytes."""

    flops: float
    bytes: float

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model. size: bytes of a number. mergers: of the tower, what deepstack
    adds among them; places: its learned positions; head_norms: norms of queries and keys stand in place of their biases
    (Qwen3-VL). counted: parameters by part, of a loaded model of another family (memory.py), which cannot be had from
    the sizes; per_rank: likewise parameters of its adapters of rank 1; holding: how many of its layers hold keys and
    values, 0 for all."""

    name: str
    hidden: int
    layers: int
    q_heads: int
    heads: int
    dim: int
    mlp: int
    vocab: int
    limit: int
    vision_depth: int
    vision_hidden: int
    vision_mlp: int
    vision_gated: bool
    full_blocks: int
    window: int
    patch: int
    merge: int
    frames: int
    tied: bool = False
    size: int = 2
    mergers: int = 1
    places: int = 0
    head_norms: bool = False
    counted: Mapping[str, int] | None = None
    per_rank: int | None = None
    holding: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str = "model") -> Shape:
        """From a config.json. Raises InputError for another family or a missing key."""
        family = config.get("model_type")
        if family not in SIZED:
            raise InputError(f"{name}: model_type is {family!r}; allowed: {', '.join(SIZED)}")
        # Newer configs keep the language model's sizes in a section of their own.
        text = {**config, **config.get("text_config", {})}
        vision = config.get("vision_config", {})
        windows, newest = family == "qwen2_5_vl", family == "qwen3_vl"
        try:
            width = vision["embed_dim" if family == "qwen2_vl" else "hidden_size"]
            mlp = (
                width * vision["mlp_ratio"] if family == "qwen2_vl" else vision["intermediate_size"]
            )
            return cls(
                name=name,
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                q_heads=text["num_attention_heads"],
                heads=text["num_key_value_heads"],
                dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                mlp=text["intermediate_size"],
                vocab=text["vocab_size"],
                limit=text["max_position_embeddings"],
                vision_depth=vision["depth"],
                vision_hidden=width,
                vision_mlp=mlp,
                vision_gated=windows,
                full_blocks=len(vision["fullatt_block_indexes"]) if windows else vision["depth"],
                window=(vision["window_size"] // vision["patch_size"]) ** 2 if windows else 0,
                patch=vision["patch_size"],
                merge=vision["spatial_merge_size"],
                frames=vision["temporal_patch_size"],
                tied=bool(text.get("tie_word_embeddings")),
                mergers=1 + len(vision["deepstack_visual_indexes"]) if newest else 1,
                places=vision["num_position_embeddings"] if newest else 0,
                head_norms=newest,
            )
        except KeyError as error:
            raise InputError(f"{name}: the config has no {error.args[0]}") from None

    @property
    def layer_weights(self) -> int:
        """Parameters of a decoder layer's products."""
        attention = self.hidden * self.dim * (2 * self.q_heads + 2 * self.heads)
        return attention + 3 * self.hidden * self.mlp


def bundled() -> list[str]:
    """Names of the configs that come with the package."""
    folder = importlib.resources.files("zipr1") / "assets" / "configs"
    return sorted(Path(str(item)).name.removesuffix(".json") for item in folder.iterdir())


def values_of(model: str) -> dict[str, Any]:
    """The config.json of a bundled model."""
    folder = importlib.resources.files("zipr1") / "assets" / "configs"
    values: dict[str, Any] = loads((folder / f"{model}.json").read_bytes())
    return values


def shape_of(model: str) -> Shape:
    """A bundled config by name, or that of a model folder, a run, or `tiny`.

    Raises InputError, with the nearest name.
    """
    if model in bundled():
        return Shape.of(values_of(model), model)
    folder = Path(model)
    if model == "tiny":
        folder = Path(str(importlib.resources.files("zipr1") / "assets" / "tiny"))
    for path in (
        folder / "config.json",
        folder / "model" / "config.json",
        folder / "last" / "model" / "config.json",
    ):
        if path.is_file():
            try:
                config = loads(path.read_bytes())
            except ValueError:
                raise InputError(f"{path} is not JSON; give a model folder") from None
            return Shape.of(config, model)
    raise unknown(model)


def unknown(model: str) -> InputError:
    """What is wrong with the name of a model that is nowhere."""
    near = difflib.get_close_matches(model, bundled(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InputError(
        f"--model {model}: neither a model folder, nor a run, nor a bundled config{hint} "
        f"Bundled: {', '.join(bundled())}"
    )


def default_lengths(s: Shape) -> list[int]:
    """Four lengths up to the model's limit, each four times the one before (but for the last, at most that)."""
    return [n for n in (256, 1024, 4096, 16384, 65536, 131072) if n <= s.limit][-4:]


def kept_tokens(length: int, keep: float) -> int:
    """ceil(keep * length), the count that `rule: top_k` keeps. Raises InputError outside (0, 1]."""
    if not 0 < keep <= 1:
        raise InputError(f"keep {keep} is not in (0, 1]; give a share of the tokens, such as 0.25")
    return math.ceil(round(keep * length, 6))


def layer(
    s: Shape, length: int, keep: float, skip: Skip, probes: int, batch: int = 1
) -> dict[str, Work]:
    """Work of one decoder layer's prefill, by phase, for `batch` prompts of `length` tokens.

    Raises InputError for a length outside 1..limit.
    """
    if not 1 <= length <= s.limit:
        raise InputError(f"length {length} is outside 1..{s.limit}, what {s.name} was made for")
    n = length if skip == "none" else kept_tokens(length, keep)
    probes = min(probes, length)
    q_width, kv_width, e = s.q_heads * s.dim, s.heads * s.dim, s.size
    through = n if skip == "layer" else length  # tokens that run the MLP
    asked = min(length, n + probes) if skip == "layer" else length  # tokens with a query

    def product(tokens: int, inner: int, outer: int) -> Work:
        rows = batch * tokens
        return Work(2.0 * rows * inner * outer, e * (inner * outer + rows * (inner + outer)))

    parts = [
        product(asked, s.hidden, q_width),
        product(length, s.hidden, kv_width),
        product(through, s.hidden, kv_width),
        product(n, q_width, s.hidden),
    ]
    mlp = [product(through, s.hidden, 2 * s.mlp), product(through, s.mlp, s.hidden)]
    work = {
        "projections": add(parts),
        "scoring": Work(0, 0),
        "selection": Work(0, 0),
        "attention": Work(
            2.0 * batch * q_width * n * (n + 1), e * batch * n * (2 * q_width + 2 * kv_width)
        ),
        "mlp": add(mlp),
    }
    if skip != "none":
        work["scoring"] = Work(
            2.0 * batch * probes * length * q_width,
            batch * (e * (probes * q_width + length * kv_width) + 4 * length),
        )
        # Scores and mask once, indices out; then the kept keys and values copied to the cache.
        work["selection"] = Work(0, batch * (5 * length + 8 * n + 4 * e * n * kv_width))
    return work


def add(works: Any) -> Work:
    """Sum of works."""
    return Work(*(sum(part) for part in zip(*works, strict=True)))


def vision(s: Shape, tokens: int) -> Work:
    """The vision tower for `tokens` visual tokens (patches / merge^2), in pictures of PICTURE tokens and a rest.

    Patches attend within their picture; 0 tokens are no work.
    """
    if tokens > PICTURE:
        return add([vision(s, PICTURE), vision(s, tokens - PICTURE)])
    if not tokens:
        return Work(0, 0)
    patches, h, e = tokens * s.merge**2, s.vision_hidden, s.size
    full = 4.0 * patches * patches * h
    local = 4.0 * patches * min(patches, s.window) * h
    mlp = (3 if s.vision_gated else 2) * s.vision_mlp * h
    weights = 4 * h * h + mlp
    inputs = 3 * s.frames * s.patch**2
    wide = s.merge**2 * h
    merger = wide * wide + wide * s.hidden
    flops = (
        s.vision_depth * 2.0 * patches * weights
        + 2.0 * patches * inputs * h
        + 2.0 * tokens * s.mergers * merger
    )
    flops += s.full_blocks * full + (s.vision_depth - s.full_blocks) * local
    moved = s.vision_depth * (weights + 10 * patches * h) + inputs * h + s.mergers * merger
    return Work(flops, float(e * moved))


def prefill(
    s: Shape, length: int, keep: float, skip: Skip, probes: int, batch: int = 1, visual: int = 0
) -> dict[str, Work]:
    """Work of a whole prefill by phase: the tower for `visual` tokens a prompt, all layers, the last token's logits."""
    if visual > length:
        raise InputError(f"{visual} visual tokens do not fit into a prompt of {length}")
    head = Work(2.0 * batch * s.hidden * s.vocab, float(s.size * s.hidden * s.vocab))
    one = layer(s, length, keep, skip, probes, batch)
    return {
        "vision": vision(s, visual).times(batch),
        **{name: work.times(s.layers) for name, work in one.items()},
        "logits": head,
    }


def kv_bytes(s: Shape, length: int, keep: float, skip: Skip, batch: int = 1) -> int:
    """Keys and values of all layers after the prefill."""
    n = length if skip == "none" else kept_tokens(length, keep)
    return s.layers * 2 * s.heads * s.dim * n * batch * s.size


def decode(s: Shape, length: int, keep: float, skip: Skip, batch: int = 1) -> Work:
    """One decoding step of `batch` rows: all weights once, the cache once."""
    n = length if skip == "none" else kept_tokens(length, keep)
    weights = s.layers * s.layer_weights + s.hidden * s.vocab
    attention = 4.0 * s.layers * s.q_heads * s.dim * n
    cache = kv_bytes(s, length, keep, skip, batch)
    return Work(batch * (2.0 * weights + attention), float(s.size * weights + cache))


def card(
    s: Shape, lengths: list[int], keeps: list[float], probes: int, batch: int, visual: float = 0.0
) -> list[dict[str, Any]]:
    """Rows of profile.json: for every length, keep and skip the work of each phase and the bounds.

    visual: share of the prompt that is visual tokens, in [0, 1]. bound: dense operations / sparse ones (prefill), dense
    bytes / sparse ones (a decoding step, the cache): what a machine with one rate for everything could gain.
    """
    if not 0 <= visual <= 1:
        raise InputError(f"visual {visual} is not in [0, 1]; give the share of visual tokens")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        seen = int(visual * length)
        for keep in keeps:
            for skip in ("attention", "layer"):
                rows += _rows(s, length, keep, skip, probes, batch, seen)
    return rows


def _rows(
    s: Shape, length: int, keep: float, skip: Skip, probes: int, batch: int, seen: int
) -> list[dict[str, Any]]:
    place = {"length": length, "batch": batch, "keep": keep, "skip": skip}

    def row(phase: str, ours: float, dense: float, **more: Any) -> dict[str, Any]:
        return {"phase": phase, **place, "bound": dense / ours, **more}

    def both(count: Any, *arguments: Any) -> tuple[Any, Any]:
        return (
            count(s, length, keep, skip, *arguments),
            count(s, length, keep, "none", *arguments),
        )

    one, full = both(layer, probes, batch)
    whole, usual = both(prefill, probes, batch, seen)
    step, slow = both(decode, batch)
    cache, large = both(kv_bytes, batch)
    phases, dense_phases = (
        {name: {"flops": w.flops, "bytes": w.bytes} for name, w in works.items()}
        for works in (whole, usual)
    )
    return [
        row("prefill_layer", add(one.values()).flops, add(full.values()).flops),
        row(
            "prefill",
            add(whole.values()).flops,
            add(usual.values()).flops,
            phases=phases,
            dense_phases=dense_phases,
        ),
        row("decode", step.bytes, slow.bytes),
        row("kv_cache", cache, large, kv_bytes=cache, dense_kv_bytes=large),
    ]


def tera(flops: float) -> str:
    """Operations for people: `1.234 T`, or a smaller unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:,.2f} {unit}"
    return f"{flops:,.0f}"
