"""Run directories made in a second: the embedded model, a little changed, saved as training saves it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from zipr1.core.load import load, validate
from zipr1.core.machine import describe
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks
from zipr1.models.policy import Policy, load_policy
from zipr1.train import loop

SPARSE = {
    "p": 0.9,
    "skip": "layer",
    "keep_last": 1,
    "probes": {"recent": 8, "random": 4},
    "dense_below": 0,
}


def recipe(**sections: Any) -> Recipe:
    values = {
        "model": {"path": "tiny"},
        "sparse": SPARSE,
        "train": {"max_new_tokens": 6, "steps": 7},
    }
    return validate(values | sections)


def part(accuracy: float, ratio: float | None) -> dict[str, Any]:
    low, high = max(0.0, accuracy - 0.02), min(1.0, accuracy + 0.02)
    known = {"accuracy": accuracy, "accuracy_ci": [low, high], "n": 40}
    return known if ratio is None else {**known, "token_ratio": ratio}


def summary() -> dict[str, Any]:
    """The shape of summary.json; its numbers are made up."""
    block = {
        "before": part(0.9, 0.94),
        "after": part(0.875, 0.25),
        "dense_accuracy": 0.95,
        "dense_accuracy_ci": [0.93, 0.97],
        "difference": -0.075,
        "difference_ci": [-0.1, -0.05],
    }
    layers = {"token_ratio_by_layer": [0.4, 0.3, 0.2, 0.1]}
    return {
        **block,
        "after": {**block["after"], **layers},
        "by_task": {"digits": block},
        "p": 0.9,
        "steps": 7,
        "rollouts": 1234,
        "seconds": 3725.0,
        "seed": 0,
        "model": "tiny",
    }


def write(path: Path, base: Path, **sections: Any) -> Path:
    """A recipe file of three small steps on the model folder `base`. sections: what is to be otherwise."""
    values: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"prompts": 16, "heldout_prompts": 4},
        "sparse": {"probes": {"recent": 3, "random": 6}, "dense_below": 0},
        "budgets": {"low": 0.6, "high": 0.9, "num_generations": 3},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "prompts_per_step": 3, "max_new_tokens": 4, "save_every": 1},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    path.write_text(yaml.safe_dump(values))
    return path


def start(path: Path, output: Path, *overrides: str, resume: str = "auto") -> dict[str, Any]:
    """Train as the file says; summary.json."""
    settings = load(path, overrides)
    return loop.run(settings, output, resume, "cpu", ["zipr1"], Console(quiet=True))


def steps(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def make_run(root: Path, finished: bool = True, **sections: Any) -> Path:
    """A run of seven steps on `tiny`. sections: of the recipe."""
    made = recipe(**sections)
    policy = load_policy(made.model, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "language_model" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.2 if "lora_B" in name else 0.01) * noise
    run = RunDir.open(made, root, info=describe(["zipr1", "train"], "cpu", 0))
    run.save_checkpoint(7, lambda folder: policy.save(folder / "model"))
    if finished:
        run.write_summary(summary())
    return root


def policy_of(run: Path) -> Policy:
    from zipr1.core.recipe import Model

    return load_policy(Model(path=str(run)), "cpu")


def questions() -> list[Prompt]:
    """Three pictures and two clips, prompts of different lengths."""
    return [
        *tasks.prompts("train", "digits", 3, 1, 5),
        *tasks.prompts("train", "moving_digits", 2, 1, 5),
    ]


def chat(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as users write it: the media inside the messages."""
    messages = copy.deepcopy(list(prompt.messages))
    media = iter(prompt.media)
    for message in messages:
        for item in message["content"]:
            if item["type"] in ("image", "video"):
                item[item["type"]] = next(media).source
    return messages


def hashes(folder: Path) -> dict[str, str]:
    from zipr1.models.manifest import sha256

    return {p.name: sha256(p) for p in sorted(folder.iterdir())}


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
