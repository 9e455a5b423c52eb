"""Model families: where each has its tower, how its pictures become features, how its tokens get their places.

All that is particular to a family is a row of FAMILIES. Families with `tile` see squares, as many as their own
processors make of a picture (tiles.py). Clips are handled for the families of Qwen alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from zipr1.core.errors import InputError
from zipr1.core.text import reason
from zipr1.data.video import FrameRule
from zipr1.models import spelling, tiles
from zipr1.models.beside import read_json
from zipr1.models.pixels import (
    PICTURE_DEFAULTS,
    QWEN2_CLIPS,
    QWEN3_CLIPS,
    ClipClass,
    clip_rule,
)
from zipr1.models.tiles import Cuts
from zipr1.models.visual import Visual

EncodeVision = Callable[[Any, str, Sequence[Visual], torch.device], list[torch.Tensor]]
# What a prompt has: pictures and clips in order.
Media = Sequence[Visual]


@dataclass(frozen=True)
class Family:
    """encode_vision: (model, kind, visuals of that kind, device) -> features `(tokens, hidden)` of each, or, with
    deepstack, `(tokens, hidden * (1 + depth))`: what the first decoder layers are given besides. Model: `model.model`.

    inputs: visuals of each prompt of a batch -> the arguments for them of transformers' own forward and `generate`.
    tower: attributes of `model.model` that see. spell: how a picture or clip is written in a prompt (spelling.py).
    mrope: positions are `(3, l)` by the model's `get_rope_index`, else 0, 1, ... qwen_positions: with that method from
    positions.py, in place of transformers'. clips: what `video` does besides its file; None: clips are not handled.
    tile: config -> pixels on a side of a tile, tokens on a side, and how many tokens come besides. cuts: settings of
    pictures, config, that side and the folder -> how many tiles. written: that side and the cuts -> settings beside an
    exported model with which transformers' own class makes as many.
    pixels, video, processor: transformers' classes that read preprocessor_config.json,
    video_preprocessor_config.json and processor_config.json.
    """

    encode_vision: EncodeVision
    inputs: Callable[[Sequence[Media]], dict[str, torch.Tensor]]
    tower: tuple[str, ...]
    pixels: str
    processor: str
    video: str = "Qwen2VLVideoProcessor"
    spell: spelling.Spell = spelling.plain
    mrope: bool = True
    qwen_positions: bool = False
    clips: ClipClass | None = QWEN2_CLIPS
    tile: Callable[[Any], tuple[int, int, int]] | None = None
    cuts: Callable[[Mapping[str, Any], Any, int, str], Cuts] | None = None
    written: Callable[[int, Cuts], dict[str, Any]] = lambda side, cuts: {}


def _qwen(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> Any:
    run = model.get_image_features if kind == "image" else model.get_video_features
    patches = torch.cat([v.patches for v in visuals]).to(device)
    return run(patches, torch.tensor([v.grid for v in visuals], device=device))


def _qwen2(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> list[Any]:
    out = _qwen(model, kind, visuals, device)
    return list(out.pooler_output if hasattr(out, "pooler_output") else out)


def _qwen3(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> list[Any]:
    out = _qwen(model, kind, visuals, device)
    whole, sizes = torch.cat(list(out.pooler_output)), [len(x) for x in out.pooler_output]
    # Parted by picture or not, which differs between versions of transformers.
    layers = [x if isinstance(x, torch.Tensor) else torch.cat(x) for x in out.deepstack_features]
    return list(torch.cat([whole, *layers], -1).split(sizes))


def _patches(rows: Sequence[Media]) -> dict[str, torch.Tensor]:
    """Patches `(n, ...)` and grids `(v, 3)` of all pictures and of all clips."""
    inputs = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        some = [v for row in rows for v in row if v.kind == kind]
        if some:
            inputs[pixels] = torch.cat([v.patches for v in some])
            inputs[grid] = torch.tensor([v.grid for v in some])
    return inputs


def _patches_in_time(rows: Sequence[Media]) -> dict[str, torch.Tensor]:
    """`_patches`, and the seconds `(v,)` that a temporal patch of each clip spans."""
    inputs, seconds = _patches(rows), [v.seconds for row in rows for v in row if v.kind == "video"]
    return {**inputs, "second_per_grid_ts": torch.tensor(seconds)} if seconds else inputs


def _tiles(rows: Sequence[Media]) -> dict[str, torch.Tensor]:
    """The tiles `(n, 3, S, S)` of all pictures."""
    tiles = [v.patches for row in rows for v in row]
    return {"pixel_values": torch.cat(tiles)} if tiles else {}


def _internvl(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> list[Any]:
    pixels = _tiles([visuals])["pixel_values"].to(device)
    out = model.get_image_features(pixel_values=pixels).pooler_output  # (tiles, tokens, hidden)
    return [part.flatten(0, 1) for part in out.split([len(v.patches) for v in visuals])]


def _llava_tiles(rows: Sequence[Media]) -> dict[str, torch.Tensor]:
    """Tiles `(n, most, 3, S, S)` of n pictures, of those with fewer zeros at the end, the sizes of the pictures
    `(n, 2)`, and how many each prompt has that has some."""
    shown = [v for row in rows for v in row]
    if not shown:
        return {}
    most = max(len(v.patches) for v in shown)
    pixels = torch.zeros(len(shown), most, *shown[0].patches.shape[1:])
    for room, visual in zip(pixels, shown, strict=True):
        room[: len(visual.patches)] = visual.patches
    sizes = torch.tensor([v.size for v in shown])
    several = torch.tensor([len(row) for row in rows if row])
    return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": several}


def _llava(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> list[Any]:
    out = []
    for visual in visuals:
        # One tile is a picture that is not alone.
        rows = [[visual]] if len(visual.patches) > 1 else [[visual, visual]]
        inputs = {name: values.to(device) for name, values in _llava_tiles(rows).items()}
        out.append(model.get_image_features(**inputs).pooler_output[0])
    return out


def _smolvlm_tiles(rows: Sequence[Media]) -> dict[str, torch.Tensor]:
    """Tiles `(B, most, 3, S, S)` of all pictures of a prompt; prompts with fewer have zeros at the end."""
    tiles = [[tile for visual in row for tile in visual.patches] for row in rows]
    most = max(len(row) for row in tiles)
    if not most:
        return {}
    pixels = torch.zeros(len(rows), most, *next(row[0].shape for row in tiles if row))
    for b, row in enumerate(tiles):
        for i, tile in enumerate(row):
            pixels[b, i] = tile
    return {"pixel_values": pixels}


def _smolvlm(model: Any, kind: str, visuals: Sequence[Visual], device: torch.device) -> list[Any]:
    pixels = _smolvlm_tiles([[visual] for visual in visuals])["pixel_values"].to(device)
    return list(model.get_image_features(pixel_values=pixels).pooler_output)


def _smolvlm_settings(side: int, cuts: Cuts) -> dict[str, Any]:
    whole = {"do_image_splitting": bool(cuts.along), "max_image_size": {"longest_edge": side}}
    return whole | ({"size": {"longest_edge": cuts.along * side}} if cuts.along else {})


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _square(config: Any, shrink: float, besides: int = 0) -> tuple[int, int, int]:
    vision = config.vision_config
    side = _side(vision.image_size)
    return side, round(side // _side(vision.patch_size) * shrink), besides


QWEN = "Qwen2VLImageProcessor"
_QWEN3 = Family(
    _qwen3,
    _patches,
    ("visual",),
    QWEN,
    "Qwen3VLProcessor",
    "Qwen3VLVideoProcessor",
    spelling.timed,
    clips=QWEN3_CLIPS,
)
# Without deepstack; of its layers those of full attention choose (sparse/hybrid.py).
_QWEN3_5 = replace(_QWEN3, encode_vision=_qwen2)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        _qwen2, _patches, ("visual",), QWEN, "Qwen2VLProcessor", qwen_positions=True
    ),
    "qwen2_5_vl": Family(
        _qwen2, _patches_in_time, ("visual",), QWEN, "Qwen2_5_VLProcessor", qwen_positions=True
    ),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "internvl": Family(
        _internvl,
        _tiles,
        ("vision_tower", "multi_modal_projector"),
        "GotOcr2ImageProcessor",
        "InternVLProcessor",
        spell=spelling.between("<img>", "</img>"),
        mrope=False,
        clips=None,
        tile=lambda config: _square(config, config.downsample_ratio),
        cuts=tiles.of_internvl,
        written=lambda side, cuts: {
            "crop_to_patches": True,
            "min_patches": cuts.least,
            "max_patches": cuts.most,
        },
    ),
    "llava_onevision": Family(
        _llava,
        _llava_tiles,
        ("vision_tower", "multi_modal_projector"),
        "LlavaOnevisionImageProcessor",
        "LlavaOnevisionProcessor",
        mrope=False,
        clips=None,
        tile=lambda config: _square(config, 1, 1),
        cuts=tiles.of_llava,
        written=lambda side, cuts: {"image_grid_pinpoints": [list(one) for one in cuts.canvases]},
    ),
    "smolvlm": Family(
        _smolvlm,
        _smolvlm_tiles,
        ("vision_model", "connector"),
        "SmolVLMImageProcessor",
        "SmolVLMProcessor",
        spell=spelling.by_rows,
        mrope=False,
        clips=None,
        tile=lambda config: _square(config, 1 / config.scale_factor),
        cuts=tiles.of_smolvlm,
        written=_smolvlm_settings,
    ),
}

_GLM = "its pictures are sized by a rule of their own and its clips are written as pictures, which is not handled yet"
# Families that are asked for and do not work, and why.
CANNOT = {
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "mllama": "its decoder sees pictures by cross-attention, not as tokens that could be dropped",
    "paligemma": "its prompt attends in both directions, and kept tokens are causal here",
    "gemma3": "its pictures attend in both directions and its layers through sliding windows",
    "gemma4": "its pictures attend in both directions and its layers through sliding windows",
    "kosmos-2": "its decoder has no layers with the projections that sparsity hooks into",
    "blip-2": "its pictures are a few query tokens, with nothing to drop",
}


def find(model_type: str, path: str) -> Family:
    """The row of a family. Raises InputError with the reason for one that cannot work or is not known."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = CANNOT.get(model_type)
    why = f"cannot be sparse here: {reason}" if reason else "is not a family that was tried"
    raise InputError(
        f"model.path: {path} is a {model_type}, which {why}; this version handles {', '.join(FAMILIES)}"
    )


def pixel_defaults(family: Family) -> dict[str, Any]:
    """What transformers' class of the family takes for pixel settings that its files leave unsaid. Raises InputError
    for a version whose class asks for torchvision, as 5.17 does for SmolVLM's."""
    known = getattr(transformers, f"{family.pixels}Pil")
    try:
        return {name: getattr(known, name) for name in PICTURE_DEFAULTS}
    except ImportError as error:
        raise InputError(
            f"{family.pixels}: transformers {transformers.__version__} does not read its settings here "
            f"({reason(error)}); pip install 'transformers>=5.23'"
        ) from None


def frame_rule(folder: str) -> FrameRule:
    """Which frames of a clip the model of a folder or hub id is shown."""
    kind = (read_json(folder, "config.json", None) or {}).get("model_type")
    clips = FAMILIES[kind].clips if kind in FAMILIES else None
    return clip_rule(folder, clips or QWEN2_CLIPS)


def towers(model: Any) -> list[torch.nn.Module]:
    """The modules of a model that see."""
    return [getattr(model.model, name) for name in FAMILIES[model.config.model_type].tower]


def deepstack(
    features: torch.Tensor, hidden: int, slots: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Features `(n, hidden * (1 + depth))` -> those of the embeddings, and the decoder's other arguments.

    slots: `(n,)` int64, where the n tokens are in the flattened batch; the decoder is patched for them
    (`features_at_slots` in patch.py).
    """
    parts = features.split(hidden, -1)
    if len(parts) == 1:
        return features, {}
    return parts[0], {"visual_pos_masks": slots, "deepstack_visual_embeds": list(parts[1:])}


def merge_of(vision: Any, config: Any) -> tuple[int, int, int]:
    """patch, merge and temporal patch of a vision config: pixels, patches a side of a token, frames of a token."""
    family = FAMILIES[config.model_type]
    if family.tile is None:
        return vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    side, tokens, _ = family.tile(config)
    patch = _side(vision.patch_size)
    return patch, math.ceil(side / patch / tokens), 1
