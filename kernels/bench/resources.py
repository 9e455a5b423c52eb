"""What every kernel takes of a GPU at every shipped configuration, compiled here without one.

    python kernels/bench/resources.py [--arch 80 90] [--dims 64 128] [--dtype bf16] [--candidates] [--ones] [--json]

Registers, spills, shared memory, how many blocks a multiprocessor holds, and which matrix instructions are used: read
from the code that Triton's own compiler and assembler make. A star marks what is shipped. Spilled registers go to slow
local memory; shared memory above the chip's limit compiles and fails when launched: both are to be seen here first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from zipr1_kernels.launch import Config  # noqa: E402

# CUDA programming guide, compute capabilities: most shared memory of one block and of a multiprocessor in bytes, of
# which each block costs one KB more; registers of one thread and of a multiprocessor; its warps and blocks.
SHARED = {80: 166912, 90: 232448}
ALL_SHARED = {80: 167936, 90: 233472}
REGISTERS, ALL_REGISTERS = 255, 65536
WARPS, BLOCKS = 64, 32
# Whole numbers that Triton compiles apart where they are 1.
ONES = ("H", "G", "R", "queries", "shares")

FLOATS = {"Lse", "Delta", "Most", "Total", "Part", "Scores", "Budget", "Share", "Ranked"}
LONGS = {"Index", "Count", "Flat", "Places", "Order"}
BYTES = {"Valid", "Cand", "Always", "Keep"}
REALS = {"scale", "factor", "eps"}
COLUMNS_OUT = {"Out": "*fp32", "Count": "*fp32"}

# module, table of configurations (or one), kernel, whether it belongs to a backward pass, arguments that differ from
# the rules above, further constants.
KERNELS: list[tuple[str, str, str, bool, dict[str, str], dict[str, Any]]] = [
    ("probe_scores", "FORWARD", "lse_kernel", False, {}, {"MAPPED": False}),
    ("probe_scores", "FORWARD", "lse_kernel", False, {}, {"MAPPED": True}),
    ("probe_scores", "FORWARD", "join_kernel", False, {}, {"SHARES": 32, "BLOCK": 64}),
    ("probe_scores", "COLUMNS", "columns_kernel", False, COLUMNS_OUT, {"NORM": True, "MAPPED": True}),
    ("probe_scores", "COLUMNS", "columns_kernel", False, COLUMNS_OUT, {"NORM": False, "MAPPED": False}),
    ("probe_scores", "QUERIES", "queries_grad_kernel", True, {"Grad": "*fp32"}, {}),
    ("probe_scores", "KEYS", "keys_grad_kernel", True, {"Grad": "*fp32"}, {}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 0}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 1}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 2}),
    ("select_top_p", "MARK", "mark_kernel", False, {}, {"MODE": 0}),
    ("select_top_p", "MARK", "mark_kernel", False, {}, {"MODE": 1}),
    ("select_top_p", "PACK", "pack_kernel", False, {}, {"ROWS": 64}),
    ("sparse_prefill", "FORWARD", "forward_kernel", False, {}, {}),
    ("sparse_prefill", "QUERIES", "queries_grad_kernel", True, {}, {}),
    ("sparse_prefill", "KEYS", "keys_grad_kernel", True, {}, {}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": True, "COUNTED": False}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": False, "COUNTED": False}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": False, "COUNTED": True}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": True, "COUNTED": False, "BM": 64}),
    ("sparse_decode", "FORWARD", "join_kernel", False, {}, {"SHARES": 128}),
    ("kv_compact", "FORWARD", "compact_kernel", False, {}, {}),
    ("norm_rope", "FORWARD", "norm_rope_kernel", False, {}, {"NORM": True}),
    ("norm_rope", "FORWARD", "norm_rope_kernel", False, {}, {"NORM": False}),
]  # fmt: skip

# Configurations worth trying at head dimension 128, by operation and table.
CANDIDATES: dict[tuple[str, str], list[Config]] = {
    ("sparse_prefill", "FORWARD"): [
        Config(128, 32, 8, 3), Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(64, 64, 4, 2),
        Config(64, 64, 4, 3),
    ],
    ("sparse_prefill", "QUERIES"): [Config(32, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)],
    ("sparse_prefill", "KEYS"): [
        Config(32, 64, 8, 2), Config(32, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 32, 4, 2), Config(64, 64, 8, 1),
    ],
    ("probe_scores", "FORWARD"): [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 128, 8, 2)],
    ("probe_scores", "COLUMNS"): [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 8, 2)],
    ("probe_scores", "QUERIES"): [Config(32, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)],
    ("probe_scores", "KEYS"): [Config(32, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)],
    ("sparse_decode", "FORWARD"): [Config(16, 64, 4, 3), Config(16, 128, 4, 2), Config(16, 128, 8, 3)],
}  # fmt: skip


def signature(kernel: Any, special: dict[str, str], dtype: str) -> dict[str, str]:
    """Triton's type of each argument, in order."""
    constants = {kernel.arg_names[i] for i in kernel.constexprs}
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kind = "constexpr"
        elif name in special:
            kind = special[name]
        elif name in FLOATS:
            kind = "*fp32"
        elif name in LONGS:
            kind = "*i64"
        elif name in BYTES:
            kind = "*u8"
        elif name in ("Slot", "Starts", "Rows"):
            kind = "*i32"
        elif name in REALS:
            kind = "fp32"
        elif name[0].isupper() and name not in ("H", "HQ", "G", "R", "GR", "L"):
            kind = f"*{dtype}"
        else:
            kind = "i32"
        kinds[name] = kind
    return kinds


def compiled(
    kernel: Any,
    config: Any,
    dim: int,
    special: dict[str, str],
    more: dict[str, Any],
    arch: int,
    dtype: str,
    ones: bool = False,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = signature(kernel, special, dtype)
    values = {
        "D": dim, "BD": dim, "DV": dim, "BV": dim, "BM": config.rows, "BN": config.columns, "BLOCK": config.columns,
        "PREC": "ieee" if dtype == "fp32" else "tf32", "UP": False, **more,
    }  # fmt: skip
    fixed = {
        kernel.arg_names[i] for i in range(len(kernel.params)) if kernel.params[i].do_not_specialize
    }
    for name in ONES if ones else ():
        if name in kinds and name not in fixed:
            kinds[name], values[name] = "constexpr", 1
    # What the launcher finds out by itself: pointers and strides are multiples of 16.
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or re.fullmatch(r"s[a-z][bhl]", name)
    }
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={name: values[name] for name, kind in kinds.items() if kind == "constexpr"},
        attrs=even,
    )
    options = {"num_warps": 4} if kernel.__name__ == "join_kernel" else config.options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread and bytes of local memory a thread, by cuobjdump; local memory is where spills go."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def named(constants: dict[str, Any]) -> str:
    """Switches that are on by their name, numbers with their value."""
    return ", ".join(k if v is True else f"{k}={v}" for k, v in constants.items() if v is not False)


def residents(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks that a multiprocessor holds at once. Registers are given out to a warp in steps of 256."""
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(
        ALL_REGISTERS // (of_a_warp * warps),
        ALL_SHARED[arch] // (shared + 1024),
        WARPS // warps,
        BLOCKS,
    )


def products(assembly: str) -> str:
    """How a kernel multiplies matrices: by Hopper's warp groups (wgmma), or as sm_80 does (mma), and how often."""
    found = {"wgmma": assembly.count("wgmma.mma_async"), "mma": assembly.count("mma.sync")}
    return "+".join(f"{name} {count}" for name, count in found.items() if count)


def measure(
    archs: list[int], dims: list[int], dtype: str, candidates: bool = False, ones: bool = False
) -> list[dict[str, Any]]:
    """One row a kernel, configuration, head dimension and architecture. candidates: those, and not what is shipped."""
    rows = []
    for op, table, name, backward, special, more in KERNELS:
        module = importlib.import_module(f"zipr1_kernels.{op}.kernel")
        configs = getattr(module, table)
        kernel = getattr(module, name)
        if candidates and ((op, table) not in CANDIDATES or name == "join_kernel"):
            continue
        for dim in dims if isinstance(configs, dict) or "D" in kernel.arg_names else [0]:
            for arch in archs:
                shipped = configs[arch][dim] if isinstance(configs, dict) else configs
                for config in CANDIDATES[op, table] if candidates else [shipped]:
                    result = compiled(kernel, config, dim, special, dict(more), arch, dtype, ones)
                    used = resources(result.asm["cubin"])
                    shared, warps = result.metadata.shared, result.metadata.num_warps
                    rows.append(
                        {
                            "op": op,
                            "kernel": name,
                            "variant": ", ".join(
                                k if v is True else f"{k}={v}"
                                for k, v in more.items()
                                if v is not False
                            ),
                            "backward": backward,
                            "dim": dim,
                            "arch": arch,
                            "config": tuple(config),
                            "shipped": config == shipped,
                            **used,
                            "shared_bytes": shared,
                            "blocks": residents(used["registers"], shared, warps, arch),
                            "products": products(result.asm["ptx"]),
                        }
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--candidates", action="store_true", help="what is worth trying instead")
    parser.add_argument(
        "--ones", action="store_true", help="with all numbers 1 that Triton makes constants"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows = measure(
        arguments.arch, arguments.dims, arguments.dtype, arguments.candidates, arguments.ones
    )
    print(
        f"{'op':15} {'kernel':20} {'variant':36} {'dim':>4} {'sm':>4} {'config':>16} {'regs':>5} "
        f"{'spilled B':>9} {'shared B':>9} {'blocks':>6}  products"
    )
    for r in rows:
        config = ",".join(map(str, r["config"])) + ("*" if r["shipped"] else " ")
        print(
            f"{r['op']:15} {r['kernel']:20} {r['variant']:36} {r['dim'] or '':>4} {r['arch']:4} {config:>16} "
            f"{r['registers']:5} {r['spilled_bytes']:9} {r['shared_bytes']:9} {r['blocks']:6}  {r['products']}"
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    # Interpreted functions cannot be compiled; fusing multiply and add is what the launcher does too.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
