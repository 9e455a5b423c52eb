"""Every kernel at every shipped configuration, compiled for two kinds of GPU without having one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "resources.py"
sys.path.insert(0, str(SCRIPT.parent))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own: kernels that were imported for the interpreter cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", "--dims", "16", "32", "64", "128"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@pytest.mark.slow
def test_every_kernel_fits_the_chip_and_forward_does_not_spill(rows):
    import resources

    for row in rows:
        assert row["shared_bytes"] <= resources.SHARED[row["arch"]], row
        assert row["registers"] <= resources.REGISTERS, row
        if not row["backward"]:
            assert row["spilled_bytes"] == 0, row
    assert {row["arch"] for row in rows} == {80, 90}
    assert {row["dim"] for row in rows if row["op"] == "sparse_prefill"} == {16, 32, 64, 128}


@pytest.mark.slow
def test_no_kernel_is_left_out(rows):
    """Every function that is launched, by name, from the sources."""
    found = set()
    for path in (ROOT / "kernels" / "zipr1_kernels").glob("*/kernel.py"):
        for line in path.read_text().splitlines():
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                found.add((path.parent.name, line[4:].split("(")[0]))
    assert found == {(row["op"], row["kernel"]) for row in rows}
