"""`merged`: a whole model, adapters merged into it, that any tool takes for an ordinary dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from zipr1.core.errors import RunError
from zipr1.export.source import Source
from zipr1.models import positions
from zipr1.models.families import FAMILIES
from zipr1.models.loading import save_folder
from zipr1.models.processors import Processor

SHARD = "5GB"  # the largest safetensors file, as on the hub


def write(
    source: Source,
    model: Any,
    peft_model: Any,
    processor: Processor,
    dtype: torch.dtype,
    folder: Path,
) -> Any:
    """Write `model` in `dtype`. peft_model: peft's wrapper around it, or None. Returns what was written."""
    plain = peft_model.merge_and_unload() if peft_model is not None else model
    plain.to(dtype)
    for name in plain.config.sub_configs:  # save_pretrained minds the whole one alone
        getattr(plain.config, name).dtype = dtype
    # Servers read it (zipr1/serving); who does not know the key carries it along.
    plain.config.zipr1 = {"sparse": source.recipe.sparse.model_dump(mode="json")}
    plain.generation_config.suppress_tokens = sorted(processor.placeholder.values())
    save_folder(plain, processor.tokenizer, processor.settings, folder, shard=SHARD)
    return plain


def reload(source: Source, folder: Path, written: Any, device: torch.device) -> Any:
    """The folder as stock transformers loads it, in float32, after every tensor was found to be the one written."""
    found = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True)
    wanted = written.state_dict()
    for name, tensor in found.state_dict().items():
        if name not in wanted or not torch.equal(tensor.cpu(), wanted[name].cpu()):
            raise RunError(
                f"{folder}: {name} did not come back as it was written; check the disk and export again"
            )
    # Where words after a clip stand is no part of the weights, and the run has it from Qwen.
    if FAMILIES[found.config.model_type].qwen_positions:
        positions.correct(found)
    return found.float().to(device).eval()
