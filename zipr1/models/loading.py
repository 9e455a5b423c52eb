"""Weights and processors of a model folder: read, written, copied, and where and in what dtype they live.

Weights are read from safetensors only; remote code never runs unless the caller's settings ask for it. What a model's
path means is found in open.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from zipr1_kernels import unusable

from zipr1.core import hub
from zipr1.core.errors import InputError, Missing
from zipr1.core.recipe import Lora, Model
from zipr1.core.text import reason
from zipr1.models import adapters, families, misshapen
from zipr1.models.beside import read_json
from zipr1.models.foreign import foreign
from zipr1.models.patterns import LORA_TARGETS
from zipr1.models.pixels import WHOLE, PixelSettings
from zipr1.models.sparse.attention import ATTENTION
from zipr1.models.tensors import check_finite, check_names, refuse, shapes
from zipr1.models.trust import refuse_code, refuse_elsewhere

log = logging.getLogger("zipr1")

# The run's own display shows what goes on; bars of loading and saving shards would break it.
transformers.utils.logging.disable_progress_bar()

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else CUDA where there is one, else the CPU; a numbered GPU becomes the current one.

    Raises InputError if it is not there, or if the kernels that ZIPR1_KERNELS asks for cannot run on it.
    """
    chosen = find_device(device)
    trouble = unusable(chosen.type == "cuda")
    if trouble:
        raise InputError(trouble)
    if chosen.type == "cuda" and chosen.index is not None:
        # Triton's kernels and whatever names no device run on the current GPU, which else is the first one.
        torch.cuda.set_device(chosen)
    return chosen


def without_plans(device: torch.device) -> None:
    """Switch cuDNN's form of torch's attention off, for the whole process, where `device` is a GPU.

    It plans for every shape of its input anew, tens of milliseconds of the host each, and here the shape changes: the
    number of kept tokens from layer to layer and prompt to prompt, that of dense decoding with every token. For those
    who measure one shape again and again (zipr1/profiling) it stays as torch has it.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def find_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--device {device}: not usable here ({first}); use cpu, or leave it out"
        ) from None
    return chosen


def choose_dtype(settings: Model, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 for frozen weights under adapters on a GPU, else float32: AdamW's small steps would round to
    nothing in bfloat16 weights, and on a CPU low precision is slower."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and settings.lora else torch.float32
    return WEIGHT_DTYPES[settings.dtype]


def from_pretrained(folder: str, settings: Model, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or a hub id. Raises InputError where they do not load."""
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    away = not Path(folder).is_dir()
    hint = hub.how_to_get(folder, "model") if away else "check the folder"
    with foreign(f"model.path: {settings.path} does not load", hint):
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            families.find(config.model_type, settings.path)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            # Settings of a wrong type fail here; without its files a tokenizer is made that knows no word.
            if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
                raise InputError(
                    f"model.path: {settings.path} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); "
                    "copy it from the model that this one was made from"
                )
            model = whole_model(AutoModelForImageTextToText, folder, dtype=dtype, **options)
            _drop_inert(model.generation_config, settings.path)
        except OSError:
            why = hub.unreachable() if away else None
            if why is None:
                raise
            raise Missing(
                f"model.path: {settings.path} is not on this machine, or not all of it, and {why}; {hint}"
            ) from None
    template = _chat_template(folder, settings.revision)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def whole_model(kind: Any, folder: str, **options: Any) -> Any:
    """A model of transformers' class `kind` whose every weight comes from the folder's safetensors. Raises InputError,
    with the names, where one is missing, of another shape, or not the model's: transformers makes random weights of the
    first two and drops the third, with a warning. And where config.json asks for code of the hub."""
    refuse_code(folder, options.get("revision"))
    refuse_elsewhere(folder)
    try:
        with quiet_report():
            model, found = kind.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with their names
                **options,
            )
    except RuntimeError:
        refuse(folder, (), (), misshapen.find(folder, options.get("revision")))
        raise
    # What the model computes for itself, and older files have all the same.
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    refuse(
        folder,
        found["missing_keys"],
        [name for name in found["unexpected_keys"] if name not in computed],
        {name: (tuple(here), tuple(wanted)) for name, here, wanted in found["mismatched_keys"]},
    )
    if found["error_msgs"]:
        raise InputError(f"{folder}: does not load ({reason(found['error_msgs'][0])})")
    return model


@contextlib.contextmanager
def quiet_report() -> Iterator[None]:
    """transformers' own table of what did not load is left out: one line tells it."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _drop_inert(config: Any, path: str) -> None:
    """Unset what a generation_config.json sets and its own mode of generation does not use, such as a temperature
    beside `do_sample: false`: transformers refuses to save it once anything else in it was changed."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        inert = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
        for name in inert:
            setattr(config, name, None)
        log.warning(
            "%s: its generation_config.json sets %s, which its other settings leave without effect; left out",
            path,
            ", ".join(inert),
        )


def _chat_template(folder: str, revision: str | None) -> str | dict[str, str] | None:
    """The template in a file that transformers' processor classes read and tokenizers do not; None where there is none,
    and the tokenizer's own holds."""
    for name in (WHOLE, "chat_template.json"):
        found = (read_json(folder, name, revision) or {}).get("chat_template")
        if isinstance(found, str | dict):
            return found
    return None


def add_lora(model: Any, lora: Lora, revision: str | None = None) -> Any:
    """Adapters on the language model's projections; everything else frozen. revision: of the model, written beside the
    adapters for whoever loads them."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        revision=revision,
    )
    with warnings.catch_warnings():
        # peft asks transformers by an older name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # New modules begin in training mode: their dropout would part the update's answers from the sampled ones.
        return get_peft_model(model, settings).eval()


def frozen_copy(model: Any) -> Any:
    """A copy whose weights never change, for the dense reference; a frozen vision tower is shared, not copied."""
    towers = families.towers(model)
    shared = not any(p.requires_grad for tower in towers for p in tower.parameters())
    frozen = copy.deepcopy(model, memo={id(tower): tower for tower in towers} if shared else {})
    return frozen.requires_grad_(False).eval()


def random_model(values: dict[str, Any], layers: int, device: torch.device, dtype: str) -> Any:
    """A model of a config.json's `values` with `layers` decoder layers, a tower of one block and random weights."""
    vision = {**values["vision_config"], "depth": 1}
    for blocks in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if blocks in vision:
            vision[blocks] = [0]
    few: dict[str, Any] = {"num_hidden_layers": layers}
    if "text_config" in values:
        few = {"text_config": {**values["text_config"], **few}}
    config = AutoConfig.for_model(**{**values, **few, "vision_config": vision})
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=WEIGHT_DTYPES[dtype])
    model.set_attn_implementation({"text_config": ATTENTION})
    return model.eval().requires_grad_(False)


def save_folder(
    model: Any,
    tokenizer: Any,
    settings: PixelSettings,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    shard: str = "50GB",
) -> None:
    """A model folder that stock transformers loads: weights, config, tokenizer, chat template, pixel settings.

    weights: in place of the model's own, where it holds a part of them. shard: the largest size of one safetensors
    file.
    """
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard)
    save_processor(tokenizer, settings, model.config.model_type, folder)


def save_processor(tokenizer: Any, settings: PixelSettings, family: str, folder: Path) -> None:
    """Tokenizer, chat template, and pixel settings under the names of transformers' own classes.

    processor_config.json is what transformers 5 reads; the other two are for version 4 and for servers.
    """
    tokenizer.save_pretrained(folder)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    for key in (
        "is_local",
        "local_files_only",
        "name_or_path",
    ):  # of this machine, not of the model
        known.pop(key, None)
    _write_json(folder / "tokenizer_config.json", known)
    known_as = families.FAMILIES[family]
    processor = {"processor_class": known_as.processor}
    image = {"image_processor_type": known_as.pixels, **_pixel_values(settings)}
    image |= known_as.written(settings.tile, settings.cuts)
    parts: dict[str, Any] = {"image_processor": image}
    if known_as.clips is not None:
        video = {"video_processor_type": known_as.video, **_clip_values(settings)}
        parts["video_processor"] = video
        _write_json(folder / "video_preprocessor_config.json", {**processor, **video})
    _write_json(folder / "processor_config.json", {**processor, **parts})
    _write_json(folder / "preprocessor_config.json", {**processor, **image})


def _pixel_values(settings: PixelSettings) -> dict[str, Any]:
    return {
        "size": {"height": settings.tile, "width": settings.tile}
        if settings.tile
        else {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        "patch_size": settings.patch,
        "temporal_patch_size": settings.temporal,
        "merge_size": settings.merge,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "resample": settings.resample,
    }


def _clip_values(settings: PixelSettings) -> dict[str, Any]:
    rule = settings.frame_rule
    values = _pixel_values(settings.of("video")) | {
        "do_sample_frames": rule.fps is not None or rule.number is not None,
        "min_frames": rule.least,
        "max_frames": rule.most,
    }
    for name, value in (("fps", rule.fps), ("num_frames", rule.number)):
        if value is not None:
            values[name] = value
    tokens = settings.clip_tokens
    if settings.clip_pixels is not None and settings.max_frame_pixels is not None:
        tokens = settings.max_frame_pixels // settings.factor**2
    return values | ({"cap_pixels_per_frame": True, "max_video_tokens": tokens} if tokens else {})


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def restore_weights(model: Any, folder: Path) -> None:
    """A model or adapter folder written by `Policy.save`, read into `model`.

    Raises InputError where its tensors are not those of `model`, or not finite.
    """
    if (folder / "adapter_config.json").exists():
        adapters.restore(model, folder)
        return
    # Through from_pretrained: on disk the weights have the names of the hub, not those of the live modules.
    with foreign(f"{folder}: does not load", "bring it back from a copy"):
        saved = whole_model(type(model), str(folder), dtype=model.dtype).state_dict()
    check_names(str(folder), shapes(model.state_dict()), shapes(saved))
    check_finite(str(folder), saved.items())
    model.load_state_dict(saved)
