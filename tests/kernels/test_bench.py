"""The benchmark runs, checks its results first, and reports the fields that others read."""

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH.parents[1] / "recipes" / "bench")]


def test_a_short_run_on_the_cpu():
    command = [sys.executable, BENCH / "run.py", "--device", "cpu", "--json", "--backward"]
    command += ["--length", "160", "--dtype", "float32", "--repeats", "1", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    ours = {(row["op"], row["mode"]): row for row in rows if row["provider"] == "ours"}
    ops = ["probe_scores", "select_top_p", "sparse_prefill", "kv_compact", "sparse_decode", "total"]
    assert set(ours) == {(op, "forward") for op in ops} | {("sparse_prefill", "backward")}
    total = ours["total", "forward"]
    assert (total["length"], total["keep"]) == (160, 0.25)
    assert total["p20_ms"] <= total["p50_ms"] <= total["p80_ms"]
    assert abs(total["speedup"] * total["p50_ms"] / total["dense_p50_ms"] - 1) < 0.01
    assert total["path"] == "torch: not on a GPU"


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    import run

    right = run.sparse_prefill
    assert run.gate("cpu") == []
    monkeypatch.setattr(run, "sparse_prefill", lambda *x: right(*x) * 1.01)
    wrong = run.gate("cpu")
    assert any(line.startswith("float32 output: off by") for line in wrong)
    assert any("float32 dq" in line for line in wrong)


def test_break_even_by_hand():
    import run

    speeds = {64: 0.2, 128: 1.1, 256: 0.9, 512: 1.5, 1024: 2.0}
    rows = [
        {"op": "total", "shape": "3b", "dtype": "float32", "keep": 0.25, "length": n, "speedup": s}
        for n, s in speeds.items()
    ]
    assert run.break_even(rows) == ["3b, float32, 25% kept: sparsity pays from 512 tokens on"]
    assert run.break_even(rows[:1]) == [
        "3b, float32, 25% kept: sparsity pays at none of these lengths"
    ]


def test_the_share_kept_is_the_one_asked_for():
    from cases import SHAPES, Problem

    problem = Problem(SHAPES["3b"], 300, 0.25, torch.float32, "cpu")
    assert problem.kept.count.tolist() == [75]
    gaps = problem.kept.index[0].diff()
    assert int(gaps.max()) > 5 and int(gaps.min()) == 1, "scattered, not a prefix"
    assert torch.equal(problem.by_sort()[:, 1], problem.kept.index[0])


def test_budgets_in_one_pass_are_timed():
    import evaluation

    rows = evaluation.measure("tiny", 2, 1)
    assert [row["task"] for row in rows] == ["digits", "moving_digits"]
    for row in rows:
        ratio = row["three_passes_s"] / row["one_pass_s"]
        assert abs(row["speedup"] / ratio - 1) < 0.05 and 0 < row["vision_share"] < 1
