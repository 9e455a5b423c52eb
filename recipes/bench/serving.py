"""vLLM dense and sparse, in turn in one process: time to the first token, decoding, and throughput of long prompts.

    .venv-vllm/bin/python recipes/bench/serving.py [--prompts words] [--length 4096] [--kept 0.25] [--layers 2]
        [--requests 4] [--turns 3]

A Qwen2.5-VL with decoder layers of the 3B model's shape and random weights in float32. Prompts: `words` are random and
`--length` tokens long, no vision tower is timed; the name of an embedded task (`moving_digits` has clips) takes the
longest of its test questions, with the encoding of their media by a vision tower of one small layer. Dense is vLLM as
it comes but for prefix caching, compiled; sparse is the plugin with rule top_k, by which each layer keeps the given
share. First token: each request alone, one token. Throughput: `--requests` at once, tokens of all answers by the time
until the last has ended. Decode: in these, by the 20th percentile of the engine's steps in which all of them answer:
other work on the machine only makes steps longer. Prints every turn, the medians,
and the ratios within a turn: their median, and from the least to the most.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}

import zipr1
from zipr1.core.recipe import Model, Sparse
from zipr1.core.types import Prompt
from zipr1.data.digits.tasks import vocabulary
from zipr1.data.embedded import PER_PICTURE, draw
from zipr1.data.media import load_media
from zipr1.models.loading import save_folder
from zipr1.models.open import open_model
from zipr1.serving.vllm.settings import KEY, marked

TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "window_size": 32,
    "fullatt_block_indexes": [0],
    "tokens_per_second": 2,
}
ANSWER = 33
ALONE = 4  # requests whose first token is timed in a turn


def make(folder: Path, layers: int, kept: float) -> None:
    config = {
        "family": "qwen2_5_vl",
        "words": vocabulary(),
        "text": {**TEXT, "num_hidden_layers": layers},
        "vision": VISION,
    }
    settings = Model(path="scratch", config=config, min_pixels=256)
    opened = open_model(settings, "cpu")
    model, processor = opened.model, opened.processor
    sparse = Sparse(rule="top_k", p=kept, skip="layer", dense_below=0)
    setattr(model.config, KEY, marked(sparse))
    save_folder(model, processor.tokenizer, processor.settings, folder)


def words(length: int, count: int) -> list[dict[str, Any]]:
    """Prompts of random words."""
    rng = random.Random(0)
    return [{"prompt_token_ids": rng.choices(range(10, 400), k=length)} for _ in range(count)]


def longest(folder: Path, task: str, count: int) -> list[tuple[Prompt, str]]:
    """Of an embedded task the questions with the most tokens, each about a medium of its own, and as rendered text."""
    _, processor = zipr1.load(str(folder))
    made = []
    for prompt in draw("test", task, 4 * PER_PICTURE * count, 0)[::PER_PICTURE]:
        (media,) = prompt.media
        chat = copy.deepcopy(prompt.messages)
        for item in chat[0]["content"]:
            if item["type"] == media.kind:
                item[media.kind] = media.source
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
        made.append((ids["input_ids"].shape[1], prompt, text))
    made.sort(key=lambda one: -one[0])
    print("tokens of the prompts:", [length for length, _, _ in made[:count]])
    return [(prompt, text) for _, prompt, text in made[:count]]


def questions(folder: Path, task: str, count: int) -> list[dict[str, Any]]:
    """`longest` as vLLM takes them."""
    from PIL import Image

    _, processor = zipr1.load(str(folder))
    made = []
    for prompt, text in longest(folder, task, count):
        (media,) = prompt.media
        pixels, fps = load_media(media, processor.max_frames, processor.fps)
        if media.kind == "image":
            data: Any = Image.fromarray(pixels)
        else:
            assert fps is not None
            about = {
                "fps": fps,
                "duration": len(pixels) / fps,
                "total_num_frames": len(pixels),
                "frames_indices": list(range(len(pixels))),
                "do_sample_frames": False,
            }
            data = (pixels, about)
        made.append({"prompt": text, "multi_modal_data": {media.kind: data}})
    return made


def engines(folder: Path, length: int, requests: int) -> dict[str, Any]:
    from vllm import LLM

    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": length + ANSWER + 1,
        "max_num_batched_tokens": length + ANSWER + 1,
        "max_num_seqs": max(requests, 2),
        "enable_prefix_caching": False,
        "skip_mm_profiling": True,
    }
    return {
        "dense": LLM(**options, additional_config={KEY: "dense"}),
        "sparse": LLM(**options),
    }


def steps(llm: Any, prompts: list[Any], tokens: int) -> list[float]:
    """Seconds of each step of the engine until all prompts have their tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for index, prompt in enumerate(llm._preprocess_cmpl(prompts)):
        llm.llm_engine.add_request(str(index), prompt, params)
    taken = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        llm.llm_engine.step()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="words")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kept", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        make(folder, given.layers, given.kept)
        if given.prompts == "words":
            prompts = words(given.length, given.requests)
        else:
            prompts = questions(folder, given.prompts, given.requests)
        sides = engines(folder, given.length, given.requests)
        for llm in sides.values():
            steps(llm, [{"prompt_token_ids": [10] * 64}], 2)
            if given.prompts != "words":
                steps(llm, prompts[:1], 1)  # the first medium of all takes longer
        turns: list[dict[str, float]] = []
        for _ in range(given.turns):
            turn = {}
            for name, llm in sides.items():
                alone = [sum(steps(llm, [p], 1)) for p in prompts[:ALONE]]
                turn[f"{name} first"] = statistics.median(alone)
                taken = steps(llm, prompts, ANSWER)
                turn[f"{name} throughput"] = given.requests * ANSWER / sum(taken)
                # A prompt a step is read, or several; then all answer together, until the first has all its tokens.
                answering = taken[given.requests : ANSWER - 1]
                fast = statistics.quantiles(answering, n=5)[0]
                turn[f"{name} decode"] = given.requests / fast
            turns.append(turn)
            print(json.dumps({k: round(v, 3) for k, v in turn.items()}), flush=True)
        middle = {k: statistics.median(t[k] for t in turns) for k in turns[0]}
        (_, shares) = sides["sparse"].collective_rpc("kept_shares")[0]
        print("kept by layer:", [round(s, 3) for s in shares])
        for what, unit in (("first", "s"), ("throughput", "tokens/s"), ("decode", "tokens/s")):
            ratios = [t[f"sparse {what}"] / t[f"dense {what}"] for t in turns]
            if what == "first":
                ratios = [1 / ratio for ratio in ratios]
            print(
                f"{what}: dense {middle[f'dense {what}']:.4g}, sparse {middle[f'sparse {what}']:.4g} {unit}, "
                f"{statistics.median(ratios):.2f} times {'sooner' if what == 'first' else 'as many'} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
