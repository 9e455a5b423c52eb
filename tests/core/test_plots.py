"""Figures: the numbers that curves show, and which parts of a picture are dark."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.plots import (
    _curve,
    curves,
    darkened,
    evenly_spaced,
    frame_at,
    kept_picture,
    smooth,
)

METRICS = {"accuracy": 0.9, "token_ratio": 0.284, "kl": 0.0123}


def test_smooth_is_a_running_mean():
    assert smooth(np.array([0.0, 3.0, 6.0, 9.0]), 3) == pytest.approx([1.5, 3.0, 6.0, 7.5])
    assert smooth(np.array([1.0, np.nan, 3.0]), 3) == pytest.approx([1.0, 2.0, 3.0])


def test_curves(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, **METRICS}) + "\n" for i in range(30)))
    path = curves(metrics, tmp_path / "plots" / "curves.png")
    wide = Image.open(path)
    assert wide.width > 1000
    metrics.write_text('{"step": 0, "loss": 1.0, "kl": null}\n')
    assert Image.open(curves(metrics, tmp_path / "one.png")).width < wide.width
    for empty in ("", '{"step": 0}\n'):
        metrics.write_text(empty)
        with pytest.raises(InputError, match="holds no"):
            curves(metrics, tmp_path / "none.png")


def test_kept_picture_darkens_what_was_dropped(tmp_path):
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:, :, 1] = 255
    right = np.tile([False, True], 2)
    path = kept_picture(
        pixels, (1, 2, 2), [np.ones(4, bool), right], "Which?", {"dense": "7"}, tmp_path / "k.png"
    )
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    green = (image[..., 1] > 250) & (image[..., 0] < 5)
    dark = image.max(-1) < 60
    # Two and a half of three panels are kept, half a panel is dropped.
    assert green.sum() / (green | dark).sum() == pytest.approx(2.5 / 3, abs=0.03)
    columns = np.nonzero(dark & (image[..., 2] > image[..., 0] + 5))[1]
    assert columns.min() > image.shape[1] * 0.6  # in the last panel


def test_kept_picture_of_a_clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (8, 28, 28, 3), dtype=np.uint8)
    one = kept_picture(frames, (1, 2, 2), [np.ones(4)], "q", {}, tmp_path / "1.png")
    four = kept_picture(frames, (4, 2, 2), [np.ones(16)] * 9, "q", {}, tmp_path / "4.png")
    assert Image.open(four).height > 2 * Image.open(one).height


@pytest.mark.parametrize(
    ("pixels", "kept", "message"),
    [
        (np.zeros((4, 4)), [np.ones(4)], "pixels have shape"),
        (np.zeros((4, 4, 3)), [np.ones(5)], "layer 0 has 5 flags for a grid of 1 x 2 x 2"),
        (np.zeros((4, 4, 3)), [], "kept_per_layer is empty"),
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


def test_a_curve_shows_each_step_and_a_running_mean():
    """Of 60 steps: a window of 60 / 20 = 3, cut at the ends; a step without the value is a gap."""
    rows = [{"step": 10 * i, "kl": 3.0 * i} for i in range(60)]
    del rows[30]["kl"]
    ax = Figure().subplots()
    _curve(ax, rows, "KL", [("kl", "KL", "C3")], share=False)
    pale, strong = ax.lines
    assert list(pale.get_xdata()) == list(strong.get_xdata()) == list(range(0, 600, 10))
    assert np.isnan(pale.get_ydata()[30]) and pale.get_ydata()[29] == 87
    assert list(strong.get_ydata()[[0, 1, 30, 59]]) == [1.5, 3, 90, 175.5]
    assert strong.get_ydata()[31] == (93 + 96) / 2
