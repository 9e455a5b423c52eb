"""Forms as pictures: a page of 500 to 1,100 visual tokens, or a clip of several sheets, 600 to 1,500.

A scene is pixels, what they say, and the drawing instructions (marks), from which tests read the labels back. Pixels
are integer arithmetic on numbers from a seeded numpy Generator: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zipr1.data.digits.glyphs import Bank, split_rows
from zipr1.data.pages import ink
from zipr1.data.pages.forms import ROWS, Form, draw_forms

CELL = 16  # px on a side of a visual token: patch 8 x merge 2
TOKENS = (500, 1100)  # fewest and most of a page
CLIP_TOKENS = (600, 1500)
SHEETS = (3, 5)  # fewest and most in a clip
SHEET_ROWS = (3, 5)
SHEET_CELLS = (12, 14)  # of a sheet's height and of its width
MOST_STEPS = 8  # of a clip, two frames each
FPS = 4.0
TICK_BOX = 12  # px
_MARGIN = 16  # px around the canvas, for what is turned or shaken out of it
_PENS = ((30, 40, 130), (25, 25, 35), (120, 30, 40), (20, 80, 60))
_PAPERS = ((235, 233, 227), (226, 224, 212), (222, 228, 234), (230, 220, 220), (220, 230, 220))


@dataclass(frozen=True)
class Mark:
    """One drawing instruction that carries meaning. kind: `print`, `digit`, `box` or `tick`; text: the word or digit.
    x, y: of the upper left corner, px; width, height: px. source: of a digit, its place in `load_digits`."""

    kind: Literal["print", "digit", "box", "tick"]
    text: str
    x: int
    y: int
    width: int
    height: int
    source: int = -1


@dataclass(frozen=True)
class Sheet:
    """steps: the time steps, first and one past the last, in which a clip shows it; (0, 1) for a page."""

    form: Form
    marks: tuple[Mark, ...]
    steps: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Scene:
    """pixels: uint8 `(H, W, 3)`, or `(F, H, W, 3)` at `fps`; H and W are multiples of 16, F of 2."""

    kind: Literal["image", "video"]
    pixels: np.ndarray
    sheets: tuple[Sheet, ...]
    fps: float | None = None


def draw_page(rng: np.random.Generator, bank: Bank, rows: int | None = None) -> Scene:
    """A page of `rows` (None: 6 to 20). One of fewer than 6, for lessons, is as small as they allow."""
    if rows is None:
        rows = int(rng.integers(ROWS[0], ROWS[1] + 1))
    (form,) = draw_forms(rng, [rows])
    pitch = int(rng.integers(18, 23))
    small = rows < ROWS[0]
    needed = -(-(_header(small) + rows * pitch + 14) // CELL)
    if small:
        wide = int(rng.integers(SHEET_CELLS[0], SHEET_CELLS[1] + 1))
        high = needed + int(rng.integers(2))
    else:
        wide = int(rng.integers(20, 29))
        least, most = max(needed, -(-TOKENS[0] // wide)), TOKENS[1] // wide
        high = int(rng.integers(least, min(most, least + 6) + 1))
    canvas, marks = _draw_sheet(rng, bank, form, high * CELL, wide * CELL, pitch)
    return Scene("image", _grainy(rng, _crop(canvas)), (Sheet(form, marks),))


def draw_clip(rng: np.random.Generator, bank: Bank, short: tuple[int, int] | None = None) -> Scene:
    """3 to 5 sheets leafed through, each shown for one time step or more. short: for lessons, how many sheets, and the
    most rows of one; each is then shown for one step."""
    high, wide = (int(n) for n in rng.integers(SHEET_CELLS[0], SHEET_CELLS[1] + 1, 2))
    if short is None:
        number = int(rng.integers(SHEETS[0], SHEETS[1] + 1))
        rows = rng.integers(SHEET_ROWS[0], SHEET_ROWS[1] + 1, number).tolist()
        least = max(number, -(-CLIP_TOKENS[0] // (high * wide)))
        most = min(MOST_STEPS, CLIP_TOKENS[1] // (high * wide), least + 3)
        steps = int(rng.integers(least, most + 1))
    else:
        number = steps = short[0]
        rows = rng.integers(1, short[1] + 1, number).tolist()
    between = np.sort(rng.permutation(np.arange(1, steps))[: number - 1]).tolist()
    frames, shown = [], []
    for form, start, stop in zip(
        draw_forms(rng, rows), [0, *between], [*between, steps], strict=True
    ):
        pitch = int(rng.integers(18, 22))
        canvas, marks = _draw_sheet(rng, bank, form, high * CELL, wide * CELL, pitch)
        shown.append(Sheet(form, marks, (start, stop)))
        for _ in range(2 * (stop - start)):
            down, right = (int(v) for v in rng.integers(-1, 2, 2))  # a hand that shakes
            frames.append(_grainy(rng, _crop(canvas, down, right)))
    return Scene("video", np.stack(frames), tuple(shown), FPS)


def _header(small: bool) -> int:
    """px above the table, at most."""
    return 50 if small else 66


def _draw_sheet(
    rng: np.random.Generator, bank: Bank, form: Form, height: int, width: int, pitch: int
) -> tuple[np.ndarray, tuple[Mark, ...]]:
    """A form on paper with a margin around it, without grain, and its marks in px of the cropped picture."""
    small = len(form.rows) < ROWS[0]
    pen = _Pen(rng, bank, height, width)
    left = int(rng.integers(4, 8 if small else 25))
    top = int(rng.integers(3, 6 if small else 13))
    face = ink.PLAIN[int(rng.integers(2))]
    size = ink.SIZES[int(rng.integers(2 if small else 3))]
    # The head of the form: what it is, and the date in boxes.
    heading_size = ink.SIZES[int(rng.integers(1, 3))]
    pen.print(form.heading, ink.HEADING, heading_size, left + int(rng.integers(9)), top)
    pen.print("Date", face, size, left, top + 20)
    comb = left + 42 + int(rng.integers(0, 6 if small else width // 3))
    for index, digit in enumerate(form.date.replace("/", "")):
        x = comb + 17 * index + (8 if index > 1 else 0)
        pen.frame(x, top + 19, 17, 17, 130)
        pen.digit(digit, x, top + 19)
    # The table: boxes on one side, labels, amounts that end where the column ends.
    first = top + 40 + (0 if small else int(rng.integers(2, 13)))
    boxes_left = bool(rng.integers(2))
    label_x = left + (20 if boxes_left else 2)
    right = width - int(rng.integers(4, 8 if small else 25)) - (0 if boxes_left else 20)
    if not small:
        right -= int(rng.integers(0, max(1, right - label_x - 150)))
    box_x = left if boxes_left else right + 4
    gap = int(rng.integers(11, 14))
    ruled = int(rng.integers(3))
    for index, row in enumerate(form.rows):
        y = first + index * pitch
        if ruled:
            pen.line(left - 2, y + pitch - 1, max(right, box_x + TICK_BOX) + 4 - left, 1, 170)
        pen.print(row.label, face, size, label_x, y)
        pen.frame(box_x, y + 2, TICK_BOX, TICK_BOX, 70)
        if row.ticked:
            pen.tick(box_x - 2, y)
        digits = str(row.amount)
        x = right - gap * len(digits) - 4 - int(rng.integers(6))
        for place, digit in enumerate(digits):
            pen.digit(digit, x + place * gap, y + int(rng.integers(-1, 2)))
    if ruled == 2:
        pen.line(right - 4 * gap - 14, first, 1, len(form.rows) * pitch, 170)
    pen.decorate(first + len(form.rows) * pitch)
    return pen.skewed(int(rng.integers(-12, 13)))


class _Pen:
    """Draws upright on paper and remembers what carries meaning; `skewed` ends it."""

    def __init__(self, rng: np.random.Generator, bank: Bank, height: int, width: int) -> None:
        self.rng, self.bank, self.height, self.width = rng, bank, height, width
        self.sources = split_rows()[bank.split]
        self.colour = np.array(_PENS[int(rng.integers(len(_PENS)))], np.int32)
        cells = (-(-height // CELL) + 2, -(-width // CELL) + 2)
        paper = np.array(_PAPERS[int(rng.integers(len(_PAPERS)))])
        # At most 235 + 4 + 15 of grain: nothing has to be clipped.
        shades = (paper + rng.integers(-4, 5, (*cells, 1))).astype(np.uint8)
        self.canvas = shades.repeat(CELL, axis=0).repeat(CELL, axis=1)
        self.marks: list[Mark] = []

    def print(self, text: str, face: str, size: int, x: int, y: int) -> None:
        line = ink.word(text, face, size)
        self._blend(line, x, y, np.array((20, 20, 25), np.int32))
        self.marks.append(Mark("print", text, x, y, line.shape[1], line.shape[0]))

    def digit(self, text: str, x: int, y: int) -> None:
        rows = self.bank.by_value[int(text)]
        row = int(rows[int(self.rng.integers(len(rows)))])
        variant = int(self.rng.integers(self.bank.video.shape[1]))
        self._blend(self.bank.video[row, variant], x, y, self.colour)
        self.marks.append(Mark("digit", text, x, y, CELL, CELL, int(self.sources[row])))

    def tick(self, x: int, y: int) -> None:
        shapes = ink.ticks()
        self._blend(shapes[int(self.rng.integers(len(shapes)))], x, y, self.colour)
        self.marks.append(Mark("tick", "", x, y, CELL, CELL))

    def frame(self, x: int, y: int, width: int, height: int, grey: int) -> None:
        """An empty box, one px wide."""
        self.line(x, y, width, 1, grey)
        self.line(x, y + height - 1, width, 1, grey)
        self.line(x, y, 1, height, grey)
        self.line(x + width - 1, y, 1, height, grey)
        self.marks.append(Mark("box", "", x, y, width, height))

    def line(self, x: int, y: int, width: int, height: int, grey: int) -> None:
        x, y = x + _MARGIN, y + _MARGIN
        self.canvas[y : y + height, x : x + width] = grey

    def decorate(self, end: int) -> None:
        """A fold, a stamp or two, faint enough to read through, and below `end`, the table's, a signature."""
        rng = self.rng
        fold = _MARGIN + int(rng.integers(self.width))
        self.canvas[:, fold : fold + 2] -= np.uint8(int(rng.integers(4, 13)))
        for _ in range(int(rng.integers(0, 3))):
            shape = ink.stamps()[int(rng.integers(len(ink.STAMPS)))]
            if shape.shape[0] < self.height and shape.shape[1] < self.width:
                x = int(rng.integers(self.width - shape.shape[1]))
                y = int(rng.integers(self.height - shape.shape[0]))
                tint = ((190, 40, 40), (50, 60, 170), (110, 60, 130))[int(rng.integers(3))]
                faint = shape // int(rng.integers(3, 6))
                self._blend(faint, x, y, np.array(tint, np.int32))
        shapes = ink.signatures()
        if self.height - end > shapes.shape[1] + 4:
            x = int(rng.integers(4, self.width - shapes.shape[2]))
            y = int(rng.integers(end + 2, self.height - shapes.shape[1]))
            self._blend(shapes[int(rng.integers(len(shapes)))], x, y, self.colour)

    def _blend(self, opacity: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
        high, wide = opacity.shape
        x, y = x + _MARGIN, y + _MARGIN
        window = self.canvas[y : y + high, x : x + wide]
        cover = opacity.astype(np.int32)[:, :, None]
        window[:] = (colour * cover + window * (255 - cover)) // 255

    def skewed(self, slope: int) -> tuple[np.ndarray, tuple[Mark, ...]]:
        """The canvas turned by `slope` / 1024, and the marks where they are then: rows of pixels are shifted down, then
        columns to the side, each by whole px, as by a scanner that does not smooth."""
        down = _offsets(self.canvas.shape[1], slope)
        aside = -_offsets(self.canvas.shape[0], slope)
        turned = self.canvas.copy()
        for start, stop in _runs(down):
            turned[:, start:stop] = np.roll(turned[:, start:stop], down[start], axis=0)
        for start, stop in _runs(aside):
            turned[start:stop] = np.roll(turned[start:stop], aside[start], axis=1)
        marks = []
        for mark in self.marks:
            middle = mark.x + _MARGIN + mark.width // 2
            y = mark.y + int(down[middle])
            x = mark.x + int(aside[y + _MARGIN + mark.height // 2])
            marks.append(Mark(mark.kind, mark.text, x, y, mark.width, mark.height, mark.source))
        return turned, tuple(marks)


def _offsets(length: int, slope: int) -> np.ndarray:
    """px that a line of `length` is away from its middle's place, int64 `(length,)`."""
    return (np.arange(length) - length // 2) * slope // 1024


def _runs(offsets: np.ndarray) -> Sequence[tuple[int, int]]:
    """Starts and ends of equal neighbours."""
    cuts = (np.flatnonzero(np.diff(offsets)) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(offsets)], strict=True))


def _crop(canvas: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    high, wide = canvas.shape[0] - 2 * _MARGIN, canvas.shape[1] - 2 * _MARGIN
    top, left = _MARGIN - down, _MARGIN - right
    return canvas[top : top + high, left : left + wide]


def _grainy(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    noise = rng.integers(0, 256, pixels.shape[:2], dtype=np.uint8)
    noise >>= 4  # 0 to 15
    return pixels + noise[:, :, None]
