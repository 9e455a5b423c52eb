"""Selection: hand-computed cases, and properties of what is kept."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zipr1_kernels import (
    cut_points,
    dispatch,
    ran,
    select_threshold,
    select_top_k,
    select_top_p,
    use,
)

SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0]])  # shares .4 .1 .3 .2
ALL = torch.ones(1, 4, dtype=torch.bool)
NONE = torch.zeros(1, 4, dtype=torch.bool)
LAST = torch.tensor([[False, False, False, True]])


INTERPRETED = pytest.mark.interpreted
PATHS = ["torch", *(pytest.param(x, marks=INTERPRETED) for x in ("triton", "triton, sorted"))]


@contextlib.contextmanager
def forced(path):
    """`use`, and "triton, sorted": as the kernel chooses in long rows."""
    with pytest.MonkeyPatch.context() as patch, use(path.partition(",")[0]):
        if path == "triton, sorted":
            from zipr1_kernels.select_top_p import kernel

            patch.setattr(kernel, "LONGEST", 0)
        yield


@pytest.fixture(params=PATHS)
def each_path(request):
    dispatch._state.ran.clear()
    with forced(request.param):
        yield
    taken = "torch: forced" if request.param == "torch" else "triton"
    assert set(dispatch._state.ran.values()) == {taken}


def kept(mask):
    return mask[0].nonzero()[:, 0].tolist()


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("p", "always", "want"),
    [
        (0.01, NONE, [0]),
        (0.39, NONE, [0]),
        (0.41, NONE, [0, 2]),
        (0.69, NONE, [0, 2]),
        (0.71, NONE, [0, 2, 3]),
        (0.91, NONE, [0, 1, 2, 3]),
        (0.19, LAST, [3]),
        (0.21, LAST, [0, 3]),
        (0.59, LAST, [0, 3]),
        (0.61, LAST, [0, 2, 3]),
    ],
)
def test_top_p_by_hand(p, always, want):
    assert kept(select_top_p(SCORES, torch.tensor([p]), ALL, always)) == want


def test_cut_points_by_hand():
    torch.testing.assert_close(
        cut_points(SCORES, ALL, NONE), torch.tensor([[0.0, 0.9, 0.4, 0.7]]), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        cut_points(SCORES, ALL, LAST), torch.tensor([[0.2, 0.9, 0.6, 0.0]]), rtol=0, atol=1e-7
    )


@pytest.mark.usefixtures("each_path")
def test_padding_is_never_read_and_never_kept():
    scores = torch.tensor([[torch.nan, 4, 1, 3, 2, torch.nan]])
    candidates = ~scores.isnan()
    always = torch.tensor([[True, False, False, False, True, True]])
    cut = cut_points(scores, candidates, always)
    torch.testing.assert_close(cut, torch.tensor([[2, 0.2, 0.9, 0.6, 0, 2]]), rtol=0, atol=1e-7)
    one = torch.ones(1)
    assert kept(select_top_p(scores, one, candidates, always)) == [1, 2, 3, 4]
    assert kept(select_top_k(scores, one.long() * 9, candidates, always)) == [1, 2, 3, 4]
    assert kept(select_threshold(scores, one * 0, candidates, always)) == [1, 2, 3, 4]


@pytest.mark.usefixtures("each_path")
def test_ties_go_to_the_lower_index():
    flat = torch.ones(1, 40)
    every = torch.ones(1, 40, dtype=torch.bool)
    keep = select_top_p(flat, torch.tensor([0.24]), every, ~every)
    assert kept(keep) == list(range(10))
    assert kept(select_top_k(flat, torch.tensor([7]), every, ~every)) == list(range(7))


@pytest.mark.usefixtures("each_path")
def test_p_of_one_keeps_all_even_where_scores_underflow():
    scores = torch.tensor([[1.0, 1e-30, 0.0, 1e-12]])
    assert kept(select_top_p(scores, torch.tensor([1.0]), ALL, NONE)) == [0, 1, 2, 3]
    assert kept(select_top_p(scores, torch.tensor([0.999]), ALL, NONE)) == [0]


def test_scores_of_zero_keep_all_and_have_finite_gradients():
    scores = torch.zeros(1, 4, requires_grad=True)
    assert kept(select_top_p(scores, torch.tensor([0.5]), ALL, NONE)) == [0, 1, 2, 3]
    cut_points(scores, ALL, NONE).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("k", "always", "want"),
    [(1, NONE, [0]), (3, NONE, [0, 2, 3]), (1, LAST, [3]), (2, LAST, [0, 3]), (0, LAST, [3])],
)
def test_top_k_by_hand(k, always, want):
    assert kept(select_top_k(SCORES, torch.tensor([k]), ALL, always)) == want


@pytest.mark.usefixtures("each_path")
def test_threshold_by_hand():
    # Relative to uniform: 1.6, 0.4, 1.2, 0.8.
    for t, want in [(1.0, [0, 2]), (0.7, [0, 2, 3]), (1.5, [0]), (0.0, [0, 1, 2, 3])]:
        assert kept(select_threshold(SCORES, torch.tensor([t]), ALL, NONE)) == want
    assert kept(select_threshold(SCORES, torch.tensor([1.5]), ALL, LAST)) == [0, 3]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(1, 10**6), min_size=1, max_size=30, unique=True),
    p=st.floats(0.01, 0.99),
    fixed=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_kept_mass_is_enough_and_minimal_in_any_order(path, values, p, fixed, seed):
    """Below 1e6 the integers are exact in float32; the kernel's sums are good to 1e-6 of the mass."""
    near = 1e-9 if path == "torch" else 1e-6
    scores = torch.tensor([values], dtype=torch.float64 if path == "torch" else torch.float32)
    every = torch.ones_like(scores, dtype=torch.bool)
    always = torch.arange(len(values))[None] >= len(values) - fixed
    at = torch.tensor([p], dtype=scores.dtype)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    with forced(path):
        keep = select_top_p(scores, at, every, always)
        again = select_top_p(scores, at, every, always)
        shuffled = select_top_p(scores[:, order], at, every, always[:, order])
    assert ran("select_top_p") == ("torch: forced" if path == "torch" else "triton")
    assert torch.equal(keep, again)
    share = scores.double() / scores.double().sum()
    mass = (share * keep).sum()
    assert mass >= p - near
    assert (keep >= always).all()
    chosen = keep & ~always
    if chosen.any():
        least = share[chosen].min()
        assert mass - least < p + near
        assert not (share[~keep] > least).any()
    # A rounding may decide otherwise only where the mass is within it of p.
    if ((share * keep).sum() - p).abs() > near and (mass - p - share[keep].min()).abs() > near:
        assert torch.equal(shuffled, keep[:, order])
    cut = cut_points(scores, every, always)
    torch.testing.assert_close(cut_points(scores[:, order], every, always[:, order]), cut[:, order])


def test_cut_points_gradient():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 7.0]], dtype=torch.float64, requires_grad=True)
    candidates = torch.tensor([[True] * 4 + [False]])
    always = torch.tensor([[False, False, False, True, False]])
    assert torch.autograd.gradcheck(lambda s: cut_points(s, candidates, always), scores)


@pytest.mark.usefixtures("each_path")
def test_samples_do_not_mix():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 12, generator=g)
    candidates = torch.arange(12) < torch.tensor([12, 3, 7, 1, 12])[:, None]
    always = candidates & (torch.arange(12) == 0)
    p = torch.tensor([0.3, 0.9, 0.5, 0.1, 1.0])
    whole = select_top_p(scores, p, candidates, always)
    for b in range(5):
        row = slice(b, b + 1)
        alone = select_top_p(scores[row], p[row], candidates[row], always[row])
        assert torch.equal(whole[row], alone)


def test_wrong_arguments_say_what_came():
    with pytest.raises(ValueError, match=r"scores has dtype torch\.int64"):
        select_top_p(SCORES.long(), torch.ones(1), ALL, NONE)
    with pytest.raises(ValueError, match=r"p has shape \(2,\)"):
        select_top_p(SCORES, torch.ones(2), ALL, NONE)
    with pytest.raises(ValueError, match="always has dtype"):
        select_top_k(SCORES, torch.ones(1).long(), ALL, NONE.float())
