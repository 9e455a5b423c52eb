"""`zipr1 train --dry-run`: load everything, show what a step would see, estimate memory, write nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from zipr1 import data, supervised
from zipr1.episode import Prompt
from zipr1.metrics import question
from zipr1.models import Encoded, Policy, load_policy
from zipr1.pictures import Pictures
from zipr1.recipe import Recipe
from zipr1.rollout import roll_out
from zipr1.validate import check, check_lengths, needs_prompts

SAMPLED = 32  # prompts that are tokenised for the counts


def dry_run(recipe: Recipe, device: str | None, console: Console) -> dict[str, Any]:
    """The plan of a run: two rendered samples, tokens per prompt, memory by part in bytes, one rollout.

    Raises the InputErrors that the run itself would.
    """
    check(recipe)
    policy = load_policy(recipe.model, device, recipe.seed)
    lessons = not needs_prompts(recipe)
    prompts = [] if lessons else data.load(recipe.data, "train", recipe.seed)
    questions = data.load(recipe.data, "heldout", recipe.seed)
    pictures = Pictures(policy, recipe)
    samples, encoded = pictures.usable((prompts or questions)[:SAMPLED])
    check_lengths(recipe, [len(sample) for sample in encoded])
    for prompt, sample in list(zip(samples, encoded, strict=True))[:2]:
        _show(policy, prompt, sample, console)
    if lessons:
        encoded = [lesson.encoded for lesson in supervised.lesson(policy, recipe, 0, -1)]
    tokens = np.array([len(e) for e in encoded])
    visual = np.array([sum(v.tokens for v in e.visuals) for e in encoded])
    plan: dict[str, Any] = {
        "stage": recipe.train.stage,
        "steps": recipe.train.steps,
        "training_prompts": len(prompts) or None,
        "heldout_questions": len(questions),
        "prompt_tokens": _spread(tokens),
        "visual_tokens": _spread(visual),
        "parameters": sum(p.numel() for p in policy.core.parameters()),
        "trainable": sum(p.numel() for _, p in policy.trainable()),
        "memory": memory(policy, recipe, int(tokens.max())),
        "recipe_sha256": recipe.sha256(),
    }
    if recipe.train.stage == "rl":
        policy.keep_reference()
        plan["rollout_rows"] = recipe.train.prompts * recipe.budgets.count
        seen = pictures.look(encoded[:2])
        batch = roll_out(policy, recipe, samples[:2], encoded[:2], seen.policy, 0, seen.reference)
        plan["sampled"] = [
            {
                "question": question(g.prompt.messages),
                "answer": g.prompt.answer,
                "texts": [r.text for r in g.rollouts],
            }
            for g in batch.groups
        ]
        plan["token_ratio"] = float(
            np.mean([r.token_ratio for g in batch.groups for r in g.rollouts])
        )
    console.print(_table(plan))
    return plan


def memory(policy: Policy, recipe: Recipe, longest: int) -> dict[str, int]:
    """Bytes by part, estimated: weights, reference, gradients and AdamW moments (exact); the rollouts' KV cache
    unpruned, and the update's activations (about 24 hidden-sized and 3 MLP-sized tensors a layer and token, with
    gradient checkpointing one hidden-sized tensor a layer and one layer's worth), for the longest prompt seen.
    """
    config = policy.decoder.config
    size = next(policy.decoder.parameters()).element_size()
    weights = sum(p.numel() * p.element_size() for p in policy.core.parameters())
    tower = sum(p.numel() * p.element_size() for p in policy.core.model.visual.parameters())
    copied = weights if recipe.model.train_vision else weights - tower
    trained = sum(p.numel() * p.element_size() for _, p in policy.trainable())
    rows = recipe.train.micro_batch
    tokens = rows * (longest + recipe.train.max_new_tokens)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 24 * config.hidden_size + 3 * config.intermediate_size
    layers = config.num_hidden_layers
    kept = (
        layers * config.hidden_size + layer
        if recipe.model.gradient_checkpointing
        else layers * layer
    )
    parts = {
        "weights": weights,
        "reference": copied if recipe.train.stage == "rl" and recipe.model.lora is None else 0,
        "gradients": trained,
        "optimizer": 2 * trained,
        "kv_cache": tokens * layers * 2 * config.num_key_value_heads * head * size,
        "activations": tokens * kept * size,
        "logits": rows * recipe.train.max_new_tokens * config.vocab_size * 4 * 3,
    }
    # Rollouts are over when the update starts: the larger of the two counts.
    fixed = sum(parts[k] for k in ("weights", "reference", "gradients", "optimizer"))
    parts["peak"] = fixed + max(parts["kv_cache"], parts["activations"] + parts["logits"])
    return parts


def _show(policy: Policy, prompt: Prompt, encoded: Encoded, console: Console) -> None:
    text = policy.processor.text(prompt.messages)
    visual = sum(v.tokens for v in encoded.visuals)
    note = f"{prompt.id}: {len(encoded)} tokens, {visual} of them visual; right answer: {prompt.answer}"
    console.print(
        Panel(escape(text.rstrip()), title=escape(note), title_align="left", expand=False)
    )


def _spread(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _table(plan: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in plan.items():
        if key == "memory":
            for part, size in value.items():
                table.add_row(
                    f"memory, {part}" if part != "peak" else "[bold]memory, peak (estimate)",
                    _size(size),
                )
        elif key == "sampled":
            for sample in value:
                table.add_row(
                    "sampled",
                    escape(f"{sample['question']} -> {', '.join(dict.fromkeys(sample['texts']))}"),
                )
        elif isinstance(value, dict):
            table.add_row(key.replace("_", " "), ", ".join(f"{k} {v}" for k, v in value.items()))
        elif isinstance(value, float):
            table.add_row(key.replace("_", " "), f"{value:.1%}")
        elif value is not None:
            table.add_row(
                key.replace("_", " "),
                f"{value:,}" if isinstance(value, int) else escape(str(value)),
            )
    return table


def _size(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:,.1f} {unit}"
