"""Scenes of coloured handwritten digits: a still picture (64 visual tokens) or a clip (144 to 216).

A scene is pixels and what they show; questions.py asks about the latter. Pixels are integer arithmetic on numbers
from a seeded numpy Generator: the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from zipr1.data.digits.glyphs import CELL, Bank

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 250),
    "yellow": (240, 220, 40),
    "purple": (180, 50, 220),
    "cyan": (40, 220, 230),
}
# (rows, columns) a digit moves by in one time step.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "top": (-1, 0), "bottom": (1, 0)}
IMAGE_CELLS, VIDEO_CELLS = 8, 6  # per side
IMAGE_DIGITS, VIDEO_DIGITS = (2, 6), (2, 3)  # fewest and most in one scene
FPS = 4.0
FRAMES_PER_STEP = 2  # the model merges two frames into one temporal patch
SWING = 3  # px behind and ahead of the cell's centre in the two frames of a step
_MARGIN = 4  # px around the canvas, so that a digit that swings out at the border is cut rather than wrapped

# How many digits share a colour. Counting needs repeats, naming by colour needs colours that occur once.
_SHARED = {
    3: ((), (2,)),
    4: ((), (2,), (2,), (3,), (3,)),
    5: ((), (2,), (3,), (3,), (2, 2)),
    6: ((2,), (3,), (3,), (2, 2), (3, 2)),
}


@dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    cells: (row, column) in each time step in which it is visible: one for images. start: its first time step.
    direction: None for images.
    """

    value: int
    colour: str
    cells: tuple[tuple[int, int], ...]
    direction: str | None = None
    start: int = 0


@dataclass(frozen=True)
class Scene:
    """pixels: uint8 `(128, 128, 3)`, or `(F, 96, 96, 3)` with F 8 to 12 frames at `fps`."""

    kind: Literal["image", "video"]
    pixels: np.ndarray
    objects: tuple[Digit, ...]
    fps: float | None = None


def draw_image(rng: np.random.Generator, bank: Bank, count: int | None = None) -> Scene:
    """`count` digits (1 to 6; None: 2 to 6 at random) in distinct cells among clutter."""
    if count is None:
        count = int(rng.integers(IMAGE_DIGITS[0], IMAGE_DIGITS[1] + 1))
    cells = rng.permutation(IMAGE_CELLS**2)
    colours = _draw_colours(rng, count)
    values = rng.integers(0, 10, count)
    canvas = _background(rng, IMAGE_CELLS)
    strokes = int(rng.integers(6, 15))
    for cell in cells[count : count + strokes]:
        _paste_clutter(canvas, rng, bank, divmod(int(cell), IMAGE_CELLS))
    objects = []
    for value, colour, cell in zip(values, colours, cells, strict=False):
        place = divmod(int(cell), IMAGE_CELLS)
        shift = rng.integers(-1, 2, 2)
        _paste(canvas, place, shift, _sprite(rng, bank, bank.image, value), _tint(rng, colour))
        objects.append(Digit(int(value), colour, (place,)))
    return Scene("image", _crop(canvas), tuple(objects))


def draw_video(rng: np.random.Generator, bank: Bank, count: int | None = None) -> Scene:
    """`count` digits (1 to 3; None: 2 or 3) that appear one after another and move one cell per time step."""
    if count is None:
        count = int(rng.integers(VIDEO_DIGITS[0], VIDEO_DIGITS[1] + 1))
    steps = int(rng.integers(4, 7))
    starts, duration = _draw_times(rng, count, steps)
    directions, paths = _draw_paths(rng, starts, duration)
    colours = list(COLOURS)
    colours = [colours[i] for i in rng.permutation(len(colours))[:count]]
    values = rng.integers(0, 10, count)
    canvas = _background(rng, VIDEO_CELLS)
    visited = {cell for path in paths for cell in path}
    free = [divmod(int(c), VIDEO_CELLS) for c in rng.permutation(VIDEO_CELLS**2)]
    for cell in [c for c in free if c not in visited][: int(rng.integers(2, 7))]:
        _paste_clutter(canvas, rng, bank, cell)
    frames = np.repeat(canvas[None], steps * FRAMES_PER_STEP, axis=0)
    frames += _grain(rng, frames.shape, 8)
    objects = []
    for value, colour, direction, path, start in zip(
        values, colours, directions, paths, starts, strict=True
    ):
        ink, tint = _sprite(rng, bank, bank.video, value), _tint(rng, colour)
        across = int(rng.integers(-1, 2))
        move = np.array(DIRECTIONS[direction])
        for step, cell in enumerate(path):
            for frame, swing in enumerate((-SWING, SWING)):
                shift = move * swing + move[::-1] * across
                target = frames[(start + step) * FRAMES_PER_STEP + frame]
                _paste(target, cell, shift, ink, tint)
        objects.append(Digit(int(value), colour, tuple(path), direction, start))
    return Scene("video", _crop(frames), tuple(objects), FPS)


def _draw_colours(rng: np.random.Generator, count: int) -> list[str]:
    names = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    plans = _SHARED.get(count, ((),))
    shared = plans[int(rng.integers(len(plans)))]
    colours = [name for name, times in zip(names, shared, strict=False) for _ in range(times)]
    return colours + names[len(shared) : len(shared) + count - len(colours)]


def _draw_times(rng: np.random.Generator, count: int, steps: int) -> tuple[list[int], int]:
    """Distinct start steps and the common duration: the first starts at 0, the last one ends with the clip."""
    if count == 1:
        return [0], steps
    duration = int(rng.integers(2, steps - count + 2))
    last = steps - duration
    between = rng.permutation(np.arange(1, last))[: count - 2]
    starts = [0, *sorted(int(s) for s in between), last]
    return starts, duration


def _draw_paths(
    rng: np.random.Generator, starts: list[int], duration: int
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Directions and cells per step, so that no two digits are in one cell at the same step."""
    while True:
        directions, paths = [], []
        for _ in starts:
            name = list(DIRECTIONS)[int(rng.integers(4))]
            move = DIRECTIONS[name]
            reach = duration - 1
            # The free range of the first cell, per axis: it shrinks on the side that the digit moves to.
            first = [
                int(rng.integers(reach if m < 0 else 0, VIDEO_CELLS - (reach if m > 0 else 0)))
                for m in move
            ]
            path = [(first[0] + move[0] * k, first[1] + move[1] * k) for k in range(duration)]
            directions.append(name)
            paths.append(path)
        occupied = [
            (s + k, c) for s, path in zip(starts, paths, strict=True) for k, c in enumerate(path)
        ]
        if len(set(occupied)) == len(occupied):
            return directions, paths


def _background(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Dark cells of random shade with grain: uint8 `(side, side, 3)`, `_MARGIN` px wider on each side."""
    shades = rng.integers(24, 48, (cells, cells, 1)) + rng.integers(-6, 7, (cells, cells, 3))
    # Shades below 54, grain below 16 and frame noise below 8 never leave uint8, so nothing has to be clipped.
    canvas = shades.astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)
    canvas += _grain(rng, canvas.shape, 16)
    return np.pad(canvas, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)))


def _grain(rng: np.random.Generator, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """Noise from 0 to `levels` - 1 (a power of 2), uint8."""
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    noise &= levels - 1
    return noise


def _crop(canvas: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(canvas[..., _MARGIN:-_MARGIN, _MARGIN:-_MARGIN, :])


def _sprite(rng: np.random.Generator, bank: Bank, sprites: np.ndarray, value: int) -> np.ndarray:
    rows = bank.by_value[value]
    row, variant = rows[int(rng.integers(len(rows)))], int(rng.integers(sprites.shape[1]))
    return sprites[row, variant]


def _tint(rng: np.random.Generator, colour: str) -> np.ndarray:
    """The colour with 85 to 100 % of its brightness and a little noise, int64 `(3,)`."""
    bright = int(rng.integers(85, 101))
    tint = np.array(COLOURS[colour]) * bright // 100 + rng.integers(-10, 11, 3)
    return tint.clip(0, 255)


def _paste_clutter(
    canvas: np.ndarray, rng: np.random.Generator, bank: Bank, cell: tuple[int, int]
) -> None:
    ink = bank.clutter[int(rng.integers(len(bank.clutter)))]
    grey = rng.integers(80, 135) + rng.integers(-12, 13, 3)
    _paste(canvas, cell, rng.integers(-1, 2, 2), ink, grey)


def _paste(
    canvas: np.ndarray, cell: tuple[int, int], shift: np.ndarray, ink: np.ndarray, tint: np.ndarray
) -> None:
    """Blend `tint` into the cell (row, column), moved by `shift` px (rows, columns), in place."""
    top = cell[0] * CELL + _MARGIN + int(shift[0])
    left = cell[1] * CELL + _MARGIN + int(shift[1])
    window = canvas[top : top + CELL, left : left + CELL]
    opacity = ink.astype(np.int32)[:, :, None]
    window[:] = (tint.astype(np.int32) * opacity + window * (255 - opacity)) // 255
