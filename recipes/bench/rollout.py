"""One question with 8 budgets: one batched generation against 8 single generate() calls, vision included.

    python recipes/bench/rollout.py [--model tiny] [--questions 20] [--json]

Both sides run in one process, in turn, question by question: the batch looks at the picture once and generates all
budgets together; the single calls are transformers' own `generate()` with the same thresholds, each with its own
vision tower pass. Prints p20, p50 and p80 over questions, and the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from zipr1.core.load import load
from zipr1.core.recipe import Budgets, Model, Sparse
from zipr1.data.digits import tasks
from zipr1.models.encoder import MediaEncoder
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse import thresholds
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request

NEW_TOKENS = 6
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def batched(policy: Policy, encoded: Encoded, settings: Sparse, p: torch.Tensor) -> None:
    features = policy.encode_vision([encoded])
    policy.generate([encoded] * len(p), features, Request(settings, p), NEW_TOKENS)


def singles(policy: Policy, encoded: Encoded, settings: Sparse, p: torch.Tensor) -> None:
    visual = encoded.visuals[0]
    image = visual.kind == "image"
    ids = encoded.ids[None].to(policy.device)
    kinds = (ids == policy.processor.placeholder[visual.kind]).int()
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds if image else 2 * kinds,
        "pixel_values" if image else "pixel_values_videos": visual.patches.to(policy.device),
        "image_grid_thw" if image else "video_grid_thw": torch.tensor(
            [visual.grid], device=policy.device
        ),
    }
    if not image and policy.model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([visual.seconds])
    for row in p:
        with sparse_attention(policy.model, Request(settings, row[None])):
            policy.model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=policy.processor.end_ids,
                pad_token_id=policy.processor.end_id,
            )


def measure(model: str, questions: int) -> list[dict[str, object]]:
    """Rows of medians and spread in milliseconds, for images and for videos."""
    policy = load_policy(Model(path=model))
    # What `make demo` trains with, at the paper's number of budgets.
    recipe, budgets = load(RECIPE), Budgets()
    rows: list[dict[str, object]] = []
    for task in ("digits", "moving_digits"):
        prompts = tasks.prompts("test", task, questions + 2, 1, seed=0)
        times = []
        for place, encoded in enumerate(MediaEncoder(policy, recipe).encode(prompts)):
            generator = torch.Generator().manual_seed(place)
            p = thresholds.thresholds(
                budgets.num_generations,
                policy.layers,
                budgets.low,
                budgets.high,
                "layer",
                "stratified",
                generator,
            )
            clock = [time.perf_counter()]
            for run in (batched, singles):
                run(policy, encoded, recipe.sparse, p)
                if policy.device.type == "cuda":
                    torch.cuda.synchronize()
                clock.append(time.perf_counter())
            times.append(np.diff(clock) * 1000)
        both = np.array(times[2:])  # the first two warm up
        ratio = both[:, 1] / both[:, 0]
        for name, column in zip(("batched", "single"), both.T, strict=True):
            low, middle, high = np.percentile(column, (20, 50, 80))
            rows.append(
                {
                    "op": "rollout",
                    "provider": name,
                    "task": task,
                    "budgets": budgets.num_generations,
                    "questions": questions,
                    "p20_ms": round(float(low), 2),
                    "p50_ms": round(float(middle), 2),
                    "p80_ms": round(float(high), 2),
                    "speedup": round(float(np.median(ratio)), 2) if name == "batched" else 1.0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.model, arguments.questions)
    print(f"{'task':14} {'':8} {'p50 ms':>8} {'p20':>8} {'p80':>8} {'speed-up':>9}")
    for row in rows:
        print(
            f"{row['task']:14} {row['provider']:8} {row['p50_ms']:8} {row['p20_ms']:8} {row['p80_ms']:8} "
            f"{row['speedup']:8}x"
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
