"""The handwriting: 1,797 UCI digits, three disjoint splits, and sprites that are ready to paste.

A sprite is the opacity of one 16 px cell: uint8 `(16, 16)`, 0 background, 255 ink. Everything is integer or exact
in double precision (coefficients are multiples of 1/4096), so that all machines draw the same pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw

CELL = 16  # px; patch 8 x merge 2: one visual token of the tiny model
SPLITS = {"train": 1197, "validation": 200, "test": 400}
# Slightly deformed copies of each training digit; the other splits stay as they were written.
VARIANTS = 16
IMAGE_SIZE, VIDEO_SIZE = 15.0, 13.0  # px; in a clip the digit also moves by 3 px within its cell


@dataclass(frozen=True)
class Bank:
    """Sprites of one split.

    image, video: uint8 `(N, V, 16, 16)`, for still scenes and for clips. labels: `(N,)` 0 to 9.
    by_value: for each digit value the rows that show it. clutter: uint8 `(48, 16, 16)`, strokes that mean nothing.
    """

    split: str
    image: np.ndarray
    video: np.ndarray
    labels: np.ndarray
    by_value: tuple[np.ndarray, ...]
    clutter: np.ndarray


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `(1797, 8, 8)` with values 0 to 16, and labels uint8 `(1797,)`."""
    with (files("zipr1") / "assets" / "digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        return archive["images"], archive["labels"]


@lru_cache(maxsize=1)
def split_rows() -> dict[str, np.ndarray]:
    """Rows of `load_digits` in each split: disjoint, and every digit value has its share in each."""
    _, labels = load_digits()
    rng = np.random.default_rng(1797)
    # Each class is spread evenly over (0, 1); cutting the merged order anywhere keeps the classes in proportion.
    place = np.empty(len(labels))
    for value in range(10):
        rows = rng.permutation(np.flatnonzero(labels == value))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order = np.argsort(place, kind="stable")
    cuts = np.cumsum(list(SPLITS.values()))[:-1]
    return {name: np.sort(rows) for name, rows in zip(SPLITS, np.split(order, cuts), strict=True)}


@lru_cache(maxsize=3)
def bank(split: str) -> Bank:
    """Sprites of `train`, `validation` or `test`; made once a process (1 s for `train`)."""
    images, labels = load_digits()
    rows = split_rows()[split]
    rng = np.random.default_rng([list(SPLITS).index(split), 8])
    bent = split == "train"
    still = np.stack([_variants(images[r], IMAGE_SIZE, rng, bent) for r in rows])
    moving = np.stack([_variants(images[r], VIDEO_SIZE, rng, bent) for r in rows])
    by_value = tuple(np.flatnonzero(labels[rows] == value) for value in range(10))
    return Bank(split, still, moving, labels[rows], by_value, _clutter())


def _variants(image: np.ndarray, size: float, rng: np.random.Generator, bent: bool) -> np.ndarray:
    """One digit as sprites: `(V, 16, 16)`; bent ones are turned, scaled, sheared and shifted a little."""
    picture = pad(image)
    if not bent:
        return sprite(picture, size)[None]
    low, high = (-10, 0.9, 0.9, -0.12, -0.5, -0.5), (10, 1.08, 1.08, 0.12, 0.5, 0.5)
    bends = rng.uniform(low, high, (VARIANTS, 6)).tolist()
    return np.stack([sprite(picture, size, a, (w, h), s, (x, y)) for a, w, h, s, x, y in bends])


def pad(image: np.ndarray) -> Image.Image:
    """An 8 x 8 picture (0 to 16) with a border of zeros, which lets the outermost strokes fade out."""
    padded = np.zeros((16, 16), np.uint8)
    # Fainter strokes of the scan are drawn stronger: a 16 px cell has few pixels to spare.
    padded[4:12, 4:12] = np.minimum(image.astype(np.int32) * 21, 255)
    return Image.fromarray(padded)


def sprite(
    picture: Image.Image,
    size: float,
    angle: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """A padded picture as a `(16, 16)` uint8 sprite, bilinear: its middle 8 x 8 become `size` px wide.

    angle in degrees; shear in px per px; shift in px of the sprite.
    """
    turn = math.radians(angle)
    cos, sin, zoom = math.cos(turn), math.sin(turn), 8 / size
    a, b = zoom * cos / scale[0], zoom * (sin + shear) / scale[0]
    d, e = -zoom * sin / scale[1], zoom * cos / scale[1]
    a, b, d, e = (round(value * 4096) / 4096 for value in (a, b, d, e))
    x, y = (round((CELL / 2 + value) * 64) / 64 for value in shift)
    matrix = (a, b, 8 - a * x - b * y, d, e, 8 - d * x - e * y)
    drawn = picture.transform(
        (CELL, CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(drawn)


def _clutter(count: int = 48) -> np.ndarray:
    """Strokes and blobs with the blur of real digits, uint8 `(count, 16, 16)`."""
    rng = np.random.default_rng(48)
    made = []
    for index in range(count):
        picture = Image.new("L", (8, 8))
        draw = ImageDraw.Draw(picture)
        if index % 3 == 0:
            x, y = (int(v) for v in rng.integers(1, 4, 2))
            wide, high = (int(v) for v in rng.integers(2, 5, 2))
            draw.ellipse((x, y, x + wide, y + high), fill=int(rng.integers(9, 17)))
        else:
            corners = [tuple(int(v) for v in rng.integers(0, 8, 2)) for _ in range(2 + index % 2)]
            draw.line(corners, fill=int(rng.integers(10, 17)), width=1)
        made.append(sprite(pad(np.asarray(picture)), IMAGE_SIZE))
    return np.stack(made)
