"""lmms-eval's own code around our answers: its data sets, prompts and scoring, one benchmark at a time.

What lmms-eval does to the process (warnings, log handlers, random states, exits) is undone here, and its known faults
are corrected where they lie; each correction that was applied is named in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
import os
import random
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmms_eval.api.task
import lmms_eval.evaluator
import lmms_eval.tasks
import numpy as np
import torch
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import ImageFile
from tenacity import RetryError, stop_after_attempt

from zipr1.core import distributed, hub, watch
from zipr1.core.errors import InputError, RunError, ZipError
from zipr1.core.text import reason
from zipr1.data.pictures import only_known_formats
from zipr1.evaluate import local
from zipr1.evaluate.adapter import Adapter, AnswerStore
from zipr1.evaluate.answers import Answered, Answerer, Conditions
from zipr1.evaluate.suites import EMBEDDED, SUITES, Suite, Task

# lmms-eval's import lets PIL fill what is missing of a cut-off picture with grey, everywhere in the process.
ImageFile.LOAD_TRUNCATED_IMAGES = False

TASKS = Path(lmms_eval.tasks.__file__).parent


@dataclass
class Scored:
    """One task in all variants. headline: lmms-eval's own number for each, None if it gives none.

    samples[v][i]: what lmms-eval logged about document i in variant v, in the order of documents. answered: ours.
    """

    task: Task
    headline: list[float | None]
    samples: list[list[dict[str, Any]]]
    answered: list[Answered]
    notes: list[str] = field(default_factory=list)


@functools.cache
def _register() -> TaskManager:
    """lmms-eval's register of its own tasks; making it parses two thousand files: seconds."""
    return TaskManager("ERROR", model_name="zipr1")


def lmms_eval_version() -> str:
    """The installed version; `unknown` of a copy that no installer knows."""
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def measure(
    suite: Suite,
    answerer: Answerer,
    conditions: Conditions,
    limit: int | None,
    data_root: Path | None,
    tell: Callable[[str, int], None] = lambda task, done: None,
) -> list[Scored]:
    """Every task of a benchmark, answered and scored in every variant.

    Raises ZipError with one line for data that is missing or wrong; under several processes on all of them.
    """
    given = limit
    if limit is not None:
        limit = -(-limit // suite.pairs) * suite.pairs
    folder = Path(tempfile.mkdtemp(prefix="zipr1-eval-"))
    try:
        with (
            _guarded(),
            distributed.hidden_launcher(),
            _home(suite, folder, data_root),
            _few_tries(),
            hub.offline_if_unreachable(),
        ):
            manager = _manager(suite, folder, limit, data_root)
            scored = [
                _measure_task(suite, task, manager, answerer, conditions, limit, folder, tell)
                for task in suite.tasks
            ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if limit != given:
        scored[0].notes.append(
            f"{suite.name}: a limit of {limit} questions in place of {given}: a picture's {suite.pairs} questions are "
            "scored together"
        )
    return scored


def _measure_task(
    suite: Suite,
    task: Task,
    manager: TaskManager,
    answerer: Answerer,
    conditions: Conditions,
    limit: int | None,
    folder: Path,
    tell: Callable[[str, int], None],
) -> Scored:
    store = AnswerStore(answerer, lambda done: tell(task.name, done))
    scored = Scored(task, [], [], [])
    keys: list[str] = []
    guessed: list[set[str]] = []
    for variant in range(len(answerer.variants)):
        failure, result = None, None
        try:
            # Some tasks count in globals, so each scoring gets new ones.
            guessed.append(set())
            fresh = _load(task, manager, guessed[-1])
        except (Exception, SystemExit) as error:  # noqa: BLE001  lmms-eval exits where data is missing
            failure = _reason(error, suite, task, manager)
        failure = distributed.agree(failure)
        if failure is None:
            try:
                result = simple_evaluate(
                    model=Adapter(store, variant, conditions, _changed),
                    tasks=[fresh],
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=0,
                    process_docs_parallel=1,
                    distributed_executor_backend="torchrun",
                    cli_args=argparse.Namespace(
                        output_path=str(folder / "out"), process_with_media=False
                    ),
                )
            except ZipError as error:
                failure = f"{suite.name}: {error}"
            except (Exception, SystemExit) as error:  # noqa: BLE001  lmms-eval exits where data is missing
                failure = _reason(error, suite, task, manager)
        failure = distributed.agree(failure)
        if failure is not None or result is None:
            raise RunError(failure or f"{suite.name}: lmms-eval gave no result for {task.name}")
        values = result["results"][task.name]
        keys = keys or list(task.metric) or _headline_keys(values)
        numbers = [values.get(f"{key},none") for key in keys]
        numbers = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        scored.headline.append(float(sum(numbers)) if numbers else None)
        scored.samples.append(sorted(result["samples"][task.name], key=lambda s: s["doc_id"]))
    scored.task = Task(task.name, tuple(keys), task.hub, task.config, task.split, task.videos)
    scored.answered = store.in_order()
    if most := max(len(documents) for documents in guessed):
        scored.notes.append(
            f"{task.name}: where an answer names no option ({most} of {len(scored.answered)} at most), lmms-eval "
            "guesses; the guess is made the same for dense and sparse"
        )
    if task.name == "mmmu_pro_vision":
        scored.notes.append(
            "MMMU-Pro vision: the letter is parsed from the answer, which lmms-eval compares whole"
        )
    return scored


def _headline_keys(values: dict[str, Any]) -> list[str]:
    """The first metric of a task that has a number."""
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if (
            kind
            and not name.endswith(("_stderr", "_stderr_clt"))
            and isinstance(value, int | float)
        ):
            return [name]
    return []


def _changed(task: str, text: str) -> str:
    """The answer as the task's scorer needs it."""
    if task == "mmmu_pro_vision":
        return letter(text) or text
    return text


def letter(text: str) -> str | None:
    """The option that an answer names: `B`, `(B)`, `B. a cat`, `The answer is B.`; None if there is none."""
    text = text.strip()
    first = re.match(r"^\W*([A-J])(?![A-Za-z])", text)
    if first and (len(text) <= 3 or not re.match(r"^[AI] [a-z]", text)):
        return first[1]
    named = re.findall(r"(?:answer|option|choice)\s*(?:is|:)?\s*\W*([A-J])(?![A-Za-z])", text, re.I)
    letters = named or re.findall(r"\(([A-J])\)", text)
    return letters[-1].upper() if letters else None


def _load(task: Task, manager: TaskManager, guessed: set[str]) -> Any:
    """A new Task object that scores a document alike whatever was scored before.

    guessed: gets what identifies each document whose scorer drew a random number.
    """
    loaded = manager.load_task_or_group([task.name], "chat")
    objects = [t for t in loaded.values() if isinstance(t, ConfigurableTask)]
    if len(loaded) != 1 or not objects:
        raise InputError(
            f"{task.name} is a group or has no answers to generate; name its tasks one by one"
        )
    scorer = objects[0]
    process, ask = scorer.process_results, scorer.doc_to_text

    def asked(*arguments: Any, **more: Any) -> Any:
        watch.alive()
        return ask(*arguments, **more)

    def seeded(doc: Any, results: Any, **more: Any) -> Any:
        watch.alive()
        # Scorers that find no letter guess by random.choice: the same guess for dense and sparse answers.
        known = repr(sorted((k, str(v)[:200]) for k, v in doc.items() if not _heavy(v)))
        random.seed(zlib.crc32(known.encode()))
        before = random.getstate()
        result = process(doc, results, **more)
        if random.getstate() != before:
            guessed.add(known)
        return result

    scorer.process_results, scorer.doc_to_text = seeded, asked
    return scorer


def _heavy(value: Any) -> bool:
    return not isinstance(value, str | int | float | bool | type(None))


def _manager(suite: Suite, folder: Path, limit: int | None, data_root: Path | None) -> TaskManager:
    """lmms-eval's register of the tasks needed: overlays of local data alone where there are any."""
    failure = None
    try:
        if suite.name in EMBEDDED:
            local.embedded(suite, folder, limit)
        elif data_root is not None and suite.name in SUITES:
            local.copies(suite, data_root, folder, TASKS)
    except InputError as error:
        failure = f"{suite.name}: {error}"
    failure = distributed.agree(failure)
    if failure is not None:
        raise InputError(failure)
    if list(folder.glob("*.yaml")):
        return TaskManager(
            "ERROR", include_path=str(folder), include_defaults=False, model_name="zipr1"
        )
    return _register()


def _reason(error: BaseException, suite: Suite, task: Task, manager: TaskManager) -> str:
    """One line: what failed, and for missing data what to do."""
    while isinstance(error, RetryError):
        inner = error.last_attempt.exception()
        if inner is None:
            break
        error = inner
    text = reason(error, 240)
    data = task.hub or str(manager._get_config(task.name).get("dataset_path", ""))
    copied = local.how_to_get(suite, None, data)
    kind = type(error).__name__
    if kind == "LocalTokenNotFoundError":
        return (
            f"{suite.name}: lmms-eval's task asks for a login to the hub, and nobody is logged in here: {hub.LOGIN}; "
            f"or without one, {copied}"
        )
    if kind in ("DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError") or (
        kind == "HfHubHTTPError" and re.search(r"\b40[13]\b", text)
    ):
        way = hub.LOGIN if not hub.logged_in() else "accept its terms on its page of the hub"
        return f"{suite.name}: the hub does not hand out its data set {data} ({text}); {way}"
    if (
        kind in ("ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
                 "ConnectTimeout", "HfHubHTTPError", "ConnectError")
        or "offline" in text.lower()
    ):  # fmt: skip
        return (
            f"{suite.name}: its data set {data} is not here, and {hub.unreachable() or text}; "
            f"{copied}"
        )
    if (
        isinstance(error, SystemExit)
        or "does not exist" in text
        or isinstance(error, FileNotFoundError)
    ):
        return f"{suite.name}: a file is missing ({text}); {copied}"
    if isinstance(error, KeyError | IndexError):
        return (
            f"{suite.name}: {task.name} finds no {text} in the data; copy the data set {data} again"
        )
    return f"{suite.name}: {task.name} failed in lmms-eval ({kind}: {text})"


@contextlib.contextmanager
def _home(suite: Suite, folder: Path, data_root: Path | None) -> Iterator[None]:
    """HF_HOME, which tasks read when they load: our links to local clips, else the user's, always set."""
    before = os.environ.get("HF_HOME")
    if data_root is not None and suite.name not in EMBEDDED:
        os.environ["HF_HOME"] = str(folder / "home")
    elif suite.name in EMBEDDED:
        os.environ["HF_HOME"] = str(folder)
    else:
        os.environ.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HF_HOME", None)
        else:
            os.environ["HF_HOME"] = before


@contextlib.contextmanager
def _few_tries() -> Iterator[None]:
    """Scoring fails at once, and loading too without a network or a login: trying again would change nothing."""
    retried: Sequence[Any] = [ConfigurableTask.process_results]
    if hub.unreachable() is not None or not hub.logged_in():
        retried = [*retried, ConfigurableTask.download]
    states = [(f.retry, f.retry.stop) for f in retried if hasattr(f, "retry")]
    for state, _ in states:
        state.stop = stop_after_attempt(1)
    try:
        yield
    finally:
        for state, stop in states:
            state.stop = stop


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """What lmms-eval prints is swallowed, and pictures are of the formats that we read; filters of warnings, random
    states and bars are as before afterwards."""
    import datasets
    from loguru import logger

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    named = [(module, module.tqdm) for module in (lmms_eval.evaluator, lmms_eval.api.task)]
    for module, bar in named:
        module.tqdm = _no_bar(bar)
    datasets.utils.logging.disable_progress_bar()
    logger.disable("lmms_eval")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        only_known_formats(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            if bars:
                datasets.utils.logging.enable_progress_bar()
            for module, bar in named:
                module.tqdm = bar


def _no_bar(bar: Any) -> Any:
    return lambda *args, **more: bar(*args, **{**more, "disable": True})
