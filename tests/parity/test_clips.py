"""Clips of many kinds, as transformers' own processor sees them: frames, sizes, seconds, tokens and places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from alike import compare_clip
from test_pictures import QWEN, SIDES

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
