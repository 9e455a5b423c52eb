"""Which tokens a layer keeps: score, select, record, one step after the other.

1. score: probes, a few queries of the prompt, attend to all candidates; a candidate's score is the attention it gets.
2. select: a rule (rules.py) turns scores and the row's p into kept tokens; or a recorded choice is replayed.
3. record: what was kept is added to the run's `Record`, with what training and the audit ask for besides.

One code for a prompt alone and for a turn of a conversation (`kv: retain`), whose probes are its own tokens and whose
candidates are all tokens of all turns. Not here: what attention does with the choice (context.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from zipr1_kernels import cut_points, probe_scores

from zipr1.core.errors import InputError
from zipr1.core.phases import phase
from zipr1.core.recipe import Probes
from zipr1.models.sparse.probes import probe_slots
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.request import Request
from zipr1.models.sparse.rules import Draw, select
from zipr1.models.transfer import send

# Added to a pass's seed for the probes of its audit, so that they are other ones.
AUDIT_SEED = 7919
# Probes of an audit, at least.
AUDIT_PROBES = 8


@dataclass(frozen=True)
class Heads:
    """What scoring asks of a layer, computed when it is asked for.

    queries: slots `(B, R)` -> `(B, HQ, R, D)`. keys: -> `(B, H, S, D)`. rows: rows `(b,)` -> the same of these rows
    alone. scale: of the logits.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[], torch.Tensor]
    rows: Callable[[torch.Tensor], Heads]
    scale: float

    @classmethod
    def given(cls, query: torch.Tensor, key: torch.Tensor, scale: float) -> Heads:
        """Of queries and keys that are there already, `(B, HQ, L, D)` and `(B, H, S, D)`."""

        def queries(slots: torch.Tensor) -> torch.Tensor:
            index = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            return query.gather(2, index)

        def rows(some: torch.Tensor) -> Heads:
            return cls.given(query[some], key[some], scale)

        return cls(queries, lambda: key, rows, scale)


@dataclass(frozen=True)
class ProbeRange:
    """The tokens of each row that probes are drawn from. lengths: how many; offsets: the first one's slot among the
    queries of this pass; past: keys that stand before the first query."""

    lengths: list[int]
    offsets: list[int]
    past: int = 0

    @classmethod
    def of(cls, tokens: torch.Tensor, past: int = 0) -> ProbeRange:
        """tokens: `(B, L)` bool, on the CPU, padded on one side. Raises InputError for a row without any."""
        lengths = tokens.sum(1)
        if not bool((lengths > 0).all()):
            raise InputError("a sample of the batch has no prompt token; give each at least one")
        return cls(lengths.tolist(), tokens.int().argmax(1).tolist(), past)

    def slots(self, layers: int, seed: int, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
        """Probes as slots among the queries, `(layers, B, R)` int64, and which of them are real, `(B, R)` bool."""
        return probe_slots(self.lengths, self.offsets, range(layers), seed, probes)

    def rows(self, some: Sequence[int]) -> ProbeRange:
        lengths, offsets = ([values[i] for i in some] for values in (self.lengths, self.offsets))
        return ProbeRange(lengths, offsets, self.past)


class Selector:
    """Chooses what the layers of one prefill keep. candidates: `(B, S)` bool, the tokens that may be dropped; asking:
    the tokens that probes are drawn from; layers: of the decoder. Masks are given on the CPU: what follows from lengths
    is made of them for all layers before the first one runs, and sent to `device` in one copy.

    record: fills as the layers run. always: `(B, S)` bool, the last `keep_last` candidates of each row, which every
    layer keeps. dense: `(B,)` bool, rows so short that they keep everything.
    """

    def __init__(
        self,
        request: Request,
        candidates: torch.Tensor,
        asking: ProbeRange,
        layers: int,
        device: torch.device,
    ) -> None:
        self.request = request
        self.past = asking.past
        settings = request.settings
        to_the_end = candidates.flip(1).cumsum(1).flip(1)
        dense = candidates.sum(1) < settings.dense_below
        made = {
            "candidates": candidates,
            "always": candidates & (to_the_end <= settings.keep_last),
            "dense": dense,
        }
        if request.replay is None:
            made["p"] = self._thresholds(dense, layers)
        else:
            made["replay"] = torch.stack(list(request.replay))
        if request.scores or (request.replay is None and settings.rule != "random"):
            made["slots"], made["real"] = asking.slots(layers, request.seed, settings.probes)
        if len(request.audit):
            made["audited"], made["fresh"], made["unseen"] = self._held_out(asking, layers)
        there = dict(zip(made, send(device, *made.values()), strict=True))
        self.candidates, self.always, self.dense = (
            there.pop(name) for name in ("candidates", "always", "dense")
        )
        self._of_layers = there
        self.record = Record(self.candidates)

    def choose(self, layer: int, heads: Heads) -> LayerRecord:
        """What `layer` keeps of the candidates; noted in `record`."""
        scores, cut = self.score(layer, heads)
        keep = self.select(layer, scores)
        choice = LayerRecord(keep, scores, cut)
        if len(self.request.audit) and layer == len(self.record.layers):
            choice.probe_audit_mass = self.audit(layer, heads, keep)
        self.record.add(layer, choice)
        return choice

    def score(self, layer: int, heads: Heads) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scores and cut points, both `(B, S)`; None where nobody needs them. With gradient if they are recorded."""
        request = self.request
        if "slots" not in self._of_layers:
            return None, None
        with torch.set_grad_enabled(request.scores and torch.is_grad_enabled()):
            slots, real = self._of_layers["slots"][layer], self._of_layers["real"]
            scores = self._scores_by(slots, real, self.candidates, heads)
            if not request.scores:
                return scores, None
            return scores, cut_points(scores, self.candidates, self.always)

    def select(self, layer: int, scores: torch.Tensor | None) -> torch.Tensor:
        """Kept candidates `(B, S)` bool: by the rule, or those of the recorded choice."""
        if "replay" in self._of_layers:
            return self._of_layers["replay"][layer]
        if scores is None:  # the random rule reads none
            scores = torch.zeros(self.candidates.shape, device=self.candidates.device)
        rule, draw = self.request.settings.rule, Draw(self.request.seed, layer)
        with phase("selection"):
            p = self._of_layers["p"][layer]
            return select(rule, scores.detach(), p, self.candidates, self.always, draw)

    @torch.no_grad()
    def audit(self, layer: int, heads: Heads, keep: torch.Tensor) -> torch.Tensor:
        """Share of the score mass of held-out probes that falls on kept tokens, `(b,)`, of each row that is audited.

        The probes are fresh random ones; those that took part in the choice are left out.
        """
        rows, fresh, unseen = (self._of_layers[name] for name in ("audited", "fresh", "unseen"))
        scores = self._scores_by(
            fresh[layer], unseen[layer], self.candidates[rows], heads.rows(rows)
        )
        total = scores.sum(1)
        # A prompt so short that every token is a probe has none left to ask.
        return torch.where(total > 0, (scores * keep[rows]).sum(1) / total.clamp_min(1e-12), 1.0)

    def _held_out(
        self, asking: ProbeRange, layers: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows that are audited `(b,)`, their probes `(layers, b, R)`, and which of these take no part in a choice."""
        request = self.request
        probes = request.settings.probes
        few = asking.rows(request.audit)
        held_out = Probes(recent=0, random=max(AUDIT_PROBES, probes.random))
        fresh, real = few.slots(layers, request.seed + AUDIT_SEED, held_out)
        chosen, _ = few.slots(layers, request.seed, probes)
        seen = (fresh[..., None] == chosen[:, :, None]).any(-1)
        return torch.tensor(list(request.audit)), fresh, real & ~seen

    def _thresholds(self, dense: torch.Tensor, layers: int) -> torch.Tensor:
        """`(layers, B)` p of each row at each layer; beams and returned sequences repeat their row's."""
        rows, given = len(dense), self.request.thresholds
        if given is None:
            p = torch.full((rows, 1), self.request.settings.p)
        else:
            if rows % len(given):
                raise InputError(
                    f"{len(given)} thresholds for {rows} rows; give one for each sample"
                )
            p = given.cpu().repeat_interleave(rows // len(given), 0)
        wide = p[:, [min(layer, p.shape[1] - 1) for layer in range(layers)]]
        return wide.masked_fill(dense[:, None], 1.0).T.contiguous()

    def _scores_by(
        self, slots: torch.Tensor, real: torch.Tensor, candidates: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        query, key = heads.queries(slots), heads.keys()
        places = slots + self.past if self.past else slots
        with phase("scoring"):
            return probe_scores(
                query, key, places, real, candidates,
                scale=heads.scale, normalise=self.request.settings.normalise,
            )  # fmt: skip
