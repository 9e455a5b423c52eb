"""Clips of many kinds, as transformers' own processor sees them: frames, sizes, seconds, tokens and places."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from alike import chat, compare_clip, same_inputs
from PIL import Image
from test_pictures import QWEN, SIDES, picture

from zipr1.core.types import Media
from zipr1.data import video

pytest.importorskip("torchvision", reason="run `make test`")

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLIPS = {
    # Of each frame.
    "qwen2_vl": {"shortest_edge": 16 * 16 * 4, "longest_edge": 96 * 96},
    # Of all frames together.
    "qwen3_vl": {"shortest_edge": 16 * 16 * 16, "longest_edge": 8 * 96 * 96},
}


def files(family: str, **more: Any) -> dict[str, Any]:
    kind = "qwen3_vl" if family.startswith("qwen3") else "qwen2_vl"
    own = "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor"
    clips = {**SIDES, "size": CLIPS[kind], "video_processor_type": own, **more}
    return {"preprocessor_config.json": QWEN, "video_preprocessor_config.json": clips}


def clip(frames: int, height: int, width: int) -> np.ndarray:
    """Blobs that move and a little noise."""
    rng = np.random.default_rng(frames * 1009 + height * 31 + width)
    y, x, t = np.ogrid[:height, :width, :frames]
    wave = 127 * np.sin(x / 9 + t / 3) * np.cos(y / 7 - t / 5) + 128
    pixels = wave.transpose(2, 0, 1)[..., None] + rng.integers(-20, 20, (frames, height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


# Frames, height, width, frames a second of the file, and what the call asks for.
KINDS: dict[str, tuple[int, int, int, float, dict[str, Any]]] = {
    "two frames": (2, 32, 48, 1.0, {}),
    "three frames": (3, 32, 48, 4.0, {}),
    "odd": (5, 48, 32, 4.0, {}),
    "seven": (7, 40, 40, 29.97, {}),
    "sixteen": (16, 64, 96, 0.5, {}),
    "long": (120, 32, 32, 30.0, {}),
    "very slow": (6, 32, 32, 0.1, {}),
    "very fast": (60, 32, 32, 240.0, {}),
    "film": (24, 32, 56, 24000 / 1001, {}),
    "tiny frames": (4, 9, 11, 2.0, {}),
    "thin": (4, 8, 400, 2.0, {}),
    "tall": (4, 300, 10, 2.0, {}),
    "large": (4, 270, 480, 2.0, {}),
    "large and odd": (9, 241, 427, 2.0, {}),
    "a second": (30, 48, 48, 30.0, {"fps": 1}),
    "two a second": (95, 48, 48, 30.0, {"fps": 2}),
    "a rate and a half": (50, 32, 48, 12.5, {"fps": 1.5}),
    "faster than the file": (11, 32, 48, 5.0, {"fps": 30}),
    "slower than four frames": (40, 32, 48, 10.0, {"fps": 0.25}),
    "at a rate, odd": (7, 32, 48, 7.0, {"fps": 7}),
    "three at a rate": (3, 32, 48, 25.0, {"fps": 2}),
    "film at a rate": (100, 32, 32, 30000 / 1001, {"fps": 4}),
    "long at a rate": (601, 16, 16, 30.0, {"fps": 3}),
    "four of many": (61, 32, 48, 30.0, {"num_frames": 4}),
    "eight of ten": (10, 32, 48, 10.0, {"num_frames": 8}),
    "all by number": (12, 32, 48, 10.0, {"num_frames": 12}),
    "an odd number": (40, 32, 48, 10.0, {"num_frames": 7}),
    "five": (40, 32, 48, 10.0, {"num_frames": 5}),
    "two of many": (99, 48, 32, 25.0, {"num_frames": 2}),
    "thirty-two of many": (300, 16, 32, 25.0, {"num_frames": 32}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, opened):
    return opened(request.param, files(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(pair, kind):
    frames, height, width, fps, options = KINDS[kind]
    compare_clip(pair, clip(frames, height, width), fps, **options)


def test_a_single_frame(opened):
    """transformers refuses one to Qwen3-VL, where it is two alike here (tests/models/test_pixels.py)."""
    for family in ("qwen2_vl", "qwen2_5_vl"):
        compare_clip(opened(family, files(family)), clip(1, 48, 64), 2.0)


def test_a_list_of_frames(opened):
    """Whose rate nobody knows: two a second as in Qwen's own code, where transformers assumes 24."""
    frames = [Image.fromarray(frame) for frame in clip(7, 48, 64)]
    pair = opened("qwen2_5_vl", files("qwen2_5_vl"))
    text = pair.ours.apply_chat_template(chat({"type": "video", "video": frames}))
    ours, theirs = (
        processor(text=[text], videos=[frames], return_tensors="pt")
        for processor in (pair.ours, pair.theirs)
    )
    assert ours.pop("second_per_grid_ts").tolist() == [2 / 2]
    assert theirs.pop("second_per_grid_ts").tolist() == pytest.approx([2 / 24])
    same_inputs(pair, ours, theirs)
    frames_with_a_rate = [chat({"type": "video", "video": frames, "fps": 4.0})]
    timed = pair.ours.apply_chat_template(frames_with_a_rate, tokenize=True)
    assert timed["second_per_grid_ts"].tolist() == [2 / 4]


def test_pictures_and_clips_of_several_chats(pair):
    """A chat of two turns with three media beside one of a clip alone: padded, in the order of the messages."""
    clips = [clip(6, 40, 56), clip(9, 56, 40), clip(4, 64, 64)]
    first, second = (picture(60, 90), picture(120, 40))
    say = {"type": "text", "text": "red"}
    chats = [
        [
            *chat({"type": "image", "image": first}, say, {"type": "video", "video": clips[0]}),
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            *chat({"type": "video", "video": clips[1]}, {"type": "image", "image": second}),
        ],
        chat({"type": "video", "video": clips[2]}),
    ]
    texts = [pair.ours.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    ours = pair.ours(
        text=texts, images=[first, second], videos=[Media("video", c, 8.0) for c in clips]
    )
    about = [
        {"total_num_frames": len(c), "fps": 8.0, "frames_indices": [*range(len(c))]} for c in clips
    ]
    theirs = pair.theirs(
        text=texts, images=[[first, second], []], videos=[clips[:2], clips[2:]], video_metadata=about,
        return_tensors="pt", padding=True, padding_side="left",
    )  # fmt: skip
    same_inputs(pair, ours, theirs)


def written(path: Any, frames: np.ndarray, times: list[int], turn: Any = None) -> None:
    """A file whose frames are shown at these milliseconds. turn: a, b, c, d of its display matrix."""
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn is not None:
            a, b, c, d = turn
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def decoded(path: Any) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("asked", [{}, {"fps": 2}, {"num_frames": 6}], ids=str)
def test_files(pair, asked, tmp_path):
    pixels = clip(24, 64, 96)
    steady, slower = (
        [i * 100 for i in range(24)],
        [i * 60 + (i > 11) * (i - 11) * 90 for i in range(24)],
    )
    written(tmp_path / "plain.mp4", pixels, steady)
    written(tmp_path / "turned.mp4", pixels, steady, (0, 65536, -65536, 0))
    written(tmp_path / "variable.mp4", pixels, slower)
    for name, turns in (("plain", 0), ("turned", -1), ("variable", 0)):
        path = str(tmp_path / f"{name}.mp4")
        frames = np.ascontiguousarray(np.rot90(decoded(path), turns, (1, 2)))
        compare_clip(pair, frames, video.check(path)[3], ours=path, **asked)
