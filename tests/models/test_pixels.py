"""Pixel settings: those of a folder as transformers' own classes read them, or a refusal; nothing is guessed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinymodels
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from zipr1.core.errors import InputError
from zipr1.core.recipe import Model
from zipr1.data.video import FrameRule
from zipr1.models.api import load
from zipr1.models.families import FAMILIES, pixel_defaults
from zipr1.models.loading import save_processor
from zipr1.models.open import open_model, resolve
from zipr1.models.pixels import QWEN2_CLIPS, QWEN3_CLIPS, PixelSettings, clip_rule
from zipr1.models.policy import load_policy
from zipr1.models.processors import fit_size
from zipr1.models.random_weights import build_tokenizer

PICTURES, CLIPS, WHOLE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
BOTH = {"shortest_edge": 3136, "longest_edge": 12845056}
# Files of a folder -> bounds of pictures and of frames, worked out by hand from transformers' rules: a part of
# processor_config.json, else the kind's own file, else the pictures'; min_pixels and max_pixels over `size`; the
# class's own defaults for what is not said.
FOLDERS: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "size": ({PICTURES: {"size": BOTH}}, (3136, 12845056), (3136, 12845056)),
    "old spelling": ({PICTURES: {"min_pixels": 1000, "max_pixels": 9000}}, (1000, 9000), (1000, 9000)),
    "lowered beside size": (
        {PICTURES: {"size": BOTH, "min_pixels": 3136, "max_pixels": 401408}},
        (3136, 401408),
        (3136, 401408),
    ),
    "old spelling inside size": (
        {PICTURES: {"size": {"min_pixels": 1000, "max_pixels": 9000}, "min_pixels": 1000, "max_pixels": 9000}},
        (1000, 9000),
        (1000, 9000),
    ),
    "parts of one file hide the others": (
        {
            WHOLE: {"image_processor": {"max_pixels": 44444}, "video_processor": {"size": BOTH}},
            PICTURES: {"max_pixels": 5000},
            CLIPS: {"max_pixels": 6000},
        },
        (3136, 44444),
        (3136, 12845056),
    ),
    "a file that names a class hides nothing": (
        {WHOLE: {"processor_class": "Qwen2_5_VLProcessor"}, PICTURES: {"min_pixels": 784, "max_pixels": 5000}},
        (784, 5000),
        (784, 5000),
    ),
    "clips without a file are bounded as pictures": (
        {WHOLE: {"image_processor": {"max_pixels": 44444}}, PICTURES: {"min_pixels": 784, "max_pixels": 5000}},
        (3136, 44444),
        (784, 5000),
    ),
    "a file of clips that says nothing": (
        {PICTURES: {"min_pixels": 784, "max_pixels": 5000}, CLIPS: {}},
        (784, 5000),
        (128 * 28 * 28, 768 * 28 * 28),
    ),
    "nulls": ({PICTURES: {"size": None, "min_pixels": None, "max_pixels": 9000}}, (3136, 9000), (9000, 9000)),
    "nothing is said": ({PICTURES: {}}, (3136, 1003520), (100352, 602112)),
}  # fmt: skip


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_bounds_are_those_of_transformers(tmp_path, name):
    files, pictures, frames = FOLDERS[name]
    settings = PixelSettings.read(written(tmp_path, files), (14, 2, 2), {})
    for kind, (low, high) in (("image", pictures), ("video", frames)):
        own = settings.of(kind)
        assert (own.min_pixels, own.max_pixels) == (low, high), kind
    size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (size["shortest_edge"], size["longest_edge"]) == pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_unsaid_is_the_class_of_the_family(tmp_path, family):
    written(tmp_path, {WHOLE: {"processor_class": "X"}, PICTURES: {"do_convert_rgb": True}})
    settings = PixelSettings.read(
        tmp_path, (14, 2, 2), {}, defaults=pixel_defaults(FAMILIES[family])
    )
    theirs = getattr(transformers, f"{FAMILIES[family].pixels}Pil").from_pretrained(tmp_path)
    assert settings.mean == tuple(theirs.image_mean)
    assert settings.std == tuple(theirs.image_std)
    assert settings.resample == int(theirs.resample)
    # What a file says beside the weights of another tool's version is not hidden by processor_config.json.
    written(tmp_path, {PICTURES: {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.25, "resample": 2}})
    settings = PixelSettings.read(tmp_path, (14, 2, 2), {})
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), (0.25, 0.25, 0.25))
    assert settings.resample == 2


def test_frames_have_a_mean_of_their_own(tmp_path):
    written(
        tmp_path, {PICTURES: {"image_mean": [0.1] * 3}, CLIPS: {"image_mean": [0.7] * 3, "size": BOTH}}
    )  # fmt: skip
    settings = PixelSettings.read(tmp_path, (14, 2, 2), {})
    assert (settings.of("image").mean, settings.of("video").mean) == ((0.1,) * 3, (0.7,) * 3)


def test_frames_share_a_clip_where_its_file_says_so(tmp_path):
    """`cap_pixels_per_frame`: nine tenths of max_video_tokens tokens, over all frames, two of which make a token."""
    clip = {"size": {"shortest_edge": 784, "longest_edge": 50000}, "cap_pixels_per_frame": True}
    written(tmp_path, {PICTURES: {"size": BOTH}, CLIPS: {**clip, "max_video_tokens": 100}})
    settings = PixelSettings.read(tmp_path, (14, 2, 2), {})
    total = 100 * 28 * 28 * 0.9  # 70,560 pixels
    assert settings.of("video", frames=4).max_pixels == total * 2 / 4
    assert settings.of("video", frames=2).max_pixels == 50000
    assert settings.of("video", frames=1000).max_pixels == 823  # 1.05 times the least
    assert settings.of("video").max_pixels == 50000
    written(tmp_path, {CLIPS: {**clip, "cap_pixels_per_frame": False}})
    assert PixelSettings.read(tmp_path, (14, 2, 2), {}).of("video", frames=1000).max_pixels == 50000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no pixel settings .preprocessor_config.json"),
        ({WHOLE: {"processor_class": "X"}}, "has no pixel settings"),
        ({PICTURES: {"do_normalize": False}}, "do_normalize: false"),
        ({PICTURES: {"do_resize": False}}, "do_resize: false"),
        ({PICTURES: {"rescale_factor": 1}}, "rescale_factor 1; handled: 1/255"),
        ({PICTURES: {"patch_size": 16}}, "patch_size 16 and its config.json has 14"),
        ({PICTURES: {"merge_size": 1}}, "merge_size 1 and its config.json has 2"),
        ({PICTURES: {"max_pixels": "many"}}, "cannot be read .*many"),
        ({PICTURES: {"image_mean": [0.5, 0.5]}}, "cannot be read"),
        ({PICTURES: {"resample": 99}}, "cannot be read"),
        ({PICTURES: {}, CLIPS: {"do_rescale": False}}, "do_rescale: false"),
    ],
)
def test_what_is_not_known_or_not_done_is_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        PixelSettings.read(written(tmp_path, files), (14, 2, 2), {})


def test_a_folder_without_settings_opens_nowhere(tmp_path):
    folder = shutil.copytree(resolve("tiny"), tmp_path / "model")
    (folder / PICTURES).unlink()
    with pytest.raises(InputError, match=r"model has no pixel settings .*copy it from the model"):
        load(str(folder), None, "cpu", None, {})
    with pytest.raises(InputError, match="has no pixel settings"):
        load_policy(Model(path=str(folder), min_pixels=1, max_pixels=1000), "cpu")


def cache(home: Path, revision: str, names: list[str]) -> None:
    """A hub cache that holds these files of the embedded model, as me/vl at one revision."""
    commit = "a" * 40
    snapshot = home / "models--me--vl" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "models--me--vl" / "refs").mkdir()
    (home / "models--me--vl" / "refs" / revision).write_text(commit)
    for name in names:
        shutil.copy(Path(resolve("tiny")) / name, snapshot / name)


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_hub_id_has_the_settings_of_its_revision(tmp_path, monkeypatch, revision):
    names = [p.name for p in Path(resolve("tiny")).iterdir()]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, revision, names)
    model = Model(path="me/vl", revision=None if revision == "main" else revision)
    settings = open_model(model, "cpu").processor.settings
    assert settings == open_model(Model(path="tiny"), "cpu").processor.settings
    shutil.rmtree(tmp_path / "models--me--vl")
    cache(tmp_path, revision, [name for name in names if name != PICTURES])
    with pytest.raises(
        InputError, match=rf"me/vl has no pixel settings .*hf download me/vl {PICTURES}"
    ):
        open_model(model, "cpu")  # fmt: skip


def test_settings_that_are_not_here_are_fetched_at_the_revision(tmp_path, monkeypatch):
    """As transformers fetches them, which does not bring them with the weights."""
    asked = []
    written(tmp_path, {PICTURES: {"min_pixels": 784, "max_pixels": 5000}})

    def fetch(repository: str, name: str, revision: str | None = None, **_: Any) -> str | None:
        asked.append((repository, name, revision))
        found = tmp_path / name
        return str(found) if found.is_file() else None

    monkeypatch.setattr("zipr1.models.beside.cached_file", fetch)
    settings = PixelSettings.read("me/vl", (14, 2, 2), {}, revision="v1")
    assert (settings.min_pixels, settings.max_pixels) == (784, 5000)
    assert ("me/vl", PICTURES, "v1") in asked
    assert {revision for _, _, revision in asked} == {"v1"}


def test_opening_a_model_says_its_bounds(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="zipr1"):
        open_model(Model(path="tiny", max_pixels=9216, max_frame_pixels=4096), "cpu")
    assert (
        "tiny: pictures of 256 to 9,216 pixels, frames of clips of 256 to 4,096" in caplog.messages
    )
    internvl = tinymodels.folder("internvl", tmp_path / "internvl")
    with caplog.at_level(logging.INFO, logger="zipr1"):
        open_model(Model(path=str(internvl)), "cpu")
    assert caplog.messages[-1].endswith(
        "each picture becomes one tile, or up to 3 and one tile of 128 x 128 pixels"
    )


@pytest.mark.parametrize(
    "size",
    [(27, 257), (14, 14), (16, 16), (13, 1000), (10, 1500), (2600, 13), (8, 699), (1, 200), (1, 1)],
)
def test_thin_pictures_become_what_transformers_makes_of_them(size):
    settings = PixelSettings()
    theirs = smart_resize(*size, 28, settings.min_pixels, settings.max_pixels)
    assert fit_size(*size, settings) == theirs


WHOLE_CLIP = {"shortest_edge": 4 * 32 * 32, "longest_edge": 100 * 32 * 32}


def qwen3(tmp_path: Path, clip: dict[str, Any], **asked: Any) -> PixelSettings:
    written(tmp_path, {PICTURES: {"size": BOTH}, CLIPS: {"size": WHOLE_CLIP, **clip}})
    return PixelSettings.read(tmp_path, (16, 2, 2), asked, clips=QWEN3_CLIPS)


def test_frames_of_qwen3_share_the_bounds_of_their_clip(tmp_path):
    """At most 100 tokens' pixels of 32 x 32 over all frames, at least four."""
    settings = qwen3(tmp_path, {})
    for frames, sides in ((4, (160, 160)), (16, (64, 64)), (2, (224, 224))):
        # 100 / 4 = 5 x 5; 100 / 16 = 2 x 2 and some; 100 / 2 = 7 x 7 and some.
        assert fit_size(320, 320, settings.of("video", frames=frames)) == sides
    # Counted in pairs, rounded to the even number of them: five frames are four, seven are eight.
    assert fit_size(160, 160, settings.of("video", frames=5)) == (160, 160)
    assert fit_size(128, 128, settings.of("video", frames=7)) == (96, 96)  # sqrt(100 / 7) = 3.8
    # A side under a token's is a token's, and then 4 tokens in 4 frames are enough.
    assert fit_size(16, 16, settings.of("video", frames=4)) == (32, 32)
    assert fit_size(16, 16, settings.of("video", frames=2)) == (64, 64)
    assert fit_size(16, 16, settings.of("video", frames=1)) == (64, 64)  # shown twice
    assert "clips of 4,096 to 102,400" in str(settings)
    assert fit_size(320, 320, settings.of("image")) == (320, 320)


def test_a_frame_of_qwen3_is_bounded_by_the_file_or_by_the_caller(tmp_path):
    """4 tokens a frame, of the file or asked: 2 x 2; a frame may have 4 tokens' pixels and a twentieth more anyhow."""
    capped = qwen3(tmp_path, {"cap_pixels_per_frame": True, "max_video_tokens": 9})
    assert fit_size(320, 320, capped.of("video", frames=2)) == (96, 96)
    assert fit_size(320, 320, capped.of("video", 4 * 32 * 32, frames=2)) == (64, 64)
    asked = qwen3(tmp_path, {}, max_frame_pixels=9 * 32 * 32 + 5)
    assert asked.max_frame_pixels == 9 * 32 * 32
    assert fit_size(320, 320, asked.of("video", frames=2)) == (96, 96)
    assert fit_size(320, 320, asked.of("video", 1, frames=2)) == (64, 64)
    assert "their frames of at most 9,216" in str(asked)


@pytest.mark.parametrize(
    ("kind", "clip", "rule"),
    [
        (QWEN2_CLIPS, {}, FrameRule()),
        (QWEN3_CLIPS, {}, FrameRule(even=False, fps=2.0)),
        (QWEN3_CLIPS, {"fps": 1}, FrameRule(even=False, fps=1.0)),
        (QWEN3_CLIPS, {"do_sample_frames": False}, FrameRule(even=False)),
        (QWEN3_CLIPS, {"num_frames": 8}, FrameRule(even=False, number=8)),
        (QWEN2_CLIPS, {"fps": 1}, FrameRule()),  # not read at a rate unless do_sample_frames
        (QWEN2_CLIPS, {"fps": 1, "do_sample_frames": True}, FrameRule(fps=1.0)),
        (QWEN2_CLIPS, {"min_frames": 2, "max_frames": 9}, FrameRule(least=2, most=9)),
    ],
)
def test_which_frames_are_seen_is_in_the_file(tmp_path, kind, clip, rule):
    written(tmp_path, {PICTURES: {"size": BOTH}, CLIPS: clip})
    assert PixelSettings.read(tmp_path, (14, 2, 2), {}, clips=kind).frame_rule == rule
    assert clip_rule(tmp_path, kind) == rule


@pytest.mark.parametrize("clip", [{}, {"fps": 1, "cap_pixels_per_frame": True}, {"num_frames": 8}])
def test_what_is_saved_is_read_again(tmp_path, clip):
    settings = qwen3(tmp_path, clip, max_frame_pixels=5000)
    save_processor(build_tokenizer([]), settings, "qwen3_vl", tmp_path)
    again = PixelSettings.read(
        tmp_path, (16, 2, 2), {}, defaults=pixel_defaults(FAMILIES["qwen3_vl"]), clips=QWEN3_CLIPS
    )
    assert again == settings
