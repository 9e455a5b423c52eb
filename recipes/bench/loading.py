"""Memory of a process that loads a parquet file of pictures: before, at most, and after, in each of several ranks.

python recipes/bench/loading.py --megabytes 412 --ranks 2

The file is made anew: rows of a question, an answer and a PNG of noise of half a megabyte, in row groups of 100 rows.
Every rank loads all rows, as the ranks of a run do. Resident memory as Linux counts it; a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import tempfile
from pathlib import Path

import numpy as np

SIDE = 410  # pixels: 410 * 410 * 3 bytes of noise, which PNG cannot make smaller


def make(path: Path, megabytes: int) -> None:
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    noise = np.random.default_rng(0)
    schema = pyarrow.schema(
        [
            ("question", pyarrow.string()),
            ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary())]))),
            ("answer", pyarrow.string()),
        ]
    )
    with parquet.ParquetWriter(path, schema) as writer:
        while path.stat().st_size < megabytes * 10**6:
            rows = []
            for _ in range(100):
                file = io.BytesIO()
                pixels = noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                Image.fromarray(pixels).save(file, "PNG", compress_level=0)
                picture = [{"bytes": file.getvalue()}]
                rows.append({"question": "what is it?", "images": picture, "answer": "noise"})
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def held(name: str) -> float:
    """MB of this process: VmRSS is now, VmHWM the most there was."""
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 10**6


def load(path: Path) -> tuple[int, float, float, float]:
    import pyarrow.parquet  # counted before: libraries are no data

    from zipr1.core.recipe import Data
    from zipr1.data import rows

    before = held("VmRSS")
    prompts = rows.load(path, Data())
    pyarrow.default_memory_pool().release_unused()
    return len(prompts), before, held("VmHWM"), held("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=412)
    parser.add_argument("--ranks", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZIPR1_CACHE"] = f"{folder}/cache"
        path = Path(folder) / "train.parquet"
        make(path, asked.megabytes)
        print(f"{path.stat().st_size / 10**6:.0f} MB of parquet, {asked.ranks} ranks at once")
        with multiprocessing.get_context("spawn").Pool(asked.ranks) as pool:
            for rank, (count, *memory) in enumerate(pool.map(load, [path] * asked.ranks, 1)):
                before, most, after = memory
                print(
                    f"rank {rank}: {count} rows; {before:.0f} MB before, {most:.0f} at most, {after:.0f} after: "
                    f"+{most - before:.0f} while loading, +{after - before:.0f} for good"
                )


if __name__ == "__main__":
    main()
