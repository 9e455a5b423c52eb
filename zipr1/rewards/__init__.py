"""Is an answer right? One function a file, `(said, wanted) -> float in [0, 1]`, found by name in REWARDS.

What a kept token costs is not here: the gate needs the whole group (zipr1/advantages.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from zipr1.errors import InputError
from zipr1.rewards.choice import choice
from zipr1.rewards.exact import exact
from zipr1.rewards.number import number

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {
    "exact": exact,
    "choice": choice,
    "number": number,
}


def find(name: str, where: str = "rewards.correct") -> Reward:
    """The reward of that name. Raises InputError naming the nearest one; where: what named it."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(
            f"{where} '{name}': no such reward; {hint}allowed: {', '.join(REWARDS)}; rename or remove it"
        )
    return REWARDS[name]
