"""What a GPU runs, in a process of its own, for vLLM reads its settings once: like_a_gpu.py says what is seen."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


def test_the_second_model_runner_and_flash_attention_answer_as_zipr1(folder):
    """Pictures and clips, sixteen at once in a small pool, some read again after a preemption."""
    script = Path(__file__).parent / "like_a_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
