"""What `run.py` times: for one shape, every operation by every provider, as functions without arguments.

Torch and zipr1_kernels only. The kept set is the one that the scores choose: p is set so that just the wanted share of
tokens stays, scattered over the prompt as random scores scatter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from zipr1_kernels import (
    cut_points,
    kv_compact,
    pack_indices,
    probe_scores,
    select_top_p,
    sparse_decode,
    sparse_prefill,
    use,
)

# Half at the end of the prompt, half at random: the default of a recipe.
RECENT, RANDOM = 64, 64

Run = Callable[[], object]


class Shape(NamedTuple):
    """Attention of a decoder layer: query heads, key heads, head dimension."""

    name: str
    q_heads: int
    heads: int
    dim: int


SHAPES = {"3b": Shape("3b", 16, 2, 128), "7b": Shape("7b", 28, 4, 128)}


class Work(NamedTuple):
    """Least operations and bytes of an op, for its floor."""

    flops: float
    bytes: float


@dataclass
class Case:
    """op: a name of the table. run: by provider; what `dense` runs is in `Problem.dense`."""

    op: str
    mode: str
    work: Work
    run: dict[str, Run]


class Problem:
    """Tensors of one shape, length, share and dtype on a device, and the functions that work on them.

    ragged: the rows of the batch keep from 0.4 to 1.6 times the share, and decoding has one row for each of them.
    """

    def __init__(
        self,
        shape: Shape,
        length: int,
        keep: float,
        dtype: torch.dtype,
        device: str,
        batch: int = 1,
        decode: int = 1,
        seed: int = 0,
        ragged: bool = False,
    ):
        self.shape, self.length, self.batch = shape, length, batch
        self.ragged, self.decode_batch = ragged, batch if ragged else decode
        # Drawn where they are used: a CPU takes ten seconds for the tokens of a long prompt.
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, tokens: int, heads: int) -> torch.Tensor:
            x = torch.randn(rows, tokens, heads, shape.dim, generator=generator, device=device)
            return x.to(dtype).transpose(1, 2)

        self.q = normal(batch, length, shape.q_heads)
        self.k, self.v = (normal(batch, length, shape.heads) for _ in range(2))
        self.grad = normal(batch, length, shape.q_heads)
        recent = min(RECENT, length)
        others = torch.randperm(length - recent, generator=generator, device=device)
        latest = torch.arange(length - recent, length, device=device)
        slots = torch.cat([others[:RANDOM].sort().values, latest])
        self.probes = slots.expand(batch, -1).contiguous()
        self.every = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.none = ~self.every
        shares = [
            keep * (0.4 + 1.2 * b / max(1, batch - 1)) if ragged else keep for b in range(batch)
        ]
        self.counts = [min(length, max(1, round(share * length))) for share in shares]
        with torch.no_grad():
            scores = self.score()
            cut = cut_points(scores, self.every, self.none).sort(1).values
            # Above the last cut point wanted, below the next; 1 where all stay.
            last = torch.tensor(self.counts, device=device)[:, None]
            ends = torch.cat([cut, torch.full_like(cut[:, :1], 2.0)], 1)
            self.p = ((ends.gather(1, last - 1) + ends.gather(1, last)) / 2)[:, 0].clamp_max(1.0)
            self.scores = scores
            self.kept = pack_indices(self.choose())
            found = self.kept.count.tolist()
            # Sums of float32 differ in their last digits between the sort and the search.
            near = zip(self.counts, found, strict=True)
            assert all(abs(n - count) <= 1 + n / 1000 for n, count in near), (self.counts, found)
            cache = kv_compact(self.k, self.v, self.kept)
            rows = [x if ragged else x[:1].expand(decode, -1, -1, -1).contiguous() for x in cache]
            self.cache = (*rows, self.kept.real if ragged else None)
            self.query = normal(self.decode_batch, 1, shape.q_heads)

    def score(self) -> torch.Tensor:
        index = self.probes[:, None, :, None].expand(-1, self.shape.q_heads, -1, self.shape.dim)
        return probe_scores(self.q.gather(2, index), self.k, self.probes, self.every)

    def score_backward(self) -> Run:
        """Gradients of the scores alone; their forward pass is done beforehand."""
        index = self.probes[:, None, :, None].expand(-1, self.shape.q_heads, -1, self.shape.dim)
        with torch.enable_grad():
            leaves = [self.q.gather(2, index).requires_grad_(), self.k.detach().requires_grad_()]
            scores = probe_scores(*leaves, self.probes, self.every)
        grad = torch.linspace(-1, 1, scores.numel(), device=scores.device).view_as(scores)
        return lambda: torch.autograd.grad(scores, leaves, grad, retain_graph=True)

    def choose(self) -> torch.Tensor:
        return select_top_p(self.scores, self.p, self.every, self.none)

    def whole(self) -> torch.Tensor:
        """Scoring, selection and attention, one after the other."""
        keep = select_top_p(self.score(), self.p, self.every, self.none)
        return sparse_prefill(self.q, self.k, self.v, pack_indices(keep))

    def by_sort(self) -> torch.Tensor:
        """What a user would write: sort, cumulative sum, scatter, nonzero."""
        ordered, order = self.scores.sort(dim=-1, descending=True)
        mass = ordered.cumsum(-1) - ordered
        first = mass < self.p[:, None] * ordered.sum(-1, keepdim=True)
        keep = torch.zeros_like(first).scatter(1, order, first)
        return keep.nonzero()

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Run]:
        """Causal attention over all tokens by each way torch has of computing it."""
        wide = [
            x.repeat_interleave(self.shape.q_heads // self.shape.heads, 1).contiguous()
            for x in (k, v)
        ]
        tight = q.contiguous()

        def grouped() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def expanded() -> torch.Tensor:
            return F.scaled_dot_product_attention(tight, *wide, is_causal=True)

        if q.device.type == "cpu":
            ways: dict[str, Run] = {"sdpa": grouped, "sdpa, heads expanded": expanded}
            if q.dtype != torch.float32:
                full = [x.float() for x in (tight, *wide)]
                ways["sdpa in float32"] = lambda: F.scaled_dot_product_attention(
                    *full, is_causal=True
                ).to(q.dtype)
            return ways

        def backend(kind: SDPBackend, run: Run) -> Run:
            def pinned() -> object:
                with sdpa_kernel(kind):
                    return run()

            return pinned

        kinds = (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        )
        return {f"sdpa {kind.name.lower()}": backend(kind, expanded) for kind in kinds}

    def flex(self) -> Run:
        """torch's flex_attention with the kept set as a block mask, compiled at the first call: for a GPU."""
        keep = self.kept.keep
        made: list[Run] = []

        def seen(b, h, i, j):  # type: ignore[no-untyped-def]
            return (i >= j) & keep[b, i] & keep[b, j]

        def build() -> Run:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            # Compiled, for otherwise it writes a mask of length x length: 17 GB at 131,072.
            mask = create_block_mask(
                seen, self.batch, None, self.length, self.length, self.q.device, _compile=True
            )
            compiled = torch.compile(flex_attention)
            q, k, v = (x.contiguous() for x in (self.q, self.k, self.v))
            return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)

        def run() -> object:
            if not made:
                made.append(build())
            return made[0]()

        return run

    def works(self) -> dict[str, Work]:
        """The least that must be computed and moved for each operation, whoever does it."""
        s, length, rows = self.shape, self.length, self.batch
        size, probes, kept = self.q.element_size(), self.probes.shape[1], sum(self.counts)
        stepped = kept if self.ragged else self.counts[0] * self.decode_batch
        pairs = sum(n * (n + 1) for n in self.counts)
        return {
            "sparse_prefill": Work(
                2.0 * s.q_heads * pairs * s.dim,
                size * s.dim * (kept * (s.q_heads + 2 * s.heads) + rows * length * s.q_heads),
            ),
            "probe_scores": Work(
                2.0 * rows * s.q_heads * probes * length * s.dim,
                rows * (size * s.dim * (length * s.heads + probes * s.q_heads) + 4 * length),
            ),
            "select_top_p": Work(0.0, rows * 5 * length + 8 * kept),
            "kv_compact": Work(0.0, 4 * size * kept * s.heads * s.dim),
            "sparse_decode": Work(
                4.0 * stepped * s.q_heads * s.dim, 2 * size * stepped * s.heads * s.dim
            ),
        }

    def runs(self) -> dict[str, dict[str, Run]]:
        """What is timed: for each forward operation, its providers."""
        prefill: dict[str, Run] = {
            "ours": lambda: sparse_prefill(self.q, self.k, self.v, self.kept),
            "gather + sdpa": self.forced("torch", self.q, self.k, self.v),
        }
        if self.q.device.type == "cuda":
            prefill["triton"] = self.forced("triton", self.q, self.k, self.v)
            prefill["flex_attention"] = self.flex()
        return {
            "probe_scores": {"ours": self.score},
            "select_top_p": {
                "ours": lambda: pack_indices(self.choose()),
                "sort + cumsum": self.by_sort,
            },
            "sparse_prefill": prefill,
            "kv_compact": {"ours": lambda: kv_compact(self.k, self.v, self.kept)},
            "sparse_decode": {"ours": self.decode, "sdpa": self.plain_decode},
        }

    def decode(self) -> torch.Tensor:
        return sparse_decode(self.query, *self.cache)

    def plain_decode(self) -> torch.Tensor:
        """torch's fused attention, the query heads of a key head as its rows, so that the cache is read once."""
        with use("torch"):
            return self.decode()

    def cases(self) -> list[Case]:
        """The forward operations, and scoring, selection and attention as a whole."""
        works, runs = self.works(), self.runs()
        cases = [Case(op, "forward", works[op], runs[op]) for op in runs]
        parts = [works[op] for op in ("sparse_prefill", "probe_scores", "select_top_p")]
        total = Work(*(sum(x) for x in zip(*parts, strict=True)))
        return [*cases, Case("total", "forward", total, {"ours": self.whole})]

    def forced(self, path: str, *tensors: torch.Tensor) -> Run:
        def run() -> object:
            with use(path):
                return sparse_prefill(*tensors, self.kept)

        return run

    def backward(self) -> tuple[Case, dict[str, Run]]:
        """Gradients of q, k and v alone (their forward pass is done beforehand), and the dense ways of getting them."""
        inputs = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        pairs = sum(n * (n + 1) for n in self.counts)
        work = Work(5.0 * self.shape.q_heads * pairs * self.shape.dim, 0.0)

        def of(run: Run, leaves: list[torch.Tensor]) -> Run:
            """The forward pass is done at the first call, where a provider that fails is left out."""
            outs: list[torch.Tensor] = []

            def gradients() -> object:
                if not outs:
                    with torch.enable_grad():
                        out = run()
                    assert isinstance(out, torch.Tensor)
                    outs.append(out)
                grad = self.grad.to(outs[0].dtype)
                return torch.autograd.grad(outs[0], leaves, grad, retain_graph=True)

            return gradients

        runs = {
            "ours": of(lambda: sparse_prefill(*inputs, self.kept), inputs),
            "gather + sdpa": of(self.forced("torch", *inputs), inputs),
        }
        if self.q.device.type == "cuda":
            runs["triton"] = of(self.forced("triton", *inputs), inputs)
        with torch.enable_grad():
            dense = {name: of(run, inputs) for name, run in self.dense(*inputs).items()}
        return Case("sparse_prefill", "backward", work, runs), dense
