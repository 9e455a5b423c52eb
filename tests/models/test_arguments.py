"""Arguments of transformers' forward passes that a sparse one does not read: refused by name, and right at p = 1."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tinymodels
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import TransformersKwargs

import zipr1
from zipr1.core.errors import InputError
from zipr1.models.families import FAMILIES
from zipr1.models.sparse.arguments import READ, REFUSED, prompt_lengths

SPARSE = {"dense_below": 0, "probes": {"recent": 3, "random": 6}}
families = pytest.mark.parametrize("family", FAMILIES)


@lru_cache
def plain(family: str) -> Any:
    with TemporaryDirectory() as path:
        folder = tinymodels.folder(family, Path(path))
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()


def text(rows: int = 1, length: int = 24) -> dict[str, Any]:
    ids = torch.randint(20, 200, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids}


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@families
def test_whatever_transformers_reads_is_read_or_refused(family):
    """A new argument of a new version fails here."""
    names: set[str] = set(TransformersKwargs.__annotations__)
    for function in (
        type(plain(family).get_decoder()).forward,
        sdpa_attention_forward,
        flash_attention_forward,
        flex_attention_forward,
        create_causal_mask,
    ):
        names |= set(inspect.signature(function).parameters)
    of_the_layer = {
        "self",
        "module",
        "query",
        "key",
        "value",
        "scaling",
        "config",
        "kwargs",
        "layer_idx",
    }
    # The config's, and what masks are made of inside of the decoder, which nobody can hand to it.
    inside = {"dropout", "or_mask_function", "and_mask_function", "allow_is_causal_skip"}
    elsewhere = {
        "num_items_in_batch",
        "output_router_logits",
    }  # of losses, and of models with experts
    assert names - of_the_layer - inside - elsewhere - set(READ) - set(REFUSED) == {"is_causal"}


@families
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_sparse_pass_does_not_read_is_refused_by_name(family, name):
    model = plain(family)
    with (
        zipr1.sparse(model, 0.5, **SPARSE),
        pytest.raises(InputError, match=rf"sparse attention: {name}: .*budget=1.0"),
    ):
        model.get_decoder()(**text(), **{name: torch.tensor([0, 24])})


@families
def test_what_changes_nothing_is_taken(family):
    model = plain(family)
    given = text()
    quiet = {**dict.fromkeys(REFUSED), "output_attentions": False, "is_causal": True}
    quiet.pop("sliding_window")  # which layers of some families hand on themselves
    with torch.no_grad(), zipr1.sparse(model, 0.5, **SPARSE):
        wanted = model(**given).logits
        for more in (
            quiet,
            {"attention_mask": torch.ones_like(given["input_ids"])},
            {"num_items_in_batch": torch.tensor(3)},
            {"return_dict": True, "output_hidden_states": True, "use_cache": False},
            {"past_key_values": DynamicCache()},
            {"position_ids": torch.arange(24)[None]},
        ):
            assert torch.equal(model(**given, **more).logits, wanted), more
        assert zipr1.stats(model).token_ratio < 1
        # By place as by name.
        decoder, mask = model.get_decoder(), torch.ones_like(given["input_ids"])
        by_name = decoder(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        assert torch.equal(decoder(given["input_ids"], mask).last_hidden_state, by_name)
        with pytest.raises(ValueError, match="exactly one of"):
            decoder()


def masks(length: int) -> dict[str, tuple[Any, str]]:
    allowed = causal(length)
    additive = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo().min)
    flex = create_block_mask(lambda b, h, q, k: q >= k, 1, None, length, length, device="cpu")
    return {
        "bool": (allowed, r"4 dimensions \(1, 1, 24, 24\)"),
        "additive": (additive, r"4 dimensions"),
        "three": (allowed[0], r"3 dimensions \(1, 24, 24\)"),
        "dict": ({"full_attention": allowed}, "a dict"),
        "flex": (flex, "a BlockMask"),
        "long": (torch.ones(1, length + 3), r"\(1, 27\); allowed here: \(1, 24\)"),
        "short": (torch.ones(1, length - 3), r"\(1, 21\); allowed here: \(1, 24\)"),
        "rows": (torch.ones(2, length), r"\(2, 24\); allowed here: \(1, 24\)"),
    }


@families
@pytest.mark.parametrize("kind", masks(24))
@torch.no_grad()
def test_masks_of_other_forms_are_refused_by_what_they_are(family, kind):
    model = plain(family)
    mask, message = masks(24)[kind]
    with (
        zipr1.sparse(model, 0.5, **SPARSE),
        pytest.raises(InputError, match=f"sparse attention: attention_mask: .*{message}"),
    ):
        model.get_decoder()(**text(), attention_mask=mask)


@families
@pytest.mark.parametrize("kind", ["bool", "additive", "dict"])
@torch.no_grad()
def test_at_one_a_custom_mask_does_what_it_does_in_the_stock_model(family, kind):
    """The mask hides the first half of a row from the second."""
    if kind == "dict" and family in (*tinymodels.HYBRID, "qwen3_vl", "qwen3_vl_moe", "smolvlm"):
        pytest.skip("this family's decoder takes no dict of masks")
    model, given = plain(family), text()
    stock = copy.deepcopy(model)
    allowed = causal(24)
    allowed[..., 12:, :12] = False
    mask: Any = allowed
    if kind == "additive":
        mask = torch.zeros(1, 1, 24, 24).masked_fill(~allowed, torch.finfo().min)
    if kind == "dict":
        mask = {"full_attention": allowed}
    decoder = stock.get_decoder()
    wanted = decoder(**given, attention_mask=mask).last_hidden_state
    assert (decoder(**given).last_hidden_state - wanted).abs().max() > 1e-3
    with zipr1.sparse(model, 1.0):
        got = model.get_decoder()(**given, attention_mask=mask).last_hidden_state
    assert torch.equal(got, wanted)


def packed(family: str, positions: torch.Tensor) -> torch.Tensor:
    """Text positions `(1, L)` as the family's decoder takes those of packed sequences."""
    return positions if not FAMILIES[family].mrope else positions[None].expand(4, -1, -1)


@families
@torch.no_grad()
def test_packed_sequences_are_refused_and_right_at_one(family):
    model, given = plain(family), text()
    positions = packed(family, torch.cat([torch.arange(12), torch.arange(12)])[None])
    call = {**given, "position_ids": positions, "use_cache": False}
    halves = [
        model(input_ids=part, position_ids=packed(family, torch.arange(12)[None])).logits
        for part in given["input_ids"].chunk(2, dim=1)
    ]
    with zipr1.sparse(model, 1.0):
        alone = model(**call).logits
    if family not in tinymodels.HYBRID:  # a linear layer's state goes on, in the stock model too
        torch.testing.assert_close(alone, torch.cat(halves, dim=1), atol=2e-4, rtol=1e-4)
    with zipr1.sparse(model, 0.5, **SPARSE):
        for cached in (False, True):
            with pytest.raises(InputError, match="position_ids: restart or jump within a row"):
                model(**{**call, "use_cache": cached})
        with pytest.raises(InputError, match="position_ids: restart or jump within a row"):
            model(**given, position_ids=packed(family, torch.arange(24)[None] * 2))


@families
@torch.no_grad()
def test_padding_may_not_change_afterwards(family):
    model, given = plain(family), text(2)
    mask = torch.ones_like(given["input_ids"])
    mask[1, :5] = 0
    with zipr1.sparse(model, 0.5, **SPARSE):
        first = model(**given, attention_mask=mask, use_cache=True)
        cache, new = first.past_key_values, torch.full((2, 1), 50)
        longer = torch.cat([mask, torch.ones(2, 1)], dim=1)
        model(input_ids=new, attention_mask=longer, past_key_values=cache)
        hiding = torch.cat([longer, torch.ones(2, 1)], dim=1)
        hiding[0, 3] = 0
        with pytest.raises(InputError, match="of tokens in the cache what it did not say"):
            model(input_ids=new, attention_mask=hiding, past_key_values=cache)
        with pytest.raises(
            InputError, match=r"\(2, 26\); allowed here: \(2, 27\)|\(2, 25\); allowed"
        ):
            model(input_ids=new, attention_mask=longer, past_key_values=cache)
        hiding[0, 3] = 1
        model(input_ids=new, attention_mask=hiding, past_key_values=cache)


@families
@torch.no_grad()
def test_a_cache_that_stayed_empty_is_not_taken_for_a_new_conversation(family):
    """A sparse pass returns another cache than it was given; to go on with the empty one would lose the prompt."""
    model, given = plain(family), text()
    cache, new = DynamicCache(), torch.tensor([[50]])
    with zipr1.sparse(model, 0.5, **SPARSE):
        out = model(**given, past_key_values=cache)
        with pytest.raises(InputError, match="go on with past_key_values of its output"):
            model(input_ids=new, past_key_values=cache)
        model(input_ids=new, past_key_values=out.past_key_values)
        with pytest.raises(InputError, match="got a StaticCache"):
            model(
                **given,
                past_key_values=StaticCache(model.config.get_text_config(), max_cache_len=64),
            )


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f not in ("qwen3_vl", "qwen3_vl_moe", "smolvlm", *tinymodels.HYBRID)],
)
@torch.no_grad()
def test_sliding_windows_are_refused(family):
    model, given = copy.deepcopy(plain(family)), text()
    wanted = model(**given).logits
    config = model.get_decoder().config
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with (
        pytest.raises(InputError, match=r"layers of sliding_attention \(config.json\)"),
        zipr1.sparse(model, 0.5, **SPARSE),
    ):
        pass
    model.get_decoder().has_sliding_layers = True
    with zipr1.sparse(model, 1.0):
        assert (model(**given).logits - wanted).abs().max() > 1e-3


@families
def test_dropout_of_attention_is_refused(family):
    model = copy.deepcopy(plain(family)).train()
    config = model.get_decoder().config
    with zipr1.sparse(model, 0.5, **SPARSE):
        model(**text())
        config.attention_dropout = 0.1
        with pytest.raises(InputError, match=r"attention_dropout=0.1 in training mode"):
            model(**text())
        model.eval()
        model(**text())


@families
def test_other_directions_are_refused(family):
    model = copy.deepcopy(plain(family))
    with zipr1.sparse(model, 0.5, **SPARSE):
        with pytest.raises(InputError, match="is_causal=False"):
            model(**text(), is_causal=False)
        model.get_decoder().config.is_causal = False
        with pytest.raises(InputError, match="is_causal=False"):
            model(**text())


def test_lengths_of_dense_prompts_by_hand():
    ids = torch.zeros(2, 4, dtype=torch.long)
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    square = causal(4).expand(2, 1, 4, 4) & real.bool()[:, None, None]
    wide = torch.cat(
        [square, torch.zeros(2, 1, 4, 3, dtype=torch.bool)], dim=-1
    )  # a static cache of 7
    added = torch.zeros(2, 1, 4, 4).masked_fill(~square, -1e9)
    for mask, wanted in (
        (real, [2, 4]),
        (square, [2, 4]),
        (wide, [2, 4]),
        (added, [2, 4]),
        ({"full_attention": wide, "sliding_attention": square}, [2, 4]),
        ({"full_attention": None}, [4, 4]),
        (causal(4), [4, 4]),
        (None, [4, 4]),
    ):
        assert prompt_lengths({"input_ids": ids, "attention_mask": mask}).tolist() == wanted
    assert prompt_lengths({"inputs_embeds": torch.zeros(2, 4, 8)}).tolist() == [4, 4]


@families
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"num_beams": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 8},
    ],
    ids=lambda options: "-".join(options),
)
@torch.no_grad()
def test_at_one_generate_is_the_stock_model_s(family, options):
    """Rows of 24 and 19 tokens; `generate` makes dicts of masks for caches of a fixed size."""
    model, given = plain(family), text(2)
    mask = torch.ones_like(given["input_ids"])
    mask[1, :5] = 0
    call = {**given, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **options}
    wanted = copy.deepcopy(model).generate(**call)
    with zipr1.sparse(model, 1.0):
        assert torch.equal(model.generate(**call), wanted)
        if options.get("cache_implementation"):
            beams = options.get("num_beams", 1)
            assert zipr1.stats(model).lengths.tolist() == [24] * beams + [19] * beams
