"""Decoders of which only some layers choose tokens: those of full attention.

In Qwen3.5 three layers of four are linear attention (gated delta rule): they hand a state of fixed size from token to
token, so they have no scores to choose by, no keys and values to drop, and read every token. D, the number of layers
in a `Record`, in thresholds and in what is reported, counts the layers that choose. The cache keeps transformers' own
numbers: a linear layer's state lies between pruned layers.

`skip: layer` is refused. It could mean that a dropped token passes a full-attention layer unchanged and is read by the
linear layer behind it, which no other layer's dropped token is: what that does to the state has not been tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from zipr1.core.errors import InputError
from zipr1.core.recipe import Sparse


@dataclass(frozen=True, eq=False)
class Choosing:
    """Which layers of a decoder choose tokens. numbers: theirs among all, ascending. last: the number of the last layer
    of all. config: of a decoder with other layers besides; None: all choose."""

    numbers: tuple[int, ...]
    last: int
    config: Any = None

    @classmethod
    def of(cls, decoder: Any) -> Choosing:
        layers = decoder.layers
        numbers = tuple(i for i, layer in enumerate(layers) if hasattr(layer, "self_attn"))
        return cls(numbers, len(layers) - 1, decoder.config if len(numbers) < len(layers) else None)

    @property
    def place(self) -> dict[int, int]:
        """Number among all layers -> number among those that choose."""
        return {number: place for place, number in enumerate(self.numbers)}

    def cache_layers(self, kind: type[Any]) -> list[Any]:
        """A layer of a cache for each of the decoder's: of `kind` where tokens are chosen, else transformers' own."""
        if self.config is None:
            return [kind() for _ in self.numbers]
        layers = list(DynamicCache(config=self.config).layers)
        for number in self.numbers:
            layers[number] = kind()
        return layers


def check_skip(settings: Sparse, decoder: Any) -> None:
    """Raise InputError for whole-layer skipping where some layers read every token."""
    choosing = Choosing.of(decoder)
    if settings.skip == "layer" and choosing.config is not None:
        raise InputError(
            f"sparse.skip: layer: {choosing.last + 1 - len(choosing.numbers)} of the model's {choosing.last + 1} "
            "layers are linear attention and read every token, those too that other layers would have skipped, which "
            "has not been tried; use skip: attention"
        )


def reading_all(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a linear attention in a sparse pass: it is told what is padding, and nothing else changes."""

    def forward(*args: Any, sparse_context: Any = None, **kwargs: Any) -> Any:
        if sparse_context is not None:
            kwargs["attention_mask"] = sparse_context.padding
        return stock(*args, **kwargs)

    return forward


def select_rows(cache: Any, index: torch.Tensor) -> None:
    """Rows `index` `(n,)` of a dense cache of transformers take the place of its own; a row may come several times."""
    for layer in cache.layers:
        getattr(layer, "batch_select_indices", layer.reorder_cache)(index)
