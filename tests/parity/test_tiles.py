"""Families whose pictures are one square tile here: that tile is the one of their own processors, where these make one.

InternVL and SmolVLM make one where they are told not to cut a picture up; LLaVA-OneVision makes it besides the parts.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from alike import same_pixels
from test_pictures import picture
from transformers import AutoImageProcessor

from zipr1.core.recipe import Model
from zipr1.data.pictures import rgb
from zipr1.models.families import FAMILIES
from zipr1.models.loading import save_processor
from zipr1.models.policy import load_policy

pytest.importorskip("torchvision", reason="run `make test`")

SQUARE = {"size": {"height": 128, "width": 128}}
TOLD: dict[str, dict[str, Any]] = {
    "internvl": {**SQUARE, "crop_to_patches": False},
    "llava_onevision": {"size": {"height": 64, "width": 64}, "image_grid_pinpoints": [[64, 64]]},
    "smolvlm": {**SQUARE, "do_image_splitting": False, "max_image_size": {"longest_edge": 128}},
}
SIZES = [(128, 128), (64, 64), (90, 50), (31, 400), (640, 480), (30, 20), (1000, 999)]


@pytest.fixture(scope="module", params=TOLD)
def processors(request, weights):
    policy = load_policy(Model(path=str(weights(request.param))), "cpu")
    kind = getattr(transformers, FAMILIES[request.param].pixels)
    return policy.processor, kind(**TOLD[request.param])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_one_tile(processors, size, mode):
    ours, theirs = processors
    image = picture(*size, mode)
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    wanted = wanted.flatten(0, -4)[:1]  # of LLaVA-OneVision, the whole picture comes first
    found = ours.visual("image", rgb(image), None)
    same_pixels(found.patches, wanted, min(ours.settings.std))


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_what_is_saved_makes_one_tile_in_transformers_too(weights, family, tmp_path):
    """Though InternVL's processor asks for cuts."""
    policy = load_policy(Model(path=str(weights(family))), "cpu")
    ours = policy.processor
    save_processor(ours.tokenizer, ours.settings, family, tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    asked = {"crop_to_patches": True} if family == "internvl" else {}
    wanted = theirs(picture(700, 200), return_tensors="pt", **asked)["pixel_values"].flatten(0, -4)
    found = ours.visual("image", rgb(picture(700, 200)), None).patches
    same_pixels(found, wanted, min(ours.settings.std))
