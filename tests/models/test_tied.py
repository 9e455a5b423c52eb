"""Adapters on the embeddings and on what makes logits, one tensor in tied models; settings of generation that nothing
uses. What is loaded, trained on and saved is what peft and transformers make of the same files."""

from __future__ import annotations

import json
import shutil

import pytest
import tinymodels
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

import zipr1
from zipr1.core.errors import InputError
from zipr1.core.recipe import Lora, Model
from zipr1.models.open import open_model, resolve
from zipr1.models.policy import load_policy

IDS = torch.arange(10, 30)[None]
# name: (peft's settings, whether the two are one tensor still)
ADAPTERS = {
    "logits": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "both": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "logits, whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "embeddings, whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "both, whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False,
    ),
    "some tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [11, 12]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}  # fmt: skip


def adapter(base, folder, **settings):
    """An adapter of noise, and the logits of peft's own model with it."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, **settings)).eval()
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return logits(peft)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def near(got, wanted):
    return float((got - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_it_says_what_peft_says(name, tmp_path):
    """`zipr1.load`, and a policy that trains it; saved, the same again for stock transformers."""
    settings, tied = ADAPTERS[name]
    wanted = adapter(resolve("tiny"), tmp_path / "adapter", **settings)
    model, _ = zipr1.load(str(tmp_path / "adapter"), budget=1.0, device="cpu")
    assert near(logits(model), wanted)
    one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert one == tied == model.config.tie_word_embeddings
    policy = load_policy(Model(path=str(tmp_path / "adapter")), "cpu")
    policy.save(tmp_path / "out")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert near(logits(stock), wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] == tied
    policy.load_weights(tmp_path / "out")
    assert near(logits(open_model(Model(path=str(tmp_path / "out")), "cpu").model), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_are_trained_on_it(tmp_path):
    """Adapters upon adapters, as a run leaves them beside their base: opened, the first ones are merged untied."""
    wanted = adapter(resolve("tiny"), tmp_path / "adapter", **ADAPTERS["logits"][0])
    asked = Model(path=str(tmp_path / "adapter"), lora=Lora(rank=2, alpha=4))
    policy = load_policy(asked, "cpu")
    assert near(logits(policy.peft_model), wanted)
    for n, parameter in policy.trainable():
        if "lora_B" in n:
            parameter.data += 0.05
    after = logits(policy.peft_model)
    assert not near(after, wanted)
    policy.save(tmp_path / "second")
    again = zipr1.load(str(tmp_path / "second" / "adapter"), budget=1.0, device="cpu")[0]
    assert near(logits(again), after)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_other_tied_families(family, tmp_path):
    base = tinymodels.folder(family, tmp_path / "base")
    settings = {"target_modules": ["q_proj", "lm_head"]}
    wanted = adapter(base, tmp_path / "adapter", **settings)
    policy = load_policy(Model(path=str(tmp_path / "adapter")), "cpu")
    policy.save(tmp_path / "out")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert near(logits(policy.model), wanted) and near(logits(stock), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_change_for_both_is_refused(tmp_path):
    settings = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    adapter(resolve("tiny"), tmp_path / "adapter", **settings)
    for call in (
        lambda: zipr1.load(str(tmp_path / "adapter"), device="cpu"),
        lambda: load_policy(Model(path=str(tmp_path / "adapter")), "cpu"),
    ):
        with pytest.raises(InputError, match=r"ensure_weight_tying.* is not handled"):
            call()


INERT = {
    "sampling": {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    "nothing said of sampling": {"temperature": 0.7},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
}


@pytest.mark.parametrize("name", INERT)
def test_settings_that_nothing_uses_do_not_keep_a_model_from_being_saved(name, tmp_path, caplog):
    shutil.copytree(resolve("tiny"), tmp_path / "base")
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "base/generation_config.json").write_text(json.dumps({**INERT[name], **ends}))
    model, _ = zipr1.load(str(tmp_path / "base"), device="cpu")
    model.save_pretrained(tmp_path / "out")
    kept = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert kept.get("temperature") is None and kept.get("length_penalty") is None
    (said,) = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert "which its other settings leave without effect" in said
    sampled = {"do_sample": True, "temperature": 0.7, **ends}
    caplog.clear()
    (tmp_path / "base/generation_config.json").write_text(json.dumps(sampled))
    assert zipr1.load(str(tmp_path / "base"), device="cpu")[0].generation_config.temperature == 0.7
    assert "generation_config" not in caplog.text
