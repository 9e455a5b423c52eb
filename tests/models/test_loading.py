"""Folders of weights, processors and chat templates: what is read and written, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import tinymodels
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from zipr1.core.errors import InputError
from zipr1.core.recipe import Model, Sparse
from zipr1.models import loading
from zipr1.models.api import load
from zipr1.models.open import resolve
from zipr1.models.pixels import PixelSettings
from zipr1.models.policy import load_policy
from zipr1.models.processors import patchify


def test_saved_folder_loads_in_stock_transformers(tmp_path):
    policy = tinymodels.make()
    policy.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.bin"))
    assert "zipr1" not in (tmp_path / "model" / "config.json").read_text()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for (name, a), (_, b) in zip(
        model.state_dict().items(), policy.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = policy.processor.text(tinymodels.prompt(0, "image").messages)
    assert tokenizer(text)["input_ids"] == policy.processor.tokenizer(text)["input_ids"]
    again = load_policy(Model(path=str(tmp_path / "model")), "cpu")
    assert again.processor.settings == policy.processor.settings


def test_patches_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    for height, width in ((56, 56), (70, 97), (300, 33)):
        settings = PixelSettings(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours, grid = patchify(pixels[None], settings)
        size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        theirs = Qwen2VLImageProcessorPil(size=size)(Image.fromarray(pixels), return_tensors="pt")
        assert theirs["image_grid_thw"][0].tolist() == list(grid)
        torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=1e-5)


NOTHING = {"min_pixels": None, "max_pixels": None, "max_frame_pixels": None}


@pytest.mark.parametrize("version", [4, 5])
def test_bounds_of_pictures_and_of_clips_are_read_from_their_own_files(tmp_path, version):
    """As transformers 4 writes them (processor_config.json names a class and no more), and as 5 does."""
    picture = {"min_pixels": 1000, "max_pixels": 9000, "image_mean": [0.1, 0.2, 0.3]}
    clip = {"size": {"shortest_edge": 2000, "longest_edge": 5000}}
    files = {
        4: {
            "processor_config.json": {"processor_class": "Qwen2VLProcessor"},
            "preprocessor_config.json": picture,
            "video_preprocessor_config.json": clip,
        },
        5: {"processor_config.json": {"image_processor": picture, "video_processor": clip}},
    }
    for name, values in files[version].items():
        (tmp_path / name).write_text(json.dumps(values))
    settings = PixelSettings.read(tmp_path, (14, 2, 2), NOTHING)
    assert settings.mean == (0.1, 0.2, 0.3)
    for kind, bounds in (("image", (1000, 9000)), ("video", (2000, 5000))):
        own = settings.of(kind)
        assert (own.min_pixels, own.max_pixels) == bounds
    asked = PixelSettings.read(tmp_path, (14, 2, 2), {**NOTHING, "max_frame_pixels": 1500})
    assert (asked.of("video").min_pixels, asked.of("video").max_pixels) == (1500, 1500)
    assert (asked.min_pixels, asked.max_pixels) == (1000, 9000)
    # A lower bound for a while, such as a benchmark's; one that is higher changes nothing.
    assert settings.of("video", 3000).max_pixels == 3000
    assert settings.of("video", 7000).max_pixels == 5000
    (tmp_path / "processor_config.json").write_text("[")
    with pytest.raises(InputError, match=r"processor_config\.json: not a JSON object"):
        PixelSettings.read(tmp_path, (14, 2, 2), NOTHING)


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_pixels": 1024, "max_pixels": 9216},
        {"min_pixels": 1024, "max_pixels": 9216, "max_frame_pixels": 4096},
        {"min_pixels": 4096, "max_pixels": 9216, "max_frame_pixels": 1024},
        {"min_pixels": 1024, "max_pixels": 9216, "max_frame_pixels": 16384},
    ],
)
def test_what_is_written_comes_back(tmp_path, bounds):
    policy = load_policy(Model(path="tiny", **bounds), "cpu")
    policy.save(tmp_path / "model")
    again = load_policy(Model(path=str(tmp_path / "model")), "cpu")
    assert again.processor.settings == policy.processor.settings
    wider = load_policy(Model(path=str(tmp_path / "model"), max_pixels=12544), "cpu")
    frames = (
        bounds.get("max_frame_pixels") or 12544
    )  # clips are like pictures where nothing else was said
    assert wider.processor.settings.of("video").max_pixels == frames


def test_placeholders_must_match_the_media():
    policy = tinymodels.shared()
    good = tinymodels.prompt(0, "image")
    bad = copy.deepcopy(good)
    bad.messages[0]["content"].insert(0, {"type": "video"})
    with pytest.raises(InputError, match=r"image/0: .*placeholders"):
        policy.encode(bad, [(np.asarray(m.source), m.fps) for m in good.media], 1000)
    with pytest.raises(InputError, match=r"image/0: .*max_prompt_tokens"):
        policy.encode(good, [(np.asarray(m.source), m.fps) for m in good.media], 10)


def test_answer_mask_finds_what_the_assistant_says():
    policy = tinymodels.shared()
    messages = [
        *tinymodels.prompt(0, "image", turns=2).messages,
        {"role": "assistant", "content": "red"},
    ]
    text = policy.processor.text(messages, generation=False).replace(
        "<|vision_start|><|image_pad|><|vision_end|>", ""
    )
    ids = policy.processor.ids(text, [])
    mask = policy.processor.answer_mask(ids)
    said = policy.processor.tokenizer.decode(ids[mask])
    assert said == "two<|im_end|>red<|im_end|>"


def test_models_that_cannot_be_loaded(tmp_path, monkeypatch):
    def problem(path):
        with pytest.raises(InputError) as caught:
            load_policy(Model(path=str(path)), "cpu")
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        return message

    assert "does not exist" in problem(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in problem(tmp_path / "empty")
    tinymodels.shared().save(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    problem(tmp_path / "pickled")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert "llava" in problem(tmp_path / "other")
    with pytest.raises(InputError, match="--device cuda:97: not usable"):
        load_policy(tinymodels.settings(), "cuda:97")


def test_misspelt_model_keys_are_named():
    for change, word in (
        ({"famly": "qwen2_vl"}, "family"),
        ({"text": {**tinymodels.TEXT, "hiden_size": 8}}, "hidden_size"),
        ({"family": "qwen9"}, "qwen2_vl"),
        ({"vision": None}, "model.config.vision"),
    ):
        config = {**tinymodels.settings().config, **change}
        with pytest.raises(InputError, match=word):
            load_policy(Model(path="scratch", config=config), "cpu")


def test_kernels_that_cannot_run_are_refused_before_anything_loads(monkeypatch):
    from zipr1_kernels import dispatch

    monkeypatch.setattr(dispatch._state, "path", "fast")
    with pytest.raises(InputError, match="ZIPR1_KERNELS is 'fast'; allowed: auto, torch, triton"):
        load_policy(Model(path="tiny"), "cpu")
    monkeypatch.setattr(dispatch._state, "path", "triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(InputError, match="Triton was asked for on a CPU"):
        load_policy(Model(path="tiny"), "cpu")


@pytest.mark.parametrize(
    ("asked", "wanted"), [("cuda:1", "cuda:1"), (None, None), ("cuda", None), ("cpu", None)]
)
def test_the_gpu_that_is_chosen_is_the_current_one(asked, wanted, monkeypatch):
    """With a stand-in for torch.cuda that records devices; `cuda` without a number is the current one already."""
    chosen = []
    monkeypatch.setattr(loading, "unusable", lambda on_gpu: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    assert loading.choose_device(asked) == torch.device(asked or "cuda")
    assert chosen == ([] if wanted is None else [wanted])


def test_cudnns_attention_is_off_where_lengths_change(monkeypatch, tmp_path):
    """Off on a GPU alone, by a stand-in for the switch; and train, evaluation and `zipr1.load` flip it, profile not."""
    from rich.console import Console

    from zipr1.core.load import validate
    from zipr1.evaluate import answers
    from zipr1.models import api
    from zipr1.profiling import subject
    from zipr1.train import loop

    flipped = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", flipped.append)
    loading.without_plans(torch.device("cpu"))
    assert flipped == []
    loading.without_plans(torch.device("cuda:1"))
    assert flipped == [False]

    class Asked(Exception):
        pass

    def asked(device):
        raise Asked(device)

    for module in (api, answers, loop):
        monkeypatch.setattr(module, "without_plans", asked)
    policy = load_policy(Model(path="tiny"), "cpu")
    for door in (
        lambda: load("tiny", None, "cpu", None, {}),
        lambda: answers.Answerer(policy, Sparse(), [1.0]),
        lambda: loop.run(
            validate({"model": {"path": "tiny"}}), tmp_path / "run", "auto", "cpu", ["zipr1"], Console(quiet=True)
        ),
    ):  # fmt: skip
        with pytest.raises(Asked, match="cpu"):
            door()
    subject.load("tiny", None, "cpu", "auto", None)
    assert flipped == [False]


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json", "tokenizer"])
def test_a_chat_template_is_found_wherever_it_lies(tmp_path, place):
    folder = shutil.copytree(resolve("tiny"), tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    name = "tokenizer_config.json" if place == "tokenizer" else place
    values = json.loads((folder / name).read_text()) if place == "tokenizer" else {}
    (folder / name).write_text(json.dumps({**values, "chat_template": template}))
    chat = [{"role": "user", "content": [{"type": "text", "text": "which digit is red?"}]}]
    asked = {"add_generation_prompt": True}
    wanted = load("tiny", None, "cpu", None, {})[1].apply_chat_template(chat, **asked)
    assert load(str(folder), None, "cpu", None, {})[1].apply_chat_template(chat, **asked) == wanted
    policy = load_policy(Model(path=str(folder)), "cpu")
    assert policy.processor.text(chat) == wanted
    # What is saved has it where every tool looks.
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == template


def test_no_chat_template_is_one_line(tmp_path):
    folder = shutil.copytree(resolve("tiny"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    chat = [{"role": "user", "content": "which digit is red?"}]
    with pytest.raises(InputError, match=r"the model has no chat template .*copy one of these"):
        load(str(folder), None, "cpu", None, {})[1].apply_chat_template(chat)
    policy = load_policy(Model(path=str(folder)), "cpu")
    prompt = tinymodels.prompt(0, "image")
    with pytest.raises(InputError, match="image/0: the model has no chat template"):
        policy.encode(prompt, [(np.asarray(m.source), m.fps) for m in prompt.media], 1000)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    with pytest.raises(InputError, match=r"template refuses the chat .system first"):
        load_policy(Model(path=str(folder)), "cpu").processor.text(chat)


def test_a_folder_without_a_tokenizer_is_refused_by_what_it_lacks(tmp_path):
    """transformers makes one that knows no word; the first complaint was then about numbers in config.json."""
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer\.json, or vocab"):
        load_policy(Model(path=str(tmp_path / "model")), "cpu")
