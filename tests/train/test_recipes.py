"""Every shipped recipe runs two real steps: only the model and the data are small, everything else is the recipe's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tinymodels
from PIL import Image
from rich.console import Console

from zipr1.core.load import load
from zipr1.data import video
from zipr1.train import loop

RECIPES = sorted(
    p for p in Path(__file__).parents[2].glob("recipes/*.yaml") if not p.name.startswith("tiny")
)


FAMILY_OF = {
    p.stem: {"qwen2vl": "qwen2_vl", "qwen3vl": "qwen3_vl", "qwen3_5": "qwen3_5"}.get(
        p.stem, "qwen2_5_vl"
    )
    for p in RECIPES
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in set(FAMILY_OF.values()):
        tinymodels.folder(family, root / family)
    return root


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """ChartQA's columns, and Video-R1's with each of its types; pictures and clips of noise, 400 tokens and more."""
    root = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (320, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        video.write(root / f"{i}.mp4", rng.integers(0, 256, (16, 112, 128, 3), np.uint8), 4.0)
    charts = [
        {"query": f"which digit is green? {i}", "label": ["two", "2"], "image": f"{i % 2}.png"}
        for i in range(8)
    ]
    (root / "charts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in charts))
    kinds = ("multiple choice", "numerical", "OCR", "free-form", "regression")
    clips = [
        {
            "problem_id": i,
            "problem": "which digit is green?",
            "data_type": "image" if i % 3 == 2 else "video",
            "problem_type": kinds[i % 5],
            "options": ["A. two", "B. three"],
            "solution": f"<answer>{'A' if i % 5 == 0 else '2'}</answer>",
            "path": f"./{i % 2}.{'png' if i % 3 == 2 else 'mp4'}",
        }
        for i in range(10)
    ]
    (root / "clips.json").write_text(json.dumps(clips))
    return root


def test_there_are_eight():
    assert len(RECIPES) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_two_real_steps(path, models, rows, tmp_path):
    file = rows / ("clips.json" if "Video-R1" in path.read_text() else "charts.jsonl")
    recipe = load(
        path,
        [
            f"model.path={models / FAMILY_OF[path.stem]}",
            "model.min_pixels=256",
            f"data.source={file}",
            f"data.heldout={file}:[:2]",
            "train.steps=2",
            "train.save_every=1",
            # Of Qwen3.5, which thinks first: as many as random weights need not say.
            f"train.max_new_tokens={min(32, load(path).train.max_new_tokens)}",
        ],
    )
    summary = loop.run(recipe, tmp_path / "run", "auto", "cpu", [], Console(quiet=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert summary["steps"] == 2 and len(metrics) == 2
    assert summary["rollouts"] == 2 * recipe.train.prompts_per_step * recipe.budgets.num_generations
    for row in metrics:
        assert set(row["seconds"]) == {"guard", "data", "vision", "rollout", "update"}
        assert row["token_ratio"] < 1
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert (tmp_path / "run" / "last" / "model").is_dir()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(run["data"]["train"]) == len(run["data"]["heldout"]) == 64
