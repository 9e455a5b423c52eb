"""The plan of a run beside what the run takes: peak memory of a step at the widths of real models, on a CPU.

    python recipes/bench/planned.py [--json]

Each model has the true widths, vocabulary, special tokens and pixel settings of the real one, two decoder layers, two
blocks of the tower and random weights. One step of its recipe is run, with low-rank adapters and few and short prompts,
each case in a process of its own. `planned` is the peak that `zipr1 train --dry-run` shows. `measured` is the most that
the process held at once (VmHWM: pages of its own and those of mapped weights) less what it held when the libraries were
imported and nothing was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1]
# A bundled config, and the recipe whose step is run.
MODELS = {"qwen2.5-vl-3b": "qwen2_5vl_24gb", "qwen3-vl-4b": "qwen3vl"}
DTYPES = ("float32", "bfloat16")
LAYERS = BLOCKS = 2

# From 151,643 on, in this order, of both families; and what the newer one has besides.
SPECIAL = [
    *(f"<|{name}|>" for name in (
        "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
        "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )),
    "<tool_call>", "</tool_call>",
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
]  # fmt: skip
NEWER = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
WORDS = 151_643
# ChatML; the older family opens with a system turn where the chat brings none.
SYSTEM = "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
TURNS = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build(name: str, folder: Path) -> None:
    """A model folder as the hub has it: bfloat16 weights, tokenizer, chat template, pixel settings."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from zipr1.models.cost import values_of

    values, newer = values_of(name), name.startswith("qwen3")
    values["vision_config"]["depth"] = BLOCKS
    few = {"deepstack_visual_indexes": [0, 1]} if newer else {"fullatt_block_indexes": [1]}
    values["vision_config"] |= few
    (values["text_config"] if newer else values)["num_hidden_layers"] = LAYERS
    first = WORDS + SPECIAL.index("<|vision_start|>")
    tokens = ("vision_start", "vision_end", "vision_pad", "image", "video")
    values |= {f"{token}_token_id": first + i for i, token in enumerate(tokens)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**values)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    end, pad = WORDS + SPECIAL.index("<|im_end|>"), WORDS
    model.generation_config.update(eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=pad)
    model.save_pretrained(folder)
    _tokenizer(newer, folder)
    side = 32 if newer else 28
    pixels: dict[str, Any] = {"patch_size": side // 2, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"shortest_edge": 4 * side**2, "longest_edge": 16384 * side**2}
    pixels |= {"size": bounds, "image_processor_type": "Qwen2VLImageProcessor"}
    if newer:
        pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def _tokenizer(newer: bool, folder: Path) -> None:
    """A byte-level BPE with as many words as the real one, of which a text uses the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"w{i}" for i in range(WORDS - len(letters)))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = SPECIAL + NEWER * newer
    made.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    assert made.token_to_id("<|image_pad|>") == 151_655
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": special[1:],
        "model_max_length": 131_072,
        "chat_template": TURNS if newer else SYSTEM + TURNS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def recipe_of(name: str, dtype: str, folder: Path) -> Any:
    """One step of the model's recipe over two pictures of about 250 tokens, written beside it."""
    import numpy as np
    from PIL import Image

    from zipr1.core.load import load

    rng = np.random.default_rng(0)
    for i in range(2):
        noise = rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    rows = [{"query": f"How many? {i}", "label": ["4"], "image": f"{i}.png"} for i in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        f"model.path={folder}", f"model.dtype={dtype}", "model.min_pixels=4096", f"data.source={folder / 'rows.jsonl'}",
        f"data.heldout={folder / 'rows.jsonl'}", "sparse.dense_below=0", "budgets.num_generations=2", "train.steps=1",
        "train.prompts_per_step=2", "train.micro_batch=4", "train.max_new_tokens=16", "evaluation.before=false",
        "evaluation.after=false",
    ]  # fmt: skip
    return load(RECIPES / f"{MODELS[name]}.yaml", changes)


def held(what: str) -> int:
    """Bytes of this process: VmRSS is now, VmHWM the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))


def case(name: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Train one step in FOLDER/run, in a fresh process; the plan is made afterwards, so that it adds nothing."""
    import peft  # noqa: F401
    import transformers
    from rich.console import Console

    from zipr1.train import loop
    from zipr1.train.dry_run import dry_run

    # Imported when they are first asked for.
    kind = "Qwen3VL" if name.startswith("qwen3") else "Qwen2_5_VL"
    assert getattr(transformers, f"{kind}ForConditionalGeneration")
    quiet = Console(quiet=True)
    recipe = recipe_of(name, dtype, folder)
    before = held("VmRSS")
    loop.run(recipe, folder / "run", "auto", "cpu", ["zipr1"], quiet)
    most = held("VmHWM")
    memory = dry_run(recipe, "cpu", quiet)["memory"]
    return {
        "model": name, "dtype": dtype, "planned_bytes": memory["peak"], "measured_bytes": most - before,
        "before_bytes": before, "memory": memory,
    }  # fmt: skip


def measured(name: str, dtype: str, folder: Path) -> dict[str, Any]:
    """`case` in a process of its own, for a folder that `build` has filled."""
    command = [sys.executable, __file__, "--case", name, dtype, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, dtype, folder = options.case
        print(json.dumps(case(name, dtype, Path(folder))))
        return
    rows = []
    print(
        f"{'model':<15}{'dtype':>10}{'planned MiB':>13}{'measured MiB':>14}{'planned/measured':>18}"
    )
    for name in MODELS:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                build(name, Path(folder))
                row = measured(name, dtype, Path(folder))
            rows.append(row)
            mib, share = 2**20, row["planned_bytes"] / row["measured_bytes"]
            print(
                f"{name:<15}{dtype:>10}{row['planned_bytes'] / mib:>13,.0f}{row['measured_bytes'] / mib:>14,.0f}"
                f"{share:>18.2f}"
            )
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
