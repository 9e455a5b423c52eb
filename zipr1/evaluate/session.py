"""One evaluation, in numbered steps: what is asked for, the model, the folder, the benchmarks, the report."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from zipr1.core import activity, distributed, hub, terminal, watch
from zipr1.core.errors import InputError, RunError, ZipError
from zipr1.core.files import writing
from zipr1.core.folders import claimed
from zipr1.core.jsontext import dumps
from zipr1.core.machine import describe
from zipr1.core.recipe import Recipe
from zipr1.core.text import one_line, reason
from zipr1.evaluate.folder import Folder, default_root, identity
from zipr1.evaluate.names import how_to_install, lmms_eval_folder, suites_of
from zipr1.evaluate.request import EvalRequest, check, settings
from zipr1.evaluate.suites import LMMS_EVAL, WITH_LOGIN, Suite
from zipr1.models.loading import choose_device
from zipr1.models.manifest import read
from zipr1.models.open import ModelSource, find_source, inference_dtype
from zipr1.models.policy import Policy, load_policy
from zipr1.models.sparse.request import settled

if TYPE_CHECKING:
    import torch

    from zipr1.evaluate.answers import Answerer, Conditions

BATCH = 16


def run(request: EvalRequest, command: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure every benchmark and write results.json, report.md, report.html and plots; return results.json.

    A benchmark that fails is reported and does not stop the others; one that was finished before is not repeated.
    Raises RunError at the end if any failed, InputError before anything is measured for wrong input.
    """
    # 1. what is asked for, in full
    check(request)
    activity.tell("loading lmms-eval")
    check_installed()
    suites = suites_of(request.tasks)
    source = find_source(request.model)
    recipe, keys = settings(request, source.sparse.model_dump())
    p_values = _p_values(request.p_values, recipe)

    def choose() -> torch.device:
        return choose_device(request.device or distributed.shared_device())

    # The ranks exchange answers alone, and may share a GPU.
    minutes = recipe.train.stall_minutes
    with distributed.joined(choose, minutes, "gloo") as device, contextlib.ExitStack() as held:
        # 2. the model, and the one it was trained from
        recipe = _with_dtype(recipe, device)
        activity.tell(f"opening {request.model}")
        policy = load_policy(recipe.model, device)
        recipe = recipe.model_copy(update={"sparse": settled(recipe.sparse, policy.weight)})
        base, base_name, base_note = _base(request, source, recipe, device)
        meta = {
            "model": request.model,
            "base": base_name,
            "sparse": recipe.sparse.model_dump(mode="json"),
            "budgets": list(p_values),
            "limit": request.limit,
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "max_pixels": policy.processor.settings.max_pixels,
            **_frame_bound(policy),
            "changes": list(request.changes),
            "data_root": str(request.data_root.resolve()) if request.data_root else None,
            "weights": identity(source.place),
        }
        # 3. where results go; what is there already
        root = request.output or default_root(request.model, meta)
        distributed.first(lambda: held.enter_context(claimed(root)))
        # By the first alone: another would find a folder that is neither empty nor an evaluation yet.
        folder = distributed.first(lambda: Folder.open(root, meta))
        loud = distributed.rank() == 0
        quiet = console if loud else terminal.console(io.StringIO())
        quiet.print(
            f"{request.model}: sparsity of {source.sparse_from}; "
            + (f"base: {base_name}; " if base_name else f"{base_note}; " if base_note else "")
            + f"results in {folder.root}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        pixels = (
            f"{policy.processor.settings}, or a benchmark's own bound of frames where it is lower"
        )
        quiet.print(pixels, soft_wrap=not quiet.is_terminal, highlight=False, markup=False)
        info = describe(command, str(policy.device))
        from zipr1.evaluate.harness import lmms_eval_version

        version = lmms_eval_version()
        if version != LMMS_EVAL:
            quiet.print(
                f"lmms-eval {version} is installed; benchmarks and scores were tested with {LMMS_EVAL}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
        quiet.print(without_login(request, suites), end="", soft_wrap=True, highlight=False)
        # 4. one benchmark after another, each written when it is done
        from zipr1.evaluate.answers import Answerer

        batch = recipe.evaluation.batch if "evaluation.batch" in keys else BATCH
        bound = source.recipe.train.micro_tokens if source.recipe is not None else None
        answerer = Answerer(policy, recipe.sparse, p_values, batch, base=base, micro_tokens=bound)
        reported = [p for p in p_values if p in request.p_values or p < 1]
        _measure_all(request, suites, answerer, recipe, keys, reported, folder, quiet)
        # 5. everything together
        from zipr1.evaluate import report

        results = report.collect(folder, suites, meta, info, version)
        if loud and results["rows"]:
            write(folder, results, quiet)
    if results["errors"]:
        names = ", ".join(error["task"] for error in results["errors"])
        there = "no report is written"
        if results["rows"]:
            there = f"what was measured is in {folder.root}"
        raise RunError(
            f"{len(results['errors'])} of {len(suites)} benchmarks have no result ({names}); {there}, and the same "
            "command tries again"
        )
    return results


def write(folder: Folder, results: dict[str, Any], console: Console) -> None:
    """results.json, the figures, report.md and report.html into the folder, and the table to the terminal."""
    from zipr1.evaluate import html, plots, report

    folder.write("results.json", dumps(results, indent=2) + "\n")
    names = dict.fromkeys(row["task"] for row in results["rows"])
    records = [record for record in map(folder.read, names) if record is not None]
    activity.tell("drawing the report")
    with writing(folder.root, "run again"):
        drawings = plots.draw(records, results, folder.root) if records else {}
    folder.write("report.md", report.markdown(results, records, list(drawings)))
    folder.write("report.html", html.page(results, records, drawings))
    activity.tell("")
    if results["rows"]:
        console.print(report.table(results, console.width))
    for note in results["notes"]:
        console.print(f"corrected: {note}", highlight=False, markup=False, style="dim")
    console.print(
        f"report: {folder.root / 'report.html'}", soft_wrap=True, highlight=False, markup=False
    )


def check_installed() -> None:
    """Raises InputError, with what to install, where lmms-eval or what it needs is missing."""
    lmms_eval_folder()
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            raise InputError(
                f"torchvision is broken here and takes lmms-eval with it ({reason(error, 120)}); "
                "pip uninstall torchvision"
            ) from None
    try:
        with _silence():
            importlib.import_module("lmms_eval.evaluator")
    except ImportError as error:
        raise InputError(f"lmms-eval cannot be imported ({error}); {how_to_install()}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Importing lmms-eval turns off all warnings of the process and all of loguru's handlers."""
    import warnings

    filters = warnings.filters[:]
    try:
        yield
    finally:
        warnings.filters[:] = filters  # type: ignore[index]


def without_login(request: EvalRequest, suites: Sequence[Suite]) -> str:
    """A line that says which benchmarks ask for a login to the hub where nobody is logged in; empty where none does."""
    asking = [suite.name for suite in suites if suite.name in WITH_LOGIN]
    if not asking or request.data_root is not None or hub.logged_in() or hub.unreachable():
        return ""
    return (
        "nobody is logged in to the hub, and lmms-eval's task files ask for a login to download "
        f"{', '.join(asking)}: {hub.LOGIN}\n"
    )


def _with_dtype(recipe: Recipe, device: torch.device) -> Recipe:
    dtype = inference_dtype(recipe.model.dtype, device)
    model = recipe.model.model_copy(update={"dtype": dtype})
    return recipe.model_copy(update={"model": model})


def _p_values(given: Sequence[float], recipe: Recipe) -> list[float]:
    """All values of p, dense first; without any the model's own beside dense."""
    return sorted({1.0, *(given or [recipe.sparse.p])}, reverse=True)


def _frame_bound(policy: Policy) -> dict[str, int]:
    """The most pixels of a clip's frame, where it is not that of a picture."""
    most = policy.processor.settings.max_frame_pixels
    return {} if most is None else {"max_frame_pixels": most}


def _base(
    request: EvalRequest, source: ModelSource, recipe: Recipe, device: torch.device
) -> tuple[Policy | None, str | None, str | None]:
    """The untouched model that a run or an exported folder was trained from: (it, its name, why there is none).

    A run's recipe names it; an exported folder's zipr1.json does, which still holds where the run is not at hand.
    """
    trained = source.recipe
    if not request.base or trained is None:
        return None, None, None
    if trained.train.stage != "rl" or trained.model.train_vision:
        return None, None, None
    origin = (read(Path(source.place)) or {}).get("base") or trained.model.model_dump()
    # The run or the folder names it, not the caller, whose trust in code is for what the caller named.
    named = {"path": origin["path"], "revision": origin["revision"], "trust_remote_code": False}
    settings = recipe.model.model_copy(update=named)
    base, failure = None, None
    try:
        base = load_policy(settings, device)
    except InputError as error:
        failure = f"the base is not measured ({error})"
    failure = distributed.agree(failure)  # all ranks measure it, or none
    return (base, settings.path, None) if failure is None else (None, None, failure)


def _measure_all(
    request: EvalRequest,
    suites: Sequence[Suite],
    answerer: Answerer,
    recipe: Recipe,
    keys: set[str],
    reported: Sequence[float],
    folder: Folder,
    console: Console,
) -> None:
    """A file for each benchmark, its result or why there is none. reported: the values of p that get a row."""
    from zipr1.evaluate.records import record

    for suite in suites:
        done = distributed.gather(folder.done(suite.name))[0]
        if done:
            console.print(f"{suite.name}: finished before, not repeated", highlight=False)
            continue
        conditions = conditions_of(suite, recipe, keys)
        limit = suite.limit if request.limit is None else request.limit or None
        began = time.monotonic()
        activity.tell(f"{suite.name}: preparing")
        try:
            from zipr1.evaluate.harness import measure

            scored = measure(
                suite, answerer, conditions, limit, request.data_root,
                lambda task, done: activity.tell(f"{task}: question", done, limit),  # noqa: B023
            )  # fmt: skip
            activity.tell(f"{suite.name}: summing up")
            result = record(suite, scored, answerer, conditions, reported, time.monotonic() - began)
        except ZipError as error:
            watch.check()  # a rank that is gone or hangs is no benchmark's fault
            result = {"task": suite.name, "error": one_line(error)}
            failed = Text.assemble(("failed:", "bold red"), f" {result['error']}")
            console.print(failed, soft_wrap=True)
        if distributed.rank() == 0:
            folder.save(suite.name, result)
    distributed.gather(None)  # what the first process wrote is there for all


def conditions_of(suite: Suite, recipe: Recipe, keys: set[str]) -> Conditions:
    """The suite's frames, fps, pixels and length of answers, but for what the command line says."""
    from zipr1.evaluate.answers import Conditions

    return Conditions(
        recipe.train.max_new_tokens if "train.max_new_tokens" in keys else suite.max_new_tokens,
        recipe.data.max_frames if "data.max_frames" in keys else suite.frames,
        recipe.data.fps if "data.fps" in keys else suite.fps,
        suite.frame_pixels,
    )
