"""The policy as a model of lmms-eval: its chat layout, around what answers.py does.

    simple_evaluate(model=Adapter(AnswerStore(answerer), 0), ...)      in a process that has loaded a policy
    python -m lmms_eval --model zipr1 --model_args pretrained=RUN --tasks mme

An AnswerStore answers every document of a benchmark once, in all variants; an Adapter for each variant reads from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger

from zipr1.core.errors import InputError
from zipr1.core.recipe import Model
from zipr1.core.types import Prompt
from zipr1.data.chat import medium
from zipr1.evaluate.answers import Answered, Answerer, Conditions
from zipr1.evaluate.suites import SUITES
from zipr1.models.api import changed
from zipr1.models.loading import choose_device
from zipr1.models.open import find_source, inference_dtype
from zipr1.models.policy import load_policy

# Tasks that set no length of answers get this one, lmms-eval's own habit.
MAX_NEW_TOKENS = 128


class Document(NamedTuple):
    """What lmms-eval knows a question by: its number in a split of a task's data set."""

    task: str
    split: str
    number: int


class AnswerStore:
    """One benchmark's answers: a document is answered once, in all variants together, and read variant by variant.

    lmms-eval asks for all documents in one variant, scores them, and asks again for the next. The first time decides:
    every document is answered then, so that its media are decoded and seen once.
    """

    def __init__(self, answerer: Answerer, tell: Callable[[int], None] = lambda done: None) -> None:
        self.answerer = answerer
        self._tell = tell
        self._answered: dict[Document, Answered] = {}

    def add(self, asked: Mapping[Document, Callable[[], Prompt]], conditions: Conditions) -> None:
        """Answer those of the documents that have no answers yet."""
        new = {document: make for document, make in asked.items() if document not in self._answered}
        if new:
            answered = self.answerer.answer(list(new.values()), conditions, self._tell)
            self._answered |= zip(new, answered, strict=True)

    def text(self, document: Document, variant: int) -> str:
        """The answer in a variant, by its number among the answerer's."""
        return self._answered[document].answers[variant].text

    def in_order(self) -> list[Answered]:
        """All that was answered, in the order of documents."""
        return [
            self._answered[document] for document in sorted(self._answered, key=lambda d: d.number)
        ]


class Adapter(lmms):
    """store, or for lmms-eval's own command line: pretrained (what --model takes), budget, batch_size, device.

    budget: p; None is what `pretrained` was trained for, as for `zipr1.load`, and 1.0 is dense.
    variant: the number of the variant whose answers `generate_until` gives. conditions: what to hold all questions to;
    None takes the tasks' own length of answers, and their suites' frames of clips.
    change: makes of (task, answer) what the task's scorer is to see.
    """

    is_simple = False

    def __init__(
        self,
        store: AnswerStore | None = None,
        variant: int = 0,
        conditions: Conditions | None = None,
        change: Callable[[str, str], str] = lambda task, text: text,
        pretrained: str = "tiny",
        budget: float | None = None,
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
        if store is None:
            source = find_source(pretrained)
            sparse = changed(source.sparse, budget, {}, "--model_args budget")
            logger.info(f"{pretrained}: p = {sparse.p:g}, sparsity of {source.sparse_from}")
            dtype = inference_dtype("auto", choose_device(device))
            policy = load_policy(Model.model_validate({"path": pretrained, "dtype": dtype}), device)
            store = AnswerStore(Answerer(policy, sparse, [sparse.p], int(batch_size), shown=0))
        self.store = store
        self.variant = variant
        self.conditions = conditions
        self.change = change

    @property
    def device(self) -> Any:
        return self.store.answerer.policy.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers of this adapter's variant, in the order of the requests."""
        for conditions, asked in self._by_conditions(requests).items():
            self.store.add(asked, conditions)
        documents = map(_document, requests)
        return [self.change(d.task, self.store.text(d, self.variant)) for d in documents]

    def _by_conditions(
        self, requests: Sequence[Instance]
    ) -> dict[Conditions, dict[Document, Callable[[], Prompt]]]:
        """What is asked of each document, by the conditions that it is answered under."""
        asked: dict[Conditions, dict[Document, Callable[[], Prompt]]] = {}
        for request in requests:
            settings = request.args[2]
            common = self.conditions or _conditions_of(_document(request).task)
            stops = settings.get("until") or ()
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            longest = common.max_new_tokens or int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
            conditions = common._replace(max_new_tokens=longest, stops=stops)
            asked.setdefault(conditions, {})[_document(request)] = self._maker(request)
        return asked

    def _maker(self, request: Instance) -> Callable[[], Prompt]:
        _, to_messages, _, number, task, split = request.args
        return lambda: prompt_of(
            f"{task}/{number}", to_messages(self.task_dict[task][split][number])
        )

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


def _conditions_of(task: str) -> Conditions:
    """The frames that the suite of a task of lmms-eval allows its clips; length of answers is left to the task."""
    for suite in SUITES.values():
        if any(task == own.name for own in suite.tasks):
            return Conditions(0, suite.frames, suite.fps, suite.frame_pixels)
    return Conditions(max_new_tokens=0)


def _document(request: Instance) -> Document:
    _, _, _, number, task, split = request.args
    return Document(task, split, number)


def prompt_of(name: str, messages: Any) -> Prompt:
    """lmms-eval's chat messages as a Prompt: pictures as pixels, clips as paths. Raises InputError for audio."""
    chat, media = [], []
    for message in ChatMessages(messages=messages).messages:
        content: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                continue
            # lmms-eval takes a .webm file for sound.
            webm = isinstance(part.url, str) and part.url.endswith(".webm")
            kind = "image" if part.type == "image" else "video"
            cut = [at for at in ("start_time", "end_time") if getattr(part, at, None) is not None]
            if (part.type == "audio" and not webm) or cut:
                held = f"{cut[0]} of a clip" if cut else part.type
                raise InputError(f"{name}: holds {held}; pictures, whole clips and text are read")
            try:
                media.append(medium(kind, part.url))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            content.append({"type": media[-1].kind})
        chat.append({"role": message.role, "content": content})
    return Prompt(name, chat, tuple(media), "")
