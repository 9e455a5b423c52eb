"""Intervals against numbers worked out by hand."""

import numpy as np
import pytest

from zipr1.core.errors import InputError
from zipr1.core.statistics import Z, confidence_interval, paired_difference, verdict


def test_independent_outcomes():
    # m = 1/2, residuals +-1/2: V = 4/3 * 4 * 1/4 / 16 = 1/12
    low, high = confidence_interval([1, 1, 0, 0])
    assert (low, high) == (0.0, 1.0)  # 0.5 -+ 0.566, cut to [0, 1]
    x = np.r_[np.ones(80), np.zeros(20)]
    # V = 100/99 * (80 * 0.04 + 20 * 0.64) / 10000 = 16/9900
    low, high = confidence_interval(x)
    assert low == pytest.approx(0.8 - Z * (16 / 9900) ** 0.5)
    assert high == pytest.approx(0.8 + Z * (16 / 9900) ** 0.5)


def test_questions_of_one_picture_count_together():
    # m = 7/8; the clusters' sums of residuals are 1/4, 1/4, -3/4, 1/4: V = 4/3 * 3/4 / 64 = 1/64
    low, high = confidence_interval([1, 1, 1, 1, 1, 0, 1, 1], list("aabbccdd"))
    assert (low, high) == pytest.approx((7 / 8 - Z / 8, 1.0))
    # Eight questions each about three pictures, one of them half right: V = 3/2 * (4^2 + 0 + 4^2) / 24^2 = 1/12
    x = np.r_[np.ones(12), np.zeros(12)]
    difference, low, high = paired_difference(x, np.zeros(24), np.repeat(["a", "b", "c"], 8))
    half = Z * (1 / 12) ** 0.5
    assert (difference, low, high) == pytest.approx((0.5, 0.5 - half, 1.0))


def test_clusters_that_agree_widen_by_the_root_of_their_size():
    x = np.r_[np.ones(90), np.zeros(10)]
    low, high = confidence_interval(np.repeat(x, 4), np.repeat(np.arange(100), 4))
    assert (low, high) == pytest.approx(confidence_interval(x))


def test_order_of_outcomes_does_not_matter():
    rng = np.random.default_rng(0)
    x, clusters = rng.integers(0, 2, 60), rng.integers(0, 20, 60)
    order = rng.permutation(60)
    assert confidence_interval(x, clusters) == pytest.approx(
        confidence_interval(x[order], clusters[order])
    )


def test_all_right_or_all_wrong_is_wilson():
    # 50 of 50: high 1, low 1 / (1 + z^2 / 50)
    low, high = confidence_interval(np.ones(50))
    assert (low, high) == pytest.approx((1 / (1 + Z**2 / 50), 1.0))
    low, high = confidence_interval(np.zeros(50))
    assert (low, high) == pytest.approx((0.0, Z**2 / 50 / (1 + Z**2 / 50)))
    # Fifty questions about ten pictures are as sure as ten questions.
    clustered = confidence_interval(np.ones(50), np.arange(50) // 5)
    assert clustered == pytest.approx(confidence_interval(np.ones(10)))


def test_one_cluster_says_almost_nothing():
    low, high = confidence_interval([1, 0, 1, 0], ["a"] * 4)
    assert (low, high) == pytest.approx(
        (0.5 - 0.5 * Z / (1 + Z**2) ** 0.5, 0.5 + 0.5 * Z / (1 + Z**2) ** 0.5)
    )


def test_paired_difference():
    # d = 1 at 10 of 100, else 0: m = 0.1, V = 100/99 * (10 * 0.81 + 90 * 0.01) / 10000 = 9/99 * 0.01
    a, b = np.ones(100), np.r_[np.zeros(10), np.ones(90)]
    difference, low, high = paired_difference(a, b)
    half = Z * (9 / 99 * 0.01) ** 0.5
    assert (difference, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert paired_difference(b, a) == pytest.approx((-0.1, -0.1 - half, -0.1 + half))


def test_no_difference_still_has_a_width():
    x = np.ones(96)
    half = Z**2 / (96 + Z**2)
    assert paired_difference(x, x) == pytest.approx((0.0, -half, half))


def test_no_difference_is_surer_than_one():
    # Ten pictures of four questions: one changed answer, m = 1/40, cluster sums 9/10 and -1/10: V = 10/9 * 0.9 / 40^2
    a, b = np.ones(40), np.ones(40)
    pictures = np.arange(40) // 4
    same = paired_difference(a, b, pictures)
    assert same == pytest.approx((0.0, -(Z**2) / (40 + Z**2), Z**2 / (40 + Z**2)))
    b[7] = 0
    one = paired_difference(a, b, pictures)
    assert one == pytest.approx((1 / 40, 1 / 40 - Z / 40, 1 / 40 + Z / 40))
    # Every answer differs alike: only pictures were sampled.
    assert paired_difference(a, np.zeros(40), pictures)[1] == pytest.approx(1 - Z**2 / (10 + Z**2))


def test_intervals_of_rare_differences_cover_the_truth():
    """2 % of 100 answers turn wrong, four questions a picture: most samples have two or fewer."""
    rng = np.random.default_rng(2)
    pictures = np.repeat(np.arange(25), 4)
    found = [paired_difference(np.ones(100), rng.random(100) >= 0.02, pictures) for _ in range(400)]
    inside = sum(low <= 0.02 <= high for _, low, high in found)
    assert inside / 400 >= 0.95 and any(mean == 0 for mean, _, _ in found)


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(100), 3)
    inside = 0
    for _ in range(400):
        p = rng.beta(4, 2, 100)  # mean 2/3, questions of a picture depend on each other
        low, high = confidence_interval(rng.random(300) < np.repeat(p, 3), clusters)
        inside += low <= 2 / 3 <= high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence_interval([]), "at least one outcome"),
        (lambda: confidence_interval([2.0]), "outside"),
        (lambda: confidence_interval([float("nan")]), "outside"),
        (lambda: confidence_interval([1, 0], ["a"]), "1 values for 2 outcomes"),
        (lambda: paired_difference([1, 0], [1]), "a has 2 outcomes and b 1"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("lost", "error", "word", "questions"),
    [
        (0.001, 0.002, "held", 677),  # 1000 * (1.645 * 0.002 / 0.004)^2
        (0.001, 0.003, "not shown", 1522),
        (0.02, 0.003, "violated", None),
        (0.006, 0.003, "not shown", None),
        (-0.01, 0.0, "held", 1),
    ],
)
def test_whether_a_loss_is_within_the_allowed(lost, error, word, questions):
    said = verdict(lost, error, 1000, 0.005)
    assert (said["verdict"], said["questions"]) == (word, questions)
