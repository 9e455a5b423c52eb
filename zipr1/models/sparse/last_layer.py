"""The last decoder layer, finished only where its output is read.

Its keys and values serve every later token, but its output is read at the answer's places alone: there the output
projection and the MLP are done, and elsewhere 0 stands for what they would have added. Of a model with D layers it is
about 1/D of a prompt's matrix products, forward and backward, that nobody would have looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zipr1.models.sparse.attention import Request


def only_at(
    stock: Callable[..., torch.Tensor], places: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[..., torch.Tensor]:
    """The forward of an output projection or MLP, `(B, L, n)` -> `(B, L, hidden)`: `stock` at the places, 0 elsewhere.

    places: of such an input, `(B, L)` bool; None: everywhere.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        wanted = places(x)
        if wanted is None:
            return stock(x)
        flat = wanted.flatten().nonzero()[:, 0]
        out = stock(x.flatten(0, 1).index_select(0, flat)[None])[0]
        empty = out.new_zeros(x.shape[0] * x.shape[1], out.shape[-1])
        return empty.index_copy(0, flat, out).view(*x.shape[:2], -1)

    return forward


def ends(decoder: Any) -> list[Any]:
    """The modules of the last layer that need not run everywhere."""
    layer = decoder.layers[-1]
    return [layer.self_attn.o_proj, layer.mlp]


@contextlib.contextmanager
def forwards(swaps: list[tuple[Any, Any]]) -> Iterator[None]:
    """Inside, modules have these forwards of their own instead of their class's (or whoever's it was)."""
    before = [module.__dict__.get("forward") for module, _ in swaps]
    for module, forward in swaps:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), own in zip(swaps, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def last_column(valid: torch.Tensor) -> torch.Tensor:
    """`(B, L)` bool, True in the last slot: where left-padded prompts are read."""
    wanted = torch.zeros_like(valid)
    wanted[:, -1] = True
    return wanted


@contextlib.contextmanager
def finished_at(model: Any, wanted: torch.Tensor, request: Request | None = None) -> Iterator[None]:
    """Inside, a prefill of a transformers model finishes the last layer at `wanted` `(B, L)` bool alone; what it
    returns elsewhere means nothing. request: the sparse prefill's, which is told; a dense one is hooked, if without
    gradient: its layers could be computed again in backward, when the hooks are gone."""
    if request is not None:
        request.wanted = wanted
    if request is not None or torch.is_grad_enabled():
        yield
        return
    swaps = [(m, only_at(m.forward, lambda x: wanted)) for m in ends(model.get_decoder())]
    with forwards(swaps):
        yield
