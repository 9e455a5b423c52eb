"""The contract of a sparse forward pass: what is asked (`Request`), and of which batch (`PromptBatch`).

Both are frozen: nothing here is assigned after it was made. What comes back is a `Record` (record.py), which the run
that `sparse_attention` yields holds after each prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from zipr1_kernels import break_even

from zipr1.core.recipe import Sparse


def dense_below(settings: Sparse, device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Tokens below which a prompt stays dense: what `settings` say, else where sparsity begins to save time for weights
    of that dtype there."""
    if settings.dense_below is not None:
        return settings.dense_below
    return break_even(device, dtype)


def settled(settings: Sparse, weight: torch.Tensor) -> Sparse:
    """The same with that number in them, to be written down. weight: of the model."""
    below = dense_below(settings, weight.device, weight.dtype)
    return settings.model_copy(update={"dense_below": below})


@dataclass(frozen=True, eq=False)
class Request:
    """Settings of one sparse forward pass.

    thresholds: `(B, D)` or `(B, 1)` float in (0, 1], a p for each row and layer; None: `settings.p`. seed: of the
    random probes and of the random rule. replay: kept prompt slots of each layer, `(B, L)` bool, taken instead of
    choosing; on the CPU, where their counts are known. scores: record scores and cut points, with their gradient.
    audit: rows of which the score mass is recorded that other probes give to kept tokens. through: the range (low,
    high) of p that rollouts were drawn from; the kept tokens' keys and outputs then carry their chance of being kept as
    a factor of value 1, so that losses have a gradient in the scores; needs `scores`. force: take the sparse path even
    where it keeps everything.
    """

    settings: Sparse
    thresholds: torch.Tensor | None = None
    seed: int = 0
    replay: Sequence[torch.Tensor] | None = None
    scores: bool = False
    audit: Sequence[int] = ()
    through: tuple[float, float] | None = None
    force: bool = False

    def settled(self, weight: torch.Tensor) -> Request:
        """The same with settled settings. weight: of the model."""
        if self.settings.dense_below is not None:
            return self
        return replace(self, settings=settled(self.settings, weight))

    @property
    def keeps_all(self) -> bool:
        """Whether p is 1 everywhere and nothing is to be recorded: the dense model, taken as it is."""
        if self.force or self.scores or self.replay is not None:
            return False
        if self.thresholds is None:
            return self.settings.p >= 1
        return bool((self.thresholds >= 1).all())


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """What a prefill must know of its batch beside the embeddings; masks are `(B, L)` bool and best on the CPU: lengths
    are read from them, and elsewhere a GPU is waited for.

    valid: real tokens, False for padding. prompt: those of the prompt, which may be dropped; None: all real ones.
    read_at: slots whose output is read (the last layer is finished there alone), all of them kept; None: everywhere.
    """

    valid: torch.Tensor
    prompt: torch.Tensor | None = None
    read_at: torch.Tensor | None = None
