"""Adapters of peft, read from safetensors alone: peft itself would also unpickle a .bin file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from zipr1.core.config import show
from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads
from zipr1.core.text import reason
from zipr1.models import patterns
from zipr1.models.foreign import foreign
from zipr1.models.tensors import check_finite, check_names, shapes

WEIGHTS = "adapter_model.safetensors"
# A decoder's embeddings and what makes logits: one tensor in models that tie them.
ENDS = ("embed_tokens", "lm_head")


def with_adapter(model: Any, folder: Path) -> Any:
    """peft's model: `model`, changed in place, with the adapter of a folder in it, not merged.

    Raises InputError for a kind of adapter other than LoRA, a folder without safetensors, settings that peft does not
    take, or tensors that are not those of its settings.
    """
    _check_kind(folder)
    from peft import PeftModel

    tensors = read(folder)
    patterns.check(folder, _settings(folder), [name for name, _ in model.named_modules()])
    changed = [n for n in tensors if any(end in n for end in ENDS) and "token_adapter" not in n]
    if any("lora_" in name for name in changed) and _settings(folder).get("ensure_weight_tying"):
        raise InputError(
            f"{folder}: its adapters change embeddings and logits by one and the same change (ensure_weight_tying), "
            "which is not handled; train them without it"
        )
    if changed:
        _untie(model)
    hint = "check adapter_config.json and that the base is the one it was trained on"
    with (
        foreign(f"{folder}: peft does not take this adapter", hint),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what is missing is told below, by name
        adapted = PeftModel.from_pretrained(model, str(folder), ignore_mismatched_sizes=True)
    _check(adapted, folder, tensors)
    return adapted


def _check_kind(folder: Path) -> None:
    """Other kinds are not merged into weights here, and some read files that their settings name outside of the folder:
    further adapters (XLORA), tokenizers and tensors to start prompts from."""
    kind = _settings(folder).get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{folder / 'adapter_config.json'}: peft_type: got {show(kind)}; LORA is allowed; merge others into their "
            "base with peft, and give the merged model"
        )


def _untie(model: Any) -> None:
    """Give a model whose embeddings also make its logits weights of their own for the two, in memory and in its config.

    An adapter that changes one of them changes it alone; merged into weights that both use it would change the other.
    """
    ins, outs = model.get_input_embeddings(), model.get_output_embeddings()
    if outs is not None and outs.weight is ins.weight:
        outs.weight = torch.nn.Parameter(
            outs.weight.detach().clone(), requires_grad=outs.weight.requires_grad
        )
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json; what is wrong with it peft tells."""
    try:
        return dict(loads((folder / "adapter_config.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


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
    # peft writes whole embeddings beside the adapters where these are on them, or their size was changed, and reads
    # them back.
    whole = tuple(f"{end}.{part}" for end in ENDS for part in ("weight", "base_layer.weight"))
    found = {
        name: shape
        for name, shape in shapes(tensors).items()
        if name in wanted or not name.endswith(whole)
    }
    check_names(str(folder / WEIGHTS), wanted, found)
