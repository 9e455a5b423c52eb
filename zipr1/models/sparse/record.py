"""What each layer kept in one forward pass over prompts: enough to replay it and to reward it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class LayerRecord:
    """One decoder layer.

    keep: `(B, L)` bool, kept slots; padding is False. scores: `(B, L)` float32, higher is more
    important, with gradient in training. cut: `(B, L)` share of mass ahead of each token, see
    `zipr1_kernels.cut_points`. heldout_mass: `(b,)` float32 in [0, 1], of the rows that are audited the share of
    the score mass of probes that did not take part in the choice which fell on kept tokens. None: not computed.
    """

    keep: torch.Tensor
    scores: torch.Tensor | None = None
    cut: torch.Tensor | None = None
    heldout_mass: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`(B,)` int64, kept tokens of each sample."""
        return self.keep.sum(-1)


@dataclass
class Record:
    """All layers, first to last. lengths: `(B,)` int64, unpadded prompt lengths."""

    lengths: torch.Tensor
    layers: list[LayerRecord] = field(default_factory=list)

    def layer_ratios(self) -> torch.Tensor:
        """`(B, D)` float32 in (0, 1]: kept fraction of the prompt in each layer."""
        counts = torch.stack([layer.counts for layer in self.layers], -1)
        return counts.to(torch.float32) / self.lengths.to(counts.device)[:, None]

    def token_ratio(self) -> torch.Tensor:
        """`(B,)` float32 in (0, 1]: mean over layers of kept / length (arXiv 2504.18579)."""
        return self.layer_ratios().mean(-1)

    def kept_positions(self, offsets: torch.Tensor) -> list[list[torch.Tensor]]:
        """[sample][layer] -> ascending int32 positions in the unpadded prompt, on the CPU.

        offsets: `(B,)` int64, slot of each prompt's first token. The form of `Rollout.kept`.
        """
        starts = offsets.tolist()
        keeps = [layer.keep.cpu().numpy() for layer in self.layers]
        return [
            [torch.from_numpy((np.flatnonzero(keep[b]) - start).astype(np.int32)) for keep in keeps]
            for b, start in enumerate(starts)
        ]
