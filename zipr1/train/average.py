"""The running average of the trained weights: what the guard judges, what is evaluated at the end, and what is saved.

A step's gradient is mostly noise by the end of a run. The average forgets the noise and keeps what the steps agree on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from zipr1.core import signals

# The first steps are averaged over fewer: the average of step s remembers about (s + START) / START steps at most.
START = 10


class Average:
    """named: the trained parameters, on this rank; a shard is averaged as it is. decay: in [0, 1), the share of the
    average that stays at a step, 0.98 remembers about 50 steps; with 0 the average is the newest weights, and nothing
    is kept. steps: how many it has taken in before (of a resumed run; the parameters then hold the average)."""

    def __init__(
        self, named: Sequence[tuple[str, torch.nn.Parameter]], decay: float, steps: int = 0
    ) -> None:
        self.named, self.decay, self.steps = list(named), decay, steps
        self.values = [p.detach().clone() for _, p in self.named] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step."""
        self.steps += 1
        if not self.decay:
            return
        keep = min(self.decay, self.steps / (self.steps + START))
        for value, (_, parameter) in zip(self.values, self.named, strict=True):
            value.lerp_(parameter.detach(), 1 - keep)

    @contextlib.contextmanager
    def used(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the model has the average; given are the newest weights by name, empty where they are the average.
        A signal waits from here on, for whoever lets it go: a model that is half of each must not be left."""
        signals.hold()
        self._swap()
        try:
            names = [name for name, _ in self.named]
            yield dict(zip(names, self.values, strict=True)) if self.decay else {}
        finally:
            self._swap()

    @torch.no_grad()
    def take_over(self) -> None:
        """The model has the average from here on."""
        for value, (_, parameter) in zip(self.values, self.named, strict=False):
            parameter.copy_(value)

    @torch.no_grad()
    def restore(self, newest: dict[str, torch.Tensor]) -> None:
        """Put the newest weights into the model, whose own are the average. newest: by name; empty where the average
        is the newest weights."""
        for name, parameter in self.named:
            if newest:
                parameter.copy_(newest[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for value, (_, parameter) in zip(self.values, self.named, strict=False):
            newest = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(newest)
