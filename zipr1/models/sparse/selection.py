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
import torch.nn.functional as F
from zipr1_kernels import cut_points, probe_scores

from zipr1.core.errors import InputError
from zipr1.core.phases import phase
from zipr1.core.recipe import Probes
from zipr1.models.sparse.probes import probe_slots
from zipr1.models.sparse.record import LayerRecord, Record
from zipr1.models.sparse.request import Request, dense_below
from zipr1.models.sparse.rules import RULES, Draw
from zipr1.models.transfer import send

# Added to a pass's seed for the probes of its audit, so that they are other ones.
AUDIT_SEED = 7919
# Probes of an audit, at least.
AUDIT_PROBES = 8


@dataclass(frozen=True)
class Heads:
    """What scoring asks of a layer, computed when it is asked for.

    queries: of the layer's probes, slots `(n,)` of the flattened batch -> `(n, HQ, D)`. keys: -> `(B, H, S, D)`.
    scale: of the logits.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[], torch.Tensor]
    scale: float

    @classmethod
    def given(cls, query: torch.Tensor, key: torch.Tensor, scale: float) -> Heads:
        """Of queries and keys that are there already, `(B, HQ, L, D)` and `(B, H, S, D)`."""

        def queries(slots: torch.Tensor) -> torch.Tensor:
            # Token-first, as projections lay heads out in memory: no copy of them all.
            return query.transpose(1, 2).flatten(0, 1).index_select(0, slots)

        return cls(queries, lambda: key, scale)


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

    Probes of a choice and those of its audit are scored together: `index` `(layers, P * R)` int64 are their slots among
    the queries of the flattened batch, `places` `(layers, P, R)` int32 those among its keys, -1 for none, `rows` `(P,)`
    int32 the rows of the batch that they belong to, the audited ones last.

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
        settings = request.settings
        to_the_end = candidates.flip(1).cumsum(1).flip(1)
        dense = candidates.sum(1) < dense_below(settings, device)
        made = {
            "candidates": candidates,
            "always": candidates & (to_the_end <= settings.keep_last),
            "dense": dense,
        }
        self.rule = RULES[settings.rule]
        if request.replay is not None:
            made["replay"] = torch.stack(list(request.replay))
        else:
            made["amount"] = self.rule.amount(self._thresholds(dense, layers), candidates.sum(1))
            if self.rule.scores is not None:
                draws = (Draw(request.seed, layer) for layer in range(layers))
                own = [self.rule.scores(candidates, draw) for draw in draws]
                made["scores"] = torch.stack(own)
        self.scored = len(dense)
        if not request.scores and (request.replay is not None or "scores" in made):
            self.scored = 0  # nobody asks for the scores
        made |= self._probes(asking, layers, candidates.shape[1] - asking.past)
        there = dict(zip(made, send(device, *made.values()), strict=True))
        self.candidates, self.always, self.dense = (
            there.pop(name) for name in ("candidates", "always", "dense")
        )
        self._of_layers = there
        self.record = Record(self.candidates, audited=there.get("audited"))

    @property
    def index(self) -> torch.Tensor | None:
        return self._of_layers.get("index")

    def choose(self, layer: int, heads: Heads) -> LayerRecord:
        """What `layer` keeps of the candidates; noted in `record`."""
        scores, audit = self.score(layer, heads)
        cut = None
        if self.request.scores and scores is not None:
            cut = cut_points(scores, self.candidates, self.always)
        choice = LayerRecord(self.select(layer, scores), scores, cut, audit)
        self.record.add(layer, choice)
        return choice

    def score(self, layer: int, heads: Heads) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scores `(B, S)`, with gradient if they are recorded, and those by the probes of the audit `(b, S)`; None
        where nobody asks for them."""
        request = self.request
        if self.index is None:
            return None, None
        with torch.set_grad_enabled(request.scores and torch.is_grad_enabled()):
            places, rows = self._of_layers["places"][layer], self._of_layers.get("rows")
            query = heads.queries(self.index[layer])
            query, key = query.unflatten(0, places.shape).transpose(1, 2), heads.keys()
            with phase("scoring"):
                scores = probe_scores(
                    query, key, places, self.candidates,
                    rows=rows, scale=heads.scale, normalise=request.settings.normalise,
                )  # fmt: skip
            if rows is None:
                return scores, None
            return scores[: self.scored] if self.scored else None, scores[self.scored :].detach()

    def select(self, layer: int, scores: torch.Tensor | None) -> torch.Tensor:
        """Kept candidates `(B, S)` bool: by the rule, or those of the recorded choice."""
        if "replay" in self._of_layers:
            return self._of_layers["replay"][layer]
        with phase("selection"):
            if "scores" in self._of_layers:  # the rule has its own
                scores = self._of_layers["scores"][layer]
            assert scores is not None
            amount = self._of_layers["amount"][layer]
            return self.rule.choose(scores.detach(), amount, self.candidates, self.always)

    def _probes(self, asking: ProbeRange, layers: int, length: int) -> dict[str, torch.Tensor]:
        """`index`, `places` and `rows` of the probes of all layers, and which rows are audited, `audited`; on the CPU.
        length: of the queries."""
        request, probes = self.request, self.request.settings.probes
        made: dict[str, torch.Tensor] = {}
        if not self.scored and not len(request.audit):
            return made
        chosen, real = asking.slots(layers, request.seed, probes)
        parts: list[tuple[torch.Tensor, torch.Tensor, Sequence[int]]] = []
        if self.scored:
            parts.append((chosen, real.expand(chosen.shape), range(len(chosen[0]))))
        if len(request.audit):
            few = asking.rows(request.audit)
            made["audited"] = torch.tensor(list(request.audit), dtype=torch.int32)
            held_out = Probes(recent=0, random=max(AUDIT_PROBES, probes.random))
            fresh, real = few.slots(layers, request.seed + AUDIT_SEED, held_out)
            seen = fresh[..., None] == chosen[:, list(request.audit), None]
            parts.append((fresh, real & ~seen.any(-1), request.audit))
        most = max(slots.shape[2] for slots, _, _ in parts)
        rows = torch.tensor([row for _, _, rows in parts for row in rows], dtype=torch.int32)
        wide = [[F.pad(x, (0, most - x.shape[2])) for x in part[:2]] for part in parts]
        slots, real = (torch.cat(some, 1) for some in zip(*wide, strict=True))
        made["index"] = (slots + rows[:, None] * length).flatten(1)
        made["places"] = (slots + asking.past).where(real, -1).int()
        if len(request.audit):
            made["rows"] = rows
        return made

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
