"""Seconds that hashing adds to saving a checkpoint: a file of weights is written, synchronised and hashed, by turns.

python recipes/bench/hashing.py --megabytes 512 --folder /where/runs/lie

Medians; the share is of both, and depends on the disk as much as on the cores. The load of the machine is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from zipr1.core.files import digest, sync


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512, help="of 2**20 bytes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    size = asked.megabytes * 2**20
    tensors = {f"layer{i}": torch.randn(size // 32) for i in range(8)}
    written, hashed = [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(asked.turns):
            path.unlink(missing_ok=True)
            began = time.monotonic()
            save_file(tensors, path)
            sync(path)
            middle = time.monotonic()
            digest(path)
            written.append(middle - began)
            hashed.append(time.monotonic() - middle)
    write, extra = statistics.median(written), statistics.median(hashed)
    print(
        f"{asked.megabytes} MiB: written and synchronised in {write:.3f} s, hashed in {extra:.3f} s "
        f"({size / extra / 2**30:.2f} GiB/s), {extra / (write + extra):.1%} of both; {asked.turns} turns, load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
