"""`exact`, `ocr`, `rouge` and `anls` on awkward answers, valued as a careful marker would, graded ones by hand."""

from __future__ import annotations

import pytest

from zipr1.rewards.distance import anls, ocr
from zipr1.rewards.exact import exact
from zipr1.rewards.rouge import rouge

EXACT = [
    # Signs that mean something.
    ("C++", "C", 0),
    ("C++", "c++", 1),
    ("C#", "C", 0),
    ("C#", "C++", 0),
    ("A+", "A-", 0),
    ("A-", "A", 0),
    ("A-", "A\u2212", 1),
    ("A- grade", "A grade", 0),
    ("x^2", "x2", 0),
    ("x²", "x^2", 1),
    ("1/2", "1 2", 0),
    ("½", "1/2", 1),
    (r"\frac{1}{2}", "1/2", 1),
    ("x > 5", "x < 5", 0),
    ("x>5", "x > 5", 1),
    ("x = 5", "x ≠ 5", 0),
    ("x - 5", "x + 5", 0),
    ("2 + 3", "2 - 3", 0),
    ("2*3", "23", 0),
    ("3 × 4", "3x4", 1),
    ("5%", "5", 0),
    ("5 percent", "5%", 1),
    ("$5", "5", 0),
    ("$5", "€5", 0),
    ("$5", r"\$5", 1),
    ("$x$", "x", 1),  # dollar signs of LaTeX
    ("11:30", "1130", 0),
    ("11:30", "11.30", 0),
    ("2010-2015", "2010–2015", 1),
    ("2010-2015", "20102015", 0),
    ("20°C", "20 °C", 1),
    ("20°", "20", 0),
    ("yes/no", "yes / no", 1),
    ("R&D", "R & D", 1),
    ("red & blue", "red and blue", 1),
    ("a@b.com", "a b.com", 0),
    ("👍", "👎", 0),
    ("👍", "👍", 1),
    ("?", "?", 1),
    ("？", "?", 1),
    ("?", "!", 0),
    ("?", "a", 0),
    # Ways of writing the same.
    ("−5", "-5", 1),
    ("-5", "−5", 1),
    ("- 5", "-5", 1),
    ("it is -5", "it is 5", 0),
    ("+5", "5", 1),
    ("1,234", "1234", 1),
    ("1 234", "1234", 1),
    ("1'234", "1234", 1),
    ("1,00,000", "100000", 1),
    ("1,23", "123", 0),
    ("1, 234", "1234", 0),  # two numbers
    ("1,000", "1000", 1),
    ("3", "3.0", 1),
    ("3.0", "3", 1),
    ("3.50", "3.5", 1),
    ("3.05", "3.5", 0),
    ("30", "3", 0),
    ("3.0", "30", 0),
    ("-3.0", "-3", 1),
    ("5.0%", "5%", 1),
    (".5", "0.5", 1),
    ("007", "7", 0),  # a code
    ("3.1.0", "3.1", 0),
    ("it\u2019s", "it's", 1),
    ("its", "it's", 0),
    ("“red”", "red", 1),
    (r"\text{red}", "red", 1),
    (r"\textbf{red}", "red", 1),
    (r"\mathrm{red} \text{and blue}", "red and blue", 1),
    ("**red**", "red", 1),
    ("`red`", "red", 1),
    ("red.", "red", 1),
    ("(red)", "red", 1),
    ("red, green", "red green", 1),
    ("red green", "redgreen", 0),
    ("well-known", "well known", 1),
    ("co\u2011op", "co-op", 1),
    ("U.S.", "US", 1),
    ("u.s", "US", 1),
    ("U.S.A. and U.K.", "USA and UK", 1),
    ("Ph.D.", "PhD", 1),
    ("STRASSE", "straße", 1),
    ("naïve", "naive", 0),
    ("ﬁne", "fine", 1),  # a ligature
    ("the cat", "cat", 0),
    ("cats", "cat", 0),
    ("seven", "7", 0),  # other words: `number` reads both
    ("Red", "red", 1),
    ("5kg", "5 kg", 1),
    ("COVID-19", "covid 19", 1),
    ("東京", "東京", 1),
    ("東京", "京都", 0),
    ("наука", "НАУКА", 1),
    ("-", "–", 1),
    ("...", "...", 0),
    ("", "", 0),
    ("<answer>red</answer>", "red", 1),
    (r"\boxed{red}", "red", 1),
]

OCR = [
    ("-5", "5", 0),
    ("5%", "5", 0),
    ("$5", "5", 0),
    ("5", "$5", 0),
    ("-5", "−5", 1),
    ("C++", "C", 0),
    ("C", "C++", 0),
    ("A+", "A-", 0),
    ("3.5", "35", 0),
    ("1,234", "1234", 1),  # punctuation
    ("5 %", "5%", 1),
    ("x^2", "x2", 0),
    ("x²", "x^2", 1),
    ("11:30", "1130", 0),
    ("11:30", "11:30", 1),
    ("1/2", "12", 0),
    ("½", "1/2", 1),
    ("EXIT", "exit", 1),
    ("EXlT", "EXIT", 0),
    ("AB12CD", "AB 12 CD", 0),  # one word for three: 3 edits of 3
    ("AB12CD", "AB12CD", 1),
    ("AB12CD", "AB12CE", 0),
    ("no parking here", "No Parking Here!", 1),
    ("no parking", "no parking here", 2 / 3),
    ("no parking here today", "no parking here", 2 / 3),
    ("no parking there", "no parking here", 2 / 3),
    ("parking no here", "no parking here", 1 / 3),
    ("no\nparking\there", "no parking here", 1),
    ("no, parking: here.", "no parking here", 1),
    ("“no parking”", "no parking", 1),
    ("don\u2019t walk", "don't walk", 1),
    ("dont walk", "don't walk", 1 / 2),
    ("well-known", "well known", 1),
    ("wellknown", "well known", 0),
    ("total $5.00", "total $5.00", 1),
    ("total $5.00", "total $6.00", 1 / 2),
    ("total 5.00", "total $5.00", 1 / 2),
    ("total 5.0", "total 5", 1 / 2),  # another text, if the same number
    ("stop stop", "stop", 0),
    ("stop stop stop", "stop stop", 1 / 2),
    ("出口", "出口", 1),
    ("出", "出口", 1 / 2),
    ("出口 EXIT", "出口 EXIT", 1),
    ("出口", "出口 EXIT", 2 / 3),
    ("ทางออก", "ทางออก", 1),
    ("CAFÉ", "cafe\u0301", 1),
    ("café", "cafe", 0),
    ("a b c d", "w x y z", 0),
    ("b c d e", "a b c d", 1 / 2),
    ("?", "stop", 0),
    ("", "?", 1),  # no words to read
    ("**stop**", "stop", 1),
    (r"\text{stop}", "stop", 1),
    ("<answer>no parking</answer>", "no parking", 1),
    ("<think>no</think>parking", "no parking", 1 / 2),
]

# Means of F1 of words, of the longest common subsequence and, where the right answer has two words, of pairs.
ROUGE = [
    ("-5", "5", 0),
    ("5%", "5", 0),
    ("$5", "5", 0),
    ("5", "5", 1),
    ("C++", "C", 0),
    ("1,234", "1234", 1),
    ("−5", "-5", 1),
    ("it\u2019s red", "it's red", 1),
    ("U.S. flag", "US flag", 1),
    ("5 %", "5%", 1),
    ("11:30", "1130", 0),
    ("A red car.", "a red car", 1),
    ("a red car", "a blue car", (2 / 3 + 2 / 3 + 0) / 3),
    ("a red car", "red car", (4 / 5 + 4 / 5 + 2 / 3) / 3),
    ("red car", "a red car", (4 / 5 + 4 / 5 + 2 / 3) / 3),
    ("car red", "red car", (1 + 1 / 2 + 0) / 3),
    ("car", "red car", (2 / 3 + 2 / 3 + 0) / 3),
    ("red car", "car", (2 / 3 + 2 / 3) / 2),
    ("red red", "red car", (1 / 2 + 1 / 2 + 0) / 3),
    ("red car red car", "red car", (2 / 3 + 2 / 3 + 1 / 2) / 3),
    ("a b c d", "a b c d e", (8 / 9 + 8 / 9 + 6 / 7) / 3),
    ("a b c d e", "e d c b a", (1 + 1 / 5 + 0) / 3),
    ("a b", "c d", 0),
    ("a x b y c", "a b c", (3 / 4 + 3 / 4 + 0) / 3),
    ("the cat sat on the mat", "the mat sat on the cat", (1 + 4 / 6 + 4 / 5) / 3),
    ("yes", "no", 0),
    ("yes", "yes", 1),
    ("Yes, it is", "yes", (1 / 2 + 1 / 2) / 2),
    ("well-known", "well known", 1),
    ("wellknown", "well known", 0),
    ("x^2", "x2", 0),
    ("5kg", "5kg", 1),
    ("出口", "出口", 1),
    ("出", "出口", (2 / 3 + 2 / 3 + 0) / 3),
    ("口出", "出口", (1 + 1 / 2 + 0) / 3),
    ("café", "cafe\u0301", 1),
    ("cats", "cat", 0),  # unstemmed
    ("?", "a", 0),
    ("a", "?", 0),
    ("", "", 0),
    ("**red** car", "red car", 1),
    (r"\boxed{red car}", "red car", 1),
    (r"\text{red car}", "red car", 1),
    ("<think>blue</think>red car", "red car", 1),
    ("<answer>red car</answer>", "red car", 1),
    ("red, car", "red; car", 1),
    ("RED CAR", "red car", 1),
    ("red/car", "red / car", 1),
    ("x > 5", "x < 5", (2 / 3 + 2 / 3 + 0) / 3),
    ("A+", "A-", 0),
    ("red & blue", "red and blue", 1),
]

# 1 - edits / the longer length, in characters; 0 below one half.
ANLS = [
    ("$5", "5", 1 / 2),  # one character too many of two
    ("5", "$5", 1 / 2),
    ("$5$", "5", 1),  # LaTeX
    ("-5", "5", 1 / 2),
    ("−5", "-5", 1),
    ("5%", "5", 1 / 2),
    ("5 %", "5%", 2 / 3),
    ("it\u2019s", "it's", 1),
    ("“a”", '"a"', 1),
    ("ABC", "abc", 1),
    ("abc", "abd", 2 / 3),
    ("abc", "acb", 0),  # two edits of three
    ("abcd", "abdc", 1 / 2),
    ("abc", "ab", 2 / 3),
    ("ab", "abc", 2 / 3),
    ("abc", "bc", 2 / 3),
    ("abcdef", "abc", 1 / 2),
    ("abcdefg", "abc", 0),
    ("abc", "xyz", 0),
    ("a", "b", 0),
    ("a", "a", 1),
    ("kitten", "sitting", 4 / 7),
    ("saturday", "sunday", 5 / 8),
    ("flaw", "lawn", 1 / 2),
    ("intention", "execution", 0),  # 5 edits of 9
    ("2019", "2018", 3 / 4),  # as the benchmark counts
    ("10", "11", 1 / 2),
    ("1,234", "1234", 4 / 5),
    ("new  york", "new york", 1),
    (" new york ", "new york", 1),
    ("new\nyork", "new york", 1),
    ("newyork", "new york", 7 / 8),
    ("new york city", "new york", 8 / 13),
    ("the new york times", "new york", 0),
    ("york new", "new york", 0),
    ("new york.", "new york", 8 / 9),
    ("NEW YORK", "new york", 1),
    ("straße", "strasse", 1),
    ("café", "cafe", 3 / 4),
    ("出口", "出口", 1),
    ("出口", "入口", 1 / 2),
    ("ﬁ", "fi", 1),
    ("ａｂｃ", "abc", 1),
    ("", "abc", 0),
    ("abc", "", 0),
    ("?", "?", 1),
    ("abc abc abc", "abc", 0),  # repeating does not pay
    (r"\text{abc}", "abc", 1),
    ("<answer>abc</answer>", "abc", 1),
    ("<think>abc", "abc", 0),
    ("The answer is abc", "abc", 0),
    ("co\u00adop", "coop", 1),  # a soft hyphen
]


def _ids(cases):
    return [f"{said} | {wanted}" for said, wanted, _ in cases]


@pytest.mark.parametrize(("said", "wanted", "value"), EXACT, ids=_ids(EXACT))
def test_exact(said, wanted, value):
    assert exact(said, wanted) == value


@pytest.mark.parametrize(("said", "wanted", "value"), OCR, ids=_ids(OCR))
def test_ocr(said, wanted, value):
    assert ocr(said, wanted) == pytest.approx(value)


@pytest.mark.parametrize(("said", "wanted", "value"), ROUGE, ids=_ids(ROUGE))
def test_rouge(said, wanted, value):
    assert rouge(said, wanted) == pytest.approx(value)


@pytest.mark.parametrize(("said", "wanted", "value"), ANLS, ids=_ids(ANLS))
def test_anls(said, wanted, value):
    assert anls(said, wanted) == pytest.approx(value)
