"""Peak memory of one micro-batch of the update, over answer length and vocabulary: logits in chunks or all at once.

    python recipes/bench/memory.py [--rows 4] [--json]

Each case is a process of its own, on a CPU: a small random Qwen2.5-VL whose vocabulary is made large, rollouts whose
answers are replaced by random ones of a given length, and the forward and backward pass of train/update.py, KL to the
dense reference summed over the vocabulary included. Printed is how far the process's peak rose above what it held
before. `chunked` is what training does; `whole` lifts the bound on logits, and is what it would cost otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

LENGTHS = (64, 128, 256)
VOCABULARIES = (8192, 32768, 151936)
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base.yaml"


def case(rows: int, length: int, words: int, whole: bool) -> int:
    """Bytes by which the peak rises. To be run in a fresh process: the kernel keeps one peak for its life."""
    import torch

    from zipr1.core.load import load
    from zipr1.core.recipe import Budgets, Efficiency, Recipe, Sparse, Train
    from zipr1.data.digits import tasks
    from zipr1.models.encoder import MediaEncoder
    from zipr1.models.policy import load_policy
    from zipr1.train import losses
    from zipr1.train.controller import EfficiencyController
    from zipr1.train.minibatch import flatten
    from zipr1.train.rollout import roll_out
    from zipr1.train.update import backward

    if whole:
        losses.LOGITS = 2**62
    base = load(RECIPE).model
    config = {**base.config, "text": {**base.config["text"], "vocab_size": words}}  # type: ignore[dict-item]
    model = base.model_copy(update={"config": config, "train_vision": False})
    recipe = Recipe(
        model=model,
        sparse=Sparse(dense_below=0),
        budgets=Budgets(num_generations=rows),
        train=Train(max_new_tokens=1),
    )
    policy = load_policy(model, "cpu")
    policy.keep_reference()
    prompts = tasks.prompts("test", "digits", 1, 1, seed=0)
    pictures = MediaEncoder(policy, recipe)
    encoded = pictures.encode(prompts)
    seen = pictures.encode_vision(encoded)
    batch = roll_out(policy, recipe, prompts, encoded, seen.policy, 0, seen.reference)
    generator = torch.Generator().manual_seed(0)
    for rollout in batch.groups[0].rollouts:
        rollout.tokens = torch.randint(20, 300, (length,), generator=generator)
        rollout.logprobs = torch.zeros(length)
    flat = flatten(batch, recipe, EfficiencyController(Efficiency(weight=1.0), policy.layers))
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backward(policy, recipe, batch, flat, list(range(rows)), share=1.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=4, help="rollouts in the micro-batch")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--case", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        length, words, whole = options.case
        print(case(options.rows, length, words, bool(whole)))
        return
    rows = []
    print(f"{'answer tokens':>14}{'vocabulary':>12}{'chunked MiB':>13}{'whole MiB':>11}")
    for words in VOCABULARIES:
        for length in LENGTHS:
            found = []
            for whole in (0, 1):
                command = [sys.executable, __file__, "--rows", str(options.rows), "--case"]
                command += [str(length), str(words), str(whole)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(int(done.stdout.split()[-1]))
            row = {"rows": options.rows, "length": length, "vocabulary": words}
            rows.append(row | {"chunked_bytes": found[0], "whole_bytes": found[1]})
            print(f"{length:>14}{words:>12}{found[0] / 2**20:>13.0f}{found[1] / 2**20:>11.0f}")
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
