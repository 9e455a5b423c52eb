"""What each layer kept in one forward pass over prompts: enough to replay it and to reward it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from zipr1.models.transfer import fetch


@dataclass
class LayerRecord:
    """One decoder layer.

    keep: `(B, L)` bool, kept slots; padding is False. scores: `(B, L)` float32, higher is more important, with gradient
    in training. cut: `(B, L)` share of mass ahead of each token, see `zipr1_kernels.cut_points`. audit: `(b, L)`
    float32, of the rows that are audited, scores by held-out probes, which took no part in the choice. None: not
    computed.
    """

    keep: torch.Tensor
    scores: torch.Tensor | None = None
    cut: torch.Tensor | None = None
    audit: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`(B,)` int64, kept tokens of each sample."""
        return self.keep.sum(-1)


@dataclass
class Record:
    """candidates: `(B, L)` bool, the tokens that were chosen among. layers: first to last, as they have run. audited:
    `(b,)` the rows that are audited; None: none."""

    candidates: torch.Tensor
    layers: list[LayerRecord] = field(default_factory=list)
    audited: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """`(B,)` int64, unpadded prompt lengths."""
        return self.candidates.sum(1)

    def add(self, number: int, layer: LayerRecord) -> None:
        """Note what layer `number` kept; one that gradient checkpointing computes again is there already."""
        if number == len(self.layers):
            self.layers.append(layer)

    def layer_ratios(self) -> torch.Tensor:
        """`(B, D)` float32 in (0, 1]: kept fraction of the prompt in each layer."""
        counts = torch.stack([layer.counts for layer in self.layers], -1)
        return counts.to(torch.float32) / self.lengths.to(counts.device)[:, None]

    def token_ratio(self) -> torch.Tensor:
        """`(B,)` float32 in (0, 1]: mean over layers of kept / length (arXiv 2504.18579)."""
        return self.layer_ratios().mean(-1)

    def kept_positions(self) -> list[list[torch.Tensor]]:
        """[sample][layer] -> ascending int32 positions in the unpadded prompt, on the CPU: the form of `Rollout.kept`.

        Padding must lie on one side of the prompt."""
        here = fetch(self.candidates, *(layer.keep for layer in self.layers))
        starts = here[0].int().argmax(1).tolist()
        keeps = [keep.numpy() for keep in here[1:]]
        return [
            [torch.from_numpy((np.flatnonzero(keep[b]) - start).astype(np.int32)) for keep in keeps]
            for b, start in enumerate(starts)
        ]

    def probe_audit_mass(self) -> torch.Tensor | None:
        """`(b,)` float32 in [0, 1], of audited rows: the share of the score mass of held-out probes that fell on kept
        tokens, mean over layers; None without any. For all layers at once, so that none launches anything for it."""
        masses = [layer.audit for layer in self.layers]
        if self.audited is None or not masses:
            return None
        scores = torch.stack([mass for mass in masses if mass is not None])
        keep = torch.stack([layer.keep for layer in self.layers]).index_select(1, self.audited)
        total = scores.sum(2)
        # A prompt so short that every token is a probe has none left to ask.
        shares = (scores * keep).sum(2) / total.clamp_min(1e-12)
        return torch.where(total > 0, shares, 1.0).mean(0)
