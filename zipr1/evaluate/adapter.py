"""The policy as a model of lmms-eval: its chat layout, around what answers.py does.

    simple_evaluate(model=Adapter(answerer), ...)               in a process that has loaded a policy
    lmms-eval --model zipr1 --model_args pretrained=RUN,budget=0.975 --tasks mme

One adapter answers one benchmark: all budgets when it is first asked, then those of `turn` from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from zipr1.core.errors import InputError
from zipr1.core.recipe import Model
from zipr1.core.types import Media, Prompt
from zipr1.evaluate.answers import Answered, Answerer, Conditions
from zipr1.models.loading import choose_device
from zipr1.models.open import find_source, inference_dtype
from zipr1.models.policy import load_policy

# Tasks that set no length of answers get this one, lmms-eval's own habit.
MAX_NEW_TOKENS = 128


class Adapter(lmms):
    """answerer, or for lmms-eval's own command line: pretrained (what --model takes), budget, batch_size, device.

    conditions: what to hold all questions to; None takes the tasks' own length of answers. turn: which of the
    answerer's budgets `generate_until` returns. answered: by (task, split, document).
    """

    is_simple = False

    def __init__(
        self,
        answerer: Answerer | None = None,
        conditions: Conditions | None = None,
        tell: Callable[[int], None] = lambda done: None,
        change: Callable[[str, str], str] = lambda task, text: text,
        pretrained: str = "tiny",
        budget: float = 1.0,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise InputError(
                f"--model_args {next(iter(unknown))}: unknown; allowed: pretrained, budget, batch_size, device"
            )
        if answerer is None:
            sparse = find_source(pretrained).sparse
            dtype = inference_dtype("auto", choose_device(device))
            policy = load_policy(Model.model_validate({"path": pretrained, "dtype": dtype}), device)
            answerer = Answerer(policy, sparse, [float(budget)], int(batch_size), shown=0)
        self.answerer = answerer
        self.conditions = conditions
        self.tell = tell
        self.change = change
        self.turn = 0
        self.answered: dict[tuple[str, str, int], Answered] = {}

    @property
    def device(self) -> Any:
        return self.answerer.policy.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers at the budget whose turn it is, in the order of the requests."""
        keys = [self._key(request) for request in requests]
        new = [i for i, key in enumerate(keys) if key not in self.answered]
        for conditions, rows in self._alike([requests[i] for i in new]).items():
            some = [new[row] for row in rows]
            asked = [self._maker(requests[i]) for i in some]
            for i, answered in zip(
                some, self.answerer.answer(asked, conditions, self.tell), strict=True
            ):
                self.answered[keys[i]] = answered
        return [self.change(key[0], self.answered[key].said[self.turn].text) for key in keys]

    def _alike(self, requests: Sequence[Instance]) -> dict[Conditions, list[int]]:
        """Requests by the conditions that they are answered under."""
        found: dict[Conditions, list[int]] = {}
        base = self.conditions or Conditions(max_new_tokens=0)
        for row, request in enumerate(requests):
            settings = request.args[2]
            stops = settings.get("until") or ()
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            longest = base.max_new_tokens or int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
            wanted = base._replace(max_new_tokens=longest, stops=stops)
            found.setdefault(wanted, []).append(row)
        return found

    def _maker(self, request: Instance) -> Callable[[], Prompt]:
        _, to_messages, _, number, task, split = request.args
        return lambda: prompt_of(
            f"{task}/{number}", to_messages(self.task_dict[task][split][number])
        )

    @staticmethod
    def _key(request: Instance) -> tuple[str, str, int]:
        return request.args[4], request.args[5], request.args[3]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise InputError(
            "tasks that compare likelihoods are not supported; choose one that generates answers"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise InputError(
            "tasks of several rounds are not supported; choose one with a single answer"
        )

    def clean(self) -> None:
        """Nothing: lmms-eval's own would delete the modules of a model that is asked again."""


def prompt_of(name: str, messages: Any) -> Prompt:
    """lmms-eval's chat messages as a Prompt: pictures as pixels, clips as paths. Raises InputError for audio."""
    turns, media = [], []
    for message in ChatMessages(messages=messages).messages:
        content: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                continue
            if part.type == "image":
                source = part.url
                if not isinstance(source, str):
                    source = np.ascontiguousarray(np.asarray(source.convert("RGB")))
                media.append(Media("image", source))
            elif isinstance(part.url, str) and (part.type == "video" or part.url.endswith(".webm")):
                # lmms-eval takes a .webm file for sound.
                media.append(Media("video", part.url))
            else:
                raise InputError(
                    f"{name}: holds {part.type}; pictures, whole clips and text are read"
                )
            content.append({"type": media[-1].kind})
        turns.append({"role": message.role, "content": content})
    return Prompt(name, turns, tuple(media), "")
