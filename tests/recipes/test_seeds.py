"""Means over seeds against numbers worked out by hand, and against the tables of Student's distribution."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from fair import rows
from fair.seeds import difference, mean_error, t_quantile

from zipr1.core.errors import InputError
from zipr1.core.statistics import Z


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_the_tables_of_students_distribution(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=6e-5)


def test_other_levels():
    assert t_quantile(1, 0.5) == pytest.approx(1.0)  # the quartile of Cauchy's distribution
    assert t_quantile(4, 0.99) == pytest.approx(4.6041, abs=6e-5)


def test_three_seeds_against_the_base():
    """Four questions about two pictures, the base right on all: the seeds lose 0, 1 and 2 of the first picture's."""
    base = [np.ones(4)]
    runs = [np.array(r, float) for r in ([1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1])]
    found = difference(runs, base, np.array([0, 0, 1, 1]), base=True)
    # Means 1, 3/4, 1/2: s = 1/4, / sqrt(3). Of the questions' means 1/3, 2/3, 1, 1, less 3/4, the pictures' sums are
    # -1/2 and 1/2: V = 2 * 1/2 / 16.
    assert found.mean == pytest.approx(-0.25) and found.runs == (3, 1)
    assert found.seeds == pytest.approx(0.25 / 3**0.5) and found.degrees == 2
    assert found.questions == pytest.approx(0.25)
    assert found.error == pytest.approx((1 / 48 + 1 / 16) ** 0.5)
    assert found.half == pytest.approx(((4.30265 * 0.25) ** 2 / 3 + (Z * 0.25) ** 2) ** 0.5)


def test_two_methods():
    a = [np.array(r, float) for r in ([1, 1, 1, 0], [1, 1, 0, 0])]
    b = [np.array(r, float) for r in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0])]
    found = difference(a, b, np.arange(4))
    # Means 3/4, 1/2 and 1/4, 1/2, 1/4: variances 1/32 over 2 and 1/48 over 3; 1/64 + 1/144 = 13/576.
    assert found.mean == pytest.approx(5 / 8 - 1 / 3)
    assert found.seeds == pytest.approx((13 / 576) ** 0.5)
    # Welch: (13/576)^2 / ((1/64)^2 + (1/144)^2 / 2) = 0.0005094 / 0.0002683 = 1.9
    assert found.degrees == 1
    # Questions' differences 0, 16/24, 12/24, 0, mean 7/24: residuals -7, 9, 5, -7, squares 204; V = 4/3 * 204/576 / 16.
    assert found.questions == pytest.approx((4 / 3 * 204 / 576 / 16) ** 0.5)


def test_one_seed_has_no_error_of_seeds():
    base, run = [np.ones(8)], [np.r_[0.0, np.ones(7)]]
    found = difference(run, base, np.arange(8) // 4, base=True)
    assert found.seeds is None and found.half == pytest.approx(Z * found.questions)
    # Against another method that is so on either side.
    assert difference([*run, *run], run, np.arange(8)).seeds is None
    assert mean_error([0.3]) == (0.3, None)
    assert mean_error([0.1, 0.3]) == pytest.approx((0.2, 0.1))


def test_seeds_that_agree():
    run = np.r_[0.0, np.ones(7)]
    found = difference([run, run, run], [run, run], np.arange(8))
    assert (found.mean, found.seeds, found.degrees) == (0.0, 0.0, 3)


def test_intervals_cover_the_truth():
    """Seeds of standard deviation 2 points, 3 of them; 400 questions, of which a mean run loses 5 in a hundred."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(300):
        hardness = rng.random(400)
        runs = [(hardness > np.clip(0.05 + rng.normal(0, 0.02), 0, 1)) * 1.0 for _ in range(3)]
        found = difference(runs, [np.ones(400)], np.arange(400), base=True)
        inside += abs(found.mean + 0.05) <= found.half
    assert 0.93 <= inside / 300 <= 1.0


@pytest.mark.parametrize("number", [1, 7, 8, 9, 2000])
def test_answers_come_back_from_a_cell(number):
    right = (np.random.default_rng(number).random(number) < 0.9).astype(float)
    text = rows.pack(right)
    assert np.array_equal(rows.unpack(text, number), right)
    assert len(text) <= 24 + number / 5 and not set(text) & set(',"\n')


def test_cells_that_are_no_answers():
    with pytest.raises(InputError, match="neither right nor wrong"):
        rows.pack(np.array([0.5]))
    text = rows.pack(np.ones(16))
    for other, number in ((text, 17), (text, 8), ("@", 16), ("", 1), (text[:-8], 16)):
        with pytest.raises(InputError, match="the file was changed"):
            rows.unpack(other, number)
    # A cell that unpacks to a gigabyte is not unpacked.
    with pytest.raises(InputError, match="the file was changed"):
        rows.unpack(rows.pack(np.zeros(10**7)), 100)


def test_rows_are_added_and_read(tmp_path):
    path, columns = tmp_path / "new" / "rows.csv", ("a", "b")
    assert rows.read(path, columns) == []
    rows.append(path, columns, [{"a": "1", "b": "x, y"}])
    rows.append(path, columns, [{"a": "2", "b": 'q"'}, {"a": "3", "b": ""}])
    assert [row["a"] for row in rows.read(path, columns)] == ["1", "2", "3"]
    assert rows.read(path, columns)[0]["b"] == "x, y" and path.read_text().count("a,b") == 1
    with pytest.raises(InputError, match=r"has the columns a,b and a,b,c are written"):
        rows.read(path, (*columns, "c"))
