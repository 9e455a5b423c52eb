"""The settings files of a model folder, in all their spellings, as transformers' own processor reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from alike import chat, compare_clip, compare_pictures
from test_clips import CLIPS, clip
from test_pictures import QWEN, SIDES, picture

pytest.importorskip("torchvision", reason="run `make test`")

PICTURES, VIDEOS, WHOLE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
KIND = {"image_processor_type": "Qwen2VLImageProcessor"}
BOUNDS = QWEN["size"]
OLD = {"min_pixels": 32 * 32, "max_pixels": 112 * 112}
FRAMES = CLIPS["qwen2_vl"]
TOGETHER = CLIPS["qwen3_vl"]

# The video classes are named by the model's type where no file does.
QWEN2: dict[str, dict[str, Any]] = {
    "one file": {PICTURES: QWEN},
    "old spelling": {PICTURES: {**SIDES, **KIND, **OLD}},
    "both spellings": {PICTURES: {**QWEN, **OLD}},
    "least pixels alone": {PICTURES: {**QWEN, "min_pixels": 160 * 160}},
    "nulls": {PICTURES: {**QWEN, "min_pixels": None, "max_pixels": None}},
    "nothing said of pictures' bounds": {PICTURES: {**SIDES, **KIND}},
    "a file of clips": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": FRAMES}},
    "clips in the old spelling": {PICTURES: QWEN, VIDEOS: {**SIDES, **OLD}},
    "both spellings of clips": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": BOUNDS, **OLD}},
    "nothing said of clips": {PICTURES: QWEN, VIDEOS: SIDES},
    "colours of clips": {
        PICTURES: {**QWEN, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        VIDEOS: {**SIDES, "size": FRAMES, "image_mean": [0.5] * 3, "image_std": [0.4, 0.5, 0.6]},
    },
    "parts of one file": {
        WHOLE: {"image_processor": QWEN, "video_processor": {**SIDES, "size": FRAMES}},
        PICTURES: {**QWEN, "size": FRAMES},
        VIDEOS: {**SIDES, "size": BOUNDS},
    },
    "one part of one file": {
        WHOLE: {"image_processor": QWEN},
        PICTURES: {**QWEN, "size": FRAMES},
    },
    "a file that only names classes": {
        WHOLE: {"processor_class": "Qwen2_5_VLProcessor"},
        PICTURES: {**QWEN, "size": FRAMES},
    },
    "a bound of the whole clip": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": FRAMES, "cap_pixels_per_frame": True, "max_video_tokens": 100},
    },
    "a bound that does not bind": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": FRAMES, "cap_pixels_per_frame": True},
    },
    "bilinear": {PICTURES: {**QWEN, "resample": 2}},
    "a rate": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": FRAMES, "do_sample_frames": True, "fps": 3}},
    "a rate that is not used": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": FRAMES, "fps": 3}},
    "a number": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": FRAMES, "do_sample_frames": True, "num_frames": 7},
    },
    "fewest and most frames": {
        PICTURES: QWEN,
        VIDEOS: {
            **SIDES, "size": FRAMES, "do_sample_frames": True, "fps": 0.1, "min_frames": 6, "max_frames": 8,
        },
    },
    "most frames": {
        PICTURES: QWEN,
        VIDEOS: {
            **SIDES, "size": FRAMES, "do_sample_frames": True, "fps": 9, "min_frames": 2, "max_frames": 9,
        },
    },
}  # fmt: skip
QWEN3: dict[str, dict[str, Any]] = {
    "a file of clips": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": TOGETHER}},
    # Were its class of pictures named there, transformers would take Qwen2-VL's for clips.
    "one file": {PICTURES: {**SIDES, "size": TOGETHER}},
    "old spelling": {PICTURES: {**QWEN, **OLD}, VIDEOS: {**SIDES, "size": TOGETHER, **OLD}},
    "nothing said of clips": {PICTURES: QWEN, VIDEOS: SIDES},
    "parts of one file": {
        WHOLE: {"image_processor": QWEN, "video_processor": {**SIDES, "size": TOGETHER}},
        PICTURES: {**QWEN, "size": FRAMES},
        VIDEOS: {**SIDES, "size": BOUNDS},
    },
    "colours": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": TOGETHER, "image_mean": [0.4] * 3, "image_std": [0.3] * 3},
    },
    "a bound of each frame": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": TOGETHER, "cap_pixels_per_frame": True, "max_video_tokens": 20},
    },
    "a share of the clip": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": TOGETHER, "cap_pixels_per_frame": True},
    },
    "another rate": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": TOGETHER, "fps": 5}},
    "all frames": {PICTURES: QWEN, VIDEOS: {**SIDES, "size": TOGETHER, "do_sample_frames": False}},
    "fewest and most frames": {
        PICTURES: QWEN,
        VIDEOS: {**SIDES, "size": TOGETHER, "fps": 9, "min_frames": 2, "max_frames": 9},
    },
}
FOLDERS = [("qwen2_5_vl", name) for name in QWEN2] + [("qwen3_vl", name) for name in QWEN3]


@pytest.mark.parametrize(("family", "name"), FOLDERS, ids=lambda value: value)
def test_settings(opened, family, name):
    files = (QWEN3 if family == "qwen3_vl" else QWEN2)[name]
    pair = opened(family, files)
    for size in ((50, 70), (300, 200), (12, 20)):
        compare_pictures(pair, picture(*size))
    for frames, height, width in ((20, 60, 90), (9, 40, 24)):
        compare_clip(pair, clip(frames, height, width), 10.0)


TEMPLATES = {
    name: f"{name}:"
    + "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    for name in ("red", "blue", "green")
}
RED, BLUE, GREEN = TEMPLATES.values()
TOKENIZER, JINJA, JSON = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"
# Files -> the template that holds.
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "jinja": ({JINJA: RED}, "red"),
    "json": ({JSON: {"chat_template": RED}}, "red"),
    "processor": ({WHOLE: {"chat_template": RED}}, "red"),
    "jinja over tokenizer": ({JINJA: RED, TOKENIZER: BLUE}, "red"),
    "json over jinja and tokenizer": (
        {JSON: {"chat_template": RED}, JINJA: BLUE, TOKENIZER: GREEN}, "red",
    ),
    "processor over json and jinja": (
        {WHOLE: {"chat_template": RED}, JSON: {"chat_template": BLUE}, JINJA: GREEN}, "red",
    ),
    "several in the processor": (
        {WHOLE: {"chat_template": {"default": RED, "tools": BLUE}}, TOKENIZER: GREEN}, "red",
    ),
    "several files": ({JINJA: RED, "additional_chat_templates/tools.jinja": BLUE}, "red"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_templates(opened, weights, name):
    given, holds = PLACES[name]
    files: dict[str, Any] = {JINJA: None, PICTURES: QWEN, **given}
    if TOKENIZER in given:
        own = (weights("qwen2_5_vl") / TOKENIZER).read_text().strip().removesuffix("}")
        files[TOKENIZER] = own + f', "chat_template": {json.dumps(given[TOKENIZER])}}}'
    pair = opened("qwen2_5_vl", files)
    compare_pictures(pair, picture(50, 70))
    text = pair.ours.apply_chat_template(chat(), add_generation_prompt=True)
    assert text == f"{holds}:which digit is green?"
    assert text == pair.theirs.apply_chat_template(chat(), add_generation_prompt=True)


def test_a_template_of_the_tokenizer_alone_holds(opened, weights):
    """transformers' processor does not look there; its tokenizer does."""
    own = (weights("qwen2_5_vl") / TOKENIZER).read_text().strip().removesuffix("}")
    own += f', "chat_template": {json.dumps(RED)}}}'
    pair = opened("qwen2_5_vl", {JINJA: None, PICTURES: QWEN, TOKENIZER: own})
    assert pair.ours.apply_chat_template(chat()) == "red:which digit is green?"
