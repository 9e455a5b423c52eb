"""Families that see squares: as many tiles as their own processors make of a picture, with the same pixels, and written
in a prompt as these write them."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from alike import same_pixels
from test_pictures import picture
from transformers import AutoImageProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from zipr1.core.recipe import Model
from zipr1.data.pictures import rgb
from zipr1.models.families import FAMILIES
from zipr1.models.loading import save_processor
from zipr1.models.policy import load_policy

pytest.importorskip("torchvision", reason="run `make test`")

# Of the tiny models of the tests (tests/tinymodels.py), as transformers' classes are told them.
TOLD: dict[str, dict[str, Any]] = {
    "internvl": {"size": {"height": 128, "width": 128}, "max_patches": 3, "crop_to_patches": True},
    "llava_onevision": {
        "size": {"height": 64, "width": 64},
        "image_grid_pinpoints": [[64, 64], [64, 128], [128, 64], [128, 128]],
    },
    "smolvlm": {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 128}},
}
SIZES = [
    (128, 128), (64, 64), (90, 50), (50, 90), (31, 400), (400, 31), (640, 480), (30, 20), (1000, 999), (129, 128),
    (257, 255), (300, 100), (100, 300), (61, 127), (1, 1), (5, 3),
]  # fmt: skip
TOKENS = 64  # of a tile


def same_tiles(found: torch.Tensor, wanted: torch.Tensor, std: float) -> None:
    """As `same_pixels`, but three values in ten thousand may be off by a level twice: SmolVLM resizes a picture up to
    three times and rounds each time, and small pictures are made many times as large."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    levels = (found - wanted).abs() * 255 * std
    assert float(levels.max()) <= 2.001
    assert float((levels > 1.001).float().mean()) <= 3e-4


@pytest.fixture(scope="module", params=TOLD)
def processors(request, weights):
    policy = load_policy(Model(path=str(weights(request.param))), "cpu")
    kind = getattr(transformers, FAMILIES[request.param].pixels)
    return request.param, policy.processor, kind(**TOLD[request.param])


def tiles_of(family: str, theirs: Any, image: Any) -> tuple[Any, str]:
    """Tiles `(n, 3, S, S)` of a picture that is alone, and how it is written, `<p>` for a placeholder."""
    if family == "internvl":
        made = theirs(image, return_tensors="pt")
        own = SimpleNamespace(
            start_image_token="<img>", end_image_token="</img>", image_token="<p>", image_seq_length=TOKENS
        )  # fmt: skip
        return made["pixel_values"], InternVLProcessor.replace_image_token(own, made, 0)
    if family == "smolvlm":
        made = theirs([[image]], return_tensors="pt", return_row_col_info=True)
        text = get_image_prompt_string(
            made["rows"][0][0], made["cols"][0][0], TOKENS, "<fake_token_around_image>", "<p>", "<global-img>",
        )  # fmt: skip
        return made["pixel_values"][0], text
    made = theirs([[image]], return_tensors="pt")
    return made["pixel_values"][0], written_by_llava(theirs, made, 0)


def written_by_llava(theirs: Any, made: Any, place: int) -> str:
    own: Any = SimpleNamespace(
        num_image_tokens=TOKENS, image_token="<p>", vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9", image_processor=theirs,
    )  # fmt: skip
    for name in ("_get_number_of_features", "_get_unpadded_features"):
        setattr(own, name, MethodType(getattr(LlavaOnevisionProcessor, name), own))
    return str(LlavaOnevisionProcessor.replace_image_token(own, made, place))


def written(processor: Any, visual: Any) -> str:
    parts = processor.spell(visual)
    return "".join(part if isinstance(part, str) else "<p>" * part for part in parts)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_tiles(processors, size, mode):
    family, ours, theirs = processors
    image = picture(*size, mode)
    wanted, text = tiles_of(family, theirs, image)
    pixels = rgb(image)
    found = ours.visual("image", pixels, None)
    assert written(ours, found) == text
    same_tiles(found.patches, wanted, min(ours.settings.std))
    planned = ours.planned("image", 1, *pixels.shape[:2], None)
    assert (planned.tokens, planned.tiles) == (found.tokens, found.tiles)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_that_is_not_alone_is_one_tile_of_llava_onevision(weights, size):
    ours = load_policy(Model(path=str(weights("llava_onevision"))), "cpu").processor
    theirs = transformers.LlavaOnevisionImageProcessor(**TOLD["llava_onevision"])
    image, other = picture(*size), picture(70, 70)
    made = theirs([[image, other]], return_tensors="pt")
    found = ours.visual("image", rgb(image), None, alone=False)
    same_pixels(found.patches, made["pixel_values"][0], min(ours.settings.std))
    assert written(ours, found) == written_by_llava(theirs, made, 0)
    assert ours.planned("image", 1, *rgb(image).shape[:2], None, alone=False).tokens == found.tokens


@pytest.mark.parametrize("family", TOLD)
def test_what_is_saved_makes_the_same_tiles_in_transformers(weights, family, tmp_path):
    policy = load_policy(Model(path=str(weights(family))), "cpu")
    ours = policy.processor
    save_processor(ours.tokenizer, ours.settings, family, tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((700, 200), (90, 80)):
        wanted, _ = tiles_of(family, theirs, picture(*size))
        found = ours.visual("image", rgb(picture(*size)), None).patches
        same_tiles(found, wanted, min(ours.settings.std))
