"""Rates by parameter: queries and keys of the language model, and all others."""

from __future__ import annotations

import pytest
import tinymodels
import torch

from zipr1.core.errors import InputError
from zipr1.core.recipe import Optim
from zipr1.train import optim


@pytest.mark.parametrize(
    ("name", "chooses"),
    [
        ("model.language_model.layers.0.self_attn.q_proj.weight", True),
        ("model.language_model.layers.11.self_attn.k_proj.bias", True),
        ("model.language_model.layers.0.self_attn.q_norm.weight", True),
        ("base_model.model.model.language_model.layers.3.self_attn.k_proj.lora_A.default.weight", True),
        ("model.language_model.layers.0.self_attn.v_proj.weight", False),
        ("model.language_model.layers.0.self_attn.o_proj.weight", False),
        ("model.language_model.layers.0.mlp.gate_proj.weight", False),
        ("model.language_model.layers.0.linear_attn.in_proj_qkvz.weight", False),
        ("model.visual.blocks.0.attn.qkv.weight", False),
        ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", False),
        ("model.vision_model.encoder.layers.0.self_attn.k_proj.weight", False),
        ("lm_head.weight", False),
    ],
)  # fmt: skip
def test_which_parameters_choose_tokens(name, chooses):
    assert optim.chooses_tokens(name) is chooses


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_others_learn_at_their_share_of_the_rate(kind):
    torch.manual_seed(0)
    names = (
        "x.self_attn.q_proj.weight",
        "x.self_attn.q_proj.bias",
        "x.mlp.up_proj.weight",
        "x.norm",
    )
    shapes = ((4, 4), (4,), (4, 4), (4,))
    named = [(n, torch.nn.Parameter(torch.ones(s))) for n, s in zip(names, shapes, strict=True)]
    made = optim.build(named, Optim(name=kind, lr_ratio_rest=0.25, weight_decay=0.0))
    made.set_rate(0.08)
    rates = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    assert [rates[id(p)] for _, p in named] == pytest.approx([0.08, 0.08, 0.02, 0.02])
    made.scale_rate(0.5)
    assert {g["lr"] for g in made.param_groups} == {0.04, 0.01}
    made.set_rate(0.08)  # anew in each step
    for _, p in named:
        p.grad = torch.ones_like(p)
    made.step()
    moved = [float((1 - p.detach()).abs().max()) for _, p in named]
    assert moved[2:] == pytest.approx([m / 4 for m in moved[:2]], rel=1e-4)
    groups = optim.build(named, Optim(name=kind)).param_groups
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert [decays[id(p)] for _, p in named] == [0.01, 0.0, 0.01, 0.0]


def test_a_model_in_which_nothing_chooses_is_refused():
    named = [("mlp.weight", torch.nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(InputError, match=r"optim.lr_ratio_rest 0\.5 .* set it to 1"):
        optim.build(named, Optim(lr_ratio_rest=0.5))
    assert optim.build(named, Optim()).param_groups


@pytest.mark.parametrize("lora", [False, True])
def test_queries_and_keys_of_every_layer_are_found(lora):
    policy = tinymodels.make(lora=lora) if lora else tinymodels.make()
    found = [n for n, _ in policy.trainable() if optim.chooses_tokens(n)]
    layers = len(policy.decoder.layers)
    # Weight and bias of two projections; or two adapter matrices each.
    assert len(found) == 4 * layers
