"""What a run will take, by counting: parameters, memory by part, checkpoints, hours. Nothing is loaded.

The one memory model: the plan of a run (`memory`), the tokens that one pass may have (token_budget.py) and the check
before a profile (profiling/session.py) take the bytes of a token from the same three functions.

The counts need a `Shape` (a bundled config, or that of a loaded model) and the recipe. `memory` bounds from above what
depends on the data (nothing pruned, every row as long as the longest). It leaves out what Python and its libraries
take, half a GiB, and on a GPU the allocator's fragments and the CUDA context, about 1 GiB; tests/models/test_memory.py
holds it against the measured peak of a small model, tests/models/test_real_widths.py of real widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zipr1.core.recipe import Recipe
from zipr1.models.cost import (
    SIZED,
    Shape,
    add,
    decode,
    prefill,
    vision,
)

# Numbers of hidden width, and of MLP width, that autograd keeps of a token in a layer (counted in transformers' Qwen2
# decoder layer: norms, projections, rotations, residuals; gate, up and their product).
KEPT_HIDDEN, KEPT_MLP = 24, 3
# Logits that exist at once, in numbers, and how often: as they are, their logarithms, the reference's, gradients.
LOGITS, COPIES = 2**24, 6
# On a CPU: of what comes and goes in a step, what the C library holds besides in pieces too small to give back. Of
# tensors alone a step of Qwen2.5-VL-3B's widths took 1.80 GB in bfloat16, of the process 2.12 GB.
FRAGMENTS = 0.5
# An A100: operations a second in bfloat16 and in float32 by TF32, bytes a second; and the share of them that
# reinforcement learning reaches: EasyR1 reports 16 % of an H100 for Qwen2.5-VL-7B (assets/baselines.md).
RATES = {2: 312e12, 4: 156e12}
BANDWIDTH, REACHED = 2.0e12, 0.16


def parameters(s: Shape) -> dict[str, int]:
    """Numbers of parameters: `vision` (with its merger), `decoder`, `embeddings` (in, and out unless tied)."""
    if s.counted is not None:
        return dict(s.counted)
    h, m, wide = s.vision_hidden, int(s.vision_mlp), s.merge**2 * s.vision_hidden
    norm = h if s.vision_gated else 2 * h  # RMSNorm has no bias
    attention = 4 * h * h + 4 * h
    mlp = (3 * h * m + 2 * m + h) if s.vision_gated else (2 * h * m + m + h)
    tower = 3 * s.frames * s.patch**2 * h + s.vision_depth * (2 * norm + attention + mlp)
    merger = wide * wide + wide + wide * s.hidden + s.hidden
    # The first merger's norm is one of a patch, that of deepstack's one of a token.
    merging = s.mergers * merger + norm + (s.mergers - 1) * 2 * wide
    if s.places:  # and a bias where patches come in
        tower += s.places * h + h
    besides = 2 * s.dim if s.head_norms else (s.q_heads + 2 * s.heads) * s.dim
    decoder = s.layers * (s.layer_weights + besides + 2 * s.hidden) + s.hidden
    return {
        "vision": tower + merging,
        "decoder": decoder,
        "embeddings": s.vocab * s.hidden * (1 if s.tied else 2),
    }


def adapters(s: Shape, rank: int) -> int:
    """Parameters of low-rank adapters on the seven projections of every decoder layer."""
    if s.per_rank is not None:
        return s.per_rank * rank
    q, kv = s.q_heads * s.dim, s.heads * s.dim
    ends = (s.hidden + q) * 2 + (s.hidden + kv) * 2 + (s.hidden + s.mlp) * 3
    return s.layers * rank * ends


def trained(s: Shape, recipe: Recipe) -> int:
    """How many parameters the recipe trains."""
    counts = parameters(s)
    if recipe.model.lora:
        return adapters(s, recipe.model.lora.rank)
    return sum(counts.values()) - (0 if recipe.model.train_vision else counts["vision"])


def rollout_rows(recipe: Recipe) -> int:
    """Answers sampled in a step, with the greedy ones that a target or a constraint asks for."""
    wanted = recipe.efficiency
    checked = wanted.max_accuracy_drop is not None or wanted.target is not None
    return recipe.train.prompts_per_step * (recipe.budgets.group + checked)


def weight_bytes(recipe: Recipe, gpu: bool = True) -> int:
    """Bytes of a weight: `auto` is bfloat16 under adapters on a GPU, else float32."""
    auto = 2 if gpu and recipe.model.lora else 4
    return {"auto": auto, "float32": 4}.get(recipe.model.dtype, 2)


def computed(recipe: Recipe, size: int) -> int:
    """Bytes of a number in what is computed: sharded weights may be gathered in another dtype than their own."""
    return {"bfloat16": 2, "float32": 4}.get(recipe.train.param_dtype or "", size)


def layer_bytes(s: Shape, size: int) -> int:
    """Bytes that one decoder layer makes of one token, and that autograd keeps of it. size: bytes of a number."""
    return size * (KEPT_HIDDEN * s.hidden + KEPT_MLP * s.mlp)


def cache_bytes(s: Shape, size: int) -> int:
    """Bytes of one token's keys and values in all layers, nothing pruned."""
    return size * (s.holding or s.layers) * 2 * s.heads * s.dim


def update_bytes(s: Shape, size: int, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps of one token for its backward pass: all that every layer makes; with gradient
    checkpointing one hidden state a layer and what one layer makes."""
    if checkpointing:
        return size * s.layers * s.hidden + layer_bytes(s, size)
    return s.layers * layer_bytes(s, size)


def memory(
    s: Shape,
    recipe: Recipe,
    longest: int,
    size: int | None = None,
    ranks: int = 1,
    cpu: bool = False,
) -> dict[str, int]:
    """Bytes by part on one device, and their `peak`. longest: tokens of the longest prompt. size: bytes of a weight.
    cpu: whether the device is one.

    weights, reference, gradients, optimizer, average: counted; `train.parallel: fsdp` shards them over `ranks`, but
    for a frozen tower. gathered: the larger of two sharded models, which is whole while it answers. loading: both
    models before they are sharded. kv_cache: of a micro-batch of rollouts, unpruned, with one layer's prefill
    beside it. activations: of a micro-batch in the update; with gradient checkpointing one hidden state a layer and
    one layer's worth. logits: at most LOGITS numbers at once. vision: one longest picture in the tower. allocator:
    FRAGMENTS of what the update makes, on a CPU.
    """
    size = size or weight_bytes(recipe)
    counts = parameters(s)
    total, own = sum(counts.values()), trained(s, recipe)
    lora, rl = recipe.model.lora is not None, recipe.train.stage == "rl"
    shards = ranks if recipe.train.parallel == "fsdp" else 1
    own_size, size = size, computed(recipe, size)
    # peft keeps adapters in float32, whatever the base is in.
    learning = own * (4 if lora else own_size)
    tower = 0 if recipe.model.train_vision else counts["vision"]
    rows = min(recipe.train.micro_batch, math.ceil(rollout_rows(recipe) / ranks))
    length = longest + recipe.train.max_new_tokens
    tokens = rows * length
    probes = min(longest, recipe.sparse.probes.recent + recipe.sparse.probes.random)
    # What one layer makes of these tokens, and of the probes' scores, which are float32.
    layer = tokens * layer_bytes(s, size)
    scores = 2 * rows * s.q_heads * probes * longest * 4
    checkpointing = recipe.model.gradient_checkpointing
    kept = (
        tokens * update_bytes(s, size, checkpointing) + (1 if checkpointing else s.layers) * scores
    )
    answers = rows * recipe.train.max_new_tokens * s.vocab
    patches = longest * s.merge**2
    copied = (total - tower) * own_size if rl and not lora else 0
    parts = {
        "weights": ((total - tower) * own_size + (learning if lora else 0)) // shards + tower * own_size,
        "reference": copied // shards,
        "gradients": learning // shards,
        "optimizer": 2 * learning // shards,
        "average": (learning if recipe.train.average else 0) // shards,
        "kv_cache": tokens * cache_bytes(s, size),
        "activations": kept,
        "logits": min(answers, max(LOGITS, s.vocab)) * 4 * COPIES,
        "vision": patches * (10 * s.vision_hidden + 3 * int(s.vision_mlp)) * size,
    }  # fmt: skip
    if not rl:
        parts["kv_cache"] = 0
    fixed = sum(parts[k] for k in ("weights", "reference", "gradients", "optimizer", "average"))
    rollout = parts["kv_cache"] + (layer + scores if rl else 0)
    learn = kept + parts["logits"]
    parts["loading"] = parts["gathered"] = 0
    if shards > 1:
        parts["loading"] = total * own_size + (learning if lora else 0) + copied
        parts["gathered"] = (total - tower) * size if rl else 0
        rollout += parts["gathered"]
        # The update gathers a decoder layer at a time, and the embeddings whole.
        learn += (s.layer_weights + s.vocab * s.hidden) * size
    parts["allocator"] = int(FRAGMENTS * learn) if cpu else 0
    # One after the other: loading, the tower, the rollouts, the update.
    step = max(parts["vision"], rollout, learn) + parts["allocator"]
    parts["peak"] = max(parts["loading"], fixed + step)
    return parts


def checkpoints(s: Shape, recipe: Recipe, size: int | None = None) -> dict[str, int]:
    """How many are written, how many stay, and the bytes of one: weights (or adapters), the optimizer's state, and the
    newest weights beside their average."""
    size = size or weight_bytes(recipe)
    steps, every = recipe.train.steps, recipe.train.save_every
    lora = recipe.model.lora is not None
    learning = trained(s, recipe) * (4 if lora else size)
    saved = learning if lora else sum(parameters(s).values()) * size
    written = math.ceil(steps / every) if every else 1
    return {
        "written": written,
        "kept": min(written, recipe.train.save_total_limit + 1),  # the best one besides
        "bytes": saved + (3 if recipe.train.average else 2) * learning,
    }


def hours(
    s: Shape, recipe: Recipe, length: int, visual: int, size: int | None = None, ranks: int = 1
) -> float:
    """Hours of training on `ranks` A100s, by counting operations and bytes, dense. length, visual: tokens of a prompt.

    A step is: the tower once a question; prefill and decoding of the rollouts; the reference once and the policy three
    times (four with gradient checkpointing) over prompt and answer. A GPU is taken to reach REACHED of its operations
    and half of its bandwidth. It says days or hours, not minutes.
    """
    size = computed(recipe, size or weight_bytes(recipe))
    rows, new = rollout_rows(recipe), recipe.train.max_new_tokens
    update = recipe.train.prompts_per_step * recipe.budgets.group
    length = min(length, s.limit - new)
    one = add(prefill(s, length, 1.0, "none", 0).values()).flops
    if s.holding:  # layers of linear attention have more products than the others, and no more is counted of them
        one *= parameters(s)["decoder"] / (s.layers * s.layer_weights)
    work = recipe.train.prompts_per_step * vision(s, visual).flops + rows * one
    passes = 1 + 3 + recipe.model.gradient_checkpointing
    work += (
        update
        * passes
        * (1 + recipe.ppo.dense_kl_fraction)
        * recipe.ppo.epochs
        * one
        * (length + new)
        / length
    )
    batch = min(rows, recipe.train.micro_batch)
    moved = (
        new * math.ceil(rows / batch) * decode(s, length, 1.0, "none", batch).bytes * size / s.size
    )
    seconds = work / (RATES[size] * REACHED) + moved / (BANDWIDTH / 2)
    return recipe.train.steps * seconds / ranks / 3600


def loaded_shape(
    config: Mapping[str, Any], name: str, merge: int, counted: Mapping[str, int] | None = None
) -> Shape:
    """Sizes of a loaded model of any family, for `memory` and `checkpoints`. config: as config.json has it. merge:
    patches on a side of a visual token. counted: parameters of `vision`, `decoder` and `embeddings`, which `parameters`
    needs for families whose sizes do not tell."""
    if config["model_type"] in SIZED:
        return Shape.of(config, name)
    text, seen = config["text_config"], config["vision_config"]
    heads, patch = text["num_attention_heads"], seen["patch_size"]
    return Shape(
        name=name,
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        q_heads=heads,
        heads=text.get("num_key_value_heads") or heads,
        dim=text.get("head_dim") or text["hidden_size"] // heads,
        # Of experts: those that work on a token, and the one for all tokens.
        mlp=text.get("intermediate_size")
        or text["num_experts_per_tok"] * text["moe_intermediate_size"]
        + text["shared_expert_intermediate_size"],
        vocab=text["vocab_size"],
        limit=text["max_position_embeddings"],
        vision_depth=seen.get("depth") or seen["num_hidden_layers"],
        vision_hidden=seen["hidden_size"],
        vision_mlp=seen["intermediate_size"],
        vision_gated=False,
        full_blocks=seen.get("depth") or seen["num_hidden_layers"],
        window=0,
        patch=patch if isinstance(patch, int) else patch[0],
        merge=merge,
        frames=seen.get("temporal_patch_size", 1),
        counted=counted,
        holding=list(text.get("layer_types") or ()).count("full_attention"),
    )


def tokens_of(s: Shape, recipe: Recipe) -> dict[str, int]:
    """Most visual tokens of a picture and of a clip by the recipe's caps, and of a prompt."""
    side = (s.patch * s.merge) ** 2
    picture = recipe.model.max_pixels or 1280 * side
    frame = recipe.model.max_frame_pixels or picture
    most = recipe.data.max_prompt_tokens
    clip = math.ceil(recipe.data.max_frames / s.frames) * (frame // side)
    return {"picture": min(most, picture // side), "clip": min(most, clip), "prompt": most}


def outline(
    s: Shape, recipe: Recipe, longest: int, size: int | None = None, cpu: bool = False
) -> dict[str, Any]:
    """The part of the plan that counting gives, the same with and without a loaded model."""
    plan: dict[str, Any] = {
        "stage": recipe.train.stage,
        "steps": recipe.train.steps,
        "parameters": sum(parameters(s).values()),
        "trainable": trained(s, recipe),
    }
    if recipe.train.stage == "rl":
        plan["rollout_rows"] = recipe.train.prompts_per_step * recipe.budgets.group
        plan["greedy_rows"] = rollout_rows(recipe) - plan["rollout_rows"]
    plan["checkpoints"] = checkpoints(s, recipe, size)
    plan["memory"] = memory(s, recipe, longest, size, cpu=cpu)
    if recipe.train.parallel == "fsdp":
        shared = {n: memory(s, recipe, longest, size, n) for n in (2, 4, 8)}
        plan["memory"] |= {f"peak_of_{n}_ranks": parts["peak"] for n, parts in shared.items()}
        plan["memory"]["loading"] = shared[2]["loading"]  # of each of several
    plan["recipe_sha256"] = recipe.sha256()
    return plan
