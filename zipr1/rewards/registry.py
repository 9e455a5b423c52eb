"""The checks of answers: functions `(prediction, reference) -> float in [0, 1]`, by name in REWARDS or a user's own.

All look inside <answer> tags and boxes first (final.py). What a kept token costs is not here: that depends on the other
rollouts of the same prompt (zipr1/train/advantages.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.rewards.choice import choice
from zipr1.rewards.distance import anls, ocr
from zipr1.rewards.exact import exact
from zipr1.rewards.number import number, regression, relaxed
from zipr1.rewards.rouge import rouge

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "relaxed": relaxed,
    "regression": regression,
    "ocr": ocr,
    "rouge": rouge,
    "anls": anls,
}


def find(name: str, where: str = "rewards.check", tolerance: float | None = None) -> Reward:
    """The reward of that name, or the function of `path.py:func`.

    where: what named it, for errors. tolerance: relative, of `number`. Raises InputError, with the nearest name.
    """
    if ".py:" in name:
        return _load_function(name, where)
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(
            f"{where} '{name}': no such reward; {hint}allowed: {', '.join(REWARDS)}, or path.py:function; "
            "rename or remove it"
        )
    if name == "number" and tolerance is not None:
        return partial(number, tolerance=tolerance)
    return REWARDS[name]


@lru_cache
def _load_function(name: str, where: str) -> Reward:
    """A user's function `(prediction: str, reference: str) -> float in [0, 1]` of a file, which is executed."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(
            f"{where} '{name}': there is no file {path}; give a path from here, such as rewards.py:mine"
        )
    spec = importlib.util.spec_from_file_location(f"zipr1_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"{where} '{name}': {path} does not load ({type(error).__name__}: {error}); mend it"
        ) from error
    check = getattr(module, function, None)
    if not callable(check) or not _takes_two(check):
        raise InputError(
            f"{where} '{name}': {path} has no function {function} of two arguments; "
            f"write def {function}(prediction: str, reference: str) -> float"
        )

    def reward(prediction: str, reference: str) -> float:
        try:
            value = check(prediction, reference)
        except Exception as error:
            raise InputError(
                f"{where} '{name}': failed on {prediction!r:.60} ({type(error).__name__}: {error}); mend it"
            ) from error
        if not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
            raise InputError(
                f"{where} '{name}': gave {value!r:.60} for {prediction!r:.60}; allowed: a number from 0 to 1"
            )
        return float(value)

    return reward


def _takes_two(check: Callable[..., object]) -> bool:
    try:
        inspect.signature(check).bind("prediction", "reference")
    except TypeError:
        return False
    except ValueError:  # built in C: it has no signature to look at
        return True
    return True


def reward_of(prompt: Prompt, recipe: Recipe) -> Reward:
    """The check of a prompt's answer: the prompt's own or the recipe's, at its best over all accepted answers."""
    check = find(prompt.reward or recipe.rewards.check, tolerance=recipe.rewards.tolerance)
    if not prompt.accepted:
        return check
    return lambda prediction, reference: max(
        check(prediction, accepted) for accepted in (reference, *prompt.accepted)
    )
