"""Probe scores of long prompts on a CPU: a few probes at a time, so that their weights stay in cache.

The plain version holds `HQ * R * L` weights and walks over them five times; at 4,096 tokens, 128 probes and 16 heads
that is 33 MB in fp32 and took five times as long as this (kernels/bench/run.py).
"""

from __future__ import annotations

import torch

# Weights held at once: 2 MB in fp32, about a core's second-level cache. Twice as many took half as long again.
BLOCK = 2**19


def pays(q_heads: int, count: int, length: int) -> bool:
    """Whether one sample's weights are more than one block; below that the plain version is as fast."""
    return q_heads * count * length > BLOCK


def probe_scores(
    q_probe: torch.Tensor,
    k: torch.Tensor,
    probes: torch.Tensor,
    candidates: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """See the public function; on a CPU, and without a gradient."""
    batch, q_heads, _, dim = q_probe.shape
    heads, length = k.shape[1], k.shape[2]
    groups = q_heads // heads
    scale = dim**-0.5 if scale is None else scale
    dtype = torch.promote_types(q_probe.dtype, torch.float32)
    total = torch.zeros(batch, length, dtype=dtype)
    seen = torch.zeros(batch, length, dtype=dtype)
    for b, row in enumerate(range(batch) if rows is None else rows.tolist()):
        slots = candidates[row].nonzero()[:, 0]
        # Probes by falling slot, seen as the number of candidates up to it: then block after block sees less.
        reach = torch.searchsorted(slots, probes[b].to(slots.dtype).contiguous(), right=True)
        real = (reach > 0).nonzero()[:, 0]
        if not len(real):
            continue
        reach, order = reach[real].sort(descending=True)
        real = real[order]
        step = max(1, BLOCK // (groups * len(slots)))
        sums = torch.zeros(len(slots), dtype=dtype)
        # Made once: blocks of this size come from the system and go back to it, a page fault for every 4 KB.
        room = [torch.empty(step * groups * len(slots), dtype=dtype) for _ in range(2)]
        for h in range(heads):
            keys = k[row, h] if len(slots) == length else k[row, h, slots]
            keys = keys.to(dtype).mT
            queries = q_probe[b, h * groups : (h + 1) * groups, real].transpose(0, 1)
            queries = (queries.to(dtype) * scale).contiguous()  # (R, G, D)
            for start in range(0, len(real), step):
                block = queries[start : start + step]
                ends = reach[start : start + step]
                most, least = int(ends[0]), int(ends[-1])
                stacked = block.reshape(-1, dim)
                logits, weights = (x[: len(stacked) * most].view(-1, most) for x in room)
                torch.mm(stacked, keys[:, :most], out=logits)
                if least < most:
                    late = torch.arange(least, most) >= ends[:, None]  # (r, most - least)
                    part = logits.view(len(block), groups, most)[:, :, least:]
                    part.masked_fill_(late[:, None], -torch.inf)
                sums[:most] += torch.softmax(logits, -1, out=weights).sum(0)
        total[b, slots] = sums
        if normalise:
            # Column j is seen by the probes that reach beyond j.
            seen[b, slots] = (reach[:, None] > torch.arange(len(slots))).sum(0).to(dtype)
    return total / seen.clamp_min(1) if normalise else total
