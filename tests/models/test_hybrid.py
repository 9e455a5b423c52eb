"""Qwen3.5: layers of full attention choose tokens, those of linear attention between them read every one."""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any

import pytest
import tinymodels
import torch
from rich.console import Console
from transformers.cache_utils import LinearAttentionLayer

import zipr1
from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Model, Probes, Sparse
from zipr1.models import sampling
from zipr1.models.policy import Policy, load_policy
from zipr1.models.sparse.cache import PrunedCache, PrunedLayer
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.patch import attributes, sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.train import loop
from zipr1.train.dry_run import dry_run

SETTINGS = Sparse(p=0.6, probes=Probes(recent=3, random=6), dense_below=0)
FULL = [1, 3]  # of four layers
families = pytest.mark.parametrize("family", tinymodels.HYBRID)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrid")

    @cache
    def made(family: str) -> Policy:
        policy = load_policy(Model(path=str(tinymodels.folder(family, root / family))), "cpu")
        # What stands in padding is a vector of zeros in new models, and of anything in trained ones.
        words = policy.model.get_input_embeddings().weight.data
        words[policy.processor.tokenizer.pad_token_id] = 5 * words[100]
        return policy

    return made


def asked(policy: Policy) -> tuple[list[Any], Any]:
    """A picture, a clip and a conversation, of different lengths."""
    encoded = tinymodels.encode(policy, tinymodels.mixed()[:3])
    return encoded, policy.encode_vision(encoded)


@families
@torch.no_grad()
def test_only_full_attention_chooses_and_only_it_holds_keys(policies, family):
    policy = policies(family)
    encoded, features = asked(policy)
    inputs, valid = policy.rows(encoded, features, None, True)
    with sparse_attention(policy.model, Request(SETTINGS)) as run:
        _, held = sampling.prefill(policy.model, inputs, valid, run)
    assert policy.layers == len(run.record.layers) == 2
    kinds = [type(layer) for layer in held.layers]
    assert kinds == [LinearAttentionLayer, PrunedLayer] * 2
    counts = held.prompt_counts()
    assert counts.shape == (3, 2) and (counts < valid.sum(1)[:, None]).all()
    kept = run.record.kept_positions()
    for place, number in enumerate(FULL):
        assert held.layers[number].keys.shape[2] == max(len(row[place]) for row in kept)
    # 2 heads of 16 numbers, keys and values, of the longest row; the states of linear layers are not counted.
    longest = [max(len(row[place]) for row in kept) for place in (0, 1)]
    assert held.kv_bytes() == 4 * 3 * 2 * 2 * 16 * sum(longest)


@families
@torch.no_grad()
def test_a_sparse_prompt_is_the_stock_model_with_those_tokens_hidden(policies, family):
    """By hand, in transformers' own layers: in a layer that chooses, dropped tokens are masked as keys and add nothing
    as queries; the linear layers are left as they are."""
    policy = policies(family)
    encoded, features = asked(policy)
    for one in encoded:
        inputs, valid = policy.rows([one], features, None, True)
        with sparse_attention(policy.model, Request(SETTINGS)) as run:
            found, _ = sampling.prefill(policy.model, inputs, valid, run, cache=False)
        plain = copy.deepcopy(policy.model)
        plain.set_attn_implementation("sdpa")
        for place, number in enumerate(FULL):
            hide(plain.get_decoder().layers[number].self_attn, run.record.layers[place].keep[0])
        wanted = plain.get_decoder()(**inputs).last_hidden_state
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        # What is dropped matters, or the test could not tell.
        dense = policy.decoder(**inputs).last_hidden_state
        assert (dense - wanted).abs().max() > 1e-2


def hide(attention: Any, keep: torch.Tensor) -> None:
    """Tokens that are not kept are neither seen nor answered. keep: `(L,)` bool."""
    length = len(keep)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & keep
    allowed |= torch.eye(length, dtype=torch.bool)  # a row that sees nothing would be NaN
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": allowed[None, None]}),
        with_kwargs=True,
    )
    attention.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * keep[:, None],))


@families
@torch.no_grad()
def test_what_is_padding_does_not_reach_the_state(policies, family):
    """A row says the same alone and, padded on the left, beside longer ones; without the mask it would not."""
    policy = policies(family)
    encoded, features = asked(policy)
    request = Request(SETTINGS)
    together = policy.generate(encoded, features, request, 5)
    for b, one in enumerate(encoded):
        alone = policy.generate([one], features, request, 5)
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[b], atol=1e-4, rtol=0)
        assert alone.counts[0].tolist() == together.counts[b].tolist()


@families
@torch.no_grad()
def test_a_last_layer_of_linear_attention_is_finished_where_it_is_read(tmp_path, family):
    """Dense and sparse, with the order of layers turned round: the policy reads the last token alone."""
    folder = tinymodels.folder(family, tmp_path)
    changed = (folder / "config.json").read_text()
    pair = '"linear_attention",\n      "full_attention"'
    assert changed.count(pair) == 2
    (folder / "config.json").write_text(
        changed.replace(pair, '"full_attention",\n      "linear_attention"')
    )
    with pytest.raises(InputError, match=r"missing|not of this model|has no"):
        load_policy(Model(path=str(folder)), "cpu")  # the weights are of the other order
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    policy = load_policy(Model(path=str(folder)), "cpu")
    assert Choosing.of(policy.decoder).numbers == (0, 2)
    encoded, features = asked(policy)
    inputs, valid = policy.rows(encoded[:1], features, None, True)
    whole = policy.decoder(**inputs).last_hidden_state[:, -1]
    last = sampling.last_column(valid)
    for request in (None, Request(SETTINGS.model_copy(update={"p": 1.0}), force=True)):
        with sparse_attention(policy.model, request) as run:
            hidden, _ = sampling.prefill(policy.model, inputs, valid, run, read_at=last)
        torch.testing.assert_close(hidden[:, -1], whole, atol=1e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("kv", ["evict", "retain"])
@torch.no_grad()
def test_a_conversation_that_loses_nothing_is_the_dense_one(policies, tmp_path, family, kv):
    """Two turns with every token kept: states, keys and values of the first serve the second."""
    policy = policies(family)
    model = copy.deepcopy(policy.model)
    encoded, _ = asked(policy)
    text = encoded[0].ids[encoded[0].ids < 200][:12][None]
    more = text.flip(1)
    dense = model(input_ids=torch.cat([text, more], 1)).logits[:, -1]
    # Not 1.0, which would be the dense model itself; a share of the mass that only all tokens hold.
    settings = {"probes": {"recent": 3, "random": 6}, "dense_below": 0, "kv": kv}
    with zipr1.sparse(model, 1 - 1e-12, keep_last=64, **settings):
        first = model(input_ids=text, use_cache=True)
        again = model(input_ids=more, past_key_values=first.past_key_values, use_cache=True)
        assert isinstance(first.past_key_values, PrunedCache) == (kv == "evict")
    torch.testing.assert_close(again.logits[:, -1], dense, atol=1e-4, rtol=1e-4)


@families
def test_skipping_whole_layers_is_refused_with_the_reason(policies, tmp_path, family):
    policy = policies(family)
    said = r"sparse\.skip: layer: 2 of the model's 4 layers are linear attention .* use skip: attention"
    with (
        pytest.raises(InputError, match=said),
        zipr1.sparse(policy.model, 0.5, skip="layer"),
    ):
        pass
    assert "_zipr1" not in vars(policy.model) and "forward" not in vars(policy.decoder)
    folder = tinymodels.folder(family, tmp_path / "base")
    values: dict[str, Any] = {
        "model": {"path": str(folder)},
        "sparse": {"skip": "layer", "dense_below": 0},
        "train": {"steps": 1, "prompts_per_step": 1},
    }
    recipe = validate(values)
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.raises(InputError, match=said):
        dry_run(recipe, "cpu", quiet)
    with pytest.raises(InputError, match=said):
        loop.run(recipe, tmp_path / "run", "auto", "cpu", ["zipr1"], quiet)


@families
def test_gradients_are_the_same_with_checkpointing(tmp_path, family):
    folder = tinymodels.folder(family, tmp_path)
    grads = []
    for checkpointing in (False, True):
        settings = Model(path=str(folder), gradient_checkpointing=checkpointing)
        policy = load_policy(settings, "cpu")
        encoded, features = asked(policy)
        request = Request(SETTINGS, scores=True)
        with sparse_attention(policy.model, request) as run, policy.recomputing():
            answers = [torch.tensor([40, 41])] * 3
            logits, _ = policy.answer_logits(encoded, features, answers, run)
            cuts = sum(layer.cut.clamp(max=1).sum() for layer in run.record.layers)
            (logits.log_softmax(-1)[..., 7].sum() + cuts).backward()
        assert len(run.record.layers) == 2
        grads.append({n: p.grad for n, p in policy.trainable()})
    for name, gradient in grads[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, grads[1][name], atol=1e-5, rtol=1e-4)


def test_undone_it_is_the_stock_model_again(policies):
    policy = policies("qwen3_5")
    linear = policy.decoder.layers[0].linear_attn
    with attributes(linear, forward=linear.forward):
        assert "forward" in vars(linear)
    with sparse_attention(policy.model, Request(SETTINGS)):
        assert "forward" in vars(linear)
    assert "forward" not in vars(linear)
