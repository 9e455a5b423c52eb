"""Two servers on the loopback interface, dense and sparse, asked in turn by `vllm bench serve` about embedded pictures.

    .venv-vllm/bin/python recipes/bench/served.py [--prompts pages] [--kept 0.25] [--layers 2] [--requests 16]
        [--turns 3]

The model of serving.py: decoder layers of Qwen2.5-VL-3B's shape with random weights in float32, a small vision tower.
The questions with the most tokens of an embedded task that shows one picture. Dense is vLLM as it comes but for
prefix caching, compiled; sparse is the plugin with rule top_k, by which each layer keeps the given share. First token:
one request at a time. Throughput and the time per token of an answer: all requests at once. Prints every turn, the
medians and their ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import ALONE, ANSWER, longest, make

from zipr1.data.media import load_media
from zipr1.serving.vllm.settings import KEY

START = 400  # seconds that a server may take until it answers
SIDES = {"dense": ["--additional-config", json.dumps({KEY: "dense"})], "sparse": []}


def write(folder: Path, task: str, count: int, to: Path) -> Path:
    """The questions in the lines that `vllm bench serve` reads, their pictures beside them."""
    from PIL import Image

    lines = []
    for index, (prompt, _) in enumerate(longest(folder, task, count)):
        (media,) = prompt.media
        if media.kind != "image":
            raise SystemExit(
                f"error: --prompts {task} shows a {media.kind}; name a task of pictures"
            )
        path = to / f"{index}.png"
        Image.fromarray(load_media(media, 1, None)[0]).save(path)
        content = [
            {"type": "image", "image": str(path)} if item["type"] == "image" else item
            for item in prompt.messages[0]["content"]
        ]
        lines.append(json.dumps({"content": content}))
    (to / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return to / "questions.jsonl"


@contextlib.contextmanager
def server(folder: Path, options: list[str], log: Path) -> Iterator[str]:
    """The address of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--no-enable-prefix-caching", *options]
    known = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    known |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=known)
    try:
        limit = time.monotonic() + START
        while True:
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"error: the server did not start:\n{log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def bench(address: str, folder: Path, path: Path, requests: int, at_once: int) -> dict[str, Any]:
    """What `vllm bench serve` says of the first `requests` questions."""
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--base-url", address]
    command += ["--model", str(folder), "--backend", "openai-chat"]
    command += ["--endpoint", "/v1/chat/completions", "--dataset-name", "custom_image"]
    command += ["--dataset-path", str(path), "--custom-ensure-client-side-data"]
    command += ["--disable-shuffle", "--custom-output-len", str(ANSWER), "--ignore-eos"]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(at_once)]
    command += ["--save-result", "--result-dir", str(path.parent), "--result-filename", "said.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: vllm bench serve:\n{(done.stdout + done.stderr)[-3000:]}")
    said: dict[str, Any] = json.loads((path.parent / "said.json").read_text())
    if said["completed"] != requests:
        raise SystemExit(f"error: {said['completed']} of {requests} requests were answered")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="pages")
    parser.add_argument("--kept", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        root = Path(name)
        folder = root / "model"
        make(folder, given.layers, given.kept)
        path = write(folder, given.prompts, given.requests, root)
        sides = {
            side: stack.enter_context(server(folder, options, root / f"{side}.log"))
            for side, options in SIDES.items()
        }
        for address in sides.values():
            bench(address, folder, path, 1, 1)  # the first request of all takes longer
        turns: list[dict[str, float]] = []
        for _ in range(given.turns):
            turn = {}
            for side, address in sides.items():
                alone = bench(address, folder, path, min(ALONE, given.requests), 1)
                turn[f"{side} first token, ms"] = alone["median_ttft_ms"]
                every = bench(address, folder, path, given.requests, given.requests)
                turn[f"{side} tokens/s"] = every["output_throughput"]
                turn[f"{side} time per token, ms"] = every["median_tpot_ms"]
            turns.append(turn)
            print(json.dumps({k: round(v, 1) for k, v in turn.items()}), flush=True)
        for what in ("first token, ms", "tokens/s", "time per token, ms"):
            dense, sparse = (
                statistics.median(t[f"{side} {what}"] for t in turns) for side in SIDES
            )
            print(f"{what}: dense {dense:.1f}, sparse {sparse:.1f}, ratio {sparse / dense:.2f}")


if __name__ == "__main__":
    main()
