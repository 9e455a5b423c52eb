"""A picture or clip as the vision tower takes it, and when the frames of a clip are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Frames a second of a clip that does not tell its rate, as transformers assumes.
UNKNOWN_FPS = 24.0


@dataclass(frozen=True)
class Visual:
    """One picture or clip as the vision tower takes it. seconds: time one temporal patch spans (0 for images); times:
    the second at which each temporal patch of a clip is shown, the mean of its first and last frame's. tiles: rows and
    columns of tiles that stand before the whole picture, whose grid this is; (0, 0): none do. size: height and width of
    a picture that is cut into tiles, before that."""

    kind: str
    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds: float
    tokens: int
    times: tuple[float, ...] = ()
    tiles: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)

    def cells(self, tokens: np.ndarray, merge: int) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Of numbers for all its tokens `(tokens, ...)` those of the tokens that show it whole, `(t * h * w, ...)`, and
        t, h and w in tokens. Tiles stand before these, and behind them a family may have tokens that show nothing."""
        t, h, w = self.grid[0], self.grid[1] // merge, self.grid[2] // merge
        first = math.prod(self.tiles) * t * h * w
        return tokens[first : first + t * h * w], (t, h, w)


def patch_times(times: Sequence[float] | np.ndarray, temporal: int) -> tuple[float, ...]:
    """Seconds of frames -> of temporal patches, the mean of the first and the last; the last frame may repeat."""
    seconds = [float(t) for t in times]
    seconds += seconds[-1:] * (-len(seconds) % temporal)
    firsts, lasts = seconds[::temporal], seconds[temporal - 1 :: temporal]
    return tuple((a + b) / 2 for a, b in zip(firsts, lasts, strict=True))
