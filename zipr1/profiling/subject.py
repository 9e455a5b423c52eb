"""What is profiled: a model, and prompts for it: random ones of any length, or a real picture or clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zipr1.core.recipe import Data, Model, Sparse
from zipr1.core.types import Media, Prompt
from zipr1.data.digits import tasks
from zipr1.data.media import load_timed
from zipr1.models import cost
from zipr1.models.loading import choose_device, random_model
from zipr1.models.open import find_source, inference_dtype
from zipr1.models.policy import Policy, load_policy
from zipr1.models.processors import Encoded

QUESTION = "Describe this."


@dataclass
class Inputs:
    """A batch of prompts as a decoder takes them, and valid `(B, L)` bool on the CPU.

    arguments: inputs_embeds `(B, L, hidden)`, position_ids `(3, B, L)` or `(B, L)`, and what a family gives besides.
    visual: visual tokens of a prompt. see: runs the vision tower for one prompt; None without one.
    """

    arguments: dict[str, Any]
    valid: torch.Tensor
    name: str
    visual: int = 0
    see: Callable[[], Any] | None = None

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    def next(self) -> dict[str, Any]:
        """Arguments of a decoding step: one more token, the prompt's last again."""
        embeds, positions = self.arguments["inputs_embeds"], self.arguments["position_ids"]
        return {"inputs_embeds": embeds[:, -1:], "position_ids": positions[..., -1:] + 1}


@dataclass
class Subject:
    """model: the transformers model, its text attention ours. shape: its sizes, `layers` those that are built.
    all_layers: those of the model it stands for. sparse: its own settings. data: frames of its clips."""

    model: Any
    shape: cost.Shape
    all_layers: int
    sparse: Sparse
    weights: str
    policy: Policy | None = None
    data: Data = field(default_factory=Data)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def random(self, length: int, batch: int) -> Inputs:
        """Text prompts of random embeddings, of the size that the model's own have."""
        table = self.model.get_input_embeddings().weight
        seeded = torch.Generator(self.device).manual_seed(0)
        ids = torch.randint(len(table), (batch, length), generator=seeded, device=self.device)
        positions = torch.arange(length, device=self.device).expand(3, batch, -1)
        valid = torch.ones(batch, length, dtype=torch.bool)
        arguments = {"inputs_embeds": table[ids].detach(), "position_ids": positions}
        return Inputs(arguments, valid, "random tokens")

    @torch.no_grad()
    def real(self, prompt: Prompt, batch: int) -> Inputs:
        """`batch` copies of a real prompt. Raises InputError for media that cannot be read."""
        policy = self.policy
        assert policy is not None  # of a bundled config none is asked for
        encoded = self.encode(policy, prompt, self.shape.limit)
        features = policy.encode_vision([encoded])
        arguments, valid = policy.rows([encoded] * batch, features, None, left=True)
        visual = sum(len(x) for x in features.values())
        names = [Path(m.source).name for m in prompt.media if isinstance(m.source, (str, Path))]
        return Inputs(
            arguments, valid, ", ".join(names), visual, lambda: policy.encode_vision([encoded])
        )

    def encode(self, policy: Policy, prompt: Prompt, most: int) -> Encoded:
        """A prompt of at most `most` tokens, its clips with as many frames as the model was trained on."""
        limits = self.data.max_frames, self.data.fps, policy.processor.settings.frame_rule
        media = [load_timed(m, *limits) for m in prompt.media]
        return policy.encode(prompt, media, most)

    def longest_clip(self) -> Prompt:
        """The embedded test clip with the longest prompt, of 40."""
        policy = self.policy
        assert policy is not None
        prompts = tasks.prompts("test", "moving_digits", 40, 1, seed=0)
        return max(prompts, key=lambda p: len(self.encode(policy, p, 100_000)))


def load(
    model: str, layers: int | None, device: str | None, dtype: str, probes: int | None
) -> Subject:
    """A bundled config with random weights, or whatever `model.path` of a recipe takes.

    layers: decoder layers to build of a bundled config. probes: of scoring, half recent and half random; None for the
    model's own. Raises InputError.
    """
    chosen = choose_device(device)
    dtype = inference_dtype(dtype, chosen)
    if model in cost.bundled():
        shape = cost.shape_of(model)
        built = layers if layers is not None else shape.layers
        network = random_model(cost.values_of(model), built, chosen, dtype)
        subject = Subject(
            network, replace(shape, layers=built), shape.layers, Sparse(skip="layer"), "random"
        )
    else:
        if model != "tiny" and "/" not in model and not Path(model).exists():
            cost.shape_of(model)  # which names the nearest bundled config
        policy = load_policy(Model.model_validate({"path": model, "dtype": dtype}), device)
        shape = cost.Shape.of(policy.model.config.to_dict(), model)
        source = find_source(model)
        subject = Subject(
            policy.model, shape, shape.layers, source.sparse, "its own", policy, source.data
        )
    size = torch.empty(0, dtype=subject.dtype).element_size()
    subject.shape = replace(subject.shape, size=size)
    if probes is not None:
        split = {"recent": probes - probes // 2, "random": probes // 2}
        subject.sparse = subject.sparse.model_copy(
            update={"probes": subject.sparse.probes.model_copy(update=split)}
        )
    # A profile shows what sparsity costs where it does not pay, too.
    subject.sparse = subject.sparse.model_copy(update={"dense_below": 0})
    return subject


def given_prompt(image: Path | None, video: Path | None) -> Prompt:
    """A question about a picture or a clip of the user's."""
    assert image is not None or video is not None
    media = Media("image", image) if image is not None else Media("video", str(video))
    content = [{"type": media.kind}, {"type": "text", "text": QUESTION}]
    return Prompt("given", [{"role": "user", "content": content}], (media,), "", picture="given")
