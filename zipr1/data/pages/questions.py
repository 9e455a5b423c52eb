"""Questions about forms and their only right answers, in one fixed wording per kind.

What a guess without the picture gets right: half of `ticked` and `larger`, an eighth of `ticks`, about a quarter of
`sheet`, and at most a twentieth of everything else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from zipr1.data.pages.forms import LABELS, Form

ORDER = ("first", "second", "third", "fourth", "fifth")
# `second`: an amount or a row after an answered question about another row.
KINDS = {
    "pages": ("amount", "row", "ticked", "ticks", "date", "larger", "second"),
    "page_clips": ("amount", "row", "ticked", "sheet", "second"),
    "page_totals": ("total",),
}


@dataclass(frozen=True)
class Question:
    """about: labels of the rows that are meant; empty for a whole sheet."""

    kind: str
    text: str
    answer: str
    about: tuple[str, ...] = ()


def draw(
    forms: Sequence[Form], rng: np.random.Generator, kind: str, used: Collection[str] = ()
) -> Question | None:
    """A question of this kind whose text is not in `used`, or None where chance finds none."""
    for _ in range(8):
        question = _one(forms, rng, kind)
        if question is None or question.text not in used:
            return question
    return None


def draw_second(
    forms: Sequence[Form],
    rng: np.random.Generator,
    openings: Sequence[str],
    used: Collection[str] = (),
) -> tuple[Question, Question] | None:
    """A first question of one of the kinds `openings`, and the amount or the label of another row."""
    first = _one(forms, rng, openings[int(rng.integers(len(openings)))])
    second = draw(forms, rng, ("amount", "row")[int(rng.integers(2))], used)
    if first is None or second is None or set(first.about) & set(second.about):
        return None
    return first, second


def _one(forms: Sequence[Form], rng: np.random.Generator, kind: str) -> Question | None:
    rows = [(row, sheet) for sheet, form in enumerate(forms) for row in form.rows]
    if kind == "ticks":
        number = sum(row.ticked for row, _ in rows)
        return Question(kind, "how many rows are ticked?", str(number))
    if kind == "date":
        return Question(kind, "which date is on it?", forms[0].date)
    if kind == "ticked":
        # Yes and no as often, however many ticks there are.
        yes = bool(rng.integers(2))
        rows = [(row, sheet) for row, sheet in rows if row.ticked == yes] or rows
    places = rng.permutation(len(rows))
    one, sheet = rows[int(places[0])]
    about: tuple[str, ...] = (one.label,)
    if kind == "amount":
        return Question(kind, f"how much is {one.label}?", str(one.amount), about)
    if kind == "row":
        return Question(kind, f"which row says {one.amount}?", one.label, about)
    if kind == "ticked":
        return Question(kind, f"is {one.label} ticked?", "yes" if one.ticked else "no", about)
    if kind == "sheet":
        return Question(kind, f"which sheet has {one.label}?", ORDER[sheet], about)
    if len(rows) == 1:
        return None
    two = rows[int(places[1])][0]
    about = (one.label, two.label)
    if kind == "larger":
        larger = max(one, two, key=lambda row: row.amount)
        return Question(kind, f"which is more, {one.label} or {two.label}?", larger.label, about)
    total = str(one.amount + two.amount)
    return Question("total", f"how much are {one.label} and {two.label}?", total, about)


def vocabulary() -> list[str]:
    """Every word of questions and answers that is not a number, sorted."""
    phrases = "how much is are and many rows ticked which row says date on it sheet has more or"
    return sorted({*phrases.split(), *LABELS, *ORDER, "yes", "no", "?", ",", "/"})
