"""Prefill of the longest embedded video: dense, sparse attention, and whole layers skipped, side by side.

    python kernels/bench/prefill.py [--model RUN] [--batch 1 8 32] [--repeats 30] [--json]

The model's own kept sets are used, with the probes and p of recipes/tiny.yaml; vision is done beforehand, and the
three take turns in one process. `kept` is the token ratio; at some hundred tokens the overhead of selection and gathers
is a large part of the time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from zipr1.data import digits
from zipr1.models import Policy, Request, load_policy, sparse_attention
from zipr1.models.cache import PrunedCache
from zipr1.pictures import Pictures
from zipr1.recipe import Model, Sparse, load

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"
Rows = tuple[dict[str, torch.Tensor], torch.Tensor]
MODES = ("none", "attention", "layer")


def prefill(policy: Policy, sparse: Sparse, rows: Rows, mode: str) -> float:
    """Run the decoder once over padded rows; returns the token ratio."""
    inputs, valid = rows
    request = None
    if mode != "none":
        request = Request(sparse.model_copy(update={"skip": mode}), valid=valid, prompt=valid)
    with sparse_attention(policy.core, request):
        policy.decoder(
            **inputs,
            past_key_values=PrunedCache() if request else None,
            use_cache=True,
        )
    if request is None or request.record is None:
        return 1.0
    return float(request.record.token_ratio().mean())


def measure(model: str, batches: list[int], repeats: int) -> list[dict[str, object]]:
    policy, recipe = load_policy(Model(path=model)), load(RECIPE)
    prompts = digits.prompts("test", "moving_digits", 40, 1, seed=0)
    encoded = Pictures(policy, recipe).encode(prompts)
    longest = max(encoded, key=len)
    features = policy.look([longest])
    rows = []
    for batch in batches:
        padded = policy.rows([longest] * batch, features, None, left=True)
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        kept = dict.fromkeys(MODES, 1.0)
        for turn in range(repeats + 3):
            for mode in MODES:
                start = time.perf_counter()
                kept[mode] = prefill(policy, recipe.sparse, padded, mode)
                if policy.device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 3:
                    times[mode].append((time.perf_counter() - start) * 1000)
        dense = float(np.median(times["none"]))
        for mode in MODES:
            low, middle, high = np.percentile(times[mode], (20, 50, 80))
            rows.append(
                {
                    "phase": "prefill",
                    "length": len(longest),
                    "batch": batch,
                    "skip": mode,
                    "keep": round(kept[mode], 4),
                    "ms": round(float(middle), 2),
                    "ms_p20": round(float(low), 2),
                    "ms_p80": round(float(high), 2),
                    "speedup": round(dense / float(middle), 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.model, arguments.batch, arguments.repeats)
    print(
        f"prefill of {rows[0]['length']} tokens, {arguments.model}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'batch':>5} {'skip':10} {'kept':>7} {'p50 ms':>8} {'p20':>8} {'p80':>8} {'speed-up':>9}"
    )
    for r in rows:
        print(
            f"{r['batch']:5} {r['skip']:10} {r['keep']:7.1%} {r['ms']:8} {r['ms_p20']:8} {r['ms_p80']:8} "
            f"{r['speedup']:8}x"
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
