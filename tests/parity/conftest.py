"""What transformers' own processors make of a model folder, in a process where torchvision can be imported.

`make test` runs this folder apart, with torchvision from .venv/oracle on the path; elsewhere its tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinymodels
from transformers import AutoModelForImageTextToText, AutoProcessor

import zipr1

# Files of the tiny models that a test writes itself or goes without.
SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """family -> a folder of tiny random weights."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tinymodels.folder(family, tmp_path_factory.mktemp("base") / family)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def opened(weights, tmp_path_factory):
    """(family, settings files) -> `zipr1.load`'s model and processor, and those of transformers. A file that is None
    is left out."""

    def open_folder(family: str, files: dict[str, Any]) -> Any:
        base, folder = weights(family), tmp_path_factory.mktemp(family)
        for path in base.iterdir():
            if path.name not in (*SETTINGS, *files):
                (folder / path.name).symlink_to(path)
        for name, content in files.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
        model, ours = zipr1.load(str(folder), budget=1.0, device="cpu")
        theirs = AutoProcessor.from_pretrained(folder)
        stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
        return SimpleNamespace(model=model, ours=ours, theirs=theirs, stock=stock)

    return open_folder
