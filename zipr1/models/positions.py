"""M-RoPE positions of Qwen2-VL and Qwen2.5-VL by Qwen's own rule, whatever the version of transformers.

After a picture or clip the words go on at the largest of its coordinates plus one. transformers 5 goes on by its height
or width instead: after a clip with more time than width, words stand at places that frames have taken, which these
models never saw. Version 5.17 cuts seconds off besides, so that all frames above two a second are simultaneous. vLLM
follows Qwen's rule. (Later families put words between frames, and there the two rules agree.)
"""

from __future__ import annotations

import itertools
from types import MethodType
from typing import Any

import torch


def correct(model: Any) -> None:
    """Give this one model object of transformers Qwen's own positions, in its `forward` and `generate`."""
    model.model.get_rope_index = MethodType(rope_index, model.model)


def rope_index(
    inner: Any,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the method of the same name of transformers' `inner`: positions `(3, B, L)` int64, and what is to be
    added to the number of a later token for its position, `(B, 1)`.

    input_ids `(B, L)`; mm_token_type_ids `(B, L)`: 0 for words, 1 for pictures, 2 for clips; grids `(v, 3)`: patches of
    time, height, width; second_per_grid_ts `(clips,)`: seconds between steps of time; attention_mask `(B, L)`.
    """
    vision = inner.config.vision_config
    merge = vision.spatial_merge_size
    # Qwen2-VL counts the steps of time themselves.
    rate = getattr(vision, "tokens_per_second", None)
    device = input_ids.device
    grids = {1: _rows(image_grid_thw), 2: _rows(video_grid_thw)}
    seconds = iter(
        [] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
    )
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=device)
    deltas = []
    for row, types in enumerate(mm_token_type_ids):
        here = torch.ones_like(types, dtype=torch.bool)
        if attention_mask is not None:
            here = attention_mask[row].bool()
        parts: list[torch.Tensor] = []
        start = 0
        for kind, group in itertools.groupby(types[here].tolist()):
            if kind == 0:
                part = torch.arange(len(list(group))).expand(3, -1)
            else:
                t, h, w = next(grids[kind])
                time = torch.arange(t)
                if rate is not None and kind == 2:
                    time = (time * next(seconds, 1.0) * rate).long()
                sides = torch.arange(h // merge), torch.arange(w // merge)
                part = torch.stack(torch.meshgrid(time, *sides, indexing="ij")).flatten(1)
            parts.append(part + start)
            start = int(parts[-1].max()) + 1
        positions[:, row, here] = torch.cat(parts, 1).to(device)
        deltas.append(start - int(here.sum()))
    return positions, torch.tensor(deltas, device=device)[:, None]


def _rows(grid: torch.Tensor | None) -> Any:
    return iter([] if grid is None else grid.tolist())
