"""Pictures of families that see squares: how many tiles a picture is cut into, and the tiles.

InternVL scales a picture to the grid of tiles whose shape is nearest to its own. SmolVLM scales its longer side to
several tiles and both sides up to whole tiles. Both show the whole picture once more, as one tile behind the others.
LLaVA-OneVision shows it first, and then tiles of the canvas that loses least of it, black where the picture ends; the
tower's tokens of these are laid out as a picture without what is black, and a mark ends each line. Pictures that are
not alone in their prompt are one tile there, made square with the mean colour.
The rules are those of transformers' image processors (tests/parity/test_tiles.py); resizing is that of `resized`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zipr1.core.errors import InputError

# What the files of SmolVLM leave unsaid: tiles along the longer side.
ALONG = 4


@dataclass(frozen=True)
class Cuts:
    """least, most: tiles of a picture, without the whole one behind them (InternVL). along: tiles along the longer side
    (SmolVLM), 0 for the other rules. canvases: heights and widths (LLaVA-OneVision), none for the other rules, and
    lines: tiles whose tokens are shown without being thinned out. One tile at most: pictures are not cut."""

    least: int = 1
    most: int = 1
    along: int = 0
    canvases: tuple[tuple[int, int], ...] = ()
    lines: int = 9

    def __str__(self) -> str:
        if self.along:
            return f"tiles, {self.along} along its longer side, and one tile"
        if self.canvases:
            tiles = max(h * w for h, w in self.canvases) // min(h * w for h, w in self.canvases)
            return f"one tile, and up to {tiles} more where it is alone,"
        return "one tile" if self.most == 1 else f"one tile, or up to {self.most} and one tile"

    def within(self, pixels: int | None, side: int) -> Cuts:
        """The same, with no more tiles than `pixels` in all; a tile has `side` pixels a side."""
        if pixels is None or self.canvases:
            return self
        most = max(1, pixels // side**2)
        along = min(self.along, math.isqrt(most))
        return replace(self, least=min(self.least, most), most=min(self.most, most), along=along)

    def grid(self, height: int, width: int, side: int) -> tuple[int, int]:
        """Rows and columns of tiles of a picture; (0, 0) where it is seen whole alone, or first."""
        if self.along:
            return _along(height, width, side, self.along)[1]
        if self.most == 1:
            return 0, 0
        rows, columns = _nearest(height, width, side, self.least, self.most)
        return (0, 0) if rows * columns == 1 else (rows, columns)


UNCUT = Cuts()


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


def canvas_of(height: int, width: int, cuts: Cuts) -> tuple[int, int]:
    """Height and width of the canvas that shows most of a picture, and of several the one with least black. Raises
    InputError for a picture so thin that none shows it."""
    best, shown, black = None, 0, math.inf
    for tall, wide in cuts.canvases:
        scale = min(wide / width, tall / height)
        seen = min(int(width * scale) * int(height * scale), width * height)
        if seen > shown or (seen == shown and tall * wide - seen < black):
            best, shown, black = (tall, wide), seen, tall * wide - seen
    if best is None or not shown:
        raise InputError(
            f"a picture of {width} x {height} pixels is too thin for the model's canvases"
        )
    return best


def laid_out(height: int, width: int, cuts: Cuts, side: int, cells: int) -> int:
    """Tokens behind those of the whole picture, the marks at the ends of lines among them. cells: tokens on a side of a
    tile."""
    tall, wide = canvas_of(height, width, cuts)
    h, w = cells * (tall // side), cells * (wide // side)
    if width / height > w / h:
        h -= (h - int(round(height * (w / width), 7))) // 2 * 2
    else:
        w -= (w - int(round(width * (h / height), 7))) // 2 * 2
    thinner = math.sqrt(h * w / (cuts.lines * cells**2))
    if thinner > 1.1:
        h, w = int(h // thinner), int(w // thinner)
    return h * w + h


def _on_canvas(
    pixels: np.ndarray, cuts: Cuts, side: int, resample: int, resized: Any
) -> list[np.ndarray]:
    """The tiles of the canvas, row by row."""
    height, width = pixels.shape[:2]
    tall, wide = canvas_of(height, width, cuts)
    across, down = wide / width, tall / height
    if across < down:
        h, w = min(math.ceil(height * across), tall), wide
    else:
        h, w = tall, min(math.ceil(width * down), wide)
    canvas = np.zeros((tall, wide, 3), np.uint8)
    top, left = (tall - h) // 2, (wide - w) // 2
    canvas[top : top + h, left : left + w] = resized(pixels, h, w, resample)
    return [
        canvas[r : r + side, c : c + side]
        for r in range(0, tall, side)
        for c in range(0, wide, side)
    ]


def _made_square(pixels: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    longer = max(height, width)
    out = np.full((longer, longer, 3), colour, np.uint8)
    top, left = (longer - height) // 2, (longer - width) // 2
    out[top : top + height, left : left + width] = pixels
    return out


def cut(
    pixels: np.ndarray,
    cuts: Cuts,
    side: int,
    resample: int,
    resized: Any,
    mean: Sequence[float],
    alone: bool,
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """uint8 `(H, W, 3)` -> tiles `(S, S, 3)`, row by row and then the whole picture (of LLaVA-OneVision first), and
    rows and columns of those in front of it. resized: as in processors.py. mean: of the colours, in [0, 1]. alone: the
    only picture of its prompt."""
    if cuts.canvases:
        if not alone:
            pixels = _made_square(pixels, [int(255 * colour) for colour in mean])
        tiles = _on_canvas(pixels, cuts, side, resample, resized) if alone else []
        return [resized(pixels, side, side, resample), *tiles], (0, 0)
    height, width = pixels.shape[:2]
    rows, columns = cuts.grid(height, width, side)
    if cuts.along:
        sizes, _ = _along(height, width, side, cuts.along)
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


def of_internvl(found: Mapping[str, Any], config: Any, side: int, folder: str) -> Cuts:
    """From the picture's settings. Its processor asks for cuts whatever the file says of `crop_to_patches`."""
    return Cuts(int(found.get("min_patches") or 1), int(found.get("max_patches") or 12))


def of_llava(found: Mapping[str, Any], config: Any, side: int, folder: str) -> Cuts:
    """The model lays tokens out by its config.json; its pictures have to be cut by the same canvases."""
    sizes = [list(size) for size in config.image_grid_pinpoints]
    said = found.get("image_grid_pinpoints")
    if said is not None and [list(size) for size in said] != sizes:
        raise InputError(
            f"{folder}: image_grid_pinpoints of its pixel settings and of its config.json differ; one of the files "
            "belongs to another model"
        )
    lines = int(str(config.vision_aspect_ratio).removeprefix("anyres_max_"))
    return Cuts(canvases=tuple((int(h), int(w)) for h, w in sizes), lines=lines)


def of_smolvlm(found: Mapping[str, Any], config: Any, side: int, folder: str) -> Cuts:
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
