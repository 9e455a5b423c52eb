"""Sizes of a model that is planned with and not here: from a bundled config, without weights."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from zipr1.core.jsontext import loads
from zipr1.models import cost, families
from zipr1.models.cost import Shape
from zipr1.models.loading import LORA_TARGETS
from zipr1.models.memory import loaded_shape


def bundled_shape(path: str) -> Shape | None:
    """The bundled config of a hub id such as `Qwen/Qwen2.5-VL-7B-Instruct`, or None."""
    name = path.rpartition("/")[2].lower().removesuffix("-instruct")
    if name in cost.bundled():
        return cost.shape_of(name)
    # Those whose sizes do not tell how many parameters they have: transformers' class does, without memory for them.
    file = importlib.resources.files("zipr1") / "assets" / "planned" / f"{name}.json"
    if not file.is_file():
        return None
    config = AutoConfig.for_model(**loads(file.read_bytes()))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    merge = families.merge_of(config.vision_config, config)[1]
    shape = loaded_shape(config.to_dict(), name, merge, parts_of(model))
    adapted = [m for n, m in model.named_modules() if re.fullmatch(LORA_TARGETS, n)]
    return replace(shape, per_rank=sum(m.in_features + m.out_features for m in adapted))


def parts_of(model: Any) -> dict[str, int]:
    """Parameters of a transformers model by part, as `memory.parameters` gives them; adapters do not count."""
    own = [p for n, p in model.named_parameters() if "lora_" not in n]
    vision = sum(p.numel() for tower in families.towers(model) for p in tower.parameters())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = sum(p.numel() for p in {id(m.weight): m.weight for m in ends}.values())
    total = sum(p.numel() for p in own)
    return {
        "vision": vision,
        "decoder": total - vision - embeddings,
        "embeddings": embeddings,
    }
