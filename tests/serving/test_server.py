"""`vllm serve FOLDER`, in processes of its own on the loopback interface: its log line, pictures, clips by URL, and the
requests that docs/serving.md shows, as they stand there."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import engines
import numpy as np
import pytest
import tinyruns

import zipr1
from zipr1.core.types import Media
from zipr1.data import video
from zipr1.data.digits import tasks

pytest.importorskip("vllm")

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WAIT = 400  # seconds for a start on a machine that is busy


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server. log: its file of output."""

    def __init__(self, folder, log, *options, **environment):
        self.port = free_port()
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "2048"]
        known = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        known |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=known | environment,
            start_new_session=True,
        )

    def wait(self):
        limit = time.monotonic() + WAIT
        while time.monotonic() < limit:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5)
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(self.log.read_text()[-3000:])

    def ask(self, messages, tokens=6):
        body = {
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": True,
        }
        request = urllib.request.Request(
            self.url + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    server = Server(folder, log)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "PNG")
    return file.getvalue()


def messages(prompt):
    """A prompt as OpenAI's interface takes it, the media as data URLs."""
    made = tinyruns.chat(prompt)
    for message in made:
        for index, item in enumerate(message["content"]):
            if item["type"] == "image":
                data = base64.b64encode(png(item["image"])).decode()
                url = {"url": f"data:image/png;base64,{data}"}
                message["content"][index] = {"type": "image_url", "image_url": url}
            elif item["type"] == "video":
                data = base64.b64encode(Path(item["video"]).read_bytes()).decode()
                url = {"url": f"data:video/mp4;base64,{data}"}
                message["content"][index] = {"type": "video_url", "video_url": url}
    return made


def test_the_log_says_what_is_served_in_one_line(served):
    lines = [line for line in served.log.read_text().splitlines() if "zipr1: " in line]
    assert len(lines) == 1
    assert "zipr1: sparse: rule top_p, p 0.6, in all 4 layers" in lines[0]


def test_pictures_clips_text_and_turns_are_answered_as_by_zipr1(served, folder, tmp_path):
    answers_as_zipr1(served, folder, tmp_path)


def test_two_ranks_of_tensor_parallelism_choose_and_answer_as_one(folder, tmp_path, monkeypatch):
    """Each rank scores with half of the heads. vLLM would give each rank a NUMA node of its own: told not to."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("--dtype", "float32", "--tensor-parallel-size", "2")
    server = Server(folder, tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        server.wait()
        answers_as_zipr1(server, folder, tmp_path)
    finally:
        server.stop()


def longer_clip(prompt, path):
    """The same question about a clip of more frames than are read of one: forty, of which sixteen are."""
    frames, _ = video.read(prompt.media[0].source)
    video.write(path, np.concatenate([frames] * 4)[:40], 10.0)
    return replace(prompt, media=(Media("video", str(path)),))


def answers_as_zipr1(served, folder, tmp_path):
    model, processor = zipr1.load(str(folder))
    prompts = tasks.prompts("test", "digits", 8, 1, 0)
    prompts += tasks.prompts("test", "moving_digits", 8, 1, 0) + engines.others()
    prompts.append(longer_clip(prompts[8], tmp_path / "clip.mp4"))
    wanted = engines.reference(model, processor, prompts)
    for prompt, other in zip(prompts, wanted):
        found = served.ask(messages(prompt))
        assert found["usage"]["prompt_tokens"] == other.prompt
        (choice,) = found["choices"]
        assert choice["message"]["content"] == processor.decode(other.ids, skip_special_tokens=True)
        logprobs = [item["logprob"] for item in choice["logprobs"]["content"]]
        near = other.logprobs[: len(logprobs)]
        assert logprobs == pytest.approx(near, abs=engines.NEAR)


def test_the_requests_of_the_docs(served, tmp_path, monkeypatch):
    """Those marked `bash` and `python3`, with this server's port."""
    monkeypatch.chdir(tmp_path)
    picture = tasks.prompts("test", "digits", 1, 1, 0)[0].media[0].source
    Path("picture.png").write_bytes(png(picture))
    blocks = BLOCK.findall(DOCS.read_text())
    shell = [code for kind, code in blocks if kind == "bash" and "curl" in code]
    python = [code for kind, code in blocks if kind == "python3"]
    assert (len(shell), len(python)) == (1, 1)
    served_name = json.load(urllib.request.urlopen(served.url + "/models"))["data"][0]["id"]
    said = []
    commands = [[sys.executable, "-c"]]
    if shutil.which("curl"):
        commands.append(["bash", "-c"])
    for command in commands:
        code = (shell if command[0] == "bash" else python)[0]
        assert "127.0.0.1:8000" in code
        assert "tiny-served" in code
        code = code.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")
        code = code.replace("tiny-served", served_name)
        done = subprocess.run([*command, code], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
    answer = said[0].strip()
    assert answer
    for other in said[1:]:
        assert json.loads(other)["choices"][0]["message"]["content"] == answer


def test_a_refused_start_ends_in_one_line(folder, tmp_path):
    server = Server(folder, tmp_path / "log", "--kv-cache-dtype", "fp8")
    try:
        assert server.process.wait(WAIT) != 0
    finally:
        server.stop() if server.process.poll() is None else None
    last = server.log.read_text().strip().splitlines()[-1]
    assert "zipr1: this folder cannot be served sparse" in last
    assert "--kv-cache-dtype fp8" in last
