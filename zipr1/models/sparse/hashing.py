"""Random numbers as a pure function of what they are for: the same on every machine and version.

torch's generators promise no such thing across devices and releases; replaying a rollout needs it.
"""

from __future__ import annotations

import numpy as np
import torch

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): 64 well-mixed bits of `x`."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def mix(*keys: int) -> int:
    """64 bits that depend on every key and on their order; keys may be negative."""
    state = 0
    for key in keys:
        state = splitmix64(state ^ (key & MASK))
    return state


def mix_each(key: int, places: np.ndarray) -> np.ndarray:
    """`mix(..., place)` for each of many places, int64 -> uint64; key: `mix` of the keys before it."""
    x = np.uint64(key) ^ places.astype(np.uint64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(key: int, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) for each position: int64 of any shape -> float32 of that shape.

    A 31-bit integer hash (xorshift-multiply rounds), so that int64 tensors on any device agree bit
    for bit; 24 bits are kept, which float32 holds exactly.
    """
    low = 2**31 - 1
    x = (positions ^ (key & low)) & low
    for factor, salt in ((0x2C1B3C6D, key >> 31), (0x297A2D39, key >> 20), (0x35A98F4D, key >> 40)):
        x = x ^ (x >> 15)
        x = (x * factor) & low
        x = x ^ (x >> 13) ^ (salt & low)
    x = x ^ (x >> 16)
    return (x & (2**24 - 1)).to(torch.float32) / 2**24
