"""Adapters of peft, read from safetensors alone: peft itself would also unpickle a .bin file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from zipr1.core.errors import InputError
from zipr1.core.text import reason
from zipr1.models.foreign import foreign
from zipr1.models.tensors import check_finite, check_names, shapes

WEIGHTS = "adapter_model.safetensors"


def with_adapter(model: Any, folder: Path) -> Any:
    """peft's model: `model`, changed in place, with the adapter of a folder in it, not merged.

    Raises InputError for a folder without safetensors, settings that peft does not take, or tensors that are not those
    of its settings.
    """
    from peft import PeftModel

    tensors = read(folder)
    hint = "check adapter_config.json and that the base is the one it was trained on"
    with (
        foreign(f"{folder}: peft does not take this adapter", hint),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what is missing is told below, by name
        adapted = PeftModel.from_pretrained(model, str(folder), ignore_mismatched_sizes=True)
    _check(adapted, folder, tensors)
    return adapted


def restore(adapted: Any, folder: Path) -> None:
    """The weights of an adapter folder into `adapted`, peft's model. Raises InputError for those of another one."""
    from peft import set_peft_model_state_dict

    tensors = read(folder)
    _check(adapted, folder, tensors)
    set_peft_model_state_dict(adapted, tensors)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, on the CPU, under their names in the file."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: has no {WEIGHTS}, and nothing else is read: .bin files can run code; save the adapter as "
            "safetensors, peft's own default"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS}: not readable as safetensors ({reason(error)}); copy the folder again"
        ) from None
    check_finite(str(folder / WEIGHTS), tensors.items())
    return tensors


def _check(adapted: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from peft import get_peft_model_state_dict

    wanted = shapes(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # peft writes whole embeddings beside the adapters when their size was changed for it, and reads them back.
    found = {
        name: shape
        for name, shape in shapes(tensors).items()
        if name in wanted or not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    check_names(str(folder / WEIGHTS), wanted, found)
