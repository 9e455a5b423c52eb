"""What a form says: a date and rows of a label, an amount and a box that is ticked or not. No pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# fmt: off
LABELS = (
    "bread", "milk", "rent", "fuel", "water", "soap", "paper", "tea", "coffee", "sugar", "salt", "rice",
    "beans", "corn", "meat", "fish", "fruit", "eggs", "cheese", "butter", "oil", "wine", "juice", "cake",
    "nails", "rope", "paint", "glue", "wood", "sand", "bricks", "tiles", "glass", "wire", "lamp", "chair",
    "desk", "shelf", "door", "lock", "keys", "pump", "pipe", "hose", "tools", "rug", "bed", "linen",
    "coat", "shoes", "hat", "gloves", "books", "pens", "stamps", "post", "taxi", "train", "bus", "hotel",
)
# fmt: on
HEADINGS = ("EXPENSES", "STORES", "ORDER", "RECEIPT", "DELIVERY", "INVENTORY", "CLAIM", "SUPPLIES")
ROWS = (6, 20)  # fewest and most on a page
MOST_TICKS = 7  # on a page, so that each number of ticks is as likely
_DIGITS = (1, 2, 2, 2, 3, 3, 3, 3, 4, 4)  # of an amount, each as likely


@dataclass(frozen=True)
class Row:
    """amount: 1 to 9999."""

    label: str
    amount: int
    ticked: bool


@dataclass(frozen=True)
class Form:
    """day: 1 to 28; month: 1 to 12. Labels and amounts occur once."""

    heading: str
    day: int
    month: int
    rows: tuple[Row, ...]

    @property
    def date(self) -> str:
        """Day and month, two digits each."""
        return f"{self.day:02d}/{self.month:02d}"


def draw_forms(rng: np.random.Generator, rows: list[int]) -> list[Form]:
    """A form for each number of rows; no label and no amount occurs twice in all of them."""
    labels = [LABELS[i] for i in rng.permutation(len(LABELS))[: sum(rows)]]
    amounts = _draw_amounts(rng, len(labels))
    made, start = [], 0
    for number in rows:
        ticked = _draw_ticks(rng, number)
        some = slice(start, start + number)
        made.append(
            Form(
                HEADINGS[int(rng.integers(len(HEADINGS)))],
                int(rng.integers(1, 29)),
                int(rng.integers(1, 13)),
                tuple(map(Row, labels[some], amounts[some], ticked)),
            )
        )
        start += number
    return made


def _draw_amounts(rng: np.random.Generator, number: int) -> list[int]:
    amounts: dict[int, None] = {}
    while len(amounts) < number:
        digits = _DIGITS[int(rng.integers(len(_DIGITS)))]
        amounts[int(rng.integers(10 ** (digits - 1), 10**digits))] = None
    return list(amounts)


def _draw_ticks(rng: np.random.Generator, rows: int) -> list[bool]:
    number = int(rng.integers(min(rows, MOST_TICKS) + 1))
    chosen = set(rng.permutation(rows)[:number].tolist())
    return [row in chosen for row in range(rows)]
