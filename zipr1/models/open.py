"""What a model's path means, and what belongs to it: the one way in which every command opens a model.

A path is `tiny`, a run, the model folder of one of a run's checkpoints, a folder made by `zipr1 export`, an adapter of
peft, any other model folder, a hub id, or `scratch`. With it come the sparsity it was trained for, the bounds of its
pictures and of its clips' frames, the frames of a clip, and of an adapter the base with the base's own revision and
bounds. What the caller sets wins over all of it.

Files beside weights are data: none of them can make the code of a model folder run, for `trust_remote_code` is taken
from the caller's settings alone, and holds for the path that the caller gave, not for a base that is named there.
"""

from __future__ import annotations

import importlib.resources
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from zipr1.core import checksums, distributed, hub
from zipr1.core.config import show
from zipr1.core.errors import InputError
from zipr1.core.load import load_written
from zipr1.core.recipe import Data, Model, Recipe, Sparse
from zipr1.core.records import Record, wrong
from zipr1.core.runs import names_nothing
from zipr1.models import families, manifest, positions
from zipr1.models.adapters import with_adapter
from zipr1.models.beside import read_json
from zipr1.models.foreign import foreign
from zipr1.models.loading import (
    WEIGHT_DTYPES,
    choose_device,
    choose_dtype,
    from_pretrained,
)
from zipr1.models.pixels import PixelSettings, has_pixel_settings, saved
from zipr1.models.processors import Processor
from zipr1.models.random_weights import build_model, build_tokenizer
from zipr1.models.tensors import check_finite

log = logging.getLogger("zipr1")

# Keys of a recipe's `model` section that belong to a model, wherever it is opened.
BOUNDS = ("min_pixels", "max_pixels", "max_frame_pixels")


@dataclass(frozen=True)
class ModelSource:
    """What a path means, found from small files alone.

    path: as it was given. place: the folder of the weights or of the adapter, or a hub id; empty for `scratch`.
    adapter: the folder of adapter_config.json, or None for whole models; base: what the adapter was trained on, None
    without one. recipe: of the run that made it, None for other models. sparse, sparse_from: how its tokens are chosen
    and where that is written. bounds: those of BOUNDS that are set for it in recipes.
    """

    path: str
    place: str
    adapter: Path | None
    base: Model | None
    recipe: Recipe | None
    sparse: Sparse
    sparse_from: str
    bounds: dict[str, int]

    @property
    def data(self) -> Data:
        """`max_frames` and `fps` of its clips, among others: the run's, or a recipe's defaults."""
        return self.recipe.data if self.recipe is not None else Data()


@dataclass
class Opened:
    """A loaded model. settings: the caller's, completed by what belongs to the path. peft_model: the model with its
    adapter in it, where `open_model` was told not to merge; `model` is changed with it."""

    model: Any
    processor: Processor
    settings: Model
    source: ModelSource
    peft_model: Any = None


class _AdapterConfig(Record):
    base_model_name_or_path: str
    revision: str | None = None


def find_source(path: str, adapters: tuple[str, ...] = ()) -> ModelSource:
    """What `path` means; nothing is loaded. adapters: those that were trained on it, one on the other.

    Raises InputError for a path that looks local and does not exist, a run without a checkpoint, a folder that was
    exported and changed since, or adapters whose bases go round in a circle.
    """
    if path in adapters:
        raise InputError(
            f"model.path: {path} is an adapter of itself ({' -> '.join([*adapters, path])}); mend "
            "base_model_name_or_path in adapter_config.json"
        )
    if path == "scratch":
        return ModelSource(path, "", None, None, None, Sparse(), "the defaults", {})
    place = resolve(path)
    written = _written_recipe(path)
    recipe = load_written(written) if written is not None else None
    exported = manifest.read(Path(place)) if Path(place).is_dir() else None
    if path == "tiny":
        sparse, sparse_from = manifest.TINY, "the embedded model"
    elif exported is not None:
        sparse = Sparse.model_validate(exported["sparse"])
        sparse_from = str(Path(place) / manifest.NAME)
    elif recipe is not None:
        sparse, sparse_from = recipe.sparse, str(written)
    else:
        sparse, sparse_from = Sparse(), "the defaults"
    adapter = adapter_of(place)
    base = _base_of(adapter, recipe) if adapter is not None else None
    bounds: dict[str, int] = {}
    if base is not None:
        below = find_source(base.path, (*adapters, path)).bounds
        bounds |= {} if has_pixel_settings(place) else below
    if recipe is not None:
        bounds |= _set_bounds(recipe.model)
    return ModelSource(path, place, adapter, base, recipe, sparse, sparse_from, bounds)


def resolve(path: str) -> str:
    """`tiny`, a run directory or a folder -> a folder; anything else is taken for a hub id.

    Raises InputError for a path that looks local and does not exist, or a run without a checkpoint.
    """
    if path == "tiny":
        return str(importlib.resources.files("zipr1") / "assets" / "tiny")
    folder = Path(path)
    if (folder / "last").exists():
        return str((folder / "last" / "model").resolve())
    if (folder / checksums.COMPLETE).is_file() and (folder / "model").is_dir():  # RUN/best
        return str((folder / "model").resolve())
    if (folder / "run.json").exists():
        raise InputError(
            f"model.path: the run {path} has no complete checkpoint yet; resume it or name another"
        )
    if folder.is_dir():
        manifest.read(folder)
        if not (folder / "config.json").exists() and adapter_of(folder) is None:
            raise InputError(
                f"model.path: {path} has no config.json; give a model folder, a run, a hub id or 'tiny'"
            )
        return str(folder)
    if names_nothing(path):
        raise InputError(
            f"model.path: {path} does not exist; give a model folder, a run, a hub id or 'tiny'"
        )
    try:
        validate_repo_id(path)
    except ValueError:  # such as `a b/c`
        raise InputError(
            f"model.path: {path} does not exist, and the hub has no such names; give a model folder, a run, a hub id "
            "or 'tiny'"
        ) from None
    return path


def origin(settings: Model) -> Model:
    """What the first run of a row of runs, each trained from the one before, started from."""
    seen: set[str] = set()
    while settings.path not in seen:
        seen.add(settings.path)
        written = _written_recipe(settings.path)
        if written is not None:
            settings = load_written(written).model
    return settings


def adapter_of(folder: str | Path) -> Path | None:
    """Where the adapter of a checkpoint (beside its base) or of an exported folder lies; None for whole models."""
    for path in (Path(folder) / "adapter", Path(folder)):
        if (path / "adapter_config.json").is_file():
            return path
    return None


def is_here(path: str, revision: str | None = None) -> bool:
    """Whether a model loads without a network: a folder, a run, `tiny`, or a hub id whose weights were downloaded.

    Raises InputError for a path that looks local and does not exist.
    """
    place = resolve(path)
    if Path(place).is_dir():
        return True
    return any(
        isinstance(try_to_load_from_cache(place, name, revision=revision), str)
        for name in ("model.safetensors", "model.safetensors.index.json")
    )


def stored_dtype(path: str, revision: str | None = None) -> str:
    """The dtype that a model's weights have on disk, or its base's; `auto` where that is not known."""
    source = find_source(path)
    if source.base is not None:
        return stored_dtype(source.base.path, revision or source.base.revision)
    try:
        with foreign(source.place, "its dtype is not known"), hub.offline_if_unreachable():
            config = AutoConfig.from_pretrained(
                source.place, revision=revision, trust_remote_code=False
            )
    except InputError:
        return "auto"
    return next((name for name, known in WEIGHT_DTYPES.items() if known == config.dtype), "auto")


def inference_dtype(dtype: str, device: torch.device) -> str:
    """The dtype to measure a model in: `auto` is bfloat16 on a GPU, where models are run so, and float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def open_model(
    settings: Model,
    device: str | torch.device | None = None,
    seed: int = 0,
    merge_adapter: bool = True,
) -> Opened:
    """The model that `settings.path` names, in `settings.dtype` on `device`, and its processor.

    Of `settings`, what is not set (None) is taken from what belongs to the path. seed: of the weights of `scratch`.
    merge_adapter: False leaves the adapter of a run or a folder apart from its base, in `Opened.peft_model`. Raises
    InputError where nothing loads, where the files are not as they were written, and for weights that are missing, of
    another shape, or not finite.
    """
    chosen = choose_device(device)
    dtype = choose_dtype(settings, chosen)
    source = find_source(settings.path)
    inherited = {k: v for k, v in source.bounds.items() if getattr(settings, k) is None}
    settings = settings.model_copy(update=inherited)
    if settings.path == "scratch":
        model, tokenizer = _from_scratch(settings, seed)
    else:
        with hub.offline_if_unreachable():
            model, tokenizer = _load(source, settings, dtype, merge_adapter)
    if families.find(str(model.config.model_type), settings.path).qwen_positions:  # type: ignore[union-attr]
        positions.correct(model)
    peft_model = None
    if source.adapter is not None and not merge_adapter:
        peft_model = with_adapter(model, source.adapter)
    with hub.offline_if_unreachable():
        processor = _processor(model, tokenizer, source, settings)
    log.info("%s: %s", settings.path, processor.settings)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    _check_tokens(settings.path, "generation_config.json: eos_token_id", ends, len(tokenizer))
    processor.stop_at(ends)
    model.to(device=chosen, dtype=dtype).eval()
    check_finite(settings.path, model.state_dict().items())
    return Opened(model, processor, settings, source, peft_model)


def _load(
    source: ModelSource, settings: Model, dtype: torch.dtype, merge: bool
) -> tuple[torch.nn.Module, Any]:
    """Model and tokenizer of anything but `scratch`; of an adapter its base, with the adapter merged into it."""
    if distributed.is_first():
        _check_bytes(source)
    if source.base is None or source.adapter is None:
        return from_pretrained(source.place, settings, dtype)
    # The folder named its base, not the caller, whose trust in code is for what the caller named.
    named = {**_reference(source.base, settings), "trust_remote_code": False}
    asked = settings.model_copy(update=named)
    try:
        model, tokenizer = _load(find_source(source.base.path), asked, dtype, merge=True)
    except InputError as error:
        if not settings.trust_remote_code:
            raise
        raise type(error)(
            f"{error}; model.trust_remote_code is for {settings.path} alone, and its base {source.base.path} is opened "
            "without: if it needs code, merge the adapter into it with peft, and give the merged model"
        ) from None
    if not merge:
        return model, tokenizer
    # peft froze the base; what trains is the recipe's choice.
    merged = with_adapter(model, source.adapter).merge_and_unload().requires_grad_(True)
    # An adapter that is trained on it writes down what it was trained on: this one, not its base.
    merged.name_or_path = merged.config.name_or_path = source.place
    return merged, tokenizer


def _check_bytes(source: ModelSource) -> None:
    """Raises InputError, with the file, if a checkpoint or an exported folder is not as it was written."""
    place = Path(source.place)
    inside = [p for p in place.parents[:2] if (p / checksums.COMPLETE).is_file()]
    checkpoint = inside[0] if inside else place.parent
    if (Path(source.path) / "last").exists() or (checkpoint / checksums.COMPLETE).is_file():
        problem = checksums.problem(checkpoint, f"{place.relative_to(checkpoint).as_posix()}/")
        if problem is not None:
            raise InputError(
                f"{checkpoint}: {problem}; bring it back from a copy, or name another checkpoint's model folder"
            )
    elif place.is_dir():
        manifest.check_bytes(place)


def _from_scratch(settings: Model, seed: int) -> tuple[torch.nn.Module, Any]:
    if not settings.config:
        raise InputError(
            "model.path is scratch and model.config is missing; see recipes/tiny_base.yaml"
        )
    tokenizer = build_tokenizer(settings.config.get("words") or ())
    return build_model(tokenizer, settings.config, seed), tokenizer


def _processor(model: Any, tokenizer: Any, source: ModelSource, settings: Model) -> Processor:
    config = model.config
    family = families.find(config.model_type, settings.path)
    side, _, besides = family.tile(config) if family.tile else (0, 0, 0)
    revision = settings.revision
    while source.base is not None and not has_pixel_settings(source.place):
        revision = _reference(source.base, settings)["revision"]
        source = find_source(source.base.path)
    pixels = PixelSettings.read(
        source.place,
        families.merge_of(config.vision_config, config),
        {name: getattr(settings, name) for name in BOUNDS},
        (settings.config or {}).get("pixels"),
        revision,
        families.pixel_defaults(family),
        family.clips,
        tile=side,
        besides=besides,
    )
    if family.cuts is not None:
        found = saved(source.place, "image", revision) or {}
        cuts = family.cuts(found, config, side, source.place)
        pixels = replace(pixels, cuts=cuts.within(settings.max_pixels, side))
    video = config.video_token_id if family.clips else None
    marks = [config.image_token_id, *([video] if family.clips else [])]
    _check_tokens(
        settings.path, "config.json: image_token_id, video_token_id", marks, len(tokenizer)
    )
    return Processor(tokenizer, pixels, config.image_token_id, video, family.spell)


def _check_tokens(path: str, where: str, tokens: list[Any], size: int) -> None:
    """Raises InputError for numbers that are no words of a tokenizer of so many."""
    for token in tokens:
        if type(token) is not int or not 0 <= token < size:
            raise InputError(
                f"{path}: {where}: got {show(token)}; a token's number from 0 to {size - 1:,} is allowed; copy the "
                "model folder again"
            )


def _reference(base: Model, settings: Model) -> dict[str, Any]:
    """Path and revision of a base; a revision that the caller gives wins."""
    return {"path": base.path, "revision": settings.revision or base.revision}


def _base_of(adapter: Path, recipe: Recipe | None) -> Model:
    """The base that an adapter was trained on: path and revision. recipe: of the run that trained it."""
    if recipe is not None and recipe.model.path == "tiny":
        return Model(path="tiny")  # in the package, wherever that is now
    config = read_json(adapter, "adapter_config.json", None) or {}
    trouble = wrong(config, _AdapterConfig)
    if trouble:
        raise InputError(f"{adapter / 'adapter_config.json'}: {trouble}; copy the folder again")
    path, revision = config["base_model_name_or_path"], config.get("revision")
    if recipe is not None and recipe.model.path == path:
        revision = revision or recipe.model.revision
    return Model(path=path, revision=revision)


def _written_recipe(path: str) -> Path | None:
    """recipe.yaml of the run, of the run of a checkpoint's model folder, or of the exported folder that `path` is."""
    folder = Path(path)
    places = [(folder, "run.json"), (folder, manifest.NAME)]
    whole = folder.resolve()
    if (whole / checksums.COMPLETE).is_file():  # RUN/best, RUN/checkpoints/step-N
        whole = whole / "model"
    if whole.name == "model":  # RUN/checkpoints/step-N/model, or RUN/last/model without a link
        places += [(root, "run.json") for root in list(whole.parents)[1:3]]
    for root, mark in places:
        if (root / mark).is_file() and (root / "recipe.yaml").is_file():
            return root / "recipe.yaml"
    return None


def _set_bounds(settings: Model) -> dict[str, int]:
    return {k: getattr(settings, k) for k in BOUNDS if getattr(settings, k) is not None}
