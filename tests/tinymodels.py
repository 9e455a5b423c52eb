"""Small random models and prompts that the tests share. Attention is sharpened, or every token scores the same."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from zipr1.core.recipe import Lora, Model
from zipr1.core.types import Media, Prompt
from zipr1.data.digits.tasks import vocabulary
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.models.random_weights import build_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
}
FAMILIES = tuple(VISION)


def settings(
    family: str = "qwen2_5_vl",
    lora: bool = False,
    checkpointing: bool = False,
    vision: bool = False,
) -> Model:
    """A `scratch` model of two vision and three decoder layers."""
    tower = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "family": family,
        "words": vocabulary(),
        "text": TEXT,
        "vision": {**tower, **VISION[family]},
    }
    return Model(
        path="scratch",
        config=config,
        min_pixels=256,
        lora=Lora(rank=4, alpha=8) if lora else None,
        gradient_checkpointing=checkpointing,
        train_vision=vision,
    )


def make(family: str = "qwen2_5_vl", sharp: float = 8.0, **options: bool) -> Policy:
    """A fresh policy whose queries and keys are `sharp` times as large as initialised."""
    policy = load_policy(settings(family, **options), "cpu", seed=0)
    for name, parameter in policy.model.named_parameters():
        if (
            "language_model" in name
            and ("q_proj" in name or "k_proj" in name)
            and "lora" not in name
        ):
            parameter.data *= sharp
    return policy


@lru_cache
def shared(family: str = "qwen2_5_vl") -> Policy:
    """A policy that no test may change."""
    return make(family)


def prompt(index: int, kind: str, words: int = 0, turns: int = 1) -> Prompt:
    """A question of its own length about noise."""
    rng = np.random.default_rng(index)
    shape = (48, 48 + 16 * index, 3) if kind == "image" else (5, 48, 32, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    media = Media(kind, pixels, 4.0 if kind == "video" else None)  # type: ignore[arg-type]
    text = "which digit is green?" + " red" * words
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}
    ]
    for _ in range(turns - 1):
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "two"}]})
        messages.append(
            {"role": "user", "content": [{"type": "text", "text": "what color is the two?"}]}
        )
    return Prompt(f"{kind}/{index}", messages, (media,), "two", picture=f"{kind}/{index}")


def mixed() -> list[Prompt]:
    """Two images and two videos, four different lengths."""
    return [
        prompt(0, "image"),
        prompt(1, "video", 3),
        prompt(2, "image", 1, turns=2),
        prompt(3, "video", 6),
    ]


def encode(policy: Policy, prompts: list[Prompt]) -> list[Encoded]:
    return [
        policy.encode(p, [(np.asarray(m.source), m.fps) for m in p.media], 10_000) for p in prompts
    ]


# --- families beside Qwen2-VL and Qwen2.5-VL: transformers' own classes, in tiny

# Those whose clips are handled.
CLIPS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# Those with layers of linear attention beside those that choose.
HYBRID = ("qwen3_5", "qwen3_5_moe")
OTHERS = ("qwen3_vl", "qwen3_vl_moe", *HYBRID, "internvl", "llava_onevision", "smolvlm")
OTHER_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
# Layers 1 and 3 of four choose; of a head's 16 numbers the first 8 turn with the position.
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}
OTHER_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _config(family: str, text: dict[str, Any], tokenizer: Any) -> Any:
    """A tiny config whose pictures make 16 to 65 tokens."""
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    if family.startswith("qwen3"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        text = {**text, "rope_parameters": rope}
        names = ("image_pad", "video_pad", "vision_start", "vision_end")
        image, clip, start, end = tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names])
        kind = transformers.Qwen3VLConfig
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        if family == "qwen3_vl_moe":
            kind, text = transformers.Qwen3VLMoeConfig, {**text, **experts}
        if family in HYBRID:
            kind, text = transformers.Qwen3_5Config, {**text, **LINEAR}
            del vision["deepstack_visual_indexes"]
        if family == "qwen3_5_moe":
            kind = transformers.Qwen3_5MoeConfig
            del text["intermediate_size"]
            text |= {**experts, "shared_expert_intermediate_size": 32}
        return kind(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=clip,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=True,
        )
    if family == "internvl":
        vision = {**OTHER_TOWER, "image_size": [128, 128], "patch_size": [8, 8]}
        text = {**text, "model_type": "qwen2"}
        return transformers.InternVLConfig(
            text_config=text, vision_config=vision, image_token_id=token
        )
    if family == "llava_onevision":
        vision = {
            **OTHER_TOWER,
            "image_size": 64,
            "patch_size": 8,
            "model_type": "siglip_vision_model",
        }
        text = {**text, "model_type": "qwen2"}
        return transformers.LlavaOnevisionConfig(
            text_config=text,
            vision_config={**vision, "vision_use_head": False},
            image_token_index=token,
            image_grid_pinpoints=[[64, 64], [64, 128], [128, 64], [128, 128]],
        )
    vision = {**OTHER_TOWER, "image_size": 128, "patch_size": 8}
    text = {**text, "model_type": "llama"}
    return transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=token, scale_factor=2
    )


def folder(family: str, path: Path) -> Path:
    """A model folder as from the hub, of any family."""
    if family in FAMILIES:
        make(family).save(path)
        return path
    tokenizer = build_tokenizer(vocabulary())
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**OTHER_TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, **ends}
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(_config(family, text, tokenizer))
    for name, parameter in model.named_parameters():
        # Attention is sharpened, or every token scores the same.
        if any(f"{part}_proj.weight" in name for part in "qk") and "vision" not in name:
            parameter.data *= 25
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Its class's own settings, but for few and small tiles.
    few = {"internvl": {"max_patches": 3}}
    few["smolvlm"] = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 128}}
    (path / "preprocessor_config.json").write_text(json.dumps(few.get(family, {})))
    if family in CLIPS:  # its class's own are too large for tests, and take two frames a second
        bounds = {"shortest_edge": 1024, "longest_edge": 2**20}
        clips = {"size": bounds, "do_sample_frames": False}
        (path / "video_preprocessor_config.json").write_text(json.dumps(clips))
    return path
