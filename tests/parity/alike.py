"""Two processors' inputs are the same: tokens, grids and seconds equal, pixels within one level of rounding."""

from __future__ import annotations

from typing import Any

import torch

EXACT = (
    "input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
)  # fmt: skip
PIXELS = ("pixel_values", "pixel_values_videos")


def same_inputs(ours: Any, theirs: Any, std: float) -> None:
    """std: the smallest of the three colours'. Levels are 1/255 apart before the division by it.

    A picture is resized across and then down, each rounded to a level; torch's weights have 16 bits, PIL's more. So a
    value in ten thousand may be off by a level twice.
    """
    assert set(ours) == set(theirs)
    for name in EXACT:
        if name in ours:
            assert torch.as_tensor(ours[name]).tolist() == torch.as_tensor(theirs[name]).tolist(), (
                name
            )
    for name in PIXELS:
        if name in ours:
            a, b = ours[name], theirs[name]
            assert a.shape == b.shape and a.dtype == b.dtype, name
            levels = (a - b).abs() * 255 * std
            assert levels.max() <= 2.001, f"{name}: {levels.max()} levels"
            assert (levels > 1.001).sum() <= max(2, 1e-4 * levels.numel()), name
