"""Reading clips and pictures: which frames come back, and what is said of files that cannot be read."""

from __future__ import annotations

import io
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.types import Media
from zipr1.data import video
from zipr1.data.media import load_media


@pytest.fixture
def clip(tmp_path):
    """20 frames at 10 fps; frame i is grey of level 10 i."""
    path = tmp_path / "clip.mp4"
    frames = np.repeat((np.arange(20, dtype=np.uint8) * 10)[:, None, None, None], 32, axis=1)
    video.write(path, np.ascontiguousarray(np.broadcast_to(frames, (20, 32, 64, 3))), 10.0)
    return path


BEGINNINGS, ENDS = video.FrameRule(), video.FrameRule(even=False)


def test_more_frames_than_there_are_is_refused():
    for even in (True, False):
        with pytest.raises(InputError, match=r"num_frames asks for 8 frames and the clip has 5"):
            video.choose(5, 1.0, rule=video.FrameRule(even=even, number=8))


@pytest.fixture(params=["decord", "pyav"])
def backend(request, monkeypatch):
    if request.param == "decord":
        pytest.importorskip("decord")
    else:
        monkeypatch.setitem(sys.modules, "decord", None)
    video.reader.cache_clear()
    yield request.param
    video.reader.cache_clear()


@pytest.mark.parametrize(
    ("max_frames", "fps", "rule", "rows"),
    [
        (None, None, BEGINNINGS, list(range(20))),
        (64, 30.0, BEGINNINGS, list(range(20))),  # never more than the clip has
        (64, 5.0, BEGINNINGS, list(range(0, 20, 2))),
        (4, 5.0, BEGINNINGS, [0, 5, 10, 15]),  # the beginnings of four equal parts
        (5, None, BEGINNINGS, [0, 5, 10, 15]),  # an even number
        (1, None, BEGINNINGS, [0]),
        (8, 0.1, BEGINNINGS, [0, 5, 10, 15]),  # at least four
        (64, 3.5, BEGINNINGS, [0, 3, 6, 10, 13, 16]),  # seven are six, 10 / 3 apart
        (None, None, ENDS, list(range(20))),
        (4, None, ENDS, [0, 6, 13, 19]),  # 19 / 3 apart
        (64, 3.5, ENDS, [0, 3, 6, 10, 13, 16, 19]),  # 19 / 6 apart; 9.5 is rounded to the even one
        (64, 0.1, ENDS, [0, 6, 13, 19]),
        (1, None, ENDS, [0]),
        (64, None, video.FrameRule(even=False, fps=2.0), [0, 6, 13, 19]),  # the rule's own rate
        (3, 5.0, video.FrameRule(even=False, fps=2.0), [0, 10, 19]),
        (
            None,
            None,
            video.FrameRule(number=5),
            [0, 5, 10, 15],
        ),  # 2.5 pairs are rounded to the even one
        (None, None, video.FrameRule(number=7), [0, 2, 5, 7, 10, 12, 15, 17]),
        (None, None, video.FrameRule(even=False, number=5), [0, 5, 10, 14, 19]),
        (64, 10.0, video.FrameRule(most=4), [0, 5, 10, 15]),
    ],
)
def test_frames_are_spread_evenly(clip, backend, max_frames, fps, rule, rows):
    assert video.reader()[0] == backend
    frames, seen_fps = video.read(clip, max_frames, fps, rule)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(rows), 32, 64, 3)
    assert np.round(frames.mean((1, 2, 3)) / 10).astype(int).tolist() == rows
    assert seen_fps == pytest.approx(10.0 * len(rows) / 20)


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {}\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
ONE_FILE = "no kind of file that is read as a clip|cannot be read as a video"


@pytest.mark.parametrize("ending", ["mp4", "m3u8", "webm", "sdp"])
@pytest.mark.parametrize("text", [HLS, CONCAT, SDP], ids=["hls", "concat", "sdp"])
def test_a_clip_that_names_other_files_is_refused(clip, backend, tmp_path, text, ending):
    """A list of files, whatever it calls itself, is followed by FFmpeg."""
    with av.open(str(clip)) as source, av.open(str(tmp_path / "other.ts"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    for other in ("other.ts", tmp_path / "other.ts", "clip.mp4", f"file://{clip}"):
        path = tmp_path / f"list.{ending}"
        path.write_text(text.format(other))
        for look in (video.read, video.check):
            with pytest.raises(InputError, match=rf"list\.{ending}: ({ONE_FILE})") as error:
                look(path)
            assert "\n" not in str(error.value)
    assert len(video.read(tmp_path / "other.ts")[0]) == 20  # whole, and read by who asks for it


@pytest.mark.parametrize(
    "head", [b"\x1a\x45\xdf\xa3\x80", b"\0\0\0\x10ftypisom\0\0\0\0", HLS.encode()]
)
def test_decord_gets_nothing_that_pyav_does_not_open(clip, tmp_path, monkeypatch, head):
    """Its own list of formats is longer, and older."""
    decord = pytest.importorskip("decord")
    given: list[str] = []

    def reader(path, **options):
        given.append(path)
        raise RuntimeError("no clip")

    monkeypatch.setattr(decord, "VideoReader", reader)
    path = tmp_path / "a.mp4"
    path.write_bytes(head + SDP.encode())
    video.reader.cache_clear()
    with pytest.raises(InputError, match=ONE_FILE):
        video.read(path)
    assert not given
    video.read(clip)
    assert given == [str(clip)]


def test_lists_would_be_followed(clip, tmp_path):
    """What the test above refuses is a way to other files."""
    path = tmp_path / "list.mp4"
    path.write_text(CONCAT.format("clip.mp4"))
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20


def test_a_name_is_no_pattern_and_no_protocol(clip, backend, tmp_path, monkeypatch):
    """`%d` would stand for all pictures of a folder, and `concat:` for the files that it names."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Image.new("RGB", (64, 64)).save(f"{i}.png")
    for name in ("%d.png", "concat:clip.mp4", "subfile,,start,0,end,0,,:clip.mp4"):
        Path(name).write_text("nothing")
        with pytest.raises(InputError, match=f"{re.escape(name)}: ({ONE_FILE})"):
            video.read(name)
        Path(name).write_bytes(clip.read_bytes())
        if "%" not in name:
            assert len(video.read(name)[0]) == 20


def test_the_fallback_says_why_once(clip, monkeypatch, caplog):
    """Even where several threads read their first clip at the same time."""
    monkeypatch.setattr(video, "_reasons_told", set())
    video.reader.cache_clear()
    ready = threading.Barrier(4)

    def fail(name):
        ready.wait(10)
        raise OSError(f"{name}.so: cannot open shared object file\nsecond line")

    monkeypatch.setattr(video.importlib, "import_module", fail)
    with ThreadPoolExecutor(4) as pool:
        assert [len(frames) for frames, _ in pool.map(video.read, [clip] * 4)] == [20] * 4
    (said,) = [r.getMessage() for r in caplog.records]
    assert said == (
        "decord cannot be imported (decord.so: cannot open shared object file); clips are read by PyAV, slower"
    )
    assert video.reader() == ("pyav", said)
    video.reader.cache_clear()


@pytest.mark.usefixtures("backend")
def test_without_pyav_a_clip_is_one_line(clip, monkeypatch):
    """Even where decord is there: it does not tell of mirrored clips, and cannot read all."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        InputError, match=r"^clips are read by PyAV.*import of av.*: pip install av$"
    ):
        video.read(clip)


def test_what_decord_cannot_read_goes_to_pyav(tmp_path, caplog, monkeypatch):
    """It is said once for all clips that fail for the same reason, by name, as a warning."""
    pytest.importorskip("decord")
    video.reader.cache_clear()
    monkeypatch.setattr(video, "_reasons_told", set())
    frames = np.full((4, 32, 48, 3), 90, np.uint8)  # decord 0.6 fails at this width
    caplog.set_level("WARNING", logger="zipr1")
    for name in ("narrow.mp4", "second.mp4"):
        video.write(tmp_path / name, frames, 4.0)
        read, fps = video.read(tmp_path / name)
        assert np.abs(read.astype(int) - frames).max() <= 3
        assert fps == 4.0
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith(f"{tmp_path / 'narrow.mp4'}: decord cannot read it (")
    assert "PyAV reads it" in said and "slower" in said and "\n" not in said


def test_each_reason_of_decords_is_said(clip, caplog, monkeypatch):
    decord = pytest.importorskip("decord")
    video.reader.cache_clear()
    monkeypatch.setattr(video, "_reasons_told", set())
    others = {name: clip.with_name(name) for name in ("b.mp4", "c.mp4")}
    for path in others.values():
        path.write_bytes(clip.read_bytes())
    errors = {
        clip: f"[05:33:22] video.cc:151: {clip}: no stream\nStack trace: ...",
        others["b.mp4"]: f"[05:33:23] video.cc:151: {others['b.mp4']}: no stream",
        others["c.mp4"]: "unknown codec",
    }

    def fail(path, **_):
        raise decord.DECORDError(errors[type(clip)(path)])

    monkeypatch.setattr(decord, "VideoReader", fail)
    for path in errors:
        assert len(video.read(path)[0]) == 20
    assert [
        r.getMessage().partition(";")[0] for r in caplog.records if r.levelname == "WARNING"
    ] == [
        f"{clip}: decord cannot read it (video.cc:151: FILE: no stream)",
        f"{others['c.mp4']}: decord cannot read it (unknown codec)",
    ]


def test_a_clip_that_neither_reads_is_an_error_and_no_warning(tmp_path, caplog):
    (tmp_path / "text.mp4").write_bytes(b"not a video at all" * 50)
    with pytest.raises(InputError, match="cannot be read as a video"):
        video.read(tmp_path / "text.mp4")
    assert "decord cannot read it" not in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.mp4", None, "no such video"),
        ("empty.mp4", b"", "0 bytes"),
        ("text.mp4", b"not a video at all" * 50, "cannot be read as a video"),
        ("cut.mp4", "cut", "cannot be read as a video"),
    ],
)
def test_bad_clips_are_named(clip, backend, tmp_path, name, content, words):
    path = tmp_path / name
    if content == "cut":
        content = clip.read_bytes()[:600]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_media(Media("video", path), 8)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_damaged_near_its_end_is_found_when_it_is_looked_at(backend, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    path = tmp_path / "clip.mp4"
    video.write(path, frames, 10.0)
    assert video.check(path) == (40, 64, 96, 10.0)
    content = bytearray(path.read_bytes())
    place = len(content) * 3 // 4  # in the last frames; the index behind them is whole
    content[place : place + len(content) // 5] = bytes(len(content) // 5)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"clip\.mp4: cannot be read as a video"):
        video.check(path)


def test_a_sound_file_is_no_clip(backend, tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mp4"):
        video.read(path)


def _png(size=(40, 20)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def test_images_come_back_as_rgb(tmp_path):
    pixels, content = _png()
    (tmp_path / "a.png").write_bytes(content)
    read, fps = load_media(Media("image", tmp_path / "a.png"), 8)
    assert np.array_equal(read, pixels)
    assert fps is None
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    grey, _ = load_media(Media("image", str(tmp_path / "grey.png")), 8)
    assert np.array_equal(grey, np.repeat(pixels[..., :1], 3, axis=-1))


def test_exif_turns_the_image(tmp_path):
    pixels, _ = _png()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read, _ = load_media(Media("image", tmp_path / "turned.png"), 8)
    assert np.array_equal(read, np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such image"),
        (b"", "0 bytes"),
        (b"hello", "not an image"),
        (_png()[1][:700], "damaged"),
    ],
    ids=["missing", "empty", "text", "cut"],
)
def test_bad_images_are_named(tmp_path, content, words):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_media(Media("image", path), 8)
    assert str(path) in str(error.value)


def test_arrays_pass_through_and_are_checked():
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    read, fps = load_media(Media("video", frames, 4.0), 16)
    assert np.array_equal(read, frames)
    assert fps == 4.0
    read, fps = load_media(Media("video", frames, 4.0), 6)
    assert read[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert fps == 2.0
    with pytest.raises(InputError, match="float64"):
        load_media(Media("image", np.zeros((4, 4, 3))), 8)
    with pytest.raises(InputError, match=r"\(4, 4\)"):
        load_media(Media("image", np.zeros((4, 4), np.uint8)), 8)
