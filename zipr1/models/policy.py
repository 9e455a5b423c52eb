"""The policy: one vision-language model that answers dense or sparse, samples, and scores given answers.

Vision features are an input here, never recomputed: `encode_vision` runs the tower once for each distinct picture and
its output serves every budget, every log-probability and every PPO epoch. Positions are computed once per prompt
by the model's own `get_rope_index`, so that pruning cannot move them.

Shapes: B rows, L slots, T answer tokens, D decoder layers that choose tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from zipr1.core import distributed, watch
from zipr1.core.distributed import Parallel, whole_state
from zipr1.core.errors import InputError
from zipr1.core.recipe import Model, Train
from zipr1.core.text import reason
from zipr1.core.types import Prompt
from zipr1.models import sampling
from zipr1.models.batching import answer_slots, groups, padded
from zipr1.models.families import FAMILIES, deepstack, towers
from zipr1.models.loading import add_lora, frozen_copy, restore_weights, save_folder
from zipr1.models.open import open_model
from zipr1.models.processors import Encoded, Processor
from zipr1.models.sampling import Answers
from zipr1.models.sparse.attention import ATTENTION
from zipr1.models.sparse.hybrid import Choosing
from zipr1.models.sparse.patch import SparseRun, features_at_slots, sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.models.transfer import send
from zipr1.models.visual import Visual

# Placeholders are never sampled: an answer with one would ask for a picture that is not there. Finite, so that
# a KL over the vocabulary has no inf - inf.
NEVER = -1e9

Features = dict[str, torch.Tensor]


class Policy:
    """A loaded model with its processor. `vision_calls` counts pictures that went through the tower."""

    def __init__(self, model: Any, processor: Processor, name: str, settings: Model) -> None:
        self.settings = settings
        self.name = name
        self.processor = processor
        model.set_attn_implementation({"text_config": ATTENTION})
        self.model: Any = model
        self.family = FAMILIES[model.config.model_type]
        for parameter in self.tower():
            parameter.requires_grad_(settings.train_vision)
        lora = settings.lora
        self.peft_model: Any = add_lora(model, lora, settings.revision) if lora else None
        self.reference_model: Any = None
        self.decoder = model.get_decoder()
        vars(self.decoder).update(features_at_slots(self.decoder))
        self.layers = len(Choosing.of(self.decoder).numbers)
        self.vision_calls = 0
        self._blocked: torch.Tensor | None = None  # placeholders, where logits are
        self.parallel = Parallel()
        if distributed.size() > 1:
            for layer in self.decoder.layers:
                layer.register_forward_hook(_show_life)
        if settings.gradient_checkpointing:
            # The older name is deprecated where the newer one exists.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})

    @property
    def weight(self) -> torch.Tensor:
        """One of the model's weights, for its device and dtype."""
        weight: torch.Tensor = self.decoder.embed_tokens.weight
        return weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def positions(self) -> int:
        """Of prompt and answer together, at most: `max_position_embeddings`."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        text = self.model.config.get_text_config()
        heads = text.num_key_value_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * heads * dim * self.decoder.embed_tokens.weight.element_size())

    def tower(self) -> list[torch.nn.Parameter]:
        """Parameters of what sees."""
        return [p for module in towers(self.model) for p in module.parameters()]

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters that the recipe trains."""
        return [
            (n, p) for n, p in (self.peft_model or self.model).named_parameters() if p.requires_grad
        ]

    def keep_reference(self) -> None:
        """Remember the model as it is now as the dense reference (a frozen copy, unless adapters can be off)."""
        if self.peft_model is None and self.reference_model is None:
            self.reference_model = frozen_copy(self.model)

    def spread(self, train: Train) -> None:
        """One model over all ranks, as `train.parallel` says; nothing where there is one. After `keep_reference`."""
        self.parallel.spread(
            train.parallel,
            getattr(torch, train.param_dtype) if train.param_dtype else None,
            self.peft_model or self.model,
            self.decoder.layers,
            self.reference_model,
            self.reference_model.get_decoder().layers if self.reference_model is not None else [],
            # Shared with the reference, and looked through at each rank's own pace.
            [] if self.settings.train_vision else self.tower(),
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The dense reference's transformers model: the frozen copy, or this one with its adapter disabled."""
        if self.peft_model is None:
            yield self.reference_model if self.reference_model is not None else self.model
        else:
            with self.peft_model.disable_adapter():
                yield self.model

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, decoder layers honour `gradient_checkpointing`, which transformers ties to training mode; their
        children stay in eval mode, so that dropout does not part the update from the rollout."""
        layers = list(self.decoder.layers) if self.settings.gradient_checkpointing else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def encode(
        self,
        prompt: Prompt,
        media: Sequence[tuple[Any, ...] | Visual],
        max_tokens: int,
    ) -> Encoded:
        """Tokenise `prompt`; media, in order: what `load_timed` gives of each (pixels and frames per second are
        enough), or what was made of it before.

        Raises InputError for placeholders that do not match, or a prompt over max_tokens.
        """
        try:
            visuals = [
                one
                if isinstance(one, Visual)
                else self.processor.visual(
                    m.kind, *one, asked=m.asked, alone=len(prompt.media) == 1
                )
                for m, one in zip(prompt.media, media, strict=True)
            ]
            ids = self.processor.ids(self.processor.text(prompt.messages), visuals)
        except InputError as error:
            raise InputError(f"{prompt.id}: {error}") from None
        if len(ids) > max_tokens:
            raise InputError(
                f"{prompt.id}: the prompt has {len(ids)} tokens and data.max_prompt_tokens is "
                f"{max_tokens}; raise it, or lower model.max_pixels or data.max_frames"
            )
        return self.place(ids, visuals, prompt.media_key)

    def place(self, ids: torch.Tensor, visuals: Sequence[Any], picture: str) -> Encoded:
        """Positions of ids `(l,)` by the model's own rule."""
        if not self.family.mrope:
            positions = torch.arange(len(ids)).expand(3, -1)
            return Encoded(ids, positions, len(ids), tuple(visuals), picture)
        types = torch.zeros(len(ids), dtype=torch.int)
        for number, token in enumerate(self.processor.placeholder.values(), start=1):
            types[ids == token] = number
        grids = {
            kind: torch.tensor([v.grid for v in visuals if v.kind == kind], dtype=torch.long)
            for kind in ("image", "video")
        }
        seconds = torch.tensor([v.seconds for v in visuals if v.kind == "video"])
        positions, delta = self.model.model.get_rope_index(
            ids[None],
            mm_token_type_ids=types[None],
            image_grid_thw=grids["image"] if len(grids["image"]) else None,
            video_grid_thw=grids["video"] if len(grids["video"]) else None,
            second_per_grid_ts=seconds if len(seconds) else None,
        )
        return Encoded(ids, positions[:, 0], len(ids) + int(delta.item()), tuple(visuals), picture)

    def encode_vision(
        self, encoded: Sequence[Encoded], known: Features | None = None, model: Any = None
    ) -> Features:
        """Vision features `(tokens, hidden)` by picture, each distinct picture once; those in `known` not again.

        model: whose tower, by default the policy's. Differentiable only if the recipe trains the tower. Pictures go
        through it in groups of at most PATCHES patches.
        """
        inner = (model or self.model).model
        features: Features = dict(known or {})
        todo = {e.picture: e for e in encoded if e.picture not in features}
        parts: dict[tuple[str, int], torch.Tensor] = {}
        with torch.set_grad_enabled(self.settings.train_vision and torch.is_grad_enabled()):
            for kind in ("image", "video"):
                places = [
                    (k, i)
                    for k, e in todo.items()
                    for i, v in enumerate(e.visuals)
                    if v.kind == kind
                ]
                for group in groups(places, [len(todo[k].visuals[i].patches) for k, i in places]):
                    visuals = [todo[k].visuals[i] for k, i in group]
                    watch.alive()
                    split = self.family.encode_vision(inner, kind, visuals, self.device)
                    self.vision_calls += len(visuals)
                    parts.update(zip(group, split, strict=True))
        for k, e in todo.items():
            if e.visuals:
                features[k] = torch.cat([parts[k, i] for i in range(len(e.visuals))])
        return features

    def blank(self) -> torch.Tensor:
        """0, with a gradient of 0 in the trained tower: from a rank whose rows show nothing, to those whose rows do."""
        side = self.processor.settings.factor
        visual = self.processor.visual("image", np.zeros((side, side, 3), np.uint8), None)
        (features,) = self.family.encode_vision(self.model.model, "image", [visual], self.device)
        return 0.0 * features.float().sum()

    def rows(
        self,
        encoded: Sequence[Encoded],
        features: Features,
        answers: Sequence[torch.Tensor] | None,
        left: bool,
        model: Any = None,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Padded inputs: the decoder's arguments (embeddings `(B, L, hidden)`, positions `(3, B, L)` or `(B, L)`, what
        the family gives besides), and valid `(B, L)` bool on the CPU."""
        ids, positions, valid = padded(encoded, answers, left)
        visual = torch.isin(ids, torch.tensor(list(self.processor.placeholder.values())))
        # By index, a seventh of the time of masked_scatter on a CPU; found there, so that no GPU waits.
        found = visual.flatten().nonzero()[:, 0]
        ids, positions, slots = send(self.device, ids, positions, found)
        embeds = (model or self.model).get_input_embeddings()(ids)
        pictures = [features[e.picture] for e in encoded if e.visuals]
        besides: dict[str, Any] = {}
        if pictures:
            shown = torch.cat(pictures).to(embeds.dtype)
            shown, besides = deepstack(shown, embeds.shape[-1], slots)
            embeds = embeds.flatten(0, 1).index_copy(0, slots, shown).view_as(embeds)
        return {"inputs_embeds": embeds, "position_ids": self.places(positions), **besides}, valid

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions `(3, B, L)` as the family's decoder takes them."""
        return positions if self.family.mrope else positions[0]

    @property
    def words(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.model.lm_head.weight.shape[0])

    def head(self, hidden: torch.Tensor, model: Any = None) -> torch.Tensor:
        """Hidden states `(..., hidden)` -> float32 logits `(..., V)`, placeholders out of reach."""
        logits = (model or self.model).lm_head(hidden).float()
        if self._blocked is None or self._blocked.device != logits.device:
            (self._blocked,) = send(
                logits.device, torch.tensor(list(self.processor.placeholder.values()))
            )
        return logits.index_fill(-1, self._blocked, NEVER)

    def answer_states(
        self,
        encoded: Sequence[Encoded],
        features: Features,
        answers: Sequence[torch.Tensor],
        run: SparseRun | None = None,
        model: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `(B, T, hidden)` that predict the answers' tokens, and their mask `(B, T)` bool on the CPU.

        run: of `sparse_attention`, inside its block, whose `record` is filled; None: dense. model: the reference's, or
        None.
        """
        model = model or self.model
        inputs, valid = self.rows(encoded, features, answers, False, model)
        lengths = torch.tensor([len(e) for e in encoded])
        where, mask = answer_slots(lengths, [len(a) for a in answers])
        hidden, _ = sampling.prefill(
            model,
            inputs,
            valid,
            run,
            prompt=torch.arange(valid.shape[1]) < lengths[:, None],
            read_at=torch.zeros_like(valid).scatter(1, where, True),
            cache=False,
        )
        (where,) = send(self.device, where)
        return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1])), mask

    def answer_logits(
        self,
        encoded: Sequence[Encoded],
        features: Features,
        answers: Sequence[torch.Tensor],
        run: SparseRun | None = None,
        model: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Teacher-forced logits `(B, T, V)` and mask `(B, T)` of `answer_states`; training makes them in chunks."""
        states, mask = self.answer_states(encoded, features, answers, run, model)
        return self.head(states, model), mask

    @torch.no_grad()
    def generate(
        self,
        encoded: Sequence[Encoded],
        features: Features,
        request: Request | None,
        max_new_tokens: int,
        uniforms: torch.Tensor | None = None,
        temperature: float = 1.0,
        model: Any = None,
        greedy: torch.Tensor | None = None,
        timed: bool = False,
        owner: torch.Tensor | None = None,
    ) -> Answers:
        """Answers to all rows together: sparse under `request`, dense without or where it keeps all.

        uniforms, temperature, greedy, timed, owner: see `sampling.sample`. model: the reference's, or None.
        """
        model = model or self.model
        inputs, valid = self.rows(encoded, features, None, True, model)
        starts = torch.tensor([e.next_position for e in encoded])
        (following,) = send(self.device, starts if owner is None else starts[owner])
        with sparse_attention(model, request) as run:
            return sampling.sample(
                *(model, inputs, valid, run),
                head=lambda hidden: self.head(hidden, model),
                positions=lambda step: self.places(
                    (following + step)[None, :, None].expand(3, -1, -1)
                ),
                end_ids=self.processor.end_ids,
                max_new_tokens=max_new_tokens,
                uniforms=uniforms,
                temperature=temperature,
                greedy=greedy,
                timed=timed,
                owner=owner,
            )

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Whole weights, on the first rank's CPU, if each holds a part (else None); all ranks must ask."""
        if not self.parallel.sharded:
            return None
        return whole_state((self.peft_model or self.model).state_dict(keep_vars=True))

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """A model folder in Hugging Face format (adapters stay beside their base). weights: what `weights` gave."""
        if self.peft_model is not None:
            self.peft_model.save_pretrained(
                folder / "adapter", save_embedding_layers=False, state_dict=weights
            )
            return
        save_folder(self.model, self.processor.tokenizer, self.processor.settings, folder, weights)

    def load_weights(self, folder: Path) -> None:
        """Weights of a checkpoint made by `save` into this model. Raises InputError for another model's."""
        path = folder / "adapter" if self.peft_model is not None else folder
        try:
            restore_weights(self.peft_model if self.peft_model is not None else self.model, path)
        except InputError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{folder}: holds no weights of this model ({reason(error)}); resume another run"
            ) from None


def _show_life(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
    """A layer was passed; and, where there is a gradient, that it has come back."""
    watch.alive()
    states = output[0] if isinstance(output, tuple) else output
    if states.requires_grad:
        states.register_hook(lambda gradient: watch.alive())


def load_policy(settings: Model, device: str | torch.device | None = None, seed: int = 0) -> Policy:
    """The model a recipe names. Raises InputError if it cannot be loaded or is of an unknown family."""
    opened = open_model(settings, device, seed)
    return Policy(opened.model, opened.processor, settings.path, opened.settings)
