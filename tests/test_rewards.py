"""Every reward of the registry on awkward answers."""

from __future__ import annotations

import pytest

from zipr1.errors import InputError
from zipr1.rewards import REWARDS, find

CASES = {
    "exact": {
        ("seven", "seven"): 1,
        (" Seven. ", "seven"): 1,
        ("two red digits", "two red digits"): 1,
        ("two  red\ndigits!", "two red digits"): 1,
        ("red two digits", "two red digits"): 0,
        ("two red", "two red digits"): 0,
        ("seven seven", "seven"): 0,
        ("", "seven"): 0,
        ("...", "!"): 0,
        ("-3", "3"): 0,
        ("3.5", "35"): 0,
        ("d’accord", "D’ACCORD"): 1,
    },
    "choice": {
        ("B", "B"): 1,
        ("b", "B"): 1,
        ("(B) a cat", "B"): 1,
        ("B. a cat", "B"): 1,
        ("The answer is C.", "C"): 1,
        ("Option (D)", "d"): 1,
        ("<answer>A</answer>", "A"): 1,
        (r"so \boxed{C}", "C"): 1,
        ("I think it is B", "B"): 1,
        ("A or B", "A"): 0,
        ("A dog, so the answer is B", "B"): 1,
        ("a cat", "A"): 0,
        ("", "A"): 0,
        ("C", "D"): 0,
    },
    "number": {
        ("12", "12"): 1,
        ("12.0", "12"): 1,
        ("about 1,234.5 metres", "1234.5"): 1,
        ("3 + 4 = 7", "7"): 1,
        ("25%", "0.25"): 1,
        ("-3e2", "-300"): 1,
        ("3", "-3"): 0,
        ("twelve", "12"): 0,
        ("", "0"): 0,
        ("0", "0"): 1,
        ("12.1", "12"): 0,
    },
}


def test_every_reward_has_cases():
    assert set(CASES) == set(REWARDS)


@pytest.mark.parametrize(
    ("name", "said", "wanted", "value"),
    [(name, *pair, value) for name, cases in CASES.items() for pair, value in cases.items()],
)
def test_reward(name, said, wanted, value):
    assert find(name)(said, wanted) == value


def test_unknown_reward():
    with pytest.raises(InputError, match=r"did you mean 'number'"):
        find("numbr")
