"""The model card (README.md) of an exported folder: what was measured, on what, and how to use it.

Only what the run wrote down is told; what it did not measure is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import yaml

from zipr1.core import markdown as md
from zipr1.core.text import duration
from zipr1.export.source import Source

# A task that lost more than this against the dense model is named under limits.
NOTABLE = 0.01


def results(source: Source) -> dict[str, Any]:
    """What of summary.json goes into zipr1.json: all of it but what provenance tells."""
    left = {"seconds", "seed", "steps", "rollouts", "model", "recipe_sha256", "by_kind"}
    return {key: value for key, value in source.summary.items() if key not in left}


def provenance(source: Source) -> dict[str, Any]:
    """Where the weights come from: enough to train them again. No time of export: the same run, the same bytes."""
    return {
        "base": source.base,
        "step": source.step,
        "steps": source.recipe.train.steps,
        "finished": bool(source.summary),
        "seed": source.recipe.seed,
        "recipe_sha256": source.recipe.sha256(),
        "seconds": source.summary.get("seconds"),
        "rollouts": source.summary.get("rollouts"),
        "started": source.run.get("started"),
        "versions": source.run.get("versions"),
        "hardware": source.run.get("hardware"),
        "git": source.run.get("git"),
    }


FOLDER = "path/to/this/folder"  # its name is the owner's choice, and no part of the bytes


def model_card(source: Source, about: Mapping[str, Any]) -> str:
    """README.md of an exported folder."""
    return "\n\n".join(
        part.strip()
        for part in (
            _front(source, about["format"]),
            _opening(source),
            _measured(source),
            _usage(source, about),
            _training(source),
            _limits(source),
        )
        if part.strip()
    ) + "\n"  # fmt: skip


def _front(source: Source, format: str) -> str:
    values: dict[str, Any] = {}
    licence = source.licence()
    if licence:
        values["license"] = licence
    if source.base_is_public:
        values["base_model"] = source.base
        values["base_model_relation"] = "adapter" if format == "adapter" else "finetune"
    values["library_name"] = "peft" if format == "adapter" else "transformers"
    values |= {"pipeline_tag": "image-text-to-text", "tags": ["zipr1", "token-sparsity"]}
    # YAML puts into quotes what would mean something else.
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _opening(source: Source) -> str:
    summary, p = source.summary, source.recipe.sparse.p
    kept = (summary.get("after") or {}).get("token_ratio")
    if kept is None:
        told = f"It was trained to be run sparse at p = {p:g}."
    else:
        told = f"At p = {p:g} it attends to {kept:.1%} of a prompt's tokens on the questions below."
    return (
        f"# {md.text(source.base.rstrip('/').rsplit('/', 1)[-1])}-zipr1\n\n"
        f"A vision-language model post-trained from {_base(source)} to answer as well while attending to fewer of its "
        f"tokens. {told} Architecture and parameter count are those of the base: any tool loads it as an ordinary "
        "dense model, and zipr1 runs it sparse."
    )


def _base(source: Source) -> str:
    if source.base == "tiny":
        return "`tiny`, the model embedded in zipr1"
    if source.base == "scratch":
        return "random weights"
    if source.base_is_public:
        return f"[{md.text(source.base)}](https://huggingface.co/{quote(source.base)})"
    return "a local model folder"


def _measured(source: Source) -> str:
    summary, p = source.summary, source.recipe.sparse.p
    if not summary:
        return (
            f"## Measured\n\nNothing: the run was exported at step {source.step} of {source.recipe.train.steps}, "
            "before it was evaluated."
        )
    rows = [
        "| held-out questions | n | dense base | before, sparse | after, sparse | tokens kept, before -> after | "
        "after - dense base |",
        "|---|---|---|---|---|---|---|",
    ]
    tasks = summary.get("by_task") or {}
    blocks = [*tasks.items(), *([("all", summary)] if len(tasks) != 1 else [])]
    for task, block in blocks:
        before, after = block.get("before") or {}, block.get("after") or {}
        rows.append(
            f"| {md.text(task)} | {after.get('n') or before.get('n') or '-'} "
            f"| {_with_interval(block.get('dense_accuracy'), block.get('dense_accuracy_ci'))} "
            f"| {_with_interval(before.get('accuracy'), before.get('accuracy_ci'))} "
            f"| {_with_interval(after.get('accuracy'), after.get('accuracy_ci'))} "
            f"| {_share(before.get('token_ratio'))} -> {_share(after.get('token_ratio'))} "
            f"| {_points(block.get('difference'), block.get('difference_ci'))} |"
        )
    layers = (summary.get("after") or {}).get("token_ratio_by_layer")
    tail = (
        f"Kept by layer after training: {', '.join(_share(x) for x in layers)}." if layers else ""
    )
    return (
        f"## Measured\n\nShare of right answers with 95 % intervals (clustered where questions share a picture), "
        f"greedy, p = {p:g}, one run (seed {source.recipe.seed}). *Before* and *after* are sparse, before and after "
        "training; the dense base sees every token.\n\n" + "\n".join(rows) + (f"\n\n{tail}" if tail else "")
    )  # fmt: skip


def _usage(source: Source, about: Mapping[str, Any]) -> str:
    sparse = (
        "Sparse, where zipr1 is installed:\n\n```python\nimport zipr1\n\n"
        f'model, processor = zipr1.load("{FOLDER}")  # p = {about["sparse"]["p"]:g}; budget=1.0 is exactly dense\n'
        'question = [{"role": "user", "content": [{"type": "image", "image": "picture.png"},\n'
        '                                         {"type": "text", "text": "..."}]}]\n'
        "inputs = processor.apply_chat_template(\n"
        "    question, add_generation_prompt=True, tokenize=True, return_dict=True).to(model.device)\n"
        "answer = model.generate(**inputs, max_new_tokens=32)\n"
        "print(zipr1.stats(model))                 # tokens kept, by layer\n```"
    )
    if about["format"] == "adapter":
        dense = (
            "Dense, with peft alone:\n\n```python\nfrom peft import PeftModel\n"
            "from transformers import AutoModelForImageTextToText\n\n"
            f"base = AutoModelForImageTextToText.from_pretrained({json.dumps(source.base)})\n"
            f'model = PeftModel.from_pretrained(base, "{FOLDER}")\n```'
        )
    else:
        dense = (
            "Dense, with transformers alone (and with whatever serves its folders):\n\n```python\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'model = AutoModelForImageTextToText.from_pretrained("{FOLDER}")\n'
            f'processor = AutoProcessor.from_pretrained("{FOLDER}")  # needs torchvision\n```'
        )
    return f"## Use\n\n{sparse}\n\n{dense}"


def _training(source: Source) -> str:
    recipe, run, summary = source.recipe, source.run, source.summary
    hardware = run.get("hardware") or {}
    device = (
        hardware.get("device_name")
        or f"{hardware.get('cpus', '?')} CPU cores ({hardware.get('cpu', 'unknown')})"
    )
    data = recipe.data.source
    embedded = {"digits": "handwritten digits", "pages": "forms filled in by hand"}
    if data in embedded:
        data = f"the questions about {embedded[data]} embedded in zipr1 (UCI digits, CC BY 4.0)"
    else:
        data = md.code(data.rsplit("/", 1)[-1])
    lines = [
        f"* Base: {_base(source)}"
        + (f", revision {md.text(source.revision)}" if source.revision else ""),
        f"* Licence of the base: {md.text(source.licence() or 'not found beside its weights')}",
        f"* Data: {data}",
        f"* {'Reinforcement learning' if recipe.train.stage == 'rl' else 'Supervised training'}: step {source.step} "
        f"of {recipe.train.steps}, {recipe.train.prompts_per_step} questions a step"
        + (f", {summary['rollouts']:,} rollouts" if summary.get("rollouts") else "")
        + (
            f"; LoRA of rank {recipe.model.lora.rank}"
            if recipe.model.lora
            else "; all weights of the decoder"
        ),
        f"* Selection: rule `{recipe.sparse.rule}`, p = {recipe.sparse.p:g}, {recipe.sparse.probes.recent} recent and "
        f"{recipe.sparse.probes.random} random probes, dropped tokens skip "
        + ("the whole layer" if recipe.sparse.skip == "layer" else "attention"),
        f"* Hardware: {md.text(device)}"
        + (f", {duration(summary['seconds'])} of training" if summary.get("seconds") else ""),
        f"* Recipe: recipe.yaml in this folder (sha256 of its values {recipe.sha256()[:16]}), seed {recipe.seed}, "
        f"zipr1 {md.text((run.get('versions') or {}).get('zipr1', '?'))}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _limits(source: Source) -> str:
    dense = source.recipe.ppo.dense_kl_fraction
    care = "trained to answer sparse alone, it may answer worse dense"
    if dense:
        care = f"in training {dense:.1%} of them were held to the base there"
    lines = [
        "* Measured on held-out questions of the kinds it was trained on, by the run; other kinds may lose more.",
        "* Sparsity is of the prompt. A pruned cache cannot be un-pruned: for several turns about one picture use "
        '`kv="retain"`, or send the conversation again.',
        "* Whatever does not know zipr1 runs it dense and saves nothing. The run did not measure the model's own dense "
        f"answers (the dense column is the untouched base); {care}.",
    ]
    for task, block in (source.summary.get("by_task") or {}).items():
        lost = -(block.get("difference") or 0.0)
        if lost > NOTABLE:
            lines.insert(
                0, f"* On {md.text(task)} it loses {100 * lost:.1f} points against the dense base."
            )
    if source.licence() is None and source.base != "scratch":
        lines.append(
            "* The licence of the base was not found beside its weights; see where you got it."
        )
    if source.base == "tiny":
        lines.append(
            "* The base is a model of a million parameters that knows coloured digits and nothing else."
        )
    return "## Limits\n\n" + "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _with_interval(value: float | None, interval: Any) -> str:
    if value is None or not interval:
        return _share(value)
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _points(value: float | None, interval: Any) -> str:
    if value is None:
        return "-"
    tail = f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    return f"{100 * value:+.1f} points{tail}"
