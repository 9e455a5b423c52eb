"""Every reward of the registry on awkward answers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipr1.core.errors import InputError
from zipr1.rewards.distance import edits
from zipr1.rewards.registry import REWARDS, find
from zipr1.rewards.rouge import common

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
        ("<think>eight? no</think><answer> Seven </answer>", "seven"): 1,
        ("<answer>eight</answer> I mean <answer>seven</answer>", "seven"): 1,
        (r"\boxed{\text{seven}}", "seven"): 1,
        ("seven", "<answer>seven</answer>"): 1,
        ("<think>seven</think> eight", "seven"): 0,
        ("<answer></answer>", "seven"): 0,
        ("12 %", "12%"): 1,
        ("१२", "12"): 0,
        ("नमस्त", "नमस्ते"): 0,  # a vowel sign is part of its word
        ("café", "cafe\u0301"): 1,
        ("１２ ％", "12%"): 1,
        ("   ", "seven"): 0,
        ("<answer>seven</answer> <answer>", "seven"): 1,  # cut after a tag
        (r"\boxed{\mathbf{\text{seven}}}", "seven"): 1,
        ("<think>it is seven", "it is seven"): 0,  # cut while thinking
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
        ("<think>A or B</think>\n<answer>C) both</answer>", "C"): 1,
        ("<answer>B", "B"): 1,  # cut at its longest
        (r"\boxed{\text{D}}", "D"): 1,
        (r"\boxed{\mathrm{(D)}}", "D"): 1,
        ("**B**", "B"): 1,
        ("E", "<answer>E</answer>"): 1,
        ("AB", "A"): 0,
        ("The answer is (B).", "B"): 1,
        ("B) because A is wrong", "B"): 1,
        ("The correct answer is: **C**", "C"): 1,
        (r"So the answer is $\textbf{(B)}$", "B"): 1,
        (r"\(B\)", "B"): 1,
        ("\uff22", "B"): 1,  # a wide letter
        ("答案：（B）", "B"): 1,
        ("B\n\nExplanation: A is too small.", "B"): 1,
        ("The answer is B. Option A is wrong.", "B"): 1,
        ("Option A is wrong, so the answer is B", "B"): 1,
        ("option B is wrong; option C is right", "C"): 0,  # which of two is not said by "option"
        ("I choose B because A is wrong", "B"): 1,
        ("The answer could be A, but the answer is B.", "B"): 1,
        ("The answer is A or B", "A"): 0,  # hedging does not pay
        ("A, B", "A"): 0,
        ("(A)(B)", "A"): 0,
        ("B, a dog", "B"): 1,
        ("The answer is not A, it is B", "B"): 1,
        ("It isn't B", "B"): 0,
        ("A dog is in the picture", "A"): 0,  # the article
        ("The answer is a cat", "A"): 0,
        ("the answer is (a)", "A"): 1,
        ("the answer is a.", "A"): 1,
        ("A is right", "A"): 1,
        ("It's B!", "B"): 1,
        ('"B"', "B"): 1,
        ("The answer is B and I am sure", "B"): 1,
        ("  ", "A"): 0,
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
        (r"so \boxed{\frac{1}{2}}", "0.5"): 1,
        (r"\boxed{-\frac{3}{4}}", "-0.75"): 1,
        (r"\frac{1}{0}", "0"): 0,
        ("1/4", "0.25"): 1,
        ("3-4", "4"): 1,  # a dash, not a sign
        ("−5", "-5"): 1,  # the minus of typesetters
        ("$1,200.50", "1200.5"): 1,
        ("1,2345", "2345"): 1,
        ("<think>7</think><answer>8</answer>", "8"): 1,
        ("<think>8</think>", "8"): 0,
        (r"12\%", "0.12"): 1,
        ("1e400", "1"): 0,
        (".5", "0.5"): 1,
        ("2e5 or e7", "7"): 1,  # e7 has no mantissa: it is a letter and a 7
        ("The answer is 12.", "12"): 1,
        ("1,234.50", "1234.5"): 1,
        ("12 %", "0.12"): 1,
        ("12%", "12"): 1,  # asked in percent, or not
        ("12", "12%"): 1,
        ("12 percent.", "12"): 1,
        ("12%", "1200"): 0,
        ("12", "0.12"): 0,
        ("12% of 50", "5000"): 0,
        ("–3", "-3"): 1,
        ("The answer is 3/4.", "0.75"): 1,
        ("x = -3/4", "-0.75"): 1,
        ("1 1/2", "1.5"): 1,
        ("½", "0.5"): 1,
        ("1½", "1.5"): 1,
        ("3/4/2020", "2020"): 1,  # a date
        ("1/2 = 0.5", "0.5"): 1,
        (r"\boxed{-\frac12}", "-0.5"): 1,
        (r"\boxed{1{,}234}", "1234"): 1,
        (r"\boxed{2 \times 10^{-3}}", "0.002"): 1,
        ("2×10³", "2000"): 1,
        ("10^3", "1000"): 1,
        ("5 m^2", "5"): 1,
        ("5 m²", "5"): 1,
        ("1\u202f234", "1234"): 1,
        ("１２", "12"): 1,
        (r"\boxed{\sqrt{2}}", "2"): 0,  # a root is not its number
        (r"\sqrt{4} = 2", "2"): 1,
        ("   ", "0"): 0,
        ("<think>so it is 8", "8"): 0,
    },
    "relaxed": {  # 5 % of the right value, ends included
        ("105", "100"): 1,
        ("95", "100"): 1,
        ("105.1", "100"): 0,
        ("-100", "100"): 0,
        ("0.01", "0"): 0,
        ("0", "0"): 1,
        ("about 41%", "0.4"): 1,
        ("Yes", "yes"): 1,
        ("No", "Yes"): 0,
        ("2019", "Group 2018"): 0,  # words with a number in them are no number
        ("Group 2018", "group 2018"): 1,
        ("12%", "12"): 0,  # as ChartQA counts
    },
    "regression": {
        ("100", "100"): 1,
        ("75", "100"): 0.75,
        ("125", "100"): 0.75,
        ("300", "100"): 0,
        ("-100", "100"): 0,
        ("0", "0"): 1,
        ("1", "0"): 0,
        ("none", "100"): 0,
        ("1e400", "100"): 0,
        ("<answer>50</answer> of 100", "100"): 0.5,
        ("12%", "12"): 1,
        ("3/4", "1"): 0.75,
        ("  ", "1"): 0,
    },
    "ocr": {
        ("the quick brown fox", "the quick brown fox"): 1,
        ("The QUICK, brown fox!", "the quick brown fox"): 1,
        ("the quick fox", "the quick brown fox"): 0.75,  # 1 deletion in 4 words
        ("the slow brown fox", "the quick brown fox"): 0.75,
        ("a the quick brown fox", "the quick brown fox"): 0.75,
        ("fox brown quick the", "the quick brown fox"): 0,  # 4 edits in 4 words
        ("fox " * 40, "fox"): 0,  # repeating does not pay
        ("", "fox"): 0,
        ("", "..."): 1,
        ("x", "..."): 0,
        ("出口在左", "出口在右"): 0.75,  # a word a character
        ("ＥＸＩＴ", "exit"): 1,
        ("<answer>stop</answer>", "STOP"): 1,
        ("   ", "fox"): 0,
        ("नमस्त", "नमस्ते"): 0,
        ("नमस्ते दुनिया", "नमस्ते"): 0,  # one word too many for one
        ("stop.", "STOP"): 1,
    },
    "rouge": {
        ("a cat sat", "a cat sat"): 1,
        ("A cat, sat.", "a cat sat"): 1,
        # 1 of 2 and of 4 words: F1 1/3; no pair of 1 and 3; 1 in order: 1/3.
        ("cat slept", "the cat sat down"): pytest.approx((1 / 3 + 0 + 1 / 3) / 3),
        # 3 words of 3; pairs "a cat" only: 1 of 2; "a cat" in order: 2 of 3.
        ("sat a cat", "a cat sat"): pytest.approx((1 + 1 / 2 + 2 / 3) / 3),
        ("yes", "Yes."): 1,
        ("cat cat cat", "cat"): pytest.approx(1 / 2),  # a word counts as often as it is right
        # 2 words of 3; the pair "cat cat" of 2; "cat cat" in order.
        ("cat cat dog", "cat cat bird"): pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("dog", "a cat sat"): 0,
        ("", "a cat"): 0,
        ("a cat", ""): 0,
        ("<think>dog</think><answer>a cat</answer>", "a cat"): 1,
        ("   ", "a cat"): 0,
        ("नमस्त", "नमस्ते"): 0,
    },
    "anls": {
        ("Hello World", "hello  world"): 1,
        ("helo", "hello"): pytest.approx(0.8),  # 1 edit in 5 characters
        ("hell", "help"): pytest.approx(0.75),
        ("abxx", "abcd"): pytest.approx(0.5),  # one half still counts
        ("axxx", "abcd"): 0,
        ("12", "1234567"): 0,
        ("", ""): 0,
        ("", "a"): 0,
        (r"\boxed{hello}", "hello"): 1,
        ("１２", "12"): 1,
        ("café", "cafe\u0301"): 1,
        (" ", "x"): 0,
        ("yes.", "yes"): pytest.approx(0.75),
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


@settings(max_examples=200)
@given(
    said=st.one_of(
        st.text(max_size=40), st.text(r"0123456789-+.,eE%/\{}fracboxed<answer>thik$ ", max_size=40)
    ),
    wanted=st.one_of(st.text(max_size=20), st.floats(allow_nan=False).map(str)),
)
def test_whatever_is_said_is_worth_something_from_0_to_1(said, wanted):
    for name, reward in REWARDS.items():
        assert 0 <= reward(said, wanted) <= 1, name
        assert 0 <= reward(wanted, said) <= 1, name


def test_unknown_reward():
    with pytest.raises(InputError, match=r"did you mean 'number'.*or path\.py:function"):
        find("numbr")


def test_the_tolerance_is_relative_and_that_of_number():
    near = find("number", tolerance=0.1)
    assert [near(said, "50") for said in ("45", "55", "44.9", "55.1", "-50")] == [1, 1, 0, 0, 0]
    assert find("relaxed", tolerance=0.5)("60", "50") == 0


def test_edits_are_those_of_a_brute_force():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    def longest(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    for a, b in itertools.product(["", "a", "ab", "ba", "abcb", "bcab", "cbbac"], repeat=2):
        assert edits(a, b) == slow(a, b)
        assert common(a, b) == longest(a, b)


OWN = """
calls = []

def first(said, wanted):
    calls.append(said)
    return float(said[:1] == wanted[:1])

def none(said, wanted): return None
def two(said, wanted): return 2
def odd(said, wanted): return 1 / 0
def one(said): return 1.0
three = 3
"""


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    first = find("mine.py:first")
    assert (first("seven", "six"), first("one", "six")) == (1.0, 0.0)
    assert find(f"{tmp_path}/mine.py:first")("s", "s") == 1.0
    for name, words in {
        "gone.py:f": r"there is no file gone\.py",
        "broken.py:f": r"broken\.py does not load \(SyntaxError",
        "mine.py:f": r"has no function f of two arguments; write def f\(prediction: str",
        "mine.py:three": "no function three",
        "mine.py:one": "no function one of two arguments",
    }.items():
        with pytest.raises(InputError, match=rf"rewards\.check '{name}': .*{words}"):
            find(name)
    for name, words in {
        "none": "gave None for 'x'; allowed: a number from 0 to 1",
        "two": "gave 2",
        "odd": r"failed on 'x' \(ZeroDivisionError",
    }.items():
        with pytest.raises(InputError, match=words):
            find(f"mine.py:{name}")("x", "y")
