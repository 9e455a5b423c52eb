"""Token ids and patches -> the tensors that transformers' own forward and `generate` take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BatchFeature

from zipr1.models.processors import Processor, Visual


def model_inputs(
    rows: Sequence[tuple[torch.Tensor, Sequence[Visual]]], processor: Processor, family: str
) -> BatchFeature:
    """rows: ids `(l,)` and visuals of each prompt. Returns left-padded `input_ids`, `attention_mask` and
    `mm_token_type_ids` `(B, L)`, and patches and grids of all images and of all videos, in order."""
    longest = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_token_id
    ids = torch.full((len(rows), longest), pad if pad is not None else processor.end_id)
    mask = torch.zeros_like(ids)
    for b, (own, _) in enumerate(rows):
        ids[b, longest - len(own) :], mask[b, longest - len(own) :] = own, 1
    image, video = processor.placeholder["image"], processor.placeholder["video"]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": ((ids == image).int() + 2 * (ids == video).int()),
    }
    visuals = [visual for _, own in rows for visual in own]
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        some = [v for v in visuals if v.kind == kind]
        if some:
            inputs[pixels] = torch.cat([v.patches for v in some])
            inputs[grid] = torch.tensor([v.grid for v in some])
    seconds = [v.seconds for v in visuals if v.kind == "video"]
    if seconds and family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return BatchFeature(inputs)
