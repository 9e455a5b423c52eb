"""Pictures of what stays: each visual token as bright as the share of layers that keep it, as JPEG in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from zipr1.core.plots import darkened, evenly_spaced, frame_at
from zipr1.models.policy import Policy
from zipr1.models.processors import Encoded

SIDE = 192  # px of the longer side of a shown frame
MOMENTS = 4  # steps of time shown of a clip
PLAIN = "plain"


def draw(
    policy: Policy,
    encoded: Encoded,
    pixels: np.ndarray,
    kept: Mapping[str, Sequence[torch.Tensor]],
) -> dict[str, str]:
    """A question's only picture or clip (moments side by side): as it is by the name PLAIN, and what is kept by name.

    pixels: uint8 `(H, W, 3)` or `(F, H, W, 3)`. kept: by a variant's name and by layer, positions in the prompt.
    """
    visual = np.isin(encoded.ids.numpy(), list(policy.processor.placeholder.values()))
    seen, merge = encoded.visuals[0], policy.processor.settings.merge
    shares: dict[str, np.ndarray] = {}
    for name, layers in kept.items():
        share = np.zeros(len(visual))
        for positions in layers:
            share[positions.numpy()] += 1 / len(layers)
        cells, (t, h, w) = seen.cells(share[visual], merge)
        shares[name] = cells.reshape(t, h, w)
    frames = pixels[None] if pixels.ndim == 3 else pixels
    drawn: dict[str, list[np.ndarray]] = {PLAIN: [], **{name: [] for name in kept}}
    for moment in evenly_spaced(t, MOMENTS):
        frame = Image.fromarray(frame_at(frames, moment, t))
        scale = SIDE / max(frame.size)
        size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
        picture = np.asarray(frame.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
        drawn[PLAIN].append(picture)
        for name, share in shares.items():
            drawn[name].append(darkened(picture, share[moment]))
    return {name: _jpeg(pictures) for name, pictures in drawn.items()}


def _jpeg(frames: Sequence[np.ndarray]) -> str:
    gap = np.ones((frames[0].shape[0], 4, 3), np.float32)
    row = [part for frame in frames for part in (gap, frame)][1:]
    out = io.BytesIO()
    Image.fromarray((np.concatenate(row, 1).clip(0, 1) * 255).astype(np.uint8)).save(
        out, "JPEG", quality=90
    )
    return base64.b64encode(out.getvalue()).decode()
