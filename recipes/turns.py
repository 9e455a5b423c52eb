"""Two turns about one picture, the second about another object: accuracy, memory and time of every way to go on.

    python recipes/turns.py RUN [RUN ...] [--split validation] [--pictures 100] [--budget P] [--json]

The embedded questions of kind `second`, asked as a conversation: the first question, the model's own greedy answer,
the second question. Ways: `dense` (budget 1, cache kept), `evict` and `retain` (cache kept), `again` (sparse, the whole
conversation sent anew). Each RUN is one seed of the same recipe; `tiny` asks the untouched base, which with
`--budget 1` is the reference. Conversations go one at a time. - dense: points of the second turn to the same weights
run dense; kept: mean token ratio of the second turn's prefill; KV: bytes held after the second answer; ms: both turns
of one conversation, without preprocessing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zipr1
from zipr1.core.load import load
from zipr1.core.statistics import confidence_interval
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.data.media import load_media

RECIPE = load(Path(__file__).resolve().parent / "tiny.yaml")
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"budget": 1.0},
    "evict": {"kv": "evict"},
    "retain": {"kv": "retain"},
    "again": {"kv": "evict"},
}
TASKS = {"digits": "images", "moving_digits": "videos"}
NEW_TOKENS = RECIPE.train.max_new_tokens


def conversations(split: str, pictures: int) -> list[Prompt]:
    """Held-out questions of kind `second`, `pictures` x 4 questions of each task asked for."""
    settings = RECIPE.data.model_copy(
        update={
            "heldout": "validation" if split == "validation" else None,
            "heldout_prompts": 4 * pictures,
        }
    )
    return [
        p for p in sources.load(settings, "heldout", 0) if p.kind == "second" and p.task in TASKS
    ]


def held(cache: Any) -> int:
    if hasattr(cache, "kv_bytes"):
        return int(cache.kv_bytes())
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def converse(model: Any, processor: Any, prompt: Prompt, pixels: Any, way: str) -> dict[str, Any]:
    """Both turns of one conversation."""
    first, right, second = (dict(message) for message in prompt.messages)
    kind = prompt.media[0].kind
    first["content"] = [{"type": kind, kind: pixels[0], "fps": pixels[1]}, first["content"][1]]
    chat, cache, said, seconds = [first], None, [], 0.0
    for following in (second, None):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        began = time.perf_counter()
        out = model.generate(
            **inputs, past_key_values=None if way == "again" else cache,
            max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        seconds += time.perf_counter() - began
        cache = out.past_key_values
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        said.append(processor.decode(new, skip_special_tokens=True).strip())
        chat += [{"role": "assistant", "content": said[-1]}, following] if following else []
    return {
        "first": float(said[0] == right["content"][0]["text"]),
        "second": float(said[1] == prompt.answer),
        "kept": zipr1.stats(model).token_ratio,
        "kv_bytes": held(cache),
        "ms": 1000 * seconds,
    }


def measure(run: str, prompts: list[Prompt], budget: float | None) -> list[dict[str, Any]]:
    """A row for each task and way; the ways take turns at each conversation."""
    settings = {"dense_below": 0} if run == "tiny" else {}
    model, processor = zipr1.load(run, budget, **settings)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for prompt in prompts:
        pixels = load_media(prompt.media[0], RECIPE.data.max_frames)
        for way, options in WAYS.items():
            with zipr1.sparse(model, **options):
                found.setdefault((prompt.task, way), []).append(
                    converse(model, processor, prompt, pixels, way)
                )
    rows = []
    for (task, way), results in found.items():
        row: dict[str, Any] = {"run": run, "task": task, "way": way, "n": len(results)}
        for name in ("first", "second", "kept", "kv_bytes", "ms"):
            values = [r[name] for r in results]
            row[name] = float(np.median(values) if name == "ms" else np.mean(values))
        row["second_ci"] = confidence_interval([r["second"] for r in results])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    prompts = conversations(arguments.split, arguments.pictures)
    with torch.no_grad():
        rows = [row for run in arguments.runs for row in measure(run, prompts, arguments.budget)]
    print(
        f"{len(arguments.runs)} runs, {arguments.split} digits, {torch.get_num_threads()} threads"
    )
    print("| | n | way | first turn right | second turn right | - dense | kept | KV, kB | ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task, title in TASKS.items():
        for way in WAYS:
            some = [r for r in rows if (r["task"], r["way"]) == (task, way)]
            dense = [r for r in rows if (r["task"], r["way"]) == (task, "dense")]
            behind = [100 * (r["second"] - d["second"]) for r, d in zip(some, dense, strict=True)]
            cells = [spread([100 * r[k] for r in some], " %") for k in ("first", "second")]
            cells += [
                spread(behind),
                spread([100 * r["kept"] for r in some], " %"),
                spread([r["kv_bytes"] / 1000 for r in some]),
                spread([r["ms"] for r in some]),
            ]
            print(f"| {title} | {some[0]['n']} | {way} | {' | '.join(cells)} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


def spread(values: list[float], unit: str = "") -> str:
    """`mean ± standard deviation` over runs."""
    tail = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{tail}{unit}"


if __name__ == "__main__":
    main()
