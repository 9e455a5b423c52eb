"""Two turns about a picture, of every family: the second goes on over the first one's cache, pictures and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinymodels
import torch

import zipr1
from zipr1.core.errors import InputError
from zipr1.models.families import FAMILIES

SETTINGS: dict[str, Any] = {"dense_below": 0, "probes": {"recent": 3, "random": 6}}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """By family: a sparse model and its processor."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def load(family: str) -> Any:
        if family not in made:
            folder = str(tinymodels.folder(family, root / family))
            made[family] = zipr1.load(folder, budget=0.7, device="cpu", **SETTINGS)
        return made[family]

    return load


def picture() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return {"type": "image", "image": pixels}


def two_turns(model: Any, processor: Any) -> tuple[list[int], Any, Any, int]:
    """The second answer over the cache of the first, the inputs of the whole conversation, the cache, and how many
    tokens the first turn had. What a random model says is no text: the second turn is put behind its very tokens."""
    question = {"type": "text", "text": "which digit is green?"}
    chat = [{"role": "user", "content": [picture(), question]}]
    whole = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    out = model.generate(**whole, **GREEDY)
    first = whole["input_ids"].shape[1]
    asked = (
        "<|im_end|>\n<|im_start|>user\nwhat color is the two?<|im_end|>\n<|im_start|>assistant\n"
    )
    tail = processor.tokenizer(asked, return_tensors="pt")["input_ids"]
    whole["input_ids"] = torch.cat([out.sequences, tail], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        types = whole["mm_token_type_ids"]
        more = whole["input_ids"].shape[1] - first
        whole["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, more))
    again = model.generate(**whole, past_key_values=out.past_key_values, **GREEDY)
    answer = again.sequences[0, whole["input_ids"].shape[1] :].tolist()
    return answer, whole, again.past_key_values, first


@families
@torch.no_grad()
def test_dense_it_says_what_the_whole_conversation_sent_anew_says(loaded, family):
    model, processor = loaded(family)
    with zipr1.sparse(model, budget=1.0):
        answer, whole, _, _ = two_turns(model, processor)
        wanted = model.generate(**whole, **GREEDY).sequences[0, whole["input_ids"].shape[1] :]
    assert answer == wanted.tolist()


@families
@torch.no_grad()
def test_sparse_it_goes_on_over_the_pruned_cache(loaded, family):
    model, processor = loaded(family)
    answer, whole, cache, first = two_turns(model, processor)
    assert answer and zipr1.stats(model).lengths.tolist() == [first]
    assert zipr1.stats(model).token_ratio < 1
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in whole:
            whole[name] = torch.cat([whole[name], whole[name]], dim=1)
    with pytest.raises(InputError, match="a later turn brings a picture"):
        model.generate(**whole, past_key_values=cache, **GREEDY)
