"""`make gpu` is run once in a while, on a lent card: the script itself may not be what fails."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
from gpu import Part  # noqa: E402

# Stands in for gpu_parts.py: a part does what its name says.
STAND_IN = """
import json, os, subprocess, sys, time
part, which, rows = sys.argv[1], sys.argv[2], sys.argv[sys.argv.index("--rows") + 1]
def row(name, ok=True, **more):
    with open(rows, "a") as file:
        file.write(json.dumps({"part": part, "which": which, "name": name, "ok": ok, **more}) + "\\n")
row("kernels", value=os.environ["ZIPR1_KERNELS"])
if which == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    row("child", pid=child.pid)
    print("about to hang", flush=True)
    time.sleep(600)
if which == "half":
    with open(rows, "a") as file:
        file.write('{"part": "ops", "wh')
if which == "wrong":
    row("D 128", False, op="kv_compact", error=1.5)
if which in ("dies", "select_top_p"):
    print("CUDA error: an illegal memory access", flush=True)
    os._exit(3)
if part == "timing":
    row("ours", p50_ms=1.25, length=4096, batch=8)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "gpu_parts.py").write_text(STAND_IN)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 1)
    return gpu.Session(tmp_path / "out", 60, small=True)


def ends(run):
    return {row["which"]: row for row in run.rows() if row["name"] in ("whole part", "not run")}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_part_that_hangs_ends_with_all_that_it_started(run):
    run.wave([Part("ops", 20, "hangs"), Part("ops", 90, "good")])
    assert ends(run)["good"]["ok"] is True
    end = ends(run)["hangs"]
    assert end["ok"] is False
    assert end["note"] == "ended after 20 s; its last words: about to hang"
    (child,) = [row["pid"] for row in run.rows() if row["name"] == "child"]
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def test_a_wrong_operation_is_off_in_later_parts_and_one_that_died_too(run):
    run.wave(
        [Part("ops", 30, "wrong"), Part("ops", 30, "select_top_p"), Part("timing", 30, "dies")]
    )
    off = ["kv_compact", "pack_indices", "select_threshold", "select_top_k", "select_top_p"]
    assert run.off == off, "what was timed says nothing of right and wrong"
    assert ends(run)["dies"]["note"] == "exit code 3: CUDA error: an illegal memory access"
    run.wave([Part("profile", 30, "later")])
    told = {row["which"]: row["value"] for row in run.rows() if row["name"] == "kernels"}
    assert told["wrong"] == "auto"
    assert told["later"] == "auto," + ",".join(f"-{op}" for op in off)
    # The kernels know all of these names.
    from zipr1_kernels import dispatch

    known = {op for ops in gpu.CHECKED.values() for op in ops}
    assert known == set(dispatch.OPS)


def test_a_check_that_was_only_slow_leaves_its_operation_on():
    """Compiling may take longer than the limit; what it had found right until then is right."""
    checked = {
        "part": "ops",
        "which": "kv_compact",
        "name": "D 128",
        "ok": True,
        "op": "kv_compact",
    }
    late = {
        "part": "ops",
        "which": "kv_compact",
        "name": "whole part",
        "ok": False,
        "note": "ended after 80 s",
    }
    died = {**late, "note": "exit code 3: "}
    assert gpu.wrong_operations([checked, late]) == []
    assert gpu.wrong_operations([late]) == ["kv_compact"]
    assert gpu.wrong_operations([checked, died]) == ["kv_compact"]
    assert gpu.wrong_operations([checked, {**checked, "ok": False}, late]) == ["kv_compact"]


def test_a_line_cut_off_is_left_out(run):
    run.wave([Part("ops", 30, "half")])
    run.wave([Part("ops", 30, "good")])
    assert {row["which"] for row in run.rows()} <= {"half", "good"}
    assert run.rows_path.read_text().count('{"part": "ops", "wh{') == 1


def test_without_time_left_parts_are_not_begun(tmp_path, monkeypatch):
    (tmp_path / "gpu_parts.py").write_text(STAND_IN)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    run = gpu.Session(tmp_path / "out", gpu.RESERVE + gpu.LEAST - 1, small=True)
    run.wave([Part("ops", 30, "good")])
    assert [(row["name"], row["ok"]) for row in run.rows()] == [("not run", None)]
    later = gpu.Session(tmp_path / "out", gpu.RESERVE + 6, small=True)
    begin = time.monotonic()
    later.wave([Part("ops", 30, "hangs")])
    assert time.monotonic() - begin < 25, "a part gets what is left, not its own limit"


def test_limits_leave_room_within_the_whole():
    """Waves follow one another: all of them, each at its slowest, end before a lent machine's ten minutes."""
    assert sum(max(part.seconds for part in wave) for wave in gpu.WAVES) + gpu.RESERVE <= 560
    names = [part.title for wave in gpu.WAVES for part in wave]
    assert len(names) == len(set(names))
    for wave in gpu.WAVES:
        assert len(wave) == 1 or "timing" not in {part.name for part in wave}, "timed alone"


def test_every_file_with_tests_for_a_gpu_is_run():
    import gpu_parts

    root = BENCH.parents[1] / "tests"
    mark = "mark." + "gpu"
    found = {str(p.relative_to(root)) for p in root.rglob("test_*.py") if mark in p.read_text()}
    files = {*gpu_parts.KERNEL_TESTS, *gpu_parts.OTHER_TESTS}
    assert found <= files and all((root / name).is_file() for name in files)
    assert "models/test_waits.py" in found, "what a GPU alone can show of waits and captured steps"


def test_pytest_that_is_ended_in_a_test_tells_of_those_before(tmp_path):
    code = "import pathlib, time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c():\n"
    code += "    pathlib.Path('begun').touch()\n    time.sleep(600)\n"
    (tmp_path / "test_some.py").write_text(code)
    words = ["-q", "-p", "no:cacheprovider", "--junitxml=found.xml", "test_some.py"]
    process = subprocess.Popen([sys.executable, "-c", gpu_parts.PYTEST, *words], cwd=tmp_path)
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        gpu_parts.interrupted(process, 300)
    finally:
        process.kill()
        process.wait()
    cases = xml.etree.ElementTree.parse(tmp_path / "found.xml").getroot().iter("testcase")
    failed = {case.get("name"): case.find("failure") is not None for case in cases}
    assert failed["test_a"] is False and failed["test_b"] is True


def test_the_table_by_hand():
    timing = {"part": "timing", "which": "attention", "ok": True, "length": 4096}
    rows = [
        {"part": "ops", "which": "kv_compact", "name": "D 128", "ok": True, "op": "kv_compact"},
        {"part": "ops", "which": "kv_compact", "name": "D 64", "ok": False, "op": "kv_compact", "error": 0.25},
        {"part": "ops", "which": "kv_compact", "name": "whole part", "ok": True, "seconds": 3.0, "note": ""},
        {**timing, "name": "ours", "p50_ms": 1.234, "batch": 1},
        {**timing, "name": "ours", "p50_ms": 234.5, "batch": 8},
        {**timing, "name": "dense", "p50_ms": 9.0, "batch": 8},
        {"part": "step", "which": "", "name": "not run", "ok": None, "note": "no time was left"},
        {"part": "machine", "which": "", "name": "host", "ok": True, "wait_us": 12.5},
    ]  # fmt: skip
    table = gpu.summary(rows, ["kv_compact"], 99.6).splitlines()
    assert table[0] == "100 s. Switched off as wrong: kv_compact."
    assert "| ops kv_compact | 2 | 1 | 3 |  |" in table
    assert "| step | 0 | 0 |  | no time was left |" in table
    assert "WRONG ops kv_compact D 64: op kv_compact, error 0.25" in table
    at = table.index("| p50 ms, tokens x rows | 4096x1 | 4096x8 |")
    assert table[at + 2 : at + 4] == ["| ours | 1.23 | 234 |", "| dense |  | 9 |"]
    assert "machine host: wait_us 12.5" in table


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stdout == "error: torch finds no CUDA device; --small runs every part on a CPU\n"


@pytest.mark.slow
@pytest.mark.interpreted
def test_every_part_runs_on_a_cpu(tmp_path):
    """The whole script, at sizes that say nothing about speed: every part ends well and finds nothing wrong."""
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--small", "--out", tmp_path, "--seconds", "900"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if row["ok"] is False]
    assert not wrong, wrong
    parts = {part.title for wave in gpu.WAVES for part in wave}
    over = [f"{row['part']} {row['which']}".strip() for row in rows if row["name"] == "whole part"]
    assert set(over) == parts
    # Every check of an operation ran it by its kernel, in the interpreter.
    checks = [row for row in rows if row["part"] == "ops" and "op" in row]
    assert {row["op"] for row in checks} == {op for ops in gpu.CHECKED.values() for op in ops}
    for row in checks:
        assert row["path"] == (
            "torch: not on a GPU" if row["op"] == "packed_attention" else "triton"
        )
    named = {(row["part"], row["name"]) for row in rows}
    assert {
        ("waits", "prefill"),
        ("waits", "32 tokens, eager"),
        ("tiny", "finite"),
        ("step", "step with through"),
    } <= named
    assert ("timing", "sparse_prefill: ours") in named and ("profile", "tiny: decode") in named
    files = {path.name for path in tmp_path.iterdir()}
    allowed = {
        "env.json",
        "rows.jsonl",
        "tests.xml",
        "log.txt",
        "profile.json",
        "run.json",
        "summary.md",
    }
    assert files == allowed
    assert done.stdout.endswith((tmp_path / "summary.md").read_text())
    assert len(done.stdout) < 12_000, "a lent machine shows the last 12,000 characters"
