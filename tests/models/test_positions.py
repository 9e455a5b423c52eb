"""M-RoPE positions by Qwen's rule: words never share a place with the frames before them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tinymodels
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipr1.core.recipe import Model
from zipr1.core.types import Media, Prompt
from zipr1.models.api import load
from zipr1.models.policy import load_policy
from zipr1.models.positions import rope_index
from zipr1.models.visual import Visual


def inner(merge: int = 2, rate: float | None = 2) -> SimpleNamespace:
    vision = SimpleNamespace(spatial_merge_size=merge)
    if rate is not None:
        vision.tokens_per_second = rate
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision))


def test_the_numbers_of_a_report():
    """transformers issue 45381: 15 words, a clip of 84 x 12 x 16 tokens two seconds apart, then words at 348 to 357."""
    policy = load_policy(Model(path="tiny"), "cpu")
    pad = policy.processor.placeholder["video"]
    ids = torch.tensor([40] * 15 + [pad] * 16128 + [40] * 10)
    found = policy.place(ids, [Visual("video", torch.empty(0), (84, 24, 32), 2.0, 16128)], "x")
    assert int(found.positions[:, 16142].max()) == 347
    assert found.positions[:, 16143:].tolist() == [list(range(348, 358))] * 3
    assert found.next_position == 358


def by_hand(parts, merge, rate):
    """Position by position, in plain Python: parts are numbers of words, or (kind, t, h, w, seconds)."""
    places: list[tuple[int, int, int]] = []
    start = 0
    for part in parts:
        if isinstance(part, int):
            places += [(start + i,) * 3 for i in range(part)]
        else:
            kind, t, h, w, seconds = part
            for step in range(t):
                time = step
                if kind == 2 and rate is not None:
                    time = int(
                        np.float32(np.float32(step) * np.float32(seconds)) * np.float32(rate)
                    )
                places += [
                    (start + time, start + row, start + column)
                    for row in range(h // merge)
                    for column in range(w // merge)
                ]
        start = max(max(p) for p in places) + 1
    return places


visual = st.tuples(
    st.sampled_from([1, 2]), st.integers(1, 5), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]),
    st.sampled_from([0.1, 0.5, 2 / 3, 1.0, 2.0, 7.25]),
)  # fmt: skip


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 4), visual), max_size=3), min_size=1, max_size=3),
    st.sampled_from([None, 2, 4]),
    st.booleans(),
)
def test_every_token_of_any_batch_is_where_qwen_puts_it(rows, rate, left):
    parts = [[part for pair in row for part in pair] + [3] for row in rows]
    types = [
        [k for p in row for k in ([0] * p if isinstance(p, int) else [p[0]] * (p[1] * p[2] * p[3] // 4))]
        for row in parts
    ]  # fmt: skip
    longest = max(map(len, types))
    kinds = torch.zeros(len(rows), longest, dtype=torch.int)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, own in enumerate(types):
        where = slice(longest - len(own), None) if left else slice(len(own))
        kinds[b, where], mask[b, where] = torch.tensor(own, dtype=torch.int), 1
    seen = [p for row in parts for p in row if not isinstance(p, int)]
    grids = {k: torch.tensor([p[1:4] for p in seen if p[0] == k]).reshape(-1, 3) for k in (1, 2)}
    seconds = torch.tensor([p[4] for p in seen if p[0] == 2])
    positions, delta = rope_index(
        inner(2, rate), kinds.long(), kinds, grids[1], grids[2], seconds, mask
    )
    for b, row in enumerate(parts):
        wanted = by_hand(row, 2, rate)
        assert positions[:, b, mask[b].bool()].T.tolist() == [list(p) for p in wanted]
        assert len(wanted) + int(delta[b]) == max(max(p) for p in wanted) + 1


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@pytest.mark.parametrize("fps", [0.25, 2.0, 8.0])
def test_the_model_computes_with_these_positions(family, fps):
    """A stock forward of the loaded model, without sparsity: it finds its positions by itself."""
    policy = tinymodels.make(family)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": "which digit is green?"}]
    media = Media("video", pixels, fps)
    prompt = Prompt("a", [{"role": "user", "content": content}], (media,), "two")
    encoded = policy.encode(prompt, [(pixels, fps)], 9999)
    seen = encoded.ids == policy.processor.placeholder["video"]
    last = int(seen.nonzero()[-1])
    first = int(encoded.positions[:, seen].max()) + 1
    assert encoded.positions[:, last + 1].tolist() == [first] * 3
    assert encoded.next_position == first + len(encoded) - last - 1
    frames = encoded.positions[0, seen].unique()
    # Half a second between steps is one place in Qwen2.5-VL, two seconds are sixteen; Qwen2-VL counts steps.
    step = {0.25: 16, 2.0: 2, 8.0: 0.5}[fps] if family == "qwen2_5_vl" else 1
    assert frames.tolist() == sorted({int(frames[0]) + int(i * step) for i in range(8)})
    inputs = {
        "input_ids": encoded.ids[None],
        "attention_mask": torch.ones_like(encoded.ids)[None],
        "mm_token_type_ids": 2 * seen.int()[None],
        "pixel_values_videos": encoded.visuals[0].patches,
        "video_grid_thw": torch.tensor([encoded.visuals[0].grid]),
    }
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([encoded.visuals[0].seconds])
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        own = model(**inputs).logits
        given = model(**inputs, position_ids=encoded.positions[:, None]).logits
        assert torch.equal(own, given)
        assert int(model.model.rope_deltas) == encoded.next_position - len(encoded)
        policy.model.model.get_rope_index = None  # a copy keeps to its own modules
        assert torch.equal(model(**inputs).logits, own)


def test_a_loaded_model_has_them_whatever_transformers_does():
    model, processor = load("tiny", 1.0, "cpu", None, {})
    clip = np.zeros((12, 32, 32, 3), np.uint8)
    content = [{"type": "video", "video": clip, "fps": 0.5}, {"type": "text", "text": "which?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    with torch.no_grad():
        model(**inputs)
    # Six steps of time four seconds and so eight places apart: 40 places above the first, with some words around.
    pad = processor.inner.placeholder["video"]
    before = int((inputs["input_ids"][0] == pad).nonzero()[0])
    after = inputs["input_ids"].shape[1] - before - 6 * 2 * 2
    assert int(model.model.rope_deltas) == before + 40 + 1 + after - inputs["input_ids"].shape[1]
