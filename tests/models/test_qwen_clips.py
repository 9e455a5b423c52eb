"""Qwen3-VL and Qwen3.5, dense and with experts: clips with the second of each pair of frames, positions, deepstack."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import policychecks
import pytest
import tinymodels
import torch
from rich.console import Console
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

import zipr1
from zipr1.core.load import validate
from zipr1.core.recipe import Model, Probes, Sparse
from zipr1.core.types import Media, Prompt
from zipr1.data import sources, video
from zipr1.models.encoder import MediaEncoder
from zipr1.models.inputs import model_inputs
from zipr1.models.policy import Policy, load_policy
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.models.visual import patch_times
from zipr1.train.dry_run import dry_run

SMALL = Sparse(p=0.7, probes=Probes(recent=3, random=6), dense_below=0)
TIMED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
timed = pytest.mark.parametrize("family", TIMED)


@lru_cache
def shared(family: str) -> Policy:
    with TemporaryDirectory() as path:
        model = Model(path=str(tinymodels.folder(family, Path(path))), min_pixels=1024)
        return load_policy(model, "cpu")


def both() -> Prompt:
    """A question about a clip of five frames and, after it, a picture."""
    rng = np.random.default_rng(3)
    clip = Media("video", rng.integers(0, 256, (5, 48, 32, 3), dtype=np.uint8), 4.0)
    picture = Media("image", rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    content = [
        {"type": "video"}, {"type": "text", "text": "red"}, {"type": "image"},
        {"type": "text", "text": "which digit is green?"},
    ]  # fmt: skip
    return Prompt("both", [{"role": "user", "content": content}], (clip, picture), "two")


def prompts() -> list[Prompt]:
    return [tinymodels.prompt(1, "video", 3), tinymodels.prompt(0, "image"), both()]


@timed
def test_each_pair_of_frames_has_its_second_before_it_and_marks_around_it(family):
    """Five frames at 4 a second: 0, 0.25 | 0.5, 0.75 | 1.0, 1.0, each pair at the mean of its two."""
    processor = shared(family).processor
    (encoded,) = tinymodels.encode(shared(family), [both()])
    clip, picture = encoded.visuals
    assert clip.times == (0.125, 0.625, 1.0)
    each = clip.tokens // 3
    pads = "<|vision_start|>" + "<|video_pad|>" * each + "<|vision_end|>"
    seen = "".join(f"<{second} seconds>{pads}" for second in ("0.1", "0.6", "1.0"))
    image = "<|image_pad|>" * picture.tokens
    wanted = (
        f"<|im_start|>user\n<|vision_start|>{seen}<|vision_end|>red"
        f"<|vision_start|>{image}<|vision_end|>which digit is green?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.tokenizer.decode(encoded.ids) == wanted
    text = processor.text(both().messages)
    assert processor.length(text, encoded.visuals) == len(encoded)


@pytest.mark.parametrize(
    ("frames", "fps"), [(1, 2.0), (2, 1.0), (5, 4.0), (7, 29.97), (16, 0.5), (4, None)]
)
def test_a_clip_is_written_as_transformers_writes_it(frames, fps):
    processor = shared("qwen3_vl").processor
    pixels = np.zeros((frames, 64, 96, 3), np.uint8)
    visual = processor.visual("video", pixels, fps)
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
    )
    own._calculate_timestamps = lambda *a: Qwen3VLProcessor._calculate_timestamps(own, *a)
    about = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)))
    inputs = {"video_grid_thw": torch.tensor([visual.grid]), "video_metadata": [about]}
    wanted = Qwen3VLProcessor.replace_video_token(own, inputs, 0)
    ids = processor.ids("<|video_pad|>", [visual])
    assert ids.tolist() == processor.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert processor.planned("video", frames, 64, 96, fps).times == visual.times


def test_seconds_are_those_of_the_frames_that_were_read(tmp_path):
    """Of 24 frames at 8 a second four are read, evenly from the first to the last: 0, 8, 15 and 23."""
    frames = np.zeros((24, 32, 32, 3), np.uint8)
    video.write(tmp_path / "a.mp4", frames, 8.0)
    rule = video.FrameRule(even=False)
    _, fps, times = video.read_timed(tmp_path / "a.mp4", 4, None, rule)
    assert times.tolist() == [0, 8 / 8, 15 / 8, 23 / 8] and fps == pytest.approx(8 / 6)
    assert patch_times(times, 2) == (4 / 8, 19 / 8)
    assert patch_times(times[:3], 2) == (4 / 8, 15 / 8)


@timed
def test_a_dry_run_counts_the_seconds_between_frames(family, tmp_path):
    """Of a clip that is a file, of 12 frames or of six that are taken: as many tokens as the prompt has when it is
    read, marks and seconds among them."""
    video.write(tmp_path / "a.mp4", np.zeros((12, 48, 32, 3), np.uint8), 4.0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "which?", "video": "a.mp4", "answer": "red"}\n')
    folder = tinymodels.folder(family, tmp_path / "model")
    found = []
    for frames in (12, 6):
        values = {
            "model": {"path": str(folder), "min_pixels": 1024},
            "data": {"source": str(rows), "heldout": str(rows), "max_frames": frames},
            "sparse": {"dense_below": 0},
            "budgets": {"num_generations": 2},
            "train": {"steps": 1, "prompts_per_step": 1, "max_new_tokens": 2},
        }
        recipe = validate(values)
        planned = dry_run(recipe, "cpu", Console(quiet=True))
        pictures = MediaEncoder(load_policy(recipe.model, "cpu"), recipe)
        (encoded,) = pictures.encode(sources.load(recipe.data, "train", recipe.seed))
        assert planned["prompt_tokens"] == dict.fromkeys(("min", "median", "max"), len(encoded))
        visual = encoded.visuals[0]
        assert len(visual.times) == frames // 2
        assert len(encoded) > visual.tokens + 2 * len(visual.times)
        found.append(planned["memory"]["kv_cache"] / (len(encoded) + 2))
    assert found[0] == found[1]  # bytes of a token


@timed
def test_positions_are_counted_by_hand(family):
    """Words take one place each on all three axes; a pair of frames starts where the words before it end, its rows and
    columns count from there, and the next word follows the largest of them."""
    policy = shared(family)
    (encoded,) = tinymodels.encode(policy, [both()])
    merge = policy.processor.settings.merge
    kinds = policy.processor.placeholder
    grids = {
        kinds["video"]: [
            (h // merge, w // merge)
            for v in encoded.visuals[:1]
            for _, h, w in [v.grid]
            for _ in v.times
        ],
        kinds["image"]: [(h // merge, w // merge) for _, h, w in [encoded.visuals[1].grid]],
    }
    place, at, wanted = 0, 0, []
    ids = encoded.ids.tolist()
    while at < len(ids):
        if ids[at] not in grids:
            wanted.append((place, place, place))
            place, at = place + 1, at + 1
            continue
        rows, columns = grids[ids[at]].pop(0)
        wanted += [(place, place + r, place + c) for r in range(rows) for c in range(columns)]
        place, at = place + max(rows, columns), at + rows * columns
    assert encoded.positions.T.tolist() == [list(three) for three in wanted]
    assert encoded.next_position == place


@timed
@pytest.mark.parametrize("forced", [False, True], ids=["bypass", "forced"])
@torch.no_grad()
def test_everything_kept_is_the_stock_model(family, forced):
    """Alone and in a batch of a clip, a picture, and both: tokens and logits are the stock class's."""
    policy = shared(family)
    plain = copy.deepcopy(policy.model)
    plain.set_attn_implementation("sdpa")
    encoded = tinymodels.encode(policy, prompts())
    features = policy.encode_vision(encoded)
    request = Request(SMALL.model_copy(update={"p": 1.0}), force=forced)
    ours = policy.generate(encoded, features, request, 6)
    blocked = list(policy.processor.placeholder.values())
    for b, e in enumerate(encoded):
        stock = model_inputs([(e.ids, e.visuals)], policy.processor, family)
        theirs = plain.generate(
            **stock, max_new_tokens=6, do_sample=False, eos_token_id=policy.processor.end_ids,
            suppress_tokens=blocked,
        )[0, len(e) :]  # fmt: skip
        assert ours.tokens[b].tolist() == theirs.tolist()[: len(ours.tokens[b])]
        with sparse_attention(policy.model, request) as run:
            logits, _ = policy.answer_logits([e], features, [torch.tensor([40])], run)
        wanted = plain(**stock).logits[:, -1:].float()
        wanted[..., blocked] = logits[..., blocked]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        for name in ("pixel_values", "pixel_values_videos"):
            if name in stock:
                other = {**stock, name: stock[name].flip(-1)}
                assert (plain(**other).logits[:, -1:] - wanted).abs()[..., 200:].max() > 1e-3


@timed
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_below_one_it_prunes_and_replays(family, skip):
    if family in tinymodels.HYBRID and skip == "layer":
        pytest.skip("refused: tests/models/test_hybrid.py")
    policychecks.below_one_it_prunes_and_replays(shared(family), prompts(), SMALL, skip)


@timed
@torch.no_grad()
def test_load_answers_clips_as_the_policy_does(family, tmp_path):
    folder = tinymodels.folder(family, tmp_path / "model")
    policy = load_policy(Model(path=str(folder), min_pixels=1024), "cpu")
    (encoded,) = tinymodels.encode(policy, [both()])
    wanted = policy.generate([encoded], policy.encode_vision([encoded]), Request(SMALL), 6)
    model, processor = zipr1.load(
        str(folder), budget=0.7, device="cpu", min_pixels=1024, dense_below=0,
        probes={"recent": 3, "random": 6},
    )  # fmt: skip
    clip, picture = both().media
    parts: list[Any] = [
        {"type": "video", "video": clip.source, "fps": clip.fps}, {"type": "text", "text": "red"},
        {"type": "image", "image": picture.source}, {"type": "text", "text": "which digit is green?"},
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True
    )
    assert inputs["input_ids"][0].tolist() == encoded.ids.tolist()
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(encoded) :]
    assert said.tolist() == wanted.tokens[0].tolist()
    assert zipr1.stats(model).kept[0].tolist() == wanted.counts[0].tolist()
