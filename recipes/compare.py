"""The comparison in docs/results.md: methods x seeds on recipes/tiny.yaml, and the training-free controls.

    python recipes/compare.py [--seeds 0 1 2] [--control-seeds 0] [--jobs 2] [--out runs/compare]

Each run is a `zipr1 train recipes/tiny.yaml seed=S KEY=VALUE...` into OUT/<method>-<seed>; finished ones are kept, so
the command goes on where it stopped (delete OUT/controls.json and OUT/fronts.json to measure those anew). Then the
base and the trained models answer held-out questions at other thresholds and by other rules. Written are OUT/table.md
(the tables of docs/results.md) and docs/pareto.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "tiny.yaml"

# `answers` follows the paper: 8 thresholds of 0.94 to 0.975, group mean and deviation, small KL weight, neither target
# nor constraint, MLPs on all tokens; 48 rollouts a step as for the others. `answers-tuned` is the best of five settings
# of it on validation digits, `cut` the best of five of its own (docs/log.md).
ANSWERS = [
    "efficiency.method=answers",
    "efficiency.target=null",
    "efficiency.max_accuracy_drop=null",
    "data.hard_kind_boost=0",
    "sparse.skip=attention",
    "budgets.low=0.9375",
    "budgets.low_end=null",
    "budgets.num_generations=8",
    "budgets.per=rollout",
    "train.prompts_per_step=6",
    "ppo.baseline=mean",
    "ppo.scale_rewards=std",
    "ppo.policy_gradient=1",
    "ppo.kl_coef=0.04",
    "ppo.kl_estimator=full",
    "optim.lr=2e-4",
]
# Each of the others differs from `no-dense`, and like it holds no answer to the reference at p = 1.
METHODS: dict[str, list[str]] = {
    "ours": [],
    "no-dense": ["ppo.dense_kl_fraction=0"],
    "answers": [*ANSWERS, "ppo.dense_kl_fraction=0"],
    "answers-tuned": [
        *ANSWERS,
        "ppo.kl_coef=2",
        "ppo.kl_estimator=jeffreys",
        "ppo.dense_kl_fraction=0",
    ],
    "no-policy-gradient": ["ppo.policy_gradient=0", "ppo.dense_kl_fraction=0"],
    "skip-attention": ["sparse.skip=attention", "ppo.dense_kl_fraction=0"],
    "cut": [
        "efficiency.method=cut",
        "efficiency.weight=2",
        "budgets.sampling=independent",
        "ppo.dense_kl_fraction=0",
    ],
}
TITLES = {
    "ours": "ours",
    "no-dense": "ours, `ppo.dense_kl_fraction: 0`",
    "no-policy-gradient": "the same, policy gradient off",
    "cut": "the same, `cut`",
    "answers": "`answers` (the paper as described)",
    "answers-tuned": "`answers`, tuned",
    "skip-attention": "the same, `skip: attention`",
}
# A row is measured however it goes.
TO_THE_END = [
    "alarms.max_drift=null",
    "alarms.max_token_mass=null",
    "alarms.min_heldout_mass=null",
    "alarms.min_movement=null",
]
TASKS = {"digits": "images", "moving_digits": "videos", "hard_digits": "sums (hard)"}
# Curves of the figure: label, colour, style, width.
STYLES = {
    "ours": ("ours, after RL", "C0", "o-", 2.4),
    "answers": ("answers only (paper as described)", "C1", "s-", 1.4),
    "base, top-p": ("no training, top-p", "0.35", "^--", 1.4),
    "base, top-k": ("no training, top-k", "0.6", "v--", 1.2),
    "base, random": ("no training, random", "C3", "x:", 1.2),
}
FRONT = (0.6, 0.75, 0.85, 0.9, 0.94, 0.96, 0.975, 0.985, 0.995)
FRONT_QUESTIONS = 400  # of each task, for the curves over p


def train(method: str, seed: int, out: Path, threads: int) -> dict[str, Any]:
    folder = out / f"{method}-{seed}"
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-c", "from zipr1.cli import main; main()", "train", str(RECIPE)]
        command += [f"seed={seed}", *METHODS[method], *TO_THE_END]
        command += ["--output", str(folder), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (out / f"{method}-{seed}.log").open("w") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        print(f"{method} seed {seed}: done", flush=True)
    return dict(json.loads(summary.read_text()))


def controls(out: Path, ratios: dict[str, float]) -> dict[str, Any]:
    """The untouched base on all held-out questions: top-p as it comes, and each rule at the ratio ours reached."""
    path = out / "controls.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    from zipr1.core.load import load
    from zipr1.data import sources
    from zipr1.models.policy import load_policy
    from zipr1.train import heldout

    recipe = load(RECIPE)
    policy = load_policy(recipe.model, "cpu")
    prompts = sources.load(recipe.data, "heldout", 0)
    found: dict[str, Any] = {}
    for task in TASKS:
        asked = [p for p in prompts if p.task == task]
        dense, blank = (
            heldout.evaluate(policy, recipe, some, [None])[0].groups(lambda q: q.kind)
            for some in (asked, [without_picture(q) for q in asked])
        )
        kinds = {
            k: {"dense": v["accuracy"], "blank": blank[k]["accuracy"], "n": v["n"]}
            for k, v in dense.items()
        }
        p = match_ratio(policy, recipe, task, ratios[task])
        settings = {
            rule: untrained(recipe).model_copy(update={"rule": rule, "p": share})
            for rule, share in (("top_p", p), ("top_k", ratios[task]), ("random", ratios[task]))
        }
        results = heldout.evaluate(policy, recipe, asked, list(settings.values()))
        found[task] = {
            name: {"p": s.p, **r.part(range(len(asked)))}
            for (name, s), r in zip(settings.items(), results, strict=True)
        }
        found[task]["kinds"] = kinds
    path.write_text(json.dumps(found, indent=2))
    return found


def untrained(recipe: Any) -> Any:
    """The sparsity that a model without training bears best: its MLPs see all tokens."""
    return recipe.sparse.model_copy(update={"skip": "attention"})


def without_picture(prompt: Any) -> Any:
    """The same question about a black picture or clip."""
    from zipr1.core.types import Media

    kind = prompt.media[0].kind
    shape = (128, 128, 3) if kind == "image" else (10, 96, 96, 3)
    blank = Media(kind, np.zeros(shape, np.uint8), None if kind == "image" else 4.0)
    return replace(prompt, media=(blank,), picture=f"blank-{kind}")


def match_ratio(policy: Any, recipe: Any, task: str, wanted: float) -> float:
    """The p at which training-free top-p keeps `wanted` of the tokens, by bisection on validation questions."""
    from zipr1.data.digits import tasks
    from zipr1.train import heldout

    prompts = tasks.prompts("validation", task, 40, 2, seed=1)
    low, high = 0.01, 0.999
    for _ in range(9):
        middle = (low + high) / 2
        sparse = untrained(recipe).model_copy(update={"p": middle})
        (result,) = heldout.evaluate(policy, recipe, prompts, [sparse])
        low, high = (middle, high) if result.token_ratio.mean() < wanted else (low, middle)
    return (low + high) / 2


def fronts(out: Path, methods: list[str], seeds: list[int]) -> dict[str, Any]:
    """Accuracy and token ratio over p: the base by rule, and each method's model of the first seed."""
    path = out / "fronts.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    from zipr1.core.load import load
    from zipr1.core.recipe import Model
    from zipr1.data import sources
    from zipr1.models.policy import load_policy
    from zipr1.train import heldout

    recipe = load(RECIPE)
    prompts = sources.load(recipe.data, "heldout", 0)
    asked = [
        p
        for t in ("digits", "moving_digits")
        for p in [q for q in prompts if q.task == t][:FRONT_QUESTIONS]
    ]
    shares = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
    plans = {"base, top-p": ("tiny", "top_p", FRONT), "base, top-k": ("tiny", "top_k", shares)}
    plans["base, random"] = ("tiny", "random", shares)
    for method in (m for m in methods if m in STYLES):
        plans[method] = (str(out / f"{method}-{seeds[0]}"), "top_p", FRONT)
    found: dict[str, Any] = {}
    for name, (model, rule, values) in plans.items():
        policy = load_policy(Model(path=model), "cpu")
        sparse = untrained(recipe)
        if name in METHODS:
            sparse = load(RECIPE, METHODS[name]).sparse
        settings = [sparse.model_copy(update={"rule": rule, "p": p}) for p in values]
        results = heldout.evaluate(policy, recipe, asked, settings)
        found[name] = [
            {
                "p": p,
                "accuracy": float(r.correct.mean()),
                "token_ratio": float(r.token_ratio.mean()),
            }
            for p, r in zip(values, results, strict=True)
        ]
        if name == "base, top-p":
            (dense,) = heldout.evaluate(policy, recipe, asked, [None])
            found["dense"] = [
                {"p": 1.0, "accuracy": float(dense.correct.mean()), "token_ratio": 1.0}
            ]
        print(f"front of {name}: done", flush=True)
    path.write_text(json.dumps(found, indent=2))
    return found


def draw(found: dict[str, Any], out: Path) -> None:
    """The Pareto figure: accuracy over kept tokens, dense as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    dense = found["dense"][0]["accuracy"]
    ax.axhline(100 * dense, color="C2", lw=1.2, label=f"dense, all tokens ({100 * dense:.1f} %)")
    for name, (label, colour, style, width) in STYLES.items():
        if name in found:
            x = [100 * r["token_ratio"] for r in found[name]]
            y = [100 * r["accuracy"] for r in found[name]]
            ax.plot(x, y, style, color=colour, lw=width, ms=5, label=label)
    for name in ("ours", "base, top-p"):
        for row in found.get(name, []):
            if row["p"] == 0.975:
                ax.plot(
                    100 * row["token_ratio"],
                    100 * row["accuracy"],
                    "*",
                    ms=15,
                    color=STYLES[name][1],
                    mec="k",
                )
    ax.set_xlabel("prompt tokens kept, mean over layers (%)")
    ax.set_ylabel("right answers (%)")
    ax.set_xlim(0, 100)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    ax.set_title(
        "Embedded model, held-out images and videos; stars: p = 0.975", fontsize=10, loc="left"
    )
    figure.savefig(out, dpi=150)


def spread(values: list[float], decimals: int = 1, sign: bool = False) -> str:
    """Fractions as percent: the mean, and with several values their standard deviation."""
    style = f"{'+' if sign else ''}.{decimals}f"
    deviation = f" ± {100 * np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{style}}{deviation}"


def table(runs: dict[str, list[dict[str, Any]]], found: dict[str, Any]) -> str:
    """Markdown rows: for each method and task, dense, before, after, and the difference in points."""
    lines = [
        "| method | seeds | task | dense | tokens before | tokens after | right before | right after | after - dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, summaries in runs.items():
        for task, title in TASKS.items():
            blocks = [s["by_task"][task] for s in summaries]
            lines.append(
                f"| {TITLES[method]} | {len(blocks)} | {title} | {blocks[0]['dense_accuracy']:.1%} "
                f"| {blocks[0]['before']['token_ratio']:.1%} "
                f"| **{spread([b['after']['token_ratio'] for b in blocks])} %** "
                f"| {blocks[0]['before']['accuracy']:.1%} "
                f"| {spread([b['after']['accuracy'] for b in blocks], 2)} % "
                f"| {spread([b['after']['accuracy'] - b['dense_accuracy'] for b in blocks], 2, True)} |"
            )
    lines += [
        "",
        "| no training, at the ratio ours reached | " + " | ".join(TASKS.values()) + " |",
        "|---|---|---|---|",
    ]
    for rule in ("top_p", "top_k", "random"):
        cells = [
            f"{found[t][rule]['accuracy']:.1%} @ {found[t][rule]['token_ratio']:.1%}" for t in TASKS
        ]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += ["", "| kind of question | n | dense base | black picture |", "|---|---|---|---|"]
    for task, title in TASKS.items():
        for kind, row in found[task]["kinds"].items():
            lines.append(
                f"| {title}: {kind} | {row['n']} | {row['dense']:.1%} | {row['blank']:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--control-seeds", type=int, nargs="+", help="of the other methods; default: the same"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, each with cores / jobs threads"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    jobs = [("ours", seed) for seed in arguments.seeds]
    others = [m for m in arguments.methods if m != "ours"]
    jobs += [(m, seed) for seed in arguments.control_seeds or arguments.seeds for m in others]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda job: train(*job, arguments.out, threads), jobs))
    runs: dict[str, list[dict[str, Any]]] = {m: [] for m in ("ours", *arguments.methods)}
    for (method, _), summary in zip(jobs, done, strict=True):
        runs[method].append(summary)
    ours = runs["ours"]
    ratios = {
        t: float(np.mean([s["by_task"][t]["after"]["token_ratio"] for s in ours])) for t in TASKS
    }
    found = controls(arguments.out, ratios)
    draw(fronts(arguments.out, arguments.methods, arguments.seeds), ROOT / "docs" / "pareto.png")
    text = table(runs, found)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
