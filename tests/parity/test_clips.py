"""Clips of many kinds, as transformers' own processor sees them: frames, sizes, seconds, tokens and places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from alike import EXACT, same_inputs
from test_pictures import QWEN, SIDES

from zipr1.core.types import Media

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
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


def question(*parts: Any) -> list[Any]:
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": "which digit is green?"}]}
    ]


def both(pair: Any, pixels: np.ndarray, fps: float, options: dict[str, Any]) -> tuple[Any, Any]:
    messages = question({"type": "video", "video": pixels, "fps": fps})
    text = pair.ours.apply_chat_template(messages, add_generation_prompt=True)
    own = {"max_frames": 10_000} if "num_frames" not in options else {}
    ours = pair.ours(text=[text], videos=[Media("video", pixels, fps)], **options, **own)
    sampled = {**options, "do_sample_frames": True} if options else {}
    if "num_frames" in options:
        sampled["fps"] = None  # the class's own rate and a number exclude each other
    about = {
        "total_num_frames": len(pixels),
        "fps": fps,
        "frames_indices": list(range(len(pixels))),
    }
    theirs = pair.theirs(
        text=[text], videos=[pixels], video_metadata=[about], return_tensors="pt", padding=True, **sampled
    )  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds(pair, kind):
    frames, height, width, fps, options = KINDS[kind]
    ours, theirs = both(pair, clip(frames, height, width), fps, options)
    same_inputs(ours, theirs, min(pair.ours.inner.settings.of("video").std))
    same_places(pair, ours, theirs)


def same_places(pair: Any, ours: Any, theirs: Any) -> None:
    """Our model's positions on our inputs are the stock class's on transformers' inputs; for Qwen2-VL and Qwen2.5-VL
    up to the end of the clip, after which they go on by Qwen's rule (tests/models/test_positions.py)."""
    found = [
        model.model.get_rope_index(**{n: torch.as_tensor(inputs[n]) for n in EXACT if n in inputs})
        for model, inputs in ((pair.model, ours), (pair.stock, theirs))
    ]
    (a, a_delta), (b, b_delta) = found
    if pair.ours.family.startswith("qwen3"):
        assert torch.equal(a, b) and torch.equal(a_delta, b_delta)
        return
    end = int((ours["mm_token_type_ids"][0] > 0).nonzero()[-1]) + 1
    assert torch.equal(a[..., :end], b[..., :end])
    after = int(a[..., :end].max()) + 1
    words = a.shape[-1] - end
    assert a[:, 0, end:].tolist() == [list(range(after, after + words))] * 3
    assert int(a_delta) == after - end
