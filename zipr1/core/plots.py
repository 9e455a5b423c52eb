"""Figures: which visual tokens each layer kept, and what all figures of zipr1 share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def kept_picture(
    pixels: np.ndarray,
    grid: tuple[int, int, int],
    kept: Mapping[str, Sequence[tuple[np.ndarray, float]]],
    question: str,
    answers: Mapping[str, str],
    out: Path,
    max_layers: int = 7,
    max_frames: int = 4,
) -> Path:
    """A picture and, layer by layer, the visual tokens that stay; dropped ones are dark.

    pixels: `(H, W, 3)` uint8, or `(F, H, W, 3)` for a clip: up to `max_frames` rows of steps of time in all.
    grid: `(t, h, w)` of the tokens that the language model sees (after merging). kept: by name (before, after), a layer
    each: bool, `t*h*w` values in that order, and the kept share of all tokens of the prompt, which is what tables
    show; up to `max_layers` are drawn, evenly spaced. answers: `{"dense": ...}`.
    """
    from matplotlib.figure import Figure

    t, h, w = grid
    frames = np.asarray(pixels)
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise InputError(
            f"pixels have shape {np.shape(pixels)}; (H, W, 3) or (F, H, W, 3) is drawn"
        )
    for name, layers in kept.items():
        for number, (mask, _) in enumerate(layers):
            if mask.size != t * h * w:
                raise InputError(
                    f"{name}: layer {number} has {mask.size} flags for a grid of {t} x {h} x {w} tokens"
                )
    if not kept or not all(kept.values()):
        raise InputError("kept is empty; give flags and a share for each layer")
    shown = evenly_spaced(min(map(len, kept.values())), max_layers)
    times = evenly_spaced(t, max(1, max_frames // len(kept)))
    side, head = 1.9, 0.75
    columns, rows = len(shown) + 1, len(times) * len(kept)
    height = (side * frames.shape[1] / frames.shape[2] + 0.28) * rows
    figure = Figure(figsize=(side * columns, height + head), facecolor="white")
    grid_of_axes = figure.add_gridspec(
        rows, columns, left=0.02, right=0.998, bottom=0.005, top=height / (height + head), wspace=0.04,
        hspace=0.28 / side,
    )  # fmt: skip
    heading = [_wrapped(question, columns)] if question else []
    heading.append("     ".join(f"{name}: {text}" for name, text in answers.items()))
    heading.append("In per cent: kept of all tokens of the prompt, text among them.")
    figure.text(
        0.02, 1 - 0.06 / (height + head), "\n".join(heading), fontsize=9, va="top", parse_math=False
    )  # a question may be about dollars
    for block, (name, layers) in enumerate(kept.items()):
        for line, moment in enumerate(times):
            frame = frame_at(frames, moment, t).astype(np.float32) / 255
            for column in range(columns):
                row = block * len(times) + line
                ax = figure.add_subplot(grid_of_axes[row, column])
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_visible(False)
                if column == 0:
                    ax.imshow(frame, interpolation="nearest")
                    if row == 0:
                        ax.set_title("seen by dense", fontsize=9)
                    when = f", time {moment + 1}/{t}" if t > 1 else ""
                    ax.set_ylabel(f"{name}{when}", fontsize=7, parse_math=False)
                    continue
                mask, share = layers[shown[column - 1]]
                flags = np.asarray(mask, dtype=bool).reshape(t, h, w)
                ax.imshow(darkened(frame, flags[moment]), interpolation="nearest")
                if line == 0:
                    ax.set_title(f"layer {shown[column - 1] + 1}: {share:.0%}", fontsize=9)
    return save(figure, out)


def plain_axes(ax: Axes, title: str) -> None:
    """The look of all curves: a bold title at the left, small ticks, no frame above or to the right, pale lines."""
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
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
