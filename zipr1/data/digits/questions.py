"""Questions about a scene and their only right answers, in one fixed wording per kind.

`catalogue` lists all that can be asked; `draw` takes one at random so that the answers of a kind are balanced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from zipr1.data.digits.scenes import COLOURS, DIRECTIONS, Digit, Scene

# fmt: off
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)
# fmt: on
COUNTS = ("no", "one", "two", "three")
# Kinds of one question each, and `second`: a question after an answered one about the same scene.
KINDS = {
    "digits": ("colour", "digit", "count", "second"),
    "moving_digits": ("direction", "first", "last", "digit", "colour", "second"),
    "hard_digits": ("sum",),
}


@dataclass(frozen=True)
class Question:
    """about: indices into `Scene.objects`; empty where no single object is meant."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


def catalogue(scene: Scene) -> dict[str, list[Question]]:
    """Every question with one right answer, by kind; kinds that have none are left out."""
    objects = list(enumerate(scene.objects))
    values = Counter(o.value for o in scene.objects)
    colours = Counter(o.colour for o in scene.objects)
    single = [(i, o) for i, o in objects if colours[o.colour] == 1]
    by_kind = {
        "colour": [
            Question("colour", f"what color is the {NUMBERS[o.value]}?", o.colour, (i,))
            for i, o in objects
            if values[o.value] == 1
        ],
        "digit": [
            Question("digit", f"which digit is {o.colour}?", NUMBERS[o.value], (i,))
            for i, o in single
        ],
    }
    if scene.kind == "image":
        by_kind["count"] = [_count(name, colours[name]) for name in COLOURS]
        by_kind["sum"] = [_sum(i, one, j, two) for i, one in single for j, two in single if i != j]
    else:
        by_kind["direction"] = [
            Question(
                "direction",
                f"which way does the {o.colour} digit move?",
                f"to the {o.direction}",
                (i,),
            )
            for i, o in single
        ]
        if len(objects) > 1:
            order = sorted(objects, key=lambda pair: pair[1].start)
            for kind, (i, o) in (("first", order[0]), ("last", order[-1])):
                text = f"which digit appears {kind}?"
                by_kind[kind] = [Question(kind, text, NUMBERS[o.value], (i,))]
    return {kind: questions for kind, questions in by_kind.items() if questions}


def draw(
    by_kind: dict[str, list[Question]],
    rng: np.random.Generator,
    kind: str,
    used: Collection[str] = (),
) -> Question | None:
    """A question of this kind whose text is not in `used`, or None."""
    choice = [q for q in by_kind.get(kind, ()) if q.text not in used]
    if kind == "count" and choice:
        # Among six colours most are absent and few are shared: draw the number first, the rare ones more often.
        numbers = list(dict.fromkeys(q.answer.split()[0] for q in choice))
        weights = np.array([(1, 1, 4, 5)[COUNTS.index(n)] for n in numbers])
        number = numbers[
            int(np.searchsorted(weights.cumsum(), rng.integers(weights.sum()), "right"))
        ]
        choice = [q for q in choice if q.answer.startswith(number + " ")]
    return choice[int(rng.integers(len(choice)))] if choice else None


def draw_second(
    by_kind: dict[str, list[Question]], rng: np.random.Generator, used: Collection[str] = ()
) -> tuple[Question, Question] | None:
    """A first question, and one about another object: its colour or which digit it is."""
    openings = [kind for kind in by_kind if kind != "sum"]
    for index in rng.permutation(len(openings)):
        first = draw(by_kind, rng, openings[index])
        if first is None:
            continue
        kind = ("colour", "digit")[int(rng.integers(2))]
        others = [q for q in by_kind.get(kind, ()) if not set(q.about) & set(first.about)]
        second = draw({kind: others}, rng, kind, used)
        if second is not None:
            return first, second
    return None


def vocabulary() -> list[str]:
    """Every word of questions and answers, sorted; "?" is a word of its own."""
    phrases = [
        "what color is the ?",
        "which digit is ?",
        "how many digits are there ?",
        "what is the digit plus the digit ?",
        "which way does the digit move ?",
        "which digit appears first last ?",
        "to the",
    ]
    words = {word for phrase in phrases for word in phrase.split()}
    return sorted(words | {*NUMBERS, *COUNTS, *COLOURS, *DIRECTIONS})


def _count(colour: str, number: int) -> Question:
    answer = f"{COUNTS[number]} {colour} {'digit' if number == 1 else 'digits'}"
    return Question("count", f"how many {colour} digits are there?", answer)


def _sum(i: int, one: Digit, j: int, two: Digit) -> Question:
    text = f"what is the {one.colour} digit plus the {two.colour} digit?"
    return Question("sum", text, NUMBERS[one.value + two.value], (i, j))
