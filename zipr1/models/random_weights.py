"""A small Qwen2-VL or Qwen2.5-VL with random weights and a tokenizer of its own.

What `model.path: scratch` builds: the start of recipes/tiny_base.yaml, and the models of the tests. The classes
are transformers' own, so whatever works on these works on the real ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from zipr1.core.errors import InputError
from zipr1.core.text import reason

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# ChatML as Qwen writes it, without the system turn.
CHAT_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}


def build_tokenizer(words: Sequence[str]) -> Any:
    """A byte-level BPE in which each of `words` is one token, with and without a space before it.

    Any other text still encodes, as bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [text for w in sorted({*words, "user", "assistant"}) for text in (w, f"a {w}")] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    out = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=merges,
        additional_special_tokens=SPECIAL[1:],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    out.chat_template = CHAT_TEMPLATE
    return out


def _known(given: dict[str, Any], allowed: set[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = (
                f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(sorted(allowed))}"
            )
            raise InputError(f"{where}.{key}: no such key; {hint}")


def build_model(tokenizer: Any, config: dict[str, Any], seed: int) -> torch.nn.Module:
    """`config`: `family`, and keyword arguments for the `text` and `vision` configs. Weights from `seed`, the same
    on every device: drawn on the CPU."""
    _known(config, {"family", "words", "pixels", "text", "vision"}, "model.config")
    family = config.get("family", "qwen2_5_vl")
    if family not in FAMILIES:
        raise InputError(f"model.config.family {family!r}: unknown; allowed: {', '.join(FAMILIES)}")
    config_class, model_class = FAMILIES[family]
    for part in ("text", "vision"):
        if not isinstance(config.get(part), dict):
            raise InputError(f"model.config.{part} is missing; see recipes/tiny_base.yaml")
        fields = dataclasses.fields(config_class.sub_configs[f"{part}_config"])
        _known(config[part], {f.name for f in fields}, f"model.config.{part}")
    text = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config["text"],
    }
    hidden = text["hidden_size"]
    width = "out_hidden_size" if config_class is Qwen2_5_VLConfig else "hidden_size"
    token = tokenizer.convert_tokens_to_ids
    full = config_class(
        text_config=text,
        vision_config={width: hidden, **config["vision"]},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: torch.nn.Module = model_class(full)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise InputError(
                f"model.config: no model can be built of it ({reason(error)})"
            ) from None
    return model
