"""Seconds that hashes add to saving a checkpoint: weights are written and synchronised without them and with them, by
turns.

python recipes/bench/hashing.py --megabytes 512 --folder /where/runs/lie

Medians; what is added depends on the disk as much as on the cores, for the file is hashed while the disk takes it. The
load of the machine is printed.
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

from zipr1.core import checksums
from zipr1.core.files import digest, sync


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512, help="of 2**20 bytes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    size = asked.megabytes * 2**20
    tensors = {f"layer{i}": torch.randn(size // 32) for i in range(8)}
    without, with_, alone = [], [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        path = folder / "model.safetensors"
        for turn in range(2 * asked.turns):
            path.unlink(missing_ok=True)
            began = time.monotonic()
            save_file(tensors, path)
            if turn % 2:
                checksums.write(folder, 1)
                with_.append(time.monotonic() - began)
                continue
            sync(path)
            without.append(time.monotonic() - began)
            began = time.monotonic()
            digest(path)
            alone.append(time.monotonic() - began)
    plain, hashed, only = map(statistics.median, (without, with_, alone))
    print(
        f"{asked.megabytes} MiB: written and synchronised in {plain:.3f} s, with hashes in {hashed:.3f} s "
        f"({hashed - plain:+.3f} s, {hashed / plain - 1:+.1%}); hashed alone in {only:.3f} s "
        f"({size / only / 2**30:.2f} GiB/s); {asked.turns} turns, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        "cores"
    )


if __name__ == "__main__":
    main()
