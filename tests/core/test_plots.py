"""Figures: which parts of a picture are dark."""

import numpy as np
import pytest
from PIL import Image

from zipr1.core import plots
from zipr1.core.errors import InputError
from zipr1.core.plots import darkened, evenly_spaced, frame_at, kept_picture


def test_kept_picture_darkens_what_was_dropped(tmp_path):
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:, :, 1] = 255
    right = np.tile([False, True], 2)
    kept = {"after": [(np.ones(4, bool), 1.0), (right, 0.5)]}
    path = kept_picture(pixels, (1, 2, 2), kept, "Which?", {"dense": "7"}, tmp_path / "k.png")
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    green = (image[..., 1] > 250) & (image[..., 0] < 5)
    dark = image.max(-1) < 60
    # Two and a half of three panels are kept, half a panel is dropped.
    assert green.sum() / (green | dark).sum() == pytest.approx(2.5 / 3, abs=0.03)
    columns = np.nonzero(dark & (image[..., 2] > image[..., 0] + 5))[1]
    assert columns.min() > image.shape[1] * 0.6  # in the last panel


def test_kept_picture_of_a_clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (8, 28, 28, 3), dtype=np.uint8)
    one = kept_picture(frames, (1, 2, 2), {"a": [(np.ones(4), 1.0)]}, "q", {}, tmp_path / "1.png")
    layers = [(np.ones(16), 1.0)] * 9
    four = kept_picture(frames, (4, 2, 2), {"a": layers}, "q", {}, tmp_path / "4.png")
    both = kept_picture(frames, (4, 2, 2), {"a": layers, "b": layers}, "q", {}, tmp_path / "8.png")
    heights = [Image.open(path).height for path in (one, four, both)]
    assert (
        heights[1] > 2 * heights[0] and heights[2] == heights[1]
    )  # two of two times, or one of four


def test_a_kept_picture_says_the_share_of_all_tokens(tmp_path, monkeypatch):
    """Of four visual tokens two are kept, which is half of the picture; the title has the table's number, 71 %."""
    seen = []
    monkeypatch.setattr(plots, "save", lambda figure, path: seen.append(figure) or path)
    kept = {name: [(np.array([1, 1, 0, 0]), 0.71)] for name in ("before", "after")}
    kept_picture(np.zeros((4, 4, 3), np.uint8), (1, 2, 2), kept, "q", {}, tmp_path / "k.png")
    titles = [ax.get_title() for ax in seen[0].axes]
    assert titles == ["seen by dense", "layer 1: 71%", "", "layer 1: 71%"]
    assert [ax.get_ylabel() for ax in seen[0].axes] == ["before", "", "after", ""]
    assert "kept of all tokens of the prompt" in seen[0].texts[0].get_text()


@pytest.mark.parametrize(
    ("pixels", "kept", "message"),
    [
        (np.zeros((4, 4)), {"a": [(np.ones(4), 1.0)]}, "pixels have shape"),
        (np.zeros((4, 4, 3)), {"a": [(np.ones(5), 1.0)]}, "a: layer 0 has 5 flags for a grid of 1"),
        (np.zeros((4, 4, 3)), {"a": []}, "kept is empty"),
        (np.zeros((4, 4, 3)), {}, "kept is empty"),
    ],
)
def test_kept_picture_wrong_input(tmp_path, pixels, kept, message):
    with pytest.raises(InputError, match=message):
        kept_picture(pixels, (1, 2, 2), kept, "q", {}, tmp_path / "k.png")


def test_a_pixel_is_as_bright_as_its_cell():
    """A row of 5 pixels over 2 cells: centres at 0.1, 0.3, 0.5, 0.7, 0.9; the second starts at 0.5."""
    frame = np.zeros((2, 5, 3), np.float32)
    frame[..., 0] = 0.6  # the mean of the channels is 0.2, and dark is 0.22 of it on top of a blue
    dark = np.array([0.044 + 0.03, 0.044 + 0.04, 0.044 + 0.10])
    out = darkened(frame, np.array([[True, False]]))
    np.testing.assert_allclose(out[:, :2], frame[:, :2])
    np.testing.assert_allclose(out[:, 2:], np.broadcast_to(dark, (2, 3, 3)), rtol=1e-6)
    half = darkened(frame, np.array([[0.5, 0.25]]))
    np.testing.assert_allclose(half[0, 0], (frame[0, 0] + dark) / 2, rtol=1e-6)
    np.testing.assert_allclose(half[1, 4], 0.25 * frame[0, 0] + 0.75 * dark, rtol=1e-6)


def test_shown_frames_of_a_clip():
    frames = np.arange(6).repeat(12).reshape(6, 2, 2, 3)
    # Six frames are three steps of two frames each, of which the first is shown.
    assert [frame_at(frames, m, 3)[0, 0, 0] for m in range(3)] == [0, 2, 4]
    assert [frame_at(frames[:1], m, 2)[0, 0, 0] for m in range(2)] == [0, 0]
    assert evenly_spaced(9, 3) == [0, 4, 8] and evenly_spaced(2, 4) == [0, 1]
    assert evenly_spaced(1, 4) == [0]


def test_dollars_in_a_question_are_no_formula(tmp_path):
    """matplotlib would read what stands between two of them, and fail where that is no formula."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    kept = {"$a$": [(np.ones(4, bool), 1.0)]}
    said = {"dense": "$\\frac{5$", "after training": "$ $"}
    path = kept_picture(pixels, (1, 2, 2), kept, "from $5 to $\\x{6$?", said, tmp_path / "a.png")
    assert path.stat().st_size > 1000
