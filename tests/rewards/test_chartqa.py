"""`chartqa` scores as the benchmark's own evaluation does; `relaxed` accepts whatever it accepts."""

from __future__ import annotations

import importlib.util
import itertools
import random
from pathlib import Path

import pytest

from zipr1.rewards.number import chartqa, relaxed

# By the benchmark's rule: numbers as they stand within 5 %, all else the same text but for the case.
CASES = [
    ("45", "45", 1),
    ("45.0", "45", 1),
    ("47.25", "45", 1),
    ("42.75", "45", 1),
    ("47.3", "45", 0),
    ("-45", "-45", 1),
    ("-45", "45", 0),
    ("The answer is 45", "45", 0),
    ("45.", "45", 1),  # a number to Python
    ("45 people", "45", 0),
    ("$45", "45", 0),
    ("1,000", "1000", 0),
    ("1,000", "1,000", 1),  # as a text
    ("1,001", "1,000", 0),
    ("1_000", "1000", 1),
    ("1e3", "1000", 1),
    ("45%", "45%", 1),
    ("46%", "45%", 1),
    ("0.45", "45%", 1),
    ("45", "45%", 0),
    ("45%", "45", 0),
    ("45 %", "45%", 1),
    ("45%%", "45%", 1),
    ("0", "0", 1),
    ("0.0", "0", 0),  # a right answer of 0 is compared as a text
    ("0.0", "0.0", 1),
    ("0.01", "0", 0),
    ("nan", "45", 0),
    ("nan", "nan", 0),
    ("45", "nan", 0),
    ("inf", "45", 0),
    ("Yes", "yes", 1),
    ("yes.", "yes", 0),
    ("yes ", "yes", 0),
    (" 45 ", "45", 1),
    ("", "", 1),
    ("", "45", 0),
    ("%", "%", 1),
    ("2012", "2010", 1),
    ("2010-2015", "2010", 0),
    (r"\boxed{45}", "45", 0),
    ("<answer>45</answer>", "45", 0),
    ("４５", "45", 1),  # wide digits are digits to Python
]


@pytest.mark.parametrize(("said", "wanted", "value"), CASES)
def test_chartqa(said, wanted, value):
    assert chartqa(said, wanted) == value


def _texts():
    """What models and charts say, and what is odd to Python."""
    rng = random.Random(0)
    numbers = [0, 1, -1, 5, 45, 100, 2010, 1e6, 0.45, -3.7, *(rng.gauss(0, 50) for _ in range(6))]
    for number in numbers:
        for factor in (1, 1.05, 0.95, 1.0500001, -1):
            yield f"{number * factor:g}"
            yield f"{number * factor:.1f}%"
    yield from (
        "Yes",
        "yes",
        "NO",
        "",
        " ",
        "%",
        "%%",
        "nan",
        "inf",
        "-inf",
        "infinity",
        "1_000",
        "1,000",
        "1e3",
        "1e400",
    )
    yield from (
        " 45",
        "45 ",
        "45\n",
        "45%\n",
        "45 %",
        "4 5",
        "45.",
        ".45",
        "+45",
        "--45",
        "$45",
        "45€",
        "٤٥",
        "４５",
        "0x2d",
    )
    yield from (
        "The answer is 45",
        "45 people",
        "Straße",
        "STRASSE",
        "İ",
        "i̇",
        "[1, 2]",
        r"\boxed{45}",
    )


def test_it_is_equal_to_lmms_evals_own():
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        pytest.skip("lmms-eval is not installed")
    path = Path(found.origin).parent / "tasks" / "chartqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("lmms_eval_chartqa", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    texts = sorted(set(_texts()))
    pairs = list(itertools.product(texts, repeat=2))
    assert len(pairs) > 10_000
    right = 0
    for said, wanted in pairs:
        value = chartqa(said, wanted)
        assert value == theirs.relaxed_correctness(said, wanted), (said, wanted)
        right += value
    assert 300 < right < len(pairs) / 2  # both kinds were seen


def test_relaxed_accepts_what_the_benchmark_accepts():
    usual = [text for text in _texts() if any(map(str.isalnum, text)) and "_" not in text]
    usual = [text for text in usual if "in" not in text and "nan" not in text and "%%" not in text]
    for said, wanted in itertools.product(sorted(set(usual)), repeat=2):
        if chartqa(said, wanted):
            assert relaxed(said, wanted) == 1, (said, wanted)
