"""Which prompt positions act as probe queries: a pure function of (seed, layer, unpadded length).

Nothing else may enter: a rollout, its replay in the update and inference must find the same probes
whatever the batch or its padding. Source of recent + random: ZipVL, arXiv 2410.08584 (64 + 64);
drawing the random ones by strata is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from zipr1.core.recipe import Probes
from zipr1.models.sparse.hashing import mix, mix_each


# Of a batch of one prompt's rollouts all rows are alike, and so are all passes of a step.
@lru_cache(maxsize=256)
def probe_positions(
    length: int, layers: tuple[int, ...], seed: int, recent: int, random: int
) -> np.ndarray:
    """Ascending int64 positions in the unpadded prompt, `(layers, n)`, n = min(length, recent + random). Not to be
    written to.

    The last `recent` positions, and one position from each of `random` equal strata of the rest
    [0, length - recent). A prompt no longer than recent + random: all positions.
    """
    if length <= recent + random:
        return np.tile(np.arange(length), (len(layers), 1))
    rest = length - recent
    strata = np.arange(random)
    low, high = strata * rest // random if random else strata, (strata + 1) * rest // max(random, 1)
    out = np.empty((len(layers), recent + random), np.int64)
    out[:, random:] = np.arange(rest, length)
    for row, layer in zip(out, layers, strict=True):
        # The modulo's bias is below 2**-40 for any prompt that fits a machine.
        drawn = mix_each(mix(seed, layer, length), strata) % (high - low).astype(np.uint64)
        row[:random] = low + drawn.astype(np.int64)
    return out


def probe_slots(
    lengths: Sequence[int],
    offsets: Sequence[int],
    layers: Sequence[int],
    seed: int,
    probes: Probes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probes of a padded batch, as slots, for each of the `layers`; on the CPU.

    Args:
        lengths: unpadded prompt lengths, >= 1. offsets: slot of each prompt's first token (0 where
            padding is on the right).

    Returns:
        slots `(layers, B, R)` int64 and valid `(B, R)` bool, R the most probes of any sample. Invalid
        entries repeat the sample's last probe, so they may be gathered.
    """
    which = tuple(layers)
    rows = [probe_positions(n, which, seed, probes.recent, probes.random) for n in lengths]
    counts = np.array([row.shape[1] for row in rows])
    slots = np.empty((len(which), len(rows), counts.max()), np.int64)
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        slots[:, b, : row.shape[1]] = row + offset
        slots[:, b, row.shape[1] :] = row[:, -1:] + offset
    valid = np.arange(slots.shape[2]) < counts[:, None]
    return torch.from_numpy(slots), torch.from_numpy(valid)
