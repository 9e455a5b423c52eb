"""`adapter`: what training added to the base, as peft reads it; small, and of use to whoever has the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zipr1.core.errors import InputError
from zipr1.export.source import Source
from zipr1.models.adapters import WEIGHTS, read, with_adapter
from zipr1.models.beside import read_json
from zipr1.models.loading import save_processor
from zipr1.models.open import open_model
from zipr1.models.processors import Processor


def write(
    source: Source,
    model: Any,
    peft_model: Any,
    processor: Processor,
    dtype: torch.dtype,
    folder: Path,
) -> Any:
    """Copy the run's adapter, cast to `dtype`. Raises InputError for a run that trained all weights."""
    if peft_model is None:
        raise InputError(
            f"{source.root}: trained all weights and has no adapter; use --format merged"
        )
    trained = source.weights / "adapter"
    tensors = {name: t.to(dtype).contiguous() for name, t in read(trained).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = read_json(trained, "adapter_config.json", None)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_processor(processor.tokenizer, processor.settings, model.config.model_type, folder)
    return tensors


def reload(source: Source, folder: Path, written: Any, device: torch.device) -> Any:
    """A fresh copy of the base, in float32, with the adapter of `folder`."""
    assert source.trained_on is not None
    base = source.trained_on.model_copy(update={"dtype": "float32"})
    return with_adapter(open_model(base, device).model, folder).merge_and_unload().eval()
