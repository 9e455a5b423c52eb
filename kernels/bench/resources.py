"""Registers, spills and shared memory of every kernel at every shipped configuration, compiled here without a GPU.

    python kernels/bench/resources.py [--arch 80 90] [--dims 64 128] [--dtype bf16] [--json]

Read from the cubin that Triton's own assembler makes. Spilled registers go to slow local memory; shared
memory above the chip's limit compiles and fails when launched: both are to be seen here first.
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

# Most shared memory of one block in bytes, and registers of one thread (CUDA programming guide, compute capabilities).
SHARED = {80: 166912, 90: 232448}
REGISTERS = 255

FLOATS = {"Lse", "Delta", "Most", "Total", "Part", "Scores", "Budget"}
LONGS = {"Index", "Count"}
BYTES = {"Valid", "Cand", "Always", "Keep"}
REALS = {"scale", "factor"}

# module, table of configurations (or one), kernel, whether it belongs to a backward pass, arguments that differ from
# the rules above, further constants.
KERNELS: list[tuple[str, str, str, bool, dict[str, str], dict[str, Any]]] = [
    ("probe_scores", "FORWARD", "lse_kernel", False, {}, {}),
    ("probe_scores", "FORWARD", "columns_kernel", False, {"Out": "*fp32", "Count": "*fp32"}, {"NORM": True}),
    ("probe_scores", "FORWARD", "columns_kernel", False, {"Out": "*fp32", "Count": "*fp32"}, {"NORM": False}),
    ("probe_scores", "BACKWARD", "queries_grad_kernel", True, {"Grad": "*fp32"}, {}),
    ("probe_scores", "BACKWARD", "keys_grad_kernel", True, {"Grad": "*fp32"}, {}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 0}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 1}),
    ("select_top_p", "SELECT", "select_kernel", False, {}, {"MODE": 2}),
    ("select_top_p", "PACK", "pack_kernel", False, {}, {}),
    ("sparse_prefill", "FORWARD", "forward_kernel", False, {}, {}),
    ("sparse_prefill", "BACKWARD", "queries_grad_kernel", True, {}, {}),
    ("sparse_prefill", "BACKWARD", "keys_grad_kernel", True, {}, {}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": True, "INDEXED": False}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": False, "INDEXED": True}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": False, "INDEXED": False}),
    ("sparse_decode", "FORWARD", "split_kernel", False, {}, {"MASKED": True, "INDEXED": False, "BM": 64}),
    ("sparse_decode", "FORWARD", "join_kernel", False, {}, {}),
    ("kv_compact", "FORWARD", "compact_kernel", False, {}, {}),
]  # fmt: skip

# Configurations worth trying at head dimension 128, by operation and table.
CANDIDATES: dict[tuple[str, str], list[Config]] = {
    ("sparse_prefill", "FORWARD"): [
        Config(128, 32, 8, 3), Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(64, 64, 4, 2),
        Config(64, 64, 4, 3),
    ],
    ("sparse_prefill", "BACKWARD"): [Config(32, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)],
    ("probe_scores", "FORWARD"): [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 128, 8, 2)],
    ("probe_scores", "BACKWARD"): [Config(32, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)],
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
        elif name == "Probe":
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
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = signature(kernel, special, dtype)
    values = {
        "D": dim, "BD": dim, "DV": dim, "BV": dim, "BM": config.rows, "BN": config.columns, "BLOCK": config.columns,
        "PREC": "ieee" if dtype == "fp32" else "tf32", "UP": False, **more,
    }  # fmt: skip
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
    options = {"num_warps": 1} if kernel.__name__ == "join_kernel" else config.options
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


def measure(archs: list[int], dims: list[int], dtype: str) -> list[dict[str, Any]]:
    rows = []
    for op, table, name, backward, special, more in KERNELS:
        module = importlib.import_module(f"zipr1_kernels.{op}.kernel")
        configs = getattr(module, table)
        kernel = getattr(module, name)
        for dim in dims if isinstance(configs, dict) or "D" in kernel.arg_names else [0]:
            constants = dict(more)
            for arch in archs:
                config = configs[arch][dim] if isinstance(configs, dict) else configs
                result = compiled(kernel, config, dim, special, constants, arch, dtype)
                rows.append(
                    {
                        "op": op,
                        "kernel": name,
                        "variant": ", ".join(f"{k}={v}" for k, v in more.items()),
                        "backward": backward,
                        "dim": dim,
                        "arch": arch,
                        "config": tuple(config),
                        **resources(result.asm["cubin"]),
                        "shared_bytes": result.metadata.shared,
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
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.arch, arguments.dims, arguments.dtype)
    print(
        f"{'op':15} {'kernel':20} {'variant':26} {'dim':>4} {'sm':>4} {'regs':>5} "
        f"{'spilled B':>9} {'shared B':>9}"
    )
    for r in rows:
        print(
            f"{r['op']:15} {r['kernel']:20} {r['variant']:26} {r['dim'] or '':>4} {r['arch']:4} "
            f"{r['registers']:5} {r['spilled_bytes']:9} {r['shared_bytes']:9}"
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    # Interpreted functions cannot be compiled; fusing multiply and add is what the launcher does too.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
