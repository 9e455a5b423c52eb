"""What a run is judged by: held-out questions before and after, summary.json, the curves and a picture."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from zipr1.core import activity, distributed
from zipr1.core.errors import InputError
from zipr1.core.files import writing
from zipr1.core.plots import kept_picture
from zipr1.core.recipe import Recipe, Sparse
from zipr1.core.records import read
from zipr1.core.rundir import RunDir
from zipr1.core.statistics import Z, paired_difference, verdict
from zipr1.core.types import Prompt
from zipr1.data import embedded
from zipr1.data.media import load_timed
from zipr1.models.policy import Policy
from zipr1.train.heldout import Result, evaluate, joined
from zipr1.train.metrics import question
from zipr1.train.page import RunPage, shown_first
from zipr1.train.progress import constraint_lines, summary_table

BEFORE, AFTER = "before.json", "after.json"


def measure(
    policy: Policy, recipe: Recipe, prompts: Sequence[Prompt], settings: Sequence[Sparse | None], title: str,
) -> list[Result]:  # fmt: skip
    """`heldout.evaluate`, telling how far it is; several ranks take every so-manieth question each."""
    own = distributed.deal(len(prompts))
    mine = [prompts[i] for i in own]
    activity.tell(title, 0, len(own))
    found = policy.parallel.run_unsharded(
        lambda: evaluate(
            policy, recipe, mine, settings, lambda done: activity.tell(title, done, len(own))
        ),
        policy=True,
        reference=None in settings,
    )
    activity.tell(f"{title}: summing up")
    return [joined(prompts, distributed.gather(result.plain())) for result in found]


def measure_before(
    policy: Policy, recipe: Recipe, prompts: Sequence[Prompt], folder: RunDir
) -> dict[str, Result]:
    """The untouched model, dense and sparse, by name; read back from the run's folder when resuming.

    Empty for the supervised stage and with `evaluation.before: false`.
    """
    if recipe.train.stage != "rl" or not recipe.evaluation.before:
        return {}
    path = folder.root / BEFORE
    again = "remove it, and the model is measured again"
    saved = distributed.first(lambda: read(path, again) if path.is_file() else None)
    if saved is not None:
        for name in ("dense", "before"):
            _check_saved(path, name, saved.get(name), prompts, policy.layers, again)
        return {name: _unpacked(prompts, saved[name]) for name in ("dense", "before")}
    dense, sparse = measure(policy, recipe, prompts, [None, recipe.sparse], "held-out, before")
    results = {"dense": dense, "before": sparse}
    folder.write_json(BEFORE, {name: _packed(result) for name, result in results.items()})
    return results


def finish(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    before: dict[str, Result],
    folder: RunDir,
    seconds: float,
    page: RunPage,
    console: Console,
) -> dict[str, Any]:
    """Measure the trained model, write summary.json, after.json, the page and its figures, print the table."""
    results = dict(before)
    if recipe.evaluation.after:
        wanted: list[Sparse | None] = (
            [recipe.sparse] if "dense" in before else [None, recipe.sparse]
        )
        found = measure(policy, recipe, prompts, wanted, "held-out, after")
        results |= dict(zip(("dense", "after")[-len(wanted) :], found, strict=True))
    rollouts = recipe.train.steps * recipe.train.prompts_per_step * recipe.budgets.group
    summary: dict[str, Any] = {
        **_block(results, range(len(prompts))),
        "by_task": _by(results, prompts, lambda p: p.task),
        "constraint": {},
        "by_kind": _by(results, prompts, lambda p: p.task_kind),
        "p": recipe.sparse.p,
        "steps": recipe.train.steps,
        "rollouts": rollouts if recipe.train.stage == "rl" else 0,
        "seconds": round(seconds, 2),
        "seed": recipe.seed,
        "model": recipe.model.path,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "recipe_sha256": recipe.sha256(),
    }
    judge(summary, recipe)
    for name, result in results.items():
        if name != "dense":
            summary[name]["heldout_mass"] = result.probe_audit_mass
            summary[name]["token_ratio_by_layer"] = result.layer_ratios.mean(0).tolist()
    summary["costs"] = {
        name: {"first_token_ms": result.first_token_ms, "kv_bytes": result.kv_bytes}
        for name, result in results.items()
        if result.first_token_ms
    }
    folder.write_summary(summary)
    if "after" in results:
        folder.write_json(AFTER, {"after": _packed(results["after"])})
    if not folder.writes:
        return summary
    activity.tell("drawing the report")
    if "after" in results:
        pictures(policy, recipe, prompts, results, folder.root)
    page.finished(policy, prompts, results, summary)
    activity.tell("")
    if "after" in results:
        console.print(summary_table(summary))
        for line in constraint_lines(summary):
            wrapped = not console.is_terminal  # whole words in a terminal, a line each in a file
            console.print(line, soft_wrap=wrapped, highlight=False, markup=False)
    where = f"everything is in {folder.root}; report: {page.path}"
    console.print(where, soft_wrap=True, highlight=False)
    made = (
        f"a plain Hugging Face folder of it: zipr1 export {shlex.quote(str(folder.root))} --to DIR"
    )
    console.print(made, soft_wrap=True, highlight=False)
    return summary


def pictures(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    results: dict[str, Result],
    root: Path,
) -> None:
    """kept-<task>.png: for each task, the first question with one picture, and what each layer kept of it before and
    after training."""
    for task, i in shown_first(prompts).items():
        rows = {
            f"{name} training": results[name]
            for name in ("before", "after")
            if name in results and results[name].kept[i]
        }
        if "after training" not in rows:
            continue
        prompt = prompts[i]
        limits = recipe.data.max_frames, recipe.data.fps, policy.processor.settings.frame_rule
        seen = load_timed(prompt.media[0], *limits)
        encoded = policy.encode(prompt, [seen], recipe.data.max_prompt_tokens)
        visual = np.isin(encoded.ids.numpy(), list(policy.processor.placeholder.values()))
        merge = policy.processor.settings.merge
        kept: dict[str, list[tuple[np.ndarray, float]]] = {}
        for name, result in rows.items():
            kept[name] = []
            for positions in result.kept[i]:
                mask = np.zeros(len(visual), dtype=bool)
                mask[positions.numpy()] = True
                cells, grid = encoded.visuals[0].cells(mask[visual], merge)
                kept[name].append((cells, float(mask.mean())))
        answers = {name: r.said[i] for name, r in results.items() if name != "before"}
        answers["right"] = prompt.answer
        path = root / f"kept-{task}.png"
        with writing(path):
            kept_picture(seen[0], grid, kept, question(prompt.messages), answers, path)


def judge(summary: dict[str, Any], recipe: Recipe) -> None:
    """Say of each task, and of all, whether the constraint is held on held-out questions, which nothing was steered by:
    `constraint` of the summary and of its `by_task`. Of all: embedded tasks by their shares among training questions,
    others by their numbers."""
    allowed = recipe.efficiency.max_accuracy_drop
    if recipe.train.stage != "rl" or allowed is None:
        return
    blocks = {task: b for task, b in summary["by_task"].items() if "difference" in b}
    found: dict[str, tuple[float, float, int]] = {}
    for task, block in blocks.items():
        low, high = block["difference_ci"]
        error = max(high - block["difference"], block["difference"] - low) / Z
        found[task] = (-block["difference"], error, block["after"]["n"])
        block["constraint"] = verdict(*found[task], allowed)
    weights = {task: float(n) for task, (_, _, n) in found.items()}
    if recipe.data.source in embedded.SOURCES:
        mix = embedded.shares(recipe.data.source, recipe.data.mix)
        weights = {task: mix.get(task, 0.0) for task in found}
    if total := sum(weights.values()):
        lost = sum(weight * found[task][0] for task, weight in weights.items()) / total
        variance = sum((weight * found[task][1] / total) ** 2 for task, weight in weights.items())
        number = sum(found[task][2] for task in found)
        summary["constraint"] = verdict(lost, float(np.sqrt(variance)), number, allowed)


def _block(results: dict[str, Result], rows: Sequence[int]) -> dict[str, Any]:
    """summary.json's fields for some questions: before, after, dense_accuracy, and the paired difference."""
    index = list(rows)
    block: dict[str, Any] = {
        name: results[name].part(index) if name in results else {} for name in ("before", "after")
    }
    if "dense" in results:
        dense = results["dense"].part(index)
        block |= {"dense_accuracy": dense["accuracy"], "dense_accuracy_ci": dense["accuracy_ci"]}
        if "after" in results:
            pictures_ = [
                results["dense"].prompts[i].picture or results["dense"].prompts[i].id for i in index
            ]
            after, base = results["after"].correct[index], results["dense"].correct[index]
            difference, low, high = paired_difference(after, base, pictures_)
            block |= {"difference": difference, "difference_ci": [low, high]}
    return block


def _by(
    results: dict[str, Result], prompts: Sequence[Prompt], key: Callable[[Prompt], str]
) -> dict[str, Any]:
    names = [key(p) for p in prompts]
    return {
        n: _block(results, [i for i, m in enumerate(names) if m == n]) for n in dict.fromkeys(names)
    }


def _packed(result: Result) -> dict[str, Any]:
    return {
        "ids": [p.id for p in result.prompts],
        "correct": result.correct.tolist(),
        "layer_ratios": result.layer_ratios.tolist(),
        "said": result.said,
        "heldout": result.probe_audit_mass,
        "picture": [p.picture or p.id for p in result.prompts],
        "task": [p.task for p in result.prompts],
        "question": [question(p.messages) for p in result.prompts],
        "answer": [p.answer for p in result.prompts],
        "first_token_ms": result.first_token_ms,
        "kv_bytes": result.kv_bytes,
        # Of those whose pictures are shown.
        "kept": {
            str(i): [positions.tolist() for positions in result.kept[i]]
            for i in shown_first(result.prompts).values()
        },
    }


def _check_saved(
    path: Path, name: str, saved: Any, prompts: Sequence[Prompt], layers: int, then: str
) -> None:
    """Raises InputError unless before.json speaks of these questions and of a model of so many layers."""
    if saved is None:
        raise InputError(f"{path}: `{name}` is missing; the file was changed or is damaged: {then}")
    if saved["ids"] != [p.id for p in prompts]:
        raise InputError(f"{path}: was made with other held-out questions; give another --output")
    for key in ("correct", "said", "layer_ratios"):
        if len(saved[key]) != len(prompts):
            raise InputError(
                f"{path}: {name}.{key} has {len(saved[key])} entries for {len(prompts)} questions; the file was "
                f"changed or is damaged: {then}"
            )
    if strange := [i for i in saved.get("kept", {}) if int(i) >= len(prompts)]:
        raise InputError(
            f"{path}: {name}.kept has a question {strange[0]} of {len(prompts)}, from 0 on; the file was changed or is "
            f"damaged: {then}"
        )
    if any(len(ratios) != layers for ratios in saved["layer_ratios"]):
        raise InputError(
            f"{path}: {name}.layer_ratios has not {layers} numbers for each question, one a layer; the file was "
            f"changed or is damaged: {then}"
        )


def _unpacked(prompts: Sequence[Prompt], saved: dict[str, Any]) -> Result:
    layers = np.array(saved["layer_ratios"])
    kept: list[list[torch.Tensor]] = [[] for _ in prompts]
    for i, positions in saved.get("kept", {}).items():
        kept[int(i)] = [torch.tensor(one, dtype=torch.int32) for one in positions]
    return Result(
        prompts, np.array(saved["correct"]), layers.mean(1), layers, saved["said"], saved["heldout"], kept,
        saved.get("first_token_ms", 0.0), saved.get("kv_bytes", 0.0),
    )  # fmt: skip
