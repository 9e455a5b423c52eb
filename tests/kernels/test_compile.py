"""Every kernel at every shipped configuration, compiled for two kinds of GPU without having one."""

import itertools
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
        assert row["blocks"] >= 1, row
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


@pytest.mark.slow
def test_hopper_multiplies_by_warp_groups_and_spills_nothing(rows):
    """At the models' head dimensions; decoding, whose queries fill no warp group, multiplies as sm_80 does."""
    checked = [row for row in rows if row["dim"] in (64, 128) and row["products"]]
    for row in checked:
        hopper = row["arch"] == 90 and row["op"] in ("probe_scores", "sparse_prefill")
        assert ("wgmma" in row["products"]) == (
            hopper or ("BM=64" in row["variant"] and row["arch"] == 90)
        ), row
        if hopper:
            assert "+" not in row["products"] and row["spilled_bytes"] == 0, row
    assert {row["kernel"] for row in checked if row["arch"] == 90 and row["op"] == "sparse_prefill"} == {
        "forward_kernel", "queries_grad_kernel", "keys_grad_kernel",
    }  # fmt: skip


def test_no_cache_is_split_into_more_shares_than_are_compiled():
    """And every place is in one of them."""
    import resources
    from zipr1_kernels.sparse_decode import kernel

    (compiled,) = (
        row[-1]["SHARES"]
        for row in resources.KERNELS
        if (row[0], row[2]) == ("sparse_decode", "join_kernel")
    )
    most = 0
    lengths = (1, 63, 64, 65, 4096, 8193, 131_072, 1_000_003)
    for pairs, columns, n in itertools.product((1, 2, 3, 4, 8, 64, 300), (16, 64, 128), lengths):
        span, shares = kernel.split(n, pairs, columns)
        assert span % columns == 0 and (shares - 1) * span < n <= shares * span
        most = max(most, shares)
    assert 64 < most <= compiled


def test_blocks_of_a_multiprocessor_by_hand():
    """65,536 registers are given out in steps of 256 a warp, so 168 of 8 warps are 8 x 5,376; with 64 warps at most."""
    import resources

    assert resources.residents(168, 65792, 8, 90) == 1  # 65536 // 43008
    assert resources.residents(40, 0, 4, 90) == 12  # 65536 // (1280 * 4)
    assert resources.residents(32, 0, 8, 90) == 8  # 64 warps
    assert resources.residents(32, 98816, 4, 90) == 2  # 233472 // 99840
    assert resources.residents(32, 98816, 4, 80) == 1  # 167936 // 99840
    assert resources.residents(16, 0, 1, 80) == 32


def test_matrix_instructions_are_counted():
    import resources

    both = "wgmma.mma_async.sync x; mma.sync.aligned y; mma.sync.aligned z"
    assert resources.products(both) == "wgmma 1+mma 2" and resources.products("fma") == ""
