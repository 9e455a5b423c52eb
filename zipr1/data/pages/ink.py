"""What is put on paper: printed words, handwritten digits and ticks, stamps and signatures, as opacities.

An opacity is uint8 `(height, width)`, 0 paper, 255 ink. Letters come as pictures (assets/letters.npz), digits from the
hands of digits/glyphs.py, ticks and the rest from distances to lines: sums, products and square roots that every
machine rounds alike.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from importlib.resources import files

import numpy as np

LINE = 16  # px, height of a printed word; its baseline lies 4 px above the lower end
PLAIN, HEADING = ("DejaVuSans", "DejaVuSerif"), "DejaVuSans-Bold"
SIZES = (10, 12, 14)  # px from the top of a "d" to the bottom of a "p"
STAMPS = ("PAID", "COPY", "SEEN", "CLOSED")


@lru_cache(maxsize=1)
def letters() -> tuple[np.ndarray, np.ndarray, dict[str, int], dict[str, int]]:
    """Ink uint8 `(9, 52, 16, 16)`, widths in px uint8 `(9, 52)`, and the places of faces and of characters."""
    with (files("zipr1") / "assets" / "letters.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        faces = {str(name): i for i, name in enumerate(archive["faces"])}
        characters = {str(name): i for i, name in enumerate(archive["characters"])}
        return archive["ink"], archive["advance"], faces, characters


@lru_cache(maxsize=1024)
def word(text: str, face: str, size: int) -> np.ndarray:
    """A printed word, `(16, width)`: letters one after another, without kerning."""
    ink, advance, faces, characters = letters()
    row, places = faces[f"{face} {size}"], [characters[c] for c in text]
    starts = np.cumsum([0, *(int(advance[row, p]) for p in places)])
    line = np.zeros((LINE, int(starts[-1]) + LINE), np.uint8)
    for place, start in zip(places, starts, strict=False):
        window = line[:, start : start + LINE]
        np.maximum(window, ink[row, place], out=window)
    return line[:, : int(starts[-1]) + 1]


@lru_cache(maxsize=1)
def ticks() -> np.ndarray:
    """48 hand-drawn marks of a box: hooks, crosses and strokes, `(48, 16, 16)`."""
    rng = np.random.default_rng(61)
    made = []
    for index in range(48):
        jitter = [(int(x), int(y)) for x, y in rng.integers(-1, 2, (4, 2))]
        shape = (
            [[(2, 8), (6, 13), (14, 2)]],
            [[(3, 3), (12, 12)], [(12, 3), (3, 12)]],
            [[(3, 12), (13, 3)]],
        )[index % 3]
        lines = [
            [(x + jitter[i][0], y + jitter[i][1]) for i, (x, y) in enumerate(line)]
            for line in shape
        ]
        made.append(_strokes(lines, 16, 16, 1.0 + 0.1 * (index % 4)))
    return np.stack(made)


@lru_cache(maxsize=1)
def signatures() -> np.ndarray:
    """12 scribbles, `(12, 28, 80)`."""
    rng = np.random.default_rng(62)
    made = []
    for _ in range(12):
        across = np.arange(4, 77, 6)
        heights = rng.integers(3, 25, len(across))
        sideways = rng.integers(-5, 6, len(across))
        line = [(int(x + s), int(y)) for x, s, y in zip(across, sideways, heights, strict=True)]
        made.append(_strokes([line], 28, 80, 0.9))
    return np.stack(made)


@lru_cache(maxsize=1)
def stamps() -> tuple[np.ndarray, ...]:
    """Rubber stamps: a word in a frame or in a ring."""
    made = []
    for index, text in enumerate(STAMPS):
        line = word(text, HEADING, 14)
        width = line.shape[1] + 16
        height = 30 if index % 2 == 0 else width
        ink = np.zeros((height, width), np.uint8)
        if index % 2 == 0:
            ink[:2], ink[-2:], ink[:, :2], ink[:, -2:] = 255, 255, 255, 255
        else:
            y, x = np.mgrid[:height, :width]
            centre = (width - 1) / 2
            far = np.sqrt((y - centre) ** 2 + (x - centre) ** 2)
            ink[(far < centre) & (far > centre - 3)] = 255
        top = height // 2 - 7
        window = ink[top : top + LINE, 8 : 8 + line.shape[1]]
        np.maximum(window, line, out=window)
        made.append(ink)
    return tuple(made)


def _strokes(
    lines: list[list[tuple[int, int]]], height: int, width: int, radius: float
) -> np.ndarray:
    """Opacity of pen strokes through points (x, y): full within `radius` px of a line, none one px farther out."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    near = np.full((height, width), 1e9)
    for line in lines:
        for (x0, y0), (x1, y1) in itertools.pairwise(line):
            dx, dy = float(x1 - x0), float(y1 - y0)
            share = ((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1.0)
            share = share.clip(0, 1)
            away_x, away_y = x - (x0 + share * dx), y - (y0 + share * dy)
            near = np.minimum(near, np.sqrt(away_x * away_x + away_y * away_y))
    return ((radius + 1 - near).clip(0, 1) * 255).astype(np.uint8)
