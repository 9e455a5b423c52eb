"""No reward takes a time that grows with the square of an answer's length."""

from __future__ import annotations

import re
import statistics
import time

import pytest

from zipr1.rewards import distance
from zipr1.rewards.distance import LONGEST, anls, common, edits, ocr
from zipr1.rewards.registry import REWARDS
from zipr1.rewards.rouge import rouge

# What is repeated: where a search could start again at each place, or a match grow and shrink.
PIECES = [
    *[
        "A or ",
        "A",
        "A, ",
        "A\n",
        "A;",
        "(A)",
        "a is ",
        "B is wrong ",
        "I ",
        "option A ",
        "answer is ",
        "not A ",
    ],
    *[
        "answer: A ",
        "A?",
        "\n",
        " ",
        "*",
        ". ",
        "9",
        "1 ",
        "1,",
        "1,111,",
        "1 111 ",
        "1'111'",
        "1.",
        "1.111.",
        "1-",
        "1 1/",
        "1:",
    ],
    *[
        ".5",
        "1e",
        "- ",
        "-1",
        "\u00b11",
        "1 or ",
        "in 2020 ",
        "1 million ",
        "1 %",
        "$1",
        "$",
        "1 kg ",
        "1x",
        "1=",
        "2^",
    ],
    *[
        "2**",
        "^{",
        "2*10^",
        "\u00b2",
        "\u00bd",
        "m^2",
        "one ",
        "hundred ",
        "half ",
        "{",
        "}",
        "\\",
        "\\text{",
        "\\boxed{",
    ],
    *[
        "\\frac{",
        "\\frac{1}",
        "\\frac1",
        "\\sqrt{",
        "}{",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "less than ",
    ],
    *["U.", "a'", "a-", "C++", "出", "\u0301", "👍", "&", "a/", "％", "a1", "_"],
]
SHORT = 10_000


def _took(reward, pieces, length):
    """CPU seconds for a text of the pieces, each again and again, in equal parts."""
    part = length // len(pieces)
    text = "".join((piece * part)[:part] for piece in pieces)
    begin = time.process_time()
    reward(text, text[1:] + "B")
    return time.process_time() - begin


def _grows(reward, *pieces):
    """Whether twice the length takes much more than twice the time, in each of a few tries: where it grows with the
    square, four times. What takes hardly any time is not measured."""
    return all(
        _took(reward, pieces, 2 * SHORT) > max(3.2 * _took(reward, pieces, SHORT), 0.02)
        for _ in range(6)
    )


@pytest.mark.parametrize("name", REWARDS)
def test_long_answers_take_a_time_in_proportion(name):
    reward = REWARDS[name]
    once = {piece: _took(reward, [piece], SHORT // 4) for piece in PIECES}
    usual = statistics.median(once.values())
    # What grows with the square stands out at this length already.
    assert not [piece for piece in PIECES if once[piece] > 6 * usual and _grows(reward, piece)]


LONG_RUNS = [("B)", ")", "a x "), ("1.111", ".111", ".1"), (" ", "1,"), ("A ", "\n"), ("2^", "{")]


@pytest.mark.parametrize("name", ["choice", "number", "exact"])
@pytest.mark.parametrize("pieces", LONG_RUNS)
def test_long_runs_after_long_runs(name, pieces):
    assert not _grows(REWARDS[name], *pieces)


def test_the_measure_sees_what_grows_with_the_square():
    # On a busy machine one of several tries may look better than it is; never all of them look worse.
    assert any(
        _grows(lambda said, wanted: float(bool(re.search(" +x", said))), " ") for _ in range(20)
    )
    assert not _grows(lambda said, wanted: float(bool(re.search(" x", said))), " ")


def test_what_took_over_a_minute():
    assert REWARDS["choice"]("A or " * 20_000, "A") == 0


def test_edits_beyond_the_longest_are_all_counted():
    short = ["a"] * 10
    long = ["b"] * (LONGEST + 100)
    assert edits(long, ["c"] * (LONGEST + 50)) == LONGEST + 100
    assert edits(short, long) == edits(long, short) == LONGEST + 100
    # A common beginning and end are free, whatever their length.
    same = [str(i) for i in range(3 * LONGEST)]
    assert edits([*same, "x", *same], [*same, "y", "z", *same]) == 2
    # A shift by one within more than is compared: the cut-off part counts as wrong, so the number is an upper bound.
    assert 2 <= edits(["x", *same, "x"], ["y", "z", *same]) <= 3 * LONGEST + 2


def test_long_readings_that_are_right_are_right():
    text = " ".join(f"w{i}" for i in range(4 * LONGEST))
    for reward in (ocr, anls):
        assert reward(text, text) == 1
    assert ocr(text + " more", text) == pytest.approx(1 - 1 / (4 * LONGEST))
    # Of the common subsequence the first LONGEST words are compared.
    assert rouge(text, text) == pytest.approx((1 + 1 + 1 / 4) / 3)


def test_nothing_more_than_the_longest_is_compared_in_order(monkeypatch):
    monkeypatch.setattr(distance, "LONGEST", 3)
    assert edits("abcdef", "bcdefa") == 5  # "abc" and "bca" 2, "def" and "efa" 3
    assert common("abcdef", "bcdefa") == 2  # "bc"
    assert edits("abc", "bca") == 2
