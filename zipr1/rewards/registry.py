"""How right is an answer? Functions `(prediction, reference) -> float in [0, 1]`, by name in REWARDS, or a user's own.

Which to use: `exact` for words; `choice` for letters of options; `number` for numbers that are exact, `regression` for
estimates; `ocr` for text that is read, `anls` for short answers about documents, `rouge` for sentences. For charts,
`relaxed` to train, which is lenient about form, and `chartqa` to measure, which counts as the benchmark does.

All but `chartqa` look inside <answer> tags and boxes first (final.py). What a kept token costs is not here: the gate
needs the whole group (zipr1/train/advantages.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

from zipr1.core import watch
from zipr1.core.errors import InputError
from zipr1.core.load import names_code
from zipr1.core.recipe import Recipe
from zipr1.core.types import Prompt
from zipr1.rewards.choice import choice
from zipr1.rewards.distance import anls, ocr
from zipr1.rewards.exact import exact
from zipr1.rewards.number import chartqa, number, regression, relaxed
from zipr1.rewards.rouge import rouge

log = logging.getLogger("zipr1")

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "relaxed": relaxed,
    "chartqa": chartqa,
    "regression": regression,
    "ocr": ocr,
    "rouge": rouge,
    "anls": anls,
}


def find(
    name: str,
    where: str = "rewards.check",
    tolerance: float | None = None,
    *,
    files: bool = True,
) -> Reward:
    """The reward of that name, or the function of `path.py:func`, whose file is executed.

    where: what named it, for errors. tolerance: relative, of `number`. files: whether a file may be named: a recipe
    may, a row of data may not, for data must not run code. Raises InputError, with the nearest name.
    """
    if names_code(name):
        if not files:
            raise InputError(
                f"{where} '{name}': a row cannot name a file, which would run its code; allowed: {', '.join(REWARDS)}; "
                "remove it, and name the file in the recipe's rewards.check"
            )
        return _own(name, where)
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        own = ", or path.py:function" if files else ""
        raise InputError(
            f"{where} '{name}': no such reward; {hint}allowed: {', '.join(REWARDS)}{own}; "
            "rename or remove it"
        )
    if name == "number" and tolerance is not None:
        return partial(number, tolerance=tolerance)
    return REWARDS[name]


@lru_cache
def _own(name: str, where: str) -> Reward:
    """A user's function `(prediction: str, reference: str) -> float in [0, 1]`, from a file, which is executed."""
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
        if getattr(value, "shape", None) == ():  # a scalar of NumPy or PyTorch
            value = value.item()
        if not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN is in no range
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
    """The check of a prompt's answer: its own, or the recipe's; the best over all answers that are right."""
    tolerance = recipe.rewards.tolerance
    check = (
        find(prompt.reward, "reward", tolerance, files=False)
        if prompt.reward
        else find(recipe.rewards.check, tolerance=tolerance)
    )
    if not prompt.accepted:
        return check
    return lambda prediction, reference: max(
        check(prediction, right) for right in (reference, *prompt.accepted)
    )


# What a mean of shares that are 1 may lack.
ROUNDING = 1e-9


def examples(prompts: Sequence[Prompt], recipe: Recipe) -> list[str]:
    """A line for each check that these questions have: how many, and what the first right answer earns when it is said
    word for word. A user's own check is named and not called."""
    named: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        named.setdefault(prompt.reward or recipe.rewards.check, []).append(prompt)
    lines = []
    for name, asked in named.items():
        line = f"reward {name}: checks {len(asked):,} questions"
        if name in REWARDS:
            first = asked[0]
            earned = reward_of(first, recipe)(first.answer, first.answer)
            line += f"; {first.answer!r:.60}, said word for word, earns {earned:g}"
        lines.append(line)
    return lines


def check_answers(prompts: Sequence[Prompt], recipe: Recipe) -> list[Prompt]:
    """The questions whose right answers their own check reads: one of them, said word for word, earns all of the
    reward. Others are worth nothing whatever is said, and would hold the accuracy constraint at no loss.

    Raises InputError with the first such row; with `data.on_bad_row: skip` they are left out with a warning, and none
    left is the error. A user's own check is not called: it may be slow, or cost money.
    """
    kept: list[Prompt] = []
    unfit: list[Prompt] = []
    earned: dict[tuple[str, ...], bool] = {}
    for prompt in prompts:
        name = prompt.reward or recipe.rewards.check
        right = (prompt.answer, *prompt.accepted)
        if name in REWARDS and (name, *right) not in earned:
            check = reward_of(prompt, recipe)
            earned[name, *right] = any(check(one, prompt.answer) > 1 - ROUNDING for one in right)
            watch.alive()
        (kept if earned.get((name, *right), True) else unfit).append(prompt)
    if not unfit:
        return kept
    first = unfit[0]
    message = (
        f"{first.row or first.id}: {first.reward or recipe.rewards.check} gives {first.answer!r:.60} no full reward "
        f"when it is said word for word, nor {len(unfit) - 1:,} more of {len(prompts):,} right answers; write them as "
        "the reward reads them, or name another (rewards.check, or `reward` in the row)"
    )
    if recipe.data.on_bad_row == "error":
        raise InputError(f"{message} (data.on_bad_row=skip leaves such rows out)")
    if not kept:
        raise InputError(message)
    log.warning("%s; these rows are left out", message)
    return kept
