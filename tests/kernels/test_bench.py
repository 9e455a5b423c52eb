"""The benchmark runs, checks its results first, and reports the fields that others read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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
    monkeypatch.setattr(run, "sparse_prefill", lambda *x: right(*x) * (1 + 0.01 * x[-1].ragged))
    wrong = run.gate("cpu")
    assert wrong and all(line.endswith("(128, ragged rows, auto)") for line in wrong)


def test_the_kernel_is_held_to_the_same_where_another_path_is_the_usual_one(monkeypatch):
    """As on a GPU, where the library's attention is right and the kernel, which has to be forced, is not."""
    import run
    from zipr1_kernels import dispatch

    right = run.sparse_prefill

    def kernel(*tensors):
        wrong = 1.1 if dispatch.forced("triton") else 1
        with run.use("torch"):
            return right(*tensors) * wrong

    monkeypatch.setattr(run, "sparse_prefill", kernel)
    assert run.gate("cpu") == []
    wrong = run.gate("cpu", ("auto", "triton"))
    assert wrong and all(line.endswith("rows, triton)") for line in wrong)
    found = {line.split(":")[0] for line in wrong}
    assert {f"{dtype} dk" for dtype in run.DTYPES} <= found
    assert "bfloat16 output without gradient" in found


def test_a_forced_kernel_that_does_not_compile_is_left_out_of_the_gate(monkeypatch, capsys):
    import run
    from zipr1_kernels import dispatch

    class OutOfResources(Exception):
        """As Triton's, no RuntimeError."""

    right = run.sparse_prefill

    def kernel(*tensors):
        if dispatch.forced("triton"):
            raise OutOfResources("shared memory, Required: 300000")
        return right(*tensors)

    monkeypatch.setattr(run, "sparse_prefill", kernel)
    assert run.gate("cpu", ("auto", "triton")) == []
    said = capsys.readouterr().out
    assert said.count("OutOfResources: shared memory, Required: 300000") == 2 * len(run.DTYPES)
    assert "left out: float32 (128, ragged rows, triton): " in said


def test_what_does_not_run_is_left_out_whatever_it_raises(capsys):
    import run

    class OutOfResources(Exception):
        """As Triton's, no RuntimeError."""

    def fails():
        raise OutOfResources("shared memory, Required: 300000")

    found = run.working({"good": lambda: 1, "bad": fails})
    assert set(found) == {"good"}
    said = capsys.readouterr().out
    assert said == "left out: bad: OutOfResources: shared memory, Required: 300000\n"


@pytest.mark.parametrize("op", ["kv_compact", "pack_indices", "select_top_p", "probe_scores"])
def test_an_operation_that_does_not_compile_is_left_to_torch(op, monkeypatch, capsys):
    """As on a GPU, where `auto` takes the kernels: those that raise are found one by one, the rest is measured."""
    import argparse

    import cases
    import run
    from zipr1_kernels import dispatch

    class OutOfResources(Exception):
        """As Triton's, no RuntimeError."""

    taken = []

    def breaks(right):
        def called(*x, **y):
            if f"-{op}" not in dispatch._state.off:
                raise OutOfResources("shared memory, Required: 300000")
            taken.append(op)
            return right(*x, **y)

        return called

    monkeypatch.setattr(cases, op, breaks(getattr(cases, op)))
    found = run.broken("cpu")
    assert found == [op]
    said = f"left to torch: {op}: OutOfResources: shared memory, Required: 300000"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(run, "machine", lambda *x: (1.0, 1.0))
    wish = argparse.Namespace(
        device="cpu", dtype=["float32"], shape=["3b"], length=[64], keep=[0.5], batch=[1], limit=60,
        repeats=1, seconds=0.01, decode=1, backward=False,
    )  # fmt: skip
    assert run.measure(wish, lambda rows: None) == []
    assert "left out: float32, ('3b', 64, 0.5, 1): OutOfResources" in capsys.readouterr().out
    with dispatch.without(*found):
        rows = run.measure(wish, lambda rows: None)
    assert taken and {"total", "sparse_prefill", "sparse_decode"} <= {row["op"] for row in rows}


def test_rows_are_kept_as_they_come_and_time_ends(monkeypatch, capsys):
    """The second problem breaks: the rows of the first are kept. With no time left none is begun."""
    import argparse

    import run

    def rows(arguments, clock, rates, dtype, shape, length, keep, batch):
        if length == 200:
            raise KeyboardInterrupt
        row = {"op": "total", "mode": "forward", "dense_p50_ms": 2.0, "p50_ms": 1.0}
        return [
            {**row, "shape": shape, "dtype": dtype, "length": length, "keep": keep, "batch": batch}
        ]

    monkeypatch.setattr(run, "machine", lambda *x: (1.0, 1.0))
    monkeypatch.setattr(run, "problem_rows", rows)
    wish = argparse.Namespace(
        device="cpu", dtype=["float32"], shape=["3b"], length=[100, 200], keep=[0.5], batch=[1], limit=60
    )  # fmt: skip
    kept = []
    with pytest.raises(KeyboardInterrupt):
        run.measure(wish, kept.extend)
    assert [row["length"] for row in kept] == [100]
    wish.limit = -1
    assert run.measure(wish, kept.extend) == []
    assert "('3b', 200, 0.5, 1): --limit of -1 seconds is over" in capsys.readouterr().out


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


def test_the_break_even_of_a_cpu_is_the_measured_one():
    import csv

    import run
    from zipr1_kernels import BREAK_EVEN

    found = [row for row in csv.DictReader((BENCH / "results.csv").open()) if row["op"] == "total"]
    rows = [
        {**row, "length": int(row["length"]), "speedup": float(row["speedup"]), "keep": 0.25}
        for row in found
        if row["device"] == "2 CPU threads" and row["keep"] == "0.25" and row["shape"] == "3b"
    ]
    said = run.break_even(rows)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"} and len(said) == 2
    for line in said:
        assert line.endswith(f"sparsity pays from {BREAK_EVEN['cpu']} tokens on"), line


def test_the_share_kept_is_the_one_asked_for():
    from cases import SHAPES, Problem

    problem = Problem(SHAPES["3b"], 300, 0.25, torch.float32, "cpu")
    assert problem.kept.count.tolist() == [75]
    gaps = problem.kept.index[0].diff()
    assert int(gaps.max()) > 5 and int(gaps.min()) == 1, "scattered, not a prefix"
    assert torch.equal(problem.by_sort()[:, 1], problem.kept.index[0])
    ragged = Problem(SHAPES["3b"], 300, 0.25, torch.float32, "cpu", batch=3, ragged=True)
    assert ragged.kept.count.tolist() == [30, 75, 120]
    works = ragged.works()
    assert works["sparse_prefill"].flops == 2 * 16 * 128 * (30 * 31 + 75 * 76 + 120 * 121)
    assert works["sparse_decode"].bytes == 2 * 4 * 225 * 2 * 128
    torch.testing.assert_close(ragged.decode(), ragged.plain_decode())
    assert ragged.decode().shape == (3, 16, 1, 128)


def test_budgets_in_one_pass_are_timed():
    import evaluation

    rows = evaluation.measure("tiny", 2, 1)
    assert [row["task"] for row in rows] == ["digits", "moving_digits"]
    for row in rows:
        ratio = row["three_passes_s"] / row["one_pass_s"]
        assert abs(row["speedup"] / ratio - 1) < 0.05 and 0 < row["vision_share"] < 1
