"""Pictures of families that see squares: how many tiles a picture is cut into, and the tiles.

InternVL scales a picture to the grid of tiles whose shape is nearest to its own. SmolVLM scales its longer side to
several tiles and both sides up to whole tiles. Both show the whole picture once more, as one tile behind the others.
The rules are those of transformers' image processors (tests/parity/test_tiles.py); resizing is that of `resized`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zipr1.core.errors import InputError

# What the files of SmolVLM leave unsaid: tiles along the longer side.
ALONG = 4


@dataclass(frozen=True)
class Cuts:
    """least, most: tiles of a picture, without the whole one behind them (InternVL). along: tiles along the longer side
    (SmolVLM), 0 for the other rule. One tile at most: pictures are not cut."""

    least: int = 1
    most: int = 1
    along: int = 0

    def __str__(self) -> str:
        if self.along:
            return f"tiles, {self.along} along its longer side, and one tile"
        return "one tile" if self.most == 1 else f"one tile, or up to {self.most} and one tile"

    def within(self, pixels: int | None, side: int) -> Cuts:
        """The same, with no more tiles than `pixels` in all; a tile has `side` pixels a side."""
        if pixels is None:
            return self
        most = max(1, pixels // side**2)
        along = min(self.along, math.isqrt(most))
        return Cuts(min(self.least, most), min(self.most, most), along)

    def grid(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Rows and columns of tiles of a picture; (0, 0) where it is seen whole alone."""
        if self.along:
            return _along(height, width, side, self.along)[1]
        if self.most == 1:
            return 0, 0
        rows, columns = _nearest(height, width, side, self.least, self.most)
        return (0, 0) if rows * columns == 1 else (rows, columns)


def _nearest(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns: of all grids of `least` to `most` tiles the one nearest in shape. Of several as near the larger
    one, so long as the picture has more than half of its pixels."""
    shapes = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1)]
    best, gap = (1, 1), math.inf
    for columns, rows in sorted(
        (s for s in shapes if least <= s[0] * s[1] <= most), key=lambda s: s[0] * s[1]
    ):
        away = abs(width / height - columns / rows)
        if away < gap:
            best, gap = (columns, rows), away
        elif away == gap and height * width > 0.5 * side**2 * columns * rows:
            best = columns, rows
    return best[1], best[0]


def _along(
    height: int, width: int, side: int, along: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Sizes that a picture takes one after the other, and rows and columns; (0, 0) for a single tile."""
    longest = along * side
    ratio = width / height
    if width >= height:
        wide, high = longest, int(longest / ratio)
        high += high % 2
    else:
        high, wide = longest, int(longest * ratio)
        wide += wide % 2
    first = max(high, 1), max(wide, 1)
    high, wide = first
    ratio = wide / high
    if wide >= high:
        wide = math.ceil(wide / side) * side
        high = math.ceil(int(wide / ratio) / side) * side
    else:
        high = math.ceil(high / side) * side
        wide = math.ceil(int(high * ratio) / side) * side
    whole = max(high, side), max(wide, side)
    rows, columns = whole[0] // side, whole[1] // side
    return [first, whole], (0, 0) if rows * columns == 1 else (rows, columns)


def cut(
    pixels: np.ndarray, cuts: Cuts, side: int, resample: int, resized: Any
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """uint8 `(H, W, 3)` -> tiles `(S, S, 3)`, row by row and then the whole picture, and rows and columns. resized: as
    in processors.py."""
    rows, columns = cuts.grid(*pixels.shape[:2], side)
    if cuts.along:
        sizes, _ = _along(*pixels.shape[:2], side, cuts.along)
        for high, wide in sizes:
            pixels = resized(pixels, high, wide, resample)
        canvas = pixels
    elif rows:
        canvas = resized(pixels, rows * side, columns * side, resample)
    tiles = [
        canvas[r * side : (r + 1) * side, c * side : (c + 1) * side]
        for r in range(rows)
        for c in range(columns)
    ]
    return [*tiles, resized(pixels, side, side, resample)], (rows, columns)


def of_internvl(found: Mapping[str, Any], side: int, folder: str) -> Cuts:
    """From the picture's settings. Its processor asks for cuts whatever the file says of `crop_to_patches`."""
    return Cuts(int(found.get("min_patches") or 1), int(found.get("max_patches") or 12))


def of_smolvlm(found: Mapping[str, Any], side: int, folder: str) -> Cuts:
    if found.get("do_image_splitting") is False:
        return Cuts()
    tile = (found.get("max_image_size") or {}).get("longest_edge", side)
    longest = (found.get("size") or {}).get("longest_edge", ALONG * side)
    if tile != side or longest % side or longest > 4096:
        raise InputError(
            f"{folder}: its pixel settings cut pictures of {longest} pixels into tiles of {tile}, and its vision tower "
            f"sees {side}; whole tiles of that size are handled"
        )
    return Cuts(along=longest // side)
