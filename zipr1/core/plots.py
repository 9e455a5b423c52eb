"""Figures: a run's curves, which visual tokens each layer kept, and what all figures of zipr1 share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.files import replacing
from zipr1.core.rundir import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(metrics: Path, out: Path) -> Path:
    """The run's curves as a PNG: each step pale, a running mean over a twentieth of the run strong."""
    from matplotlib.figure import Figure

    rows = read_lines(metrics)
    if not rows:
        raise InputError(f"{metrics}: holds no step; there is nothing to draw")
    panels: list[tuple[str, list[tuple[str, str, str]], bool]] = [
        ("Tokens kept", [("token_ratio", "sparse", "C0")], True),
        (
            "Right answers",
            [("accuracy", "sparse", "C2"), ("dense_accuracy", "dense", "0.45")],
            True,
        ),
        ("KL to the dense model", [("kl", "KL", "C3")], False),
        (
            "Efficiency controller",
            [
                ("efficiency_weight", "efficiency weight", "C4"),
                ("multiplier", "multiplier", "C1"),
            ],
            False,
        ),
        ("Loss", [("loss", "loss", "C5")], False),
    ]
    present = [
        (title, [line for line in lines if any(_is_number(r.get(line[0])) for r in rows)], share)
        for title, lines, share in panels
    ]
    present = [panel for panel in present if panel[1]]
    if not present:
        raise InputError(f"{metrics}: holds none of the values that are drawn")
    width = min(2, len(present))
    height = -(-len(present) // width)
    figure = Figure(figsize=(5.2 * width, 3.1 * height), layout="constrained", facecolor="white")
    axes = figure.subplots(height, width, squeeze=False).ravel()
    for ax, (title, lines, share) in zip(axes, present, strict=False):
        _curve(ax, rows, title, lines, share)
    for ax in axes[len(present) :]:
        ax.set_axis_off()
    return save(figure, out)


def kept_picture(
    pixels: np.ndarray,
    grid: tuple[int, int, int],
    kept_per_layer: Sequence[np.ndarray],
    question: str,
    answers: Mapping[str, str],
    out: Path,
    max_layers: int = 7,
    max_frames: int = 4,
) -> Path:
    """A picture and, layer by layer, the visual tokens that stay; dropped ones are dark.

    pixels: `(H, W, 3)` uint8, or `(F, H, W, 3)` for a clip: a row for each of up to `max_frames` steps of time.
    grid: `(t, h, w)` of the tokens that the language model sees (after merging). kept_per_layer: bool, `t*h*w`
    values in that order, one array a layer; up to `max_layers` are drawn, evenly spaced. answers: `{"dense": ...}`.
    """
    from matplotlib.figure import Figure

    t, h, w = grid
    frames = np.asarray(pixels)
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise InputError(
            f"pixels have shape {np.shape(pixels)}; (H, W, 3) or (F, H, W, 3) is drawn"
        )
    masks = [np.asarray(k, dtype=bool) for k in kept_per_layer]
    for number, mask in enumerate(masks):
        if mask.size != t * h * w:
            raise InputError(
                f"layer {number} has {mask.size} flags for a grid of {t} x {h} x {w} tokens"
            )
    if not masks:
        raise InputError("kept_per_layer is empty; give one array of flags for each layer")
    layers = evenly_spaced(len(masks), max_layers)
    times = evenly_spaced(t, max_frames)
    columns, rows = len(layers) + 1, len(times)
    side = 1.9
    aspect = frames.shape[1] / frames.shape[2]
    answer_lines = [f"{name}: {text}" for name, text in answers.items()]
    figure = Figure(
        figsize=(side * columns + 0.2, side * aspect * rows + 0.95),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    heading = f"{_wrapped(question, columns)}\n" if question else ""
    figure.suptitle(heading + "     ".join(answer_lines), fontsize=10, x=0.01, ha="left")
    for row, moment in enumerate(times):
        frame = frame_at(frames, moment, t).astype(np.float32) / 255
        for column, ax in enumerate(axes[row]):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if column == 0:
                ax.imshow(frame, interpolation="nearest")
                if row == 0:
                    ax.set_title("seen by dense", fontsize=9)
                if t > 1:
                    ax.set_ylabel(f"time {moment + 1}/{t}", fontsize=8)
                continue
            mask = masks[layers[column - 1]].reshape(t, h, w)
            ax.imshow(darkened(frame, mask[moment]), interpolation="nearest")
            if row == 0:
                ax.set_title(f"layer {layers[column - 1] + 1}: {mask.mean():.0%}", fontsize=9)
    return save(figure, out)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean; near the ends over what is there. NaN counts as missing."""
    kernel = np.ones(window)
    there = np.isfinite(values)
    sums = np.convolve(np.where(there, values, 0.0), kernel, mode="same")
    counts = np.convolve(there.astype(float), kernel, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _curve(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    lines: Sequence[tuple[str, str, str]],
    share: bool,
) -> None:
    steps = np.array([row.get("step", i) for i, row in enumerate(rows)])
    for key, label, colour in lines:
        values = np.array(
            [row[key] if _is_number(row.get(key)) else np.nan for row in rows], dtype=float
        )
        window = min(len(rows), max(1, len(rows) // 20) // 2 * 2 + 1)
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(steps, smooth(values, window), color=colour, linewidth=1.8, label=label)
    plain_axes(ax, title)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylim(*((0, 1.02) if share else (min(0, ax.get_ylim()[0]), None)))
    if share:
        from matplotlib.ticker import PercentFormatter

        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=8)


def plain_axes(ax: Axes, title: str) -> None:
    """The look of all curves: a bold title at the left, small ticks, no frame above or to the right, pale lines."""
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)


def save(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """The figure as a whole file; its folder is made. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    return path


def drawing(figure: Figure) -> str:
    """The figure as SVG text for a page, its letters as outlines; the same numbers give the same text."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "zipr1"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def score_axis(ax: Axes, values: Sequence[float], top: float = 1.0) -> None:
    """Room for `values` of 0 to `top`, and for a fifth of that range at least: little shall not look like a lot."""
    low, high = min(values), max(values)
    room = max(1.15 * (high - low), 0.2 * top)
    middle = (low + high) / 2
    bottom = min(max(0.0, middle - room / 2), top - room)
    ax.set_ylim(bottom - 0.02 * room, bottom + 1.04 * room)
    ax.set_yticks([tick for tick in ax.get_yticks() if bottom - 1e-9 <= tick <= top + 1e-9])
    ax.set_ylim(bottom - 0.02 * room, bottom + 1.04 * room)


def darkened(frame: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The frame, dark and bluish where tokens were dropped.

    frame: `(H, W, 3)` float in [0, 1]. kept: `(h, w)`, one value for each token's cell: 1 or True stays as it is, 0 or
    False turns dark, a share between them (of layers that keep the token, say) lies between both.
    """
    height, width = frame.shape[:2]
    # A pixel belongs to the cell that its centre lies in.
    rows = (2 * np.arange(height) + 1) * kept.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * kept.shape[1] // (2 * width)
    light = kept[rows][:, columns][..., None].astype(np.float32)
    dark = 0.22 * frame.mean(axis=-1, keepdims=True) + np.array([0.03, 0.04, 0.10], np.float32)
    return light * frame + (1 - light) * dark


def frame_at(frames: np.ndarray, moment: int, moments: int) -> np.ndarray:
    """The frame `(H, W, 3)` of `frames` `(F, H, W, 3)` to show for one of `moments` steps of a clip's tokens.

    A token may span several frames (two in Qwen's video towers): the first of them is shown.
    """
    frame: np.ndarray = frames[min(len(frames) - 1, moment * len(frames) // moments)]
    return frame


def evenly_spaced(count: int, most: int) -> list[int]:
    """Up to `most` of `count` indices, evenly spaced, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _wrapped(text: str, columns: int) -> str:
    return "\n".join(textwrap.wrap(text, width=max(40, 24 * columns)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
