"""Two processors' inputs are the same: tokens, grids, seconds and places equal, pixels within one level of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from zipr1.core.types import Media

EXACT = (
    "input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
)  # fmt: skip
PIXELS = {"pixel_values": "image", "pixel_values_videos": "video"}
QUESTION = {"type": "text", "text": "which digit is green?"}


def chat(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts, QUESTION]}]


def compare_pictures(pair: Any, *images: Any, theirs: Any = None) -> None:
    """theirs: what transformers is given in place of the images, if it is something else."""
    found, wanted = (
        processor.apply_chat_template(
            chat(*({"type": "image", "image": image} for image in given)),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )
        for processor, given in (
            (pair.ours, images), (pair.theirs, images if theirs is None else [theirs])
        )
    )  # fmt: skip
    same_inputs(pair, found, wanted)
    same_places(pair, found, wanted)


def compare_clip(
    pair: Any, pixels: np.ndarray, rate: float, ours: Any = None, **options: Any
) -> None:
    """ours: the clip as zipr1 is given it, where these are not the pixels. options: fps or num_frames, as the
    processors are asked; without any each goes by the folder's settings."""
    if ours is None:
        ours = Media("video", pixels, rate)
    text = pair.ours.apply_chat_template(
        chat({"type": "video", "video": pixels}), add_generation_prompt=True
    )
    own = {} if "num_frames" in options else {"max_frames": 10_000}
    found = pair.ours(text=[text], videos=[ours], **options, **own)
    if options:
        options["do_sample_frames"] = True
    if "num_frames" in options:
        options["fps"] = None  # the class's own rate and a number exclude each other
    about = {"total_num_frames": len(pixels), "fps": rate, "frames_indices": [*range(len(pixels))]}
    wanted = pair.theirs(
        text=[text], videos=[pixels], video_metadata=[about], return_tensors="pt", **options
    )
    same_inputs(pair, found, wanted)
    same_places(pair, found, wanted)


def same_inputs(pair: Any, ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in EXACT:
        if name in ours:
            found, wanted = torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])
            assert found.tolist() == wanted.tolist(), name
    for name, kind in PIXELS.items():
        if name in ours:
            same_pixels(ours[name], theirs[name], min(pair.ours.inner.settings.of(kind).std))


def same_pixels(ours: torch.Tensor, theirs: torch.Tensor, std: float) -> None:
    """A picture is resized across and then down, each rounded to a level; torch's weights have 16 bits, PIL's more. So
    a value in ten thousand may be off by a level twice. std: the smallest of the three colours'."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    levels = (ours - theirs).abs() * 255 * std
    assert float(levels.max()) <= 2.001
    assert int((levels > 1.001).sum()) <= max(2, 1e-4 * levels.numel())


def same_places(pair: Any, ours: Any, theirs: Any) -> None:
    """Our model's positions on our inputs are the stock class's on transformers' inputs. After a clip of Qwen2-VL and
    Qwen2.5-VL transformers departs from Qwen's rule, which ours keep to (tests/models/test_positions.py)."""
    (found, found_delta), (wanted, wanted_delta) = (
        model.model.get_rope_index(**{n: torch.as_tensor(inputs[n]) for n in EXACT if n in inputs})
        for model, inputs in ((pair.model, ours), (pair.stock, theirs))
    )
    if pair.ours.family.startswith("qwen3") or "video_grid_thw" not in ours:
        assert torch.equal(found, wanted) and torch.equal(found_delta, wanted_delta)
        return
    end = int((ours["mm_token_type_ids"][0] > 0).nonzero()[-1]) + 1
    assert torch.equal(found[..., :end], wanted[..., :end])
    after = int(found[..., :end].max()) + 1
    assert found[:, 0, end:].tolist() == [[*range(after, after + found.shape[-1] - end)]] * 3
    assert int(found_delta) == after - end
