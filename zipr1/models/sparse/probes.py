"""Which prompt positions act as probe queries: a pure function of (seed, layer, unpadded length).

Nothing else may enter: a rollout, its replay in the update and inference must find the same probes
whatever the batch or its padding. Source of recent + random: ZipVL, arXiv 2410.08584 (64 + 64);
drawing the random ones by strata is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from zipr1.core.recipe import Probes
from zipr1.models.sparse.hashing import mix


@lru_cache(maxsize=4096)
def _positions(length: int, layer: int, seed: int, recent: int, random: int) -> tuple[int, ...]:
    if length <= recent + random:
        return tuple(range(length))
    rest = length - recent
    drawn = []
    for i in range(random):
        low, high = i * rest // random, (i + 1) * rest // random
        # The modulo's bias is below 2**-40 for any prompt that fits a machine.
        drawn.append(low + mix(seed, layer, length, i) % (high - low))
    return (*drawn, *range(rest, length))


def probe_positions(length: int, layer: int, seed: int, recent: int, random: int) -> torch.Tensor:
    """Ascending int64 positions in the unpadded prompt: min(length, recent + random) of them.

    The last `recent` positions, and one position from each of `random` equal strata of the rest
    [0, length - recent). A prompt no longer than recent + random: all positions.
    """
    return torch.tensor(_positions(length, layer, seed, recent, random), dtype=torch.int64)


def probe_slots(
    lengths: Sequence[int],
    offsets: Sequence[int],
    layer: int,
    seed: int,
    probes: Probes,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probes of a padded batch, as slots.

    Args:
        lengths: unpadded prompt lengths, >= 1. offsets: slot of each prompt's first token (0 where
            padding is on the right).

    Returns:
        slots `(B, R)` int64 and valid `(B, R)` bool, R the most probes of any sample. Invalid
        entries repeat the sample's last probe, so they may be gathered.
    """
    rows = [_positions(n, layer, seed, probes.recent, probes.random) for n in lengths]
    width = max(map(len, rows))
    slots = [
        [o + x for x in row] + [o + row[-1]] * (width - len(row))
        for row, o in zip(rows, offsets, strict=True)
    ]
    counts = torch.tensor([len(row) for row in rows])
    valid = torch.arange(width) < counts[:, None]
    return torch.tensor(slots, dtype=torch.int64, device=device), valid.to(device)
