"""Media on their way to the model: decoded ahead, once, in any order; lengths and placeholders checked, nothing cut."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import standingpu
import tinymodels
import torch
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data, Model, Recipe
from zipr1.core.types import Media, Prompt
from zipr1.data import video
from zipr1.models import encoder as module
from zipr1.models import processors
from zipr1.models.encoder import MediaEncoder, effective
from zipr1.models.policy import load_policy


def recipe(**changes):
    return Recipe(data=Data(**{"max_prompt_tokens": 4096, "workers": 3, **changes}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(root / "a.png")
    video.write(root / "c.mp4", rng.integers(0, 256, (12, 64, 80, 3), np.uint8), 6.0)
    return root


def ask(media, index=0, text="which digit is green?"):
    content = [*({"type": m.kind} for m in media), {"type": "text", "text": text}]
    return Prompt(f"q/{index}", [{"role": "user", "content": content}], tuple(media), "two",
                  row=f"rows.jsonl: row {index + 1}")  # fmt: skip


def known(path):
    """A medium that was looked at."""
    media = Media("video" if path.suffix == ".mp4" else "image", path)
    size = video.check(path) if media.kind == "video" else (1, 64, 96, 0.0)
    return replace(media, size=size)


@pytest.fixture
def counted(monkeypatch):
    """Names of the threads in which media were decoded, by source."""
    seen = []
    load = module.load_timed

    def counting(media, *rest):
        seen.append((media.key, threading.current_thread().name))
        return load(media, *rest)

    monkeypatch.setattr(module, "load_timed", counting)
    return seen


def same(a, b):
    return all(
        torch.equal(x.ids, y.ids)
        and torch.equal(x.positions, y.positions)
        and all(torch.equal(v.patches, w.patches) for v, w in zip(x.visuals, y.visuals))
        for x, y in zip(a, b, strict=True)
    )


def test_what_was_decoded_ahead_is_not_decoded_again_and_is_the_same(counted):
    prompts = tinymodels.mixed()
    plain = tinymodels.encode(tinymodels.shared(), prompts)
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    pictures.ahead(prompts)
    for future in pictures.coming.values():
        future.result(timeout=60)
    begun = len(counted)
    assert begun == 4
    assert same(pictures.encode(prompts), plain)
    assert len(counted) == begun and not pictures.coming
    assert all(name.startswith("decode") for _, name in counted)


def test_a_picture_that_is_alone_in_one_prompt_and_not_in_another_is_cut_up_in_the_first(tmp_path):
    """In LLaVA-OneVision: 64 tokens of the whole and, of one tile more of 8 x 8, a line's end each; or 64 and one."""
    folder = tinymodels.folder("llava_onevision", tmp_path)
    policy = load_policy(Model(path=str(folder)), "cpu")
    rng = np.random.default_rng(0)
    a, b = (Media("image", rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2))
    text = {"type": "text", "text": "which?"}
    one, two = (
        Prompt(str(len(media)), [{"role": "user", "content": [{"type": "image"}] * len(media) + [text]}], media, "x")
        for media in ((a,), (a, b))
    )  # fmt: skip
    pictures = MediaEncoder(policy, recipe())
    for prompts in ([one, two], [two, one]):
        encoded = {e.picture: e for e in pictures.encode(prompts)}
        found = [[v.tokens for v in encoded[p.media_key].visuals] for p in (one, two)]
        assert found == [[64 + 8 * 8 + 8], [65, 65]]
        looked = pictures.encode_vision(list(encoded.values())).policy
        assert [len(looked[p.media_key]) for p in (one, two)] == [136, 130]


def test_ahead_forgets_what_nobody_came_for_and_skips_what_is_remembered(counted):
    prompts = tinymodels.mixed()
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    pictures.ahead(prompts[:2])
    pictures.ahead(prompts[2:])
    assert set(pictures.coming) == {(m.key, True) for p in prompts[2:] for m in p.media}
    pictures.encode_vision(pictures.encode(prompts[2:]))
    pictures.ahead(prompts[2:])
    assert not pictures.coming  # their features are remembered


def test_a_medium_in_two_questions_is_decoded_once(counted, files):
    media = Media("image", files / "a.png")
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    pictures.encode([ask([media]), ask([media], 1), ask([media, media], 2)])
    assert len(counted) == 1


def test_a_bad_medium_is_told_with_its_row_and_does_not_hurt_the_others(files, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_bytes((files / "c.mp4").read_bytes()[:2000])
    good, bad = (
        ask([Media("video", files / "c.mp4")]),
        ask([Media("video", tmp_path / "bad.mp4")], 6),
    )
    strict = MediaEncoder(tinymodels.shared(), recipe())
    strict.ahead([good, bad])
    with pytest.raises(InputError, match=r"rows\.jsonl: row 7: .*bad\.mp4: cannot be read"):
        strict.usable([good, bad])
    patient = MediaEncoder(tinymodels.shared(), recipe(on_bad_row="skip"))
    patient.ahead([good, bad])
    kept, encoded = patient.usable([bad, good])
    assert [p.id for p in kept] == ["q/0"] and len(encoded) == 1
    assert "skipped q/6" in caplog.text


@pytest.mark.parametrize("frames", [None, 3, 8])
def test_lengths_from_sizes_are_those_of_decoded_media(files, frames):
    pictures = MediaEncoder(
        tinymodels.shared(), recipe(**({"max_frames": frames} if frames else {}))
    )
    prompts = [
        ask([known(files / "a.png")]),
        ask([known(files / "c.mp4")], 1),
        ask([known(files / "c.mp4"), known(files / "a.png"), known(files / "a.png")], 2),
    ]
    for prompt, encoded in zip(prompts, pictures.encode(prompts), strict=True):
        visual = sum(v.tokens for v in encoded.visuals)
        assert pictures.length(prompt) == (len(encoded), visual)


def test_long_prompts_are_refused_or_left_out_and_never_cut(files, caplog):
    short, long = ask([known(files / "a.png")]), ask([known(files / "c.mp4")] * 3, 4)
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    limit = pictures.length(short)[0]
    strict = MediaEncoder(tinymodels.shared(), recipe(max_prompt_tokens=limit))
    with pytest.raises(InputError, match=rf"row 5: the prompt has \d+ tokens and .* is {limit}"):
        strict.fitting([short, long])
    patient = MediaEncoder(tinymodels.shared(), recipe(max_prompt_tokens=limit, on_bad_row="skip"))
    assert patient.fitting([short, long]) == [short]
    assert "1 of 2 prompts skipped; the first: rows.jsonl: row 5" in caplog.text
    (encoded,) = patient.encode([short])
    marks = torch.tensor(list(patient.policy.processor.placeholder.values()))
    assert int(torch.isin(encoded.ids, marks).sum()) == encoded.visuals[0].tokens
    with pytest.raises(InputError, match=r"all of 1 prompts are bad"):
        patient.fitting([long])


def test_placeholders_written_into_a_question_are_found_before_the_run(files):
    prompt = ask([known(files / "a.png")], 2, "what is <|image_pad|> here?")
    with pytest.raises(InputError, match=r"row 3: the text has placeholders \['image', 'image'\]"):
        MediaEncoder(tinymodels.shared(), recipe()).fitting([prompt])


def test_features_that_do_not_match_the_placeholders_are_an_error(files, monkeypatch):
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    (encoded,) = pictures.encode([ask([Media("image", files / "a.png")])])
    tokens = encoded.visuals[0].tokens
    monkeypatch.setattr(
        pictures.policy,
        "encode_vision",
        lambda *a, **k: {encoded.picture: torch.zeros(tokens + 1, 64)},
    )
    with pytest.raises(
        InputError, match=rf"{tokens} placeholders but {tokens + 1} visual features"
    ):
        pictures.encode_vision([encoded])


def test_effective_sizes_are_told_and_frames_have_a_cap_of_their_own(files):
    policy = tinymodels.make()
    settings = policy.processor.settings
    pictures = MediaEncoder(policy, recipe(max_frames=8))
    prompts = [ask([Media("image", files / "a.png")]), ask([Media("video", files / "c.mp4")], 1)]
    one, two = effective(pictures.encode(prompts), policy)
    assert one == f"pictures: 64 x 96 pixels (at most {settings.max_pixels:,}), 24 tokens"
    # 8 of 12 frames at 6 a second; 64 x 80 pixels are 4 x 5 tokens of 16 pixels, in 4 pairs of frames.
    assert two.startswith(
        f"clips: 8 frames, 4 a second, 64 x 80 pixels (at most {settings.max_pixels:,}), 80 tokens, read by "
    )
    policy.processor.settings = replace(settings, max_frame_pixels=32 * 32)
    one, two = effective(MediaEncoder(policy, recipe(max_frames=8)).encode(prompts), policy)
    assert "64 x 96 pixels" in one
    assert "16 x 32 pixels (at most 1,024), 8 tokens" in two
    assert Model(max_frame_pixels=1024).max_frame_pixels == 1024


def test_pictures_that_are_remembered_leave_no_patches_behind(monkeypatch):
    """A view of a tensor, an empty one too, keeps all of its memory."""
    made: list[weakref.ref] = []
    patchify = processors.patchify

    def counted(frames, settings):
        patches, grid = patchify(frames, settings)
        array = patches.numpy().copy()
        made.append(weakref.ref(array))
        return torch.from_numpy(array), grid

    monkeypatch.setattr(processors, "patchify", counted)
    pictures = MediaEncoder(tinymodels.shared(), recipe())
    prompts = tinymodels.mixed()
    pictures.encode_vision(pictures.encode(prompts))
    assert len(pictures.seen) == len(made) == 4
    assert [one() for one in made] == [None] * 4
    # They are known: their tokens are, too, and nothing is decoded again.
    assert [len(e) for e in pictures.encode(prompts)] == [
        len(e) for e in tinymodels.encode(tinymodels.shared(), prompts)
    ]


def test_of_more_pictures_than_fit_the_first_are_remembered():
    """Each in its turn, round after round: those remembered are not seen again, and nothing is copied for the rest."""
    prompts = tinymodels.mixed()
    policy = tinymodels.make()
    pictures = MediaEncoder(policy, recipe())
    sizes = {e.picture: f.nbytes for e in pictures.encode(prompts)
             for f in [pictures.encode_vision([e]).policy[e.picture]]}  # fmt: skip
    first, second = list(sizes)[:2]
    small = MediaEncoder(policy, recipe(), most=sizes[first] + sizes[second])
    calls = []
    for _ in range(3):
        before = policy.vision_calls
        for prompt in prompts:
            small.encode_vision(small.encode([prompt]))
        calls.append(policy.vision_calls - before)
        assert list(small.seen) == list(small.visuals) == [first, second]
    assert calls == [4, 2, 2] and small.held == small.most


def test_remembering_a_picture_makes_no_gpu_wait():
    policy = tinymodels.make()
    pictures = MediaEncoder(policy, recipe())
    encoded = pictures.encode(tinymodels.mixed())
    made = policy.encode_vision(encoded)
    with standingpu.gpu() as gpu:
        for one in encoded:
            pictures._remember(one.picture, one, standingpu.OnGpu(made[one.picture]))
        assert not gpu.waits and gpu.launches == 4
    assert all(torch.equal(pictures.seen[name], made[name]) for name in made)
