"""Clips as files and as lists of frames: both readers give the same frames, and what a file says of itself holds."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.core.types import Media
from zipr1.data import rows, video
from zipr1.data.chat import medium
from zipr1.data.containers import turn_of, turned
from zipr1.data.media import check, exists, load_media, load_timed

ONE = 65536
# As written in a file: a, b, 0, c, d, 0, x, y, 1 of x' = a x + c y, y' = b x + d y; and the same of a frame's pixels.
TURNS = {
    "upright": ((ONE, 0, 0, ONE), lambda f: f),
    "a quarter, clockwise": ((0, ONE, -ONE, 0), lambda f: np.rot90(f, -1)),
    "half": ((-ONE, 0, 0, -ONE), lambda f: np.rot90(f, 2)),
    "a quarter, counterclockwise": ((0, -ONE, ONE, 0), lambda f: np.rot90(f, 1)),
    "left is right": ((-ONE, 0, 0, ONE), lambda f: f[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda f: f[::-1]),
    "rows are columns": ((0, ONE, ONE, 0), lambda f: f.swapaxes(0, 1)),
    "and both turned": ((0, -ONE, -ONE, 0), lambda f: np.rot90(f, 2).swapaxes(0, 1)),
    "an eighth is left alone": ((46341, 46341, -46341, 46341), lambda f: f),
}


def quarters(height=64, width=128) -> np.ndarray:
    """A frame whose four quarters are red, green, blue and grey."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = 250, 0, 0
    frame[: height // 2, width // 2 :] = 0, 250, 0
    frame[height // 2 :, : width // 2] = 0, 0, 250
    frame[height // 2 :, width // 2 :] = 120
    return frame


def written(
    path,
    frames=None,
    codec="libx264",
    pixels="yuv420p",
    times=None,
    rate=10,
    turn=None,
    **container,
):
    """A clip, by default of 40 frames of rising greys. times: of frames in milliseconds. turn: its display matrix."""
    if frames is None:
        frames = np.broadcast_to(
            (np.arange(40, dtype=np.uint8) * 5 + 20)[:, None, None, None], (40, 64, 96, 3)
        )
    with av.open(str(path), "w", options=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn is not None:
            a, b, c, d = turn
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        for i, frame in enumerate(frames):
            one = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            one.pts = int(times[i] if times is not None else i * 1000 // rate)
            one.time_base = Fraction(1, 1000)
            out.mux(stream.encode(one))
        out.mux(stream.encode())
    return path


def every(total, fps):
    return np.arange(total)


def by_both(path):
    """What each reader makes of all frames: (frames, frames a second, how many)."""
    pytest.importorskip("decord")
    return video._read_decord(path, every), video._read_pyav(path, every)


def patched(path, matrix):
    """The file with another display matrix: what phones write into the header of a track."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_clips_are_seen_upright(name, codec, tmp_path):
    """AV1 too, which decord does not read."""
    matrix, by_hand = TURNS[name]
    path = patched(written(tmp_path / "a.mp4", np.stack([quarters()] * 4), codec), matrix)
    frames, fps = video.read(path)
    wanted = by_hand(quarters())
    assert frames.shape == (4, *wanted.shape) and fps == 10.0
    assert np.abs(frames[0].astype(int) - wanted).mean() < 12
    assert video.check(path) == (4, *wanted.shape[:2], 10.0)


@pytest.mark.parametrize("name", [n for n in TURNS if "quarter" in n or n in ("upright", "half")])
def test_both_readers_turn_alike(name, tmp_path):
    path = patched(written(tmp_path / "a.mp4", np.stack([quarters()] * 4)), TURNS[name][0])
    (one, _, _), (two, _, _) = by_both(path)
    assert one.shape == two.shape and np.abs(one.astype(int) - two).mean() < 8


def test_a_matrix_moves_every_corner_to_where_it_says():
    """Against the definition, for all eight: pixel (x, y) is seen at (a x + c y, b x + d y), moved back into view."""
    frame = np.arange(6).reshape(2, 3, 1) * np.ones((1, 1, 3), int)
    for a, b, c, d in [(s, 0, 0, t) for s in (1, -1) for t in (1, -1)] + [
        (0, s, t, 0) for s in (1, -1) for t in (1, -1)
    ]:
        places = {
            (a * x + c * y, b * x + d * y): frame[y, x, 0] for y in range(2) for x in range(3)
        }
        left, top = min(x for x, _ in places), min(y for _, y in places)
        seen = turned(frame, (a, b, c, d))
        assert seen.shape[:2] == ((2, 3) if a else (3, 2))
        for (x, y), value in places.items():
            assert seen[y - top, x - left, 0] == value


KINDS = {
    "mp4": ("a.mp4", {}),
    "B frames": ("a.mp4", {"pixels": "yuv444p"}),
    "mov": ("a.mov", {}),
    "mkv": ("a.mkv", {}),
    "webm": ("a.webm", {"codec": "libvpx-vp9"}),
    "avi": ("a.avi", {"codec": "mpeg4"}),
    "10 bit": ("a.mp4", {"codec": "libx264", "pixels": "yuv420p10le"}),
    "fragments": ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "index first": ("a.mp4", {"movflags": "faststart"}),
    "late start": ("a.mp4", {"times": [2000 + 100 * i for i in range(40)]}),
    "half of a second": ("a.mp4", {"rate": 2}),
    "one frame": ("a.mp4", {"frames": np.full((1, 64, 96, 3), 90, np.uint8)}),
    "three frames": ("a.mp4", {"frames": np.full((3, 64, 96, 3), 90, np.uint8)}),
    "portrait": ("a.mp4", {"frames": np.full((4, 128, 64, 3), 90, np.uint8)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_both_readers_give_the_same_frames_and_rate(name, tmp_path):
    file, options = KINDS[name]
    path = written(tmp_path / file, **options)
    (one, one_fps, one_total), (two, two_fps, two_total) = by_both(path)
    asked = options.get("frames")
    frames = 40 if asked is None else len(asked)
    assert one_total == two_total == len(one) == len(two) == frames
    assert one_fps == pytest.approx(two_fps, rel=1e-3)
    assert one_fps == pytest.approx(options.get("rate", 10), rel=0.03)
    assert one.shape == two.shape and np.abs(one.astype(int) - two).mean() < 3


@pytest.mark.parametrize(
    ("file", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mp4", "libx264")]
)
def test_a_rate_that_the_frames_do_not_keep_is_not_believed(file, codec, tmp_path):
    """Five frames in half a second, then one a second: 40 frames in 35.4 seconds, 39 steps. The camera's rate of 10 (or
    the clock's of 1,000) would make four seconds (0.04) of it."""
    times = [0, 100, 200, 300, 400, *(400 + 1000 * i for i in range(1, 36))]
    path = written(tmp_path / file, codec=codec, times=times)
    for _, fps, total in by_both(path):
        assert total == 40 and fps == pytest.approx(39 / 35.4, rel=0.1)
    # 36.3 seconds, or 33.7 by the header of the mp4, at one frame every two; an even number.
    assert len(video.read(path, 64, 0.5)[0]) == (16 if file == "a.mp4" else 18)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("file", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "av1.mp4"])
def test_a_file_that_is_cut_off_is_no_shorter_clip(file, kept, tmp_path, monkeypatch):
    """Cut between two frames, where decoders see nothing wrong."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4", "av1.mp4": "libsvtav1"}.get(file, "libx264")
    index = {"movflags": "faststart"} if file.endswith(("mp4", "mov")) else {}
    path = written(tmp_path / file, noise, codec, **index)
    with av.open(str(path)) as container:
        starts = [p.pos for p in container.demux(container.streams.video[0]) if p.size]
    content = path.read_bytes()
    path.write_bytes(content[: starts[int(kept * len(starts))]])
    for look in (video.read, video.check):
        with pytest.raises(InputError, match=r"cannot be read as a video \(it is cut off: it says"):
            look(path)
    path.write_bytes(content)
    assert len(video.read(path)[0]) == 12
    path.write_bytes(content + b"\0" * 100)  # what some cameras leave behind
    assert len(video.read(path)[0]) == 12


def test_a_picture_is_no_clip(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: a picture and no clip; give .* as a list"):
            video.read(tmp_path / name)


def test_the_cover_of_a_film_is_not_the_film(tmp_path):
    """A picture attached to the file comes first in it."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        film = out.add_stream("libx264", rate=10)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        out.mux(cover.encode())
        for level in range(8):
            frame = np.full((64, 96, 3), 20 * level, np.uint8)
            out.mux(film.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(film.encode())
    assert video._read_pyav(path, every)[0].shape == (8, 64, 96, 3)


# --- lists of frames


@pytest.fixture
def frames(tmp_path):
    """Paths of four grey pictures, 0, 40, 80 and 120."""
    paths = []
    for i in range(4):
        Image.fromarray(np.full((48, 64, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


WAYS = {
    "paths": lambda paths: paths,
    "a tuple": tuple,
    "file://": lambda paths: [f"file://{p}" for p in paths],
    "pictures": lambda paths: [Image.open(p) for p in paths],
    "arrays": lambda paths: [np.asarray(Image.open(p)) for p in paths],
    "one array": lambda paths: np.stack([np.asarray(Image.open(p)) for p in paths]),
    "bytes": lambda paths: [Path(p).read_bytes() for p in paths],
    "of a data set": lambda paths: [{"bytes": Path(p).read_bytes(), "path": None} for p in paths],
    "parts": lambda paths: [{"image": p} for p in paths],
}


@pytest.mark.parametrize("way", WAYS)
def test_frames_of_a_list_are_a_clip(frames, way):
    media = medium("video", WAYS[way](frames), {"fps": 2})
    exists(media)
    assert check(media) == (4, 48, 64, 2.0)
    pixels, fps, times = load_timed(media, 16)
    assert pixels.shape == (4, 48, 64, 3) and pixels[:, 0, 0, 0].tolist() == [0, 40, 80, 120]
    assert fps == 2.0 and times.tolist() == [0.0, 0.5, 1.0, 1.5]
    pixels, fps = load_media(media, 2)  # the beginnings of two halves
    assert pixels[:, 0, 0, 0].tolist() == [0, 80] and fps == 1.0


def test_rows_have_lists_of_frames(frames, tmp_path):
    """As ms-swift writes them: a list in the list of videos; beside it a row with one clip of one frame."""
    turn = [{"role": "user", "content": "<video>q"}, {"role": "assistant", "content": "x"}]
    made = [
        {"messages": turn, "videos": [["0.png", "1.png", "2.png", "3.png"]]},
        {"messages": turn, "videos": [["3.png"]]},
        {"question": "q", "video": [frames], "answer": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    four, one, named = rows.load(tmp_path / "rows.jsonl", Data())
    assert [p.media[0].size for p in (four, one, named)] == [
        (4, 48, 64, 0.0), (1, 48, 64, 0.0), (4, 48, 64, 0.0),
    ]  # fmt: skip
    assert np.array_equal(load_media(four.media[0], 16)[0], load_media(named.media[0], 16)[0])
    assert len({p.picture for p in (four, one)}) == 2


WRONG = {
    "sizes differ": (["0.png", "small.png"], "the first is 64 x 48 and number 2 is 32 x 48"),
    "none": ([], "a clip of no frames"),
    "one is gone": (["0.png", "gone.png"], r"gone\.png: no such image file"),
    "one is damaged": (["0.png", "cut.png"], r"cut\.png: the image is damaged"),
    "one is a clip": (["0.png", "a.mp4"], r"a\.mp4: not an image"),
    "a list in a list": ([["0.png"]], r"image \['0.png'\]; allowed: the path of a file"),
    "one is nothing": (["0.png", None], "image None; allowed: the path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_lists_that_are_no_clip_are_refused(name, frames, tmp_path):
    Image.new("RGB", (32, 48)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "3.png").read_bytes()[:-60])
    written(tmp_path / "a.mp4")
    given, words = WRONG[name]
    row = {"question": "<video>q", "videos": [given], "answer": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"row 1: .*{words}"):
        rows.load(tmp_path / "rows.jsonl", Data())
    with pytest.raises(InputError, match=words):
        load_media(medium("video", given, None, tmp_path), 16)


# --- what is asked of one clip


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"fps": 1.0}, 4),
        ({"fps": 2}, 8),
        ({"fps": 100}, 16),  # the rule still bounds them
        ({"fps": 100, "max_frames": 99}, 40),
        ({"nframes": 6}, 6),
        ({"num_frames": 40}, 40),
        ({"max_frames": 3}, 2),
        ({"fps": 5, "max_frames": 7}, 6),
        ({"fps": 0.5}, 4),  # not fewer than four
        ({"fps": 0.5, "min_frames": 2}, 2),
        ({}, 16),
        ({"fps": None, "nframes": None}, 16),
    ],
)
def test_frames_that_are_asked_for_are_read(options, number, tmp_path):
    """Of four seconds at 10 a second, where 16 frames are the rule, an even number of them, as Qwen2-VL reads."""
    media = medium("video", str(written(tmp_path / "a.mp4")), options)
    assert len(load_media(media, 16)[0]) == number
    assert check(media) == (40, 64, 96, 10.0)


def test_more_frames_than_there_are_cannot_be_asked_for(frames, tmp_path):
    for source in (str(written(tmp_path / "a.mp4")), frames):
        media = medium("video", source, {"num_frames": 42})
        for look in (check, lambda m: load_media(m, 16)):
            with pytest.raises(
                InputError, match=r"num_frames asks for 42 frames and the clip has (40|4);"
            ):
                look(media)


def test_what_is_asked_makes_another_clip(frames):
    """Features are remembered by this key."""
    keys = {medium("video", "a.mp4", o).key for o in ({}, {"fps": 1}, {"fps": 2}, {"nframes": 2})}
    keys |= {medium("video", frames, {"fps": f}).key for f in (1, 2)}
    assert len(keys) == 6
    assert medium("video", "a.mp4", {"fps": None}) == Media(
        "video", medium("video", "a.mp4").source
    )


def test_a_frame_of_pyav_without_a_matrix_is_upright():
    frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
    assert turn_of(frame) == (1, 0, 0, 1)
