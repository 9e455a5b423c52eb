"""The folder of an evaluation: what a kill leaves of it is taken again, and by another evaluation where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import killed

from zipr1.core.errors import InputError
from zipr1.core.folders import claimed
from zipr1.evaluate.folder import Folder

META = {"model": "a", "budgets": [1.0]}
ROW = {
    "task": "digits", "p": 1.0, "n": 4, "top": 100.0, "token_ratio": 1.0, "kv_bytes": 2048.0, "seconds": 1.0,
    "dense_kv_bytes": 2048.0, "dense_seconds": 1.0, "dense": 80.0, "sparse": 80.0, "difference": 0.0,
    "difference_ci": [0.0, 0.0],
}  # fmt: skip
RESULT = {
    "task": "digits", "kind": "image", "average": 1.0, "rows": [ROW], "notes": [], "prompt_tokens": 100.0,
    "conditions": {"max_new_tokens": 16, "frames": 8, "fps": None, "frame_pixels": None}, "decoding_seconds": 1.0,
    "vision_seconds": 1.0, "layers": {"1.0": [1.0]}, "gallery": [],
}  # fmt: skip


def start(root: Path) -> None:
    with claimed(root):
        Folder.open(root, META).save("digits", RESULT)


def test_any_prefix_of_a_start_is_a_fresh_start(tmp_path):
    begun, at = [], 0
    while True:
        at += 1
        root = tmp_path / f"eval{at}"
        if not killed(root, at, lambda root=root: start(root)):
            break
        begun.append((root / "eval.json").exists())
        meta = META if begun[-1] else META | {"model": "b"}
        with claimed(root):
            folder = Folder.open(root, meta)
            assert not folder.done("digits") or begun[-1]
            folder.save("digits", RESULT)
        assert Folder.open(root, meta).done("digits")
        with pytest.raises(InputError, match="holds another evaluation"):
            Folder.open(root, META | {"model": "c"})
    assert at > 8 and begun == sorted(begun) and sum(begun) > 2


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(InputError, match="is not empty and holds no evaluation"):
        Folder.open(tmp_path, META)
