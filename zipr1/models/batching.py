"""Small tensor work of the policy: rows of prompts and answers, choosing tokens, grouping pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zipr1.models.processors import Encoded

# Patches in one pass of the vision tower: bounds its memory (65,536 are 16 pictures of 1,792 x 1,792 pixels).
PATCHES = 65536


def padded(
    encoded: Sequence[Encoded], answers: Sequence[torch.Tensor] | None, left: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts and their answers in rows: ids `(B, L)`, positions `(3, B, L)` int64, valid `(B, L)` bool, on the CPU."""
    tails = answers if answers is not None else [encoded[0].ids[:0]] * len(encoded)
    lengths = [len(e) + len(a) for e, a in zip(encoded, tails, strict=True)]
    longest = max(lengths)
    # Filled by NumPy, whose assignments cost a tenth of torch's: a step has thousands of them.
    ids = np.zeros((len(encoded), longest), np.int64)
    positions = np.zeros((3, len(encoded), longest), np.int64)
    valid = np.zeros((len(encoded), longest), bool)
    for b, (e, a) in enumerate(zip(encoded, tails, strict=True)):
        start = longest - lengths[b] if left else 0
        middle, stop = start + len(e), start + lengths[b]
        ids[b, start:middle], ids[b, middle:stop] = e.ids.numpy(), a.cpu().numpy()
        positions[:, b, start:middle] = e.positions.numpy()
        positions[:, b, middle:stop] = e.next_position + np.arange(len(a))
        valid[b, start:stop] = True
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(valid)


def answer_slots(
    prompts: torch.Tensor, answers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of right-padded rows that predict the answers' tokens, `(B, T)` int64, and their mask `(B, T)` bool; where
    it is False, the row's first. prompts `(B,)` int64, answers: lengths."""
    steps = torch.arange(max(answers), device=prompts.device)
    mask = steps < torch.tensor(list(answers), device=prompts.device)[:, None]
    return prompts[:, None] - 1 + steps * mask, mask


def choose(
    logprobs: torch.Tensor, uniforms: torch.Tensor | None, greedy: torch.Tensor | None = None
) -> torch.Tensor:
    """Next tokens `(B,)` from logprobs `(B, V)`: inverse CDF of uniforms `(B,)` in [0, 1); the argmax in rows that are
    greedy `(B,)` bool, and in all without uniforms."""
    likeliest = logprobs.argmax(-1)
    if uniforms is None:
        return likeliest
    cdf = logprobs.double().exp().cumsum(-1)
    u = uniforms.to(logprobs.device).double()
    sampled = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    sampled = sampled.clamp(max=logprobs.shape[-1] - 1)
    return sampled if greedy is None else torch.where(greedy.to(u.device), likeliest, sampled)


def groups(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Consecutive items whose sizes add up to at most PATCHES, or single ones."""
    groups: list[list[Any]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or total + size > PATCHES:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def replay_masks(kept: Sequence[list[torch.Tensor]], length: int) -> list[torch.Tensor]:
    """Kept positions by row and layer, of right-padded prompts -> per layer a `(B, length)` bool mask on the CPU."""
    masks = np.zeros((len(kept[0]), len(kept), length), bool)
    for b, layers in enumerate(kept):
        for d, positions in enumerate(layers):
            masks[d, b, positions.numpy()] = True
    return list(torch.from_numpy(masks))


def by_length(lengths: Sequence[int], most: int, tokens: int | None = None) -> list[list[int]]:
    """Indices in batches of at most `most`, alike in length, so that little is padding; the longest come first.

    tokens: most in a batch, padding included; one row may have more.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    while order:
        size = most if tokens is None else min(most, max(1, tokens // max(1, lengths[order[0]])))
        batches.append(order[:size])
        order = order[size:]
    return batches
