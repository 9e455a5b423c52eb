"""RL steps side by side with TRL's GRPOTrainer: the same model, pictures, questions, group size and answer length.

    python recipes/bench/trl_step.py [--model tiny | 3b | 3b-quarter | RUN] [--questions 8] [--rounds 3]

TRL lives in an environment of its own, made on the first call (`--venv`) with the pins of constraints.txt. The two
take turns, `--rounds` times, each in a fresh process with the same number of threads; the first step of a process is
left out. Both train all weights but the frozen tower's in float32 with AdamW, sample at temperature 1, and hold a KL
to a frozen reference. Ours prunes the prompt and adds its efficiency term (without the constraint, which asks each
question once more); TRL runs dense. `--device cuda` puts both on a GPU, which nobody has done yet. A second table tells
where our step goes: the model's forward and backward passes, the optimizer, and the rest, which is the loop's overhead.

--model tiny: the embedded model, whose answers end after a token or two. RUN: `tiny` after a run of recipes/tiny.yaml.
Both prune as that recipe says. 3b: random weights with the proportions of Qwen2.5-VL-3B at an eighth of its width and
about a quarter of its depth, tower included, and pictures of 256 tokens; its answers run to the last token, and it
prunes as a recipe does that says nothing. 3b-quarter: the same with `skip: layer` and thresholds at which it keeps
about a quarter of its tokens, for the time that a trained model would take.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GROUP, NEW_TOKENS = 8, 16

# Qwen2.5-VL-3B: 2048 wide, 11008 in the MLP, 36 layers, 8 query heads a key head; 1280, 3420 and 32 in the tower.
TEXT = {"hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 1}  # fmt: skip
VISION = {"depth": 7, "hidden_size": 160, "intermediate_size": 428, "num_heads": 5,
          "fullatt_block_indexes": [6]}  # fmt: skip
SIDE = 256  # pixels: 16 x 16 tokens of 16 x 16 pixels


def install(folder: Path) -> Path:
    """The Python of an environment with TRL. torchvision comes alone, for transformers' processors."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = ["-c", str(ROOT / "constraints.txt")]
        pip = [str(python), "-m", "pip", "install", "-q"]
        packages = ["torch", "transformers", "accelerate", "datasets", "pillow", "trl"]
        subprocess.run([*pip, *pins, *packages], check=True)
        subprocess.run([*pip, "--no-deps", "torchvision"], check=True)
        (folder / "ready").touch()
    return python


def workload(folder: Path, kind: str) -> None:
    """A model folder, pictures, rows of questions about them, and what of the model's recipe is about pruning."""
    import numpy as np
    from PIL import Image

    from zipr1.core.load import load, load_written
    from zipr1.core.recipe import Model
    from zipr1.data.digits import tasks
    from zipr1.models.policy import load_policy

    kept: dict[str, Any] = {"sparse": {"dense_below": 0}, "budgets": {}}
    if kind == "3b-quarter":
        kept = {"sparse": {"dense_below": 0, "skip": "layer"}, "budgets": {"low": 0.4, "high": 0.5}}
    if kind.startswith("3b"):
        config = load(ROOT / "recipes" / "tiny_base.yaml").model.config
        assert config is not None
        parts = {"text": {**config["text"], **TEXT}, "vision": {**config["vision"], **VISION}}
        model = Model(path="scratch", config={**config, **parts}, min_pixels=SIDE**2)
    else:
        run = ROOT / "recipes" / "tiny.yaml" if kind == "tiny" else Path(kind) / "recipe.yaml"
        found = load_written(run).model_dump(mode="json")
        kept = {"sparse": found["sparse"], "budgets": found["budgets"]}
        trained = str((Path(kind) / "last").resolve() / "model")
        model = Model(path="tiny" if kind == "tiny" else trained)
    (folder / "kept.json").write_text(json.dumps(kept))
    load_policy(model, "cpu").save(folder / "model")
    rows = []
    for i, prompt in enumerate(tasks.prompts("train", "digits", 128, 1, seed=0)):
        picture = Image.fromarray(np.asarray(prompt.media[0].source))
        if kind.startswith("3b"):
            picture = picture.resize((SIDE, SIDE))
        picture.save(folder / f"{i}.png")
        text = next(p["text"] for p in prompt.messages[-1]["content"] if p["type"] == "text")
        rows.append({"prompt": text, "images": [f"{i}.png"], "answer": prompt.answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder: Path, steps: int, questions: int, device: str) -> dict[str, Any]:
    """Seconds of each step, and of what: `zipr1 train`'s own step on the rows."""
    import torch

    from zipr1.core.recipe import Budgets, Data, Efficiency, Model, Optim, Recipe, Sparse, Train
    from zipr1.data import sources as data
    from zipr1.data.sampler import PromptSampler
    from zipr1.models.encoder import MediaEncoder
    from zipr1.models.policy import load_policy
    from zipr1.train import loop, optim

    rows = str(folder / "rows.jsonl")
    kept = json.loads((folder / "kept.json").read_text())
    recipe = Recipe(
        model=Model(path=str(folder / "model")),
        data=Data(source=rows, heldout=rows),
        sparse=Sparse(**kept["sparse"]),
        budgets=Budgets(**{**kept["budgets"], "num_generations": GROUP}),
        efficiency=Efficiency(max_accuracy_drop=None),
        optim=Optim(lr=1e-6, lr_scheduler_type="constant_with_warmup"),
        train=Train(steps=steps, prompts_per_step=questions, max_new_tokens=NEW_TOKENS),
    )
    policy = load_policy(recipe.model, device)
    wait = torch.cuda.synchronize if policy.device.type == "cuda" else lambda: None
    prompts = data.load(recipe.data, "train", 0)
    policy.keep_reference()
    optimizer = optim.build(policy.trainable(), recipe.optim)
    pictures = MediaEncoder(policy, recipe)
    spent = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    running: list[str] = []

    def timed(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # What is called inside another is part of it: a recomputed layer is backward's.
            if running:
                return call(*args, **kwargs)
            running.append(name)
            wait()
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                wait()
                spent[name] += time.perf_counter() - began
                running.pop()

        return wrapper

    for model in (policy.model, policy.reference_model):
        for module in (model.get_decoder(), model.lm_head, model.get_input_embeddings()):
            module.forward = timed("forward", module.forward)
    policy.model.model.visual.forward = timed("forward", policy.model.model.visual.forward)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    optimizer.step = timed("optimizer", optimizer.step)  # type: ignore[method-assign]
    deck = PromptSampler(prompts, recipe.seed, recipe.train.prompts_per_step)
    gc.collect()
    gc.freeze()  # as zipr1.train does
    state: dict[str, Any] = {"pressure": {}, "right": {}}
    seconds, split, tokens, ratios = [], [], [], []
    for step in range(steps):
        before, began = dict(spent), time.perf_counter()
        metrics, _ = loop.rl_step(policy, recipe, pictures, deck, optimizer, state, step)
        wait()
        seconds.append(time.perf_counter() - began)
        split.append({k: spent[k] - before[k] for k in spent})
        tokens.append(metrics["answer_tokens"])
        ratios.append(metrics["token_ratio"])
    return {"seconds": seconds, "split": split, "answer_tokens": tokens, "kept": ratios}


def theirs(folder: Path, steps: int, questions: int, device: str) -> dict[str, Any]:
    """Seconds of each step of GRPOTrainer on the same rows."""
    import torch

    # A CPU build of torch lacks two operators that torchvision describes on import.
    shim = torch.library.Library("torchvision", "DEF")
    shim.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    shim.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import trl
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "images": [Image.open(folder / row["images"][0]).convert("RGB")],
                "answer": row["answer"],
            }
            for row in rows
        ]
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder / "model")

    def right(completions: Any, answer: Any, **kwargs: Any) -> list[float]:
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [float(t.strip() == a) for t, a in zip(texts, answer, strict=True)]

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    settings = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=questions * GROUP,
        num_generations=GROUP,
        steps_per_generation=1,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        beta=0.04,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=steps,
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model, right, settings, data, processing_class=processor, callbacks=[Clock()]
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    lengths = [log["completions/mean_length"] for log in logs]
    return {"seconds": seconds, "answer_tokens": lengths, "trl": trl.__version__}


def child(python: Path, side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        str(python),
        __file__,
        "--side",
        side,
        "--folder",
        str(folder),
        "--device",
        options.device,
    ]
    command += ["--steps", str(options.steps), "--questions", str(options.questions)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float]) -> list[float]:
    """20 %, 50 % and 80 %."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="tiny", metavar="tiny|3b|3b-quarter|RUN")
    parser.add_argument("--questions", type=int, default=8, help="in a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "trl")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work = {"zipr1": ours, "trl": theirs}[options.side]
        result = work(options.folder, options.steps, options.questions, options.device)
        print(json.dumps(result), flush=True)
        gc.unfreeze()
        return
    python = install(options.venv)
    found: dict[str, list[dict[str, Any]]] = {"zipr1": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload(folder, options.model)
        for _ in range(options.rounds):
            for side, run_by in (("zipr1", Path(sys.executable)), ("trl", python)):
                found[side].append(child(run_by, side, folder, options))
    rows = []
    print(
        f"{options.questions} questions x {GROUP} answers a step, at most {NEW_TOKENS} tokens each"
    )
    print(f"{'':8}{'s/step p20':>12}{'p50':>8}{'p80':>8}{'questions/s':>13}{'tokens':>8}")
    for side, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"][1:]]
        lengths = [n for run in runs for n in run["answer_tokens"]]
        low, middle, high = spread(seconds)
        mean = sum(lengths) / max(1, len(lengths))
        rows.append({"side": side, "steps": len(seconds), "s_p20": low, "s_p50": middle, "s_p80": high,
                     "questions_per_s": options.questions / middle, "answer_tokens": mean})  # fmt: skip
        print(
            f"{side:8}{low:>12.3f}{middle:>8.3f}{high:>8.3f}{options.questions / middle:>13.2f}{mean:>8.1f}"
        )
    ratio = rows[1]["s_p50"] / rows[0]["s_p50"]
    print(f"zipr1 makes {ratio:.2f} times as many questions a second")
    kept = [ratio for run in found["zipr1"] for ratio in run["kept"]]
    print(f"ours keeps {sum(kept) / len(kept):.1%} of the prompts' tokens")
    total = sum(s for run in found["zipr1"] for s in run["seconds"][1:])
    shares = {
        name: sum(part[name] for run in found["zipr1"] for part in run["split"][1:]) / total
        for name in ("forward", "backward", "optimizer")
    }
    shares["rest"] = 1 - sum(shares.values())
    print("our step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    if options.json:
        print(
            json.dumps(
                {
                    "model": options.model,
                    "questions": options.questions,
                    "rows": rows,
                    "ratio": ratio,
                    "kept": sum(kept) / len(kept),
                    "split": shares,
                }
            )
        )


if __name__ == "__main__":
    main()
