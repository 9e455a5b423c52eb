"""Which tensor of a file it is that transformers could not put together: of stacked experts it names none."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from zipr1.models.tensors import Shape, shapes

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")


def find(folder: str, revision: str | None = None) -> dict[str, tuple[Shape, Shape]]:
    """Tensors of a model folder, or of a hub id that was downloaded, whose sizes are not the model's: by their names in
    the files, the shape there and the model's. Only the headers of the files are read.

    A tensor whose dimensions stand in another order is none of them: some families are stored so.
    """
    place = Path(folder)
    if not place.is_dir():
        place = Path(snapshot_download(folder, revision=revision, local_files_only=True))
    here: dict[str, Shape] = {}
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            here |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    wanted = shapes(model.state_dict())
    # Experts that a file has one by one are compared with each other.
    groups: dict[tuple[str, str], Counter[Shape]] = {}
    for name, shape in here.items():
        if match := _EXPERT.fullmatch(name):
            groups.setdefault((match[1], match[2]), Counter())[shape] += 1
    found = {}
    for name, shape in here.items():
        right = wanted.get(name)
        if match := _EXPERT.fullmatch(name):
            right = groups[match[1], match[2]].most_common(1)[0][0]
        if right is not None and sorted(shape) != sorted(right):
            found[name] = (shape, right)
    return found
