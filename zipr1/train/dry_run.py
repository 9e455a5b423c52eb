"""`zipr1 train --dry-run`: check everything, show what a step would see, count memory and hours, write nothing.

Where the model or the data are not on this machine, the plan is counted from a bundled config and the recipe's caps,
and one line says what could not be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zipr1.core import activity
from zipr1.core.errors import InputError, Missing
from zipr1.core.machine import free_memory
from zipr1.core.recipe import Recipe
from zipr1.core.text import one_line, size
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.models import memory
from zipr1.models.cost import Shape
from zipr1.models.encoder import MediaEncoder, effective
from zipr1.models.open import is_here
from zipr1.models.planned import bundled_shape, parts_of
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse.hybrid import check_skip
from zipr1.models.sparse.request import dense_below
from zipr1.rewards.registry import check_answers, examples
from zipr1.train import supervised
from zipr1.train.metrics import question
from zipr1.train.rollout import roll_out
from zipr1.train.sampler_check import check_sampler
from zipr1.train.validate import check, check_lengths, check_positions, needs_prompts

SAMPLED = 32  # prompts that are tokenised for the counts


def dry_run(recipe: Recipe, device: str | None, console: Console) -> dict[str, Any]:
    """The plan of a run: two rendered samples, tokens per prompt, memory by part in bytes, one rollout.

    Raises the InputErrors that the run itself would, but for a model or data that are not here: those are named.
    """
    check(recipe)
    unchecked: list[str] = []
    prompts = _prompts(recipe, unchecked)
    for line in examples([*prompts[0], *prompts[1]], recipe) if prompts is not None else ():
        console.print(line, soft_wrap=not console.is_terminal, highlight=False, markup=False)
    policy = _policy(recipe, device, unchecked)
    shape = bundled_shape(recipe.model.path)
    if policy is not None:
        shape = _shape(policy)
    if policy is not None and shape is not None and prompts is not None:
        result = _tried(recipe, shape, policy, *prompts, console)
    elif shape is not None:
        result = _counted(recipe, shape, prompts)
    else:
        raise InputError(f"nothing to plan with: {'; '.join(unchecked)}")
    if unchecked:
        result["not_checked"] = "; ".join(unchecked)
    console.print(_table(result))
    if unchecked:
        line = f"not checked here: {'; '.join(unchecked)}"
        # One line for a file or a pipe; whole words in a terminal.
        wrap = not console.is_terminal
        console.print(line, soft_wrap=wrap, highlight=False, markup=False, style="yellow")
    return result


def _prompts(recipe: Recipe, unchecked: list[str]) -> tuple[list[Prompt], list[Prompt]] | None:
    """Training prompts and held-out questions; None, and a note, where they are not here."""
    activity.tell("reading the questions")
    try:
        train = sources.load(recipe.data, "train", recipe.seed) if needs_prompts(recipe) else []
        heldout = sources.load(recipe.data, "heldout", recipe.seed)
        return check_answers(train, recipe), check_answers(heldout, recipe)
    except Missing as error:
        unchecked.append(f"data ({str(error).split(';')[0]})")
        return None


def _policy(recipe: Recipe, device: str | None, unchecked: list[str]) -> Policy | None:
    """The model; None, and a note, where it is not here or too large for here and a bundled config can stand in."""
    path = recipe.model.path
    activity.tell(f"opening {path}")
    known = bundled_shape(path)
    if known is None or path == "scratch":
        return load_policy(recipe.model, device, recipe.seed)
    if not is_here(path, recipe.model.revision):
        unchecked.append(f"tokenizer and weights (hf download {path})")
        return None
    needed = sum(memory.parameters(known).values()) * memory.weight_bytes(recipe)
    free = free_memory()
    if free is not None and needed > free:
        unchecked.append(
            f"tokenizer and weights ({path} needs {size(needed)} and {size(free)} are free)"
        )
        return None
    return load_policy(recipe.model, device, recipe.seed)


def _shape(policy: Policy) -> Shape:
    """Sizes to count with, and parameters as they are without adapters."""
    merge = policy.processor.settings.merge
    parts = parts_of(policy.model)
    shape = memory.loaded_shape(policy.model.config.to_dict(), policy.name, merge, parts)
    lora = policy.settings.lora
    if lora is None:
        return shape
    # Experts have no adapters, so their number does not follow from the sizes.
    adapters = sum(p.numel() for n, p in policy.model.named_parameters() if "lora_" in n)
    return replace(shape, per_rank=adapters // lora.rank)


def _counted(
    recipe: Recipe, shape: Shape, prompts: tuple[list[Prompt], list[Prompt]] | None
) -> dict[str, Any]:
    """The plan without a model, or without data: the recipe's caps stand in for what is not known."""
    most = memory.tokens_of(shape, recipe)
    result = memory.outline(shape, recipe, most["prompt"])
    sizes = {
        "training_prompts": len(prompts[0]) or None if prompts else None,
        "heldout_questions": len(prompts[1]) if prompts else None,
        "visual_tokens": {"picture_at_most": most["picture"], "clip_at_most": most["clip"]},
        "prompt_tokens": {"at_most": most["prompt"]},
    }
    seen = most["clip"] if recipe.data.fps or recipe.model.max_frame_pixels else most["picture"]
    hours = memory.hours(shape, recipe, most["prompt"], min(seen, most["prompt"]))
    return {"model": recipe.model.path, **sizes, **result, "a100_hours": hours}


def _tried(
    recipe: Recipe,
    shape: Shape,
    policy: Policy,
    prompts: list[Prompt],
    questions: list[Prompt],
    console: Console,
) -> dict[str, Any]:
    """The plan with everything here: samples tokenised and shown, and one rollout of two questions."""
    activity.tell("reading prompts and answering two of them")
    lessons = not needs_prompts(recipe)
    check_positions(recipe, policy.positions)
    check_skip(recipe.sparse, policy.decoder)
    pictures = MediaEncoder(policy, recipe)
    prompts, questions = pictures.fitting(prompts), pictures.fitting(questions)
    samples, encoded = pictures.usable((prompts or questions)[:SAMPLED])
    limit = dense_below(recipe.sparse, policy.device, policy.weight.dtype)
    check_lengths(recipe, [len(sample) for sample in encoded], limit)
    for prompt, sample in list(zip(samples, encoded, strict=True))[:2]:
        _show(policy, prompt, sample, console)
    for line in effective(encoded, policy):
        console.print(line, soft_wrap=not console.is_terminal, highlight=False)
    if lessons:
        encoded = [lesson.encoded for lesson in supervised.lesson(policy, recipe, 0, -1)]
    tokens, visual = _lengths(pictures, prompts, encoded)
    size = next(policy.decoder.parameters()).element_size()
    result: dict[str, Any] = {
        "model": recipe.model.path,
        "training_prompts": len(prompts) or None,
        "heldout_questions": len(questions),
        "prompt_tokens": _spread(tokens),
        "visual_tokens": _spread(visual),
        "stage": recipe.train.stage,
        "steps": recipe.train.steps,
    }
    on_cpu = policy.device.type == "cpu"
    result |= memory.outline(shape, recipe, int(tokens.max()), size, on_cpu)
    result["trainable"] = sum(p.numel() for _, p in policy.trainable())
    if recipe.train.stage == "rl":
        policy.keep_reference()
        seen = pictures.encode_vision(encoded[:2])
        batch = roll_out(policy, recipe, samples[:2], encoded[:2], seen.policy, 0, seen.reference)
        console.print(
            check_sampler(policy, recipe, batch), soft_wrap=not console.is_terminal, highlight=False
        )
        result["sampled"] = [
            {
                "question": question(g.prompt.messages),
                "answer": g.prompt.answer,
                "texts": [r.text for r in g.rollouts],
            }
            for g in batch.groups
        ]
        result["token_ratio"] = float(
            np.mean([r.token_ratio for g in batch.groups for r in g.rollouts])
        )
    return result


def _lengths(
    pictures: MediaEncoder, prompts: Sequence[Prompt], encoded: Sequence[Encoded]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts, and visual ones: of all prompts where the sizes of their media are known."""
    if prompts and all(m.size is not None for p in prompts for m in p.media):
        both = np.array([pictures.length(prompt) for prompt in prompts])
        return both[:, 0], both[:, 1]
    return (
        np.array([len(e) for e in encoded]),
        np.array([sum(v.tokens for v in e.visuals) for e in encoded]),
    )


def _show(policy: Policy, prompt: Prompt, encoded: Encoded, console: Console) -> None:
    text = policy.processor.text(prompt.messages)
    visual = sum(v.tokens for v in encoded.visuals)
    note = f"{prompt.id}: {len(encoded)} tokens, {visual} of them visual; right answer: {prompt.answer}"
    # A title that is a string would be read as markup, whatever the console.
    console.print(Panel(text.rstrip(), title=Text(note), title_align="left", expand=False))


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        name = key.replace("_", " ")
        if key == "memory":
            shards = "peak_of_8_ranks" in value
            for part, count in value.items():
                if count:
                    style = "bold" if part.startswith("peak") else ""
                    # More ranks do not lower what is needed before anything is divided among them.
                    whole = part.startswith("peak_of_") and count == value["loading"]
                    loading = ", while loading whole" if whole else ""
                    name = f"memory, {_part(part, shards)}"
                    table.add_row(name, f"{size(count)}{loading}", style=style)
        elif key == "checkpoints":
            each = f"{value['written']} of {size(value['bytes'])}"
            table.add_row(name, f"{each}, at most {value['kept']} kept")
        elif key == "sampled":
            for sample in value:
                said = dict.fromkeys(_line(text, 60) for text in sample["texts"])
                table.add_row("sampled", f"{_line(sample['question'], 200)} -> {', '.join(said)}")
        elif isinstance(value, dict):
            parts = (f"{k.replace('_', ' ')} {v:,}" for k, v in value.items())
            table.add_row(name, ", ".join(parts))
        elif key == "a100_hours":
            one, eight = (f"{v:,.0f}" if v >= 10 else f"{v:.1f}" for v in (value, value / 8))
            table.add_row("hours on one A100", f"{one} (estimate), on eight {eight}")
        elif key == "recipe_sha256":
            table.add_row("recipe sha256", value[:16])
        elif key == "not_checked":
            continue
        elif isinstance(value, float):
            table.add_row("tokens kept" if key == "token_ratio" else name, f"{value:.1%}")
        elif value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def _part(name: str, shards: bool) -> str:
    """What a part of the memory is called. shards: its parts are divided among ranks."""
    if name == "peak":
        return f"peak{' on one GPU' if shards else ''} (estimate)"
    if name.startswith("peak_of_"):
        return f"peak on each of {name.split('_')[2]}"
    return name.replace("_", " ")


def _line(text: str, most: int) -> str:
    """A text on one line, what is over `most` characters left out."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[:most]}..."
