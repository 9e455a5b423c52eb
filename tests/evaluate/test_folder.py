"""The folder of an evaluation: what a kill leaves of it is taken again, and by another evaluation where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import killed

from zipr1.core.errors import InputError
from zipr1.core.folders import claimed
from zipr1.evaluate.folder import Folder

META = {"model": "a", "budgets": [1.0]}


def start(root: Path) -> None:
    with claimed(root):
        Folder.open(root, META).save("digits", {"task": "digits", "rows": []})


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
            folder.save("digits", {"task": "digits"})
        assert Folder.open(root, meta).done("digits")
        with pytest.raises(InputError, match="holds another evaluation"):
            Folder.open(root, META | {"model": "c"})
    assert at > 8 and begun == sorted(begun) and sum(begun) > 2


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(InputError, match="is not empty and holds no evaluation"):
        Folder.open(tmp_path, META)
