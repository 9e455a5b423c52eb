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
    """Tensors of one shape, length, share and dtype on a device, and the functions that work on them."""

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
    ):
        self.shape, self.length, self.batch, self.decode_batch = shape, length, batch, decode
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, tokens: int, heads: int) -> torch.Tensor:
            x = torch.randn(rows, tokens, heads, shape.dim, generator=generator)
            return x.to(device, dtype).transpose(1, 2)

        self.q = normal(batch, length, shape.q_heads)
        self.k, self.v = (normal(batch, length, shape.heads) for _ in range(2))
        self.grad = normal(batch, length, shape.q_heads)
        recent = min(RECENT, length)
        others = torch.randperm(length - recent, generator=generator)[:RANDOM].sort().values
        slots = torch.cat([others, torch.arange(length - recent, length)])
        self.probes = slots.expand(batch, -1).contiguous().to(device)
        self.every = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.none = ~self.every
        self.valid = torch.ones_like(self.probes, dtype=torch.bool)
        self.kept_count = max(1, round(keep * length))
        with torch.no_grad():
            scores = self.score()
            cut = cut_points(scores, self.every, self.none).sort(1).values
            # Above the last cut point wanted, below the next.
            n = self.kept_count
            self.p = torch.ones_like(cut[:, 0])
            if n < length:
                self.p = (cut[:, n - 1] + cut[:, n]) / 2
            self.scores = scores
            self.kept = pack_indices(self.choose())
            found = self.kept.count.tolist()
            # Sums of float32 differ in their last digits between the sort and the search.
            assert all(abs(n - count) <= 1 + n / 1000 for count in found), (n, found)
            cache = kv_compact(self.k, self.v, self.kept)
            self.cache = [x[:1].expand(decode, -1, -1, -1).contiguous() for x in cache]
            self.query = normal(decode, 1, shape.q_heads)

    def score(self) -> torch.Tensor:
        index = self.probes[:, None, :, None].expand(-1, self.shape.q_heads, -1, self.shape.dim)
        return probe_scores(self.q.gather(2, index), self.k, self.probes, self.valid, self.every)

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
        """torch's flex_attention with the kept set as a block mask, compiled: for a GPU."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        keep = self.kept.keep

        def seen(b, h, i, j):  # type: ignore[no-untyped-def]
            return (i >= j) & keep[b, i] & keep[b, j]

        mask = create_block_mask(seen, self.batch, None, self.length, self.length, self.q.device)
        compiled = torch.compile(flex_attention)
        q, k, v = (x.contiguous() for x in (self.q, self.k, self.v))
        return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)

    def cases(self) -> list[Case]:
        """The forward operations; the floor counts what must be computed and moved, whoever does it."""
        s, length, n = self.shape, self.length, self.kept_count
        size, rows = self.q.element_size(), self.batch
        probes = self.probes.shape[1]
        attention = Work(
            2.0 * rows * s.q_heads * n * (n + 1) * s.dim,
            rows * size * s.dim * (n * (s.q_heads + 2 * s.heads) + length * s.q_heads),
        )
        scoring = Work(
            2.0 * rows * s.q_heads * probes * length * s.dim,
            rows * (size * s.dim * (length * s.heads + probes * s.q_heads) + 4 * length),
        )
        selecting = Work(0.0, rows * (4 * length + length + 8 * n))
        compacting = Work(0.0, rows * 4 * size * n * s.heads * s.dim)
        decoding = Work(
            4.0 * self.decode_batch * s.q_heads * n * s.dim,
            self.decode_batch * 2 * size * n * s.heads * s.dim,
        )
        total = Work(*(sum(x) for x in zip(attention, scoring, selecting, strict=True)))
        prefill: dict[str, Run] = {
            "ours": lambda: sparse_prefill(self.q, self.k, self.v, self.kept),
            "gather + sdpa": self.forced("torch", self.q, self.k, self.v),
        }
        if self.q.device.type == "cuda":
            prefill["triton"] = self.forced("triton", self.q, self.k, self.v)
            prefill["flex_attention"] = self.flex()
        wide = [x.repeat_interleave(s.q_heads // s.heads, 1) for x in self.cache]
        return [
            Case("probe_scores", "forward", scoring, {"ours": self.score}),
            Case(
                "select_top_p",
                "forward",
                selecting,
                {
                    "ours": lambda: pack_indices(self.choose()),
                    "sort + cumsum": self.by_sort,
                },
            ),
            Case("sparse_prefill", "forward", attention, prefill),
            Case(
                "kv_compact",
                "forward",
                compacting,
                {"ours": lambda: kv_compact(self.k, self.v, self.kept)},
            ),
            Case(
                "sparse_decode",
                "forward",
                decoding,
                {
                    "ours": lambda: sparse_decode(self.query, *self.cache),
                    "sdpa": lambda: F.scaled_dot_product_attention(self.query, *wide),
                },
            ),
            Case("total", "forward", total, {"ours": self.whole}),
        ]

    def forced(self, path: str, *tensors: torch.Tensor) -> Run:
        def run() -> object:
            with use(path):
                return sparse_prefill(*tensors, self.kept)

        return run

    def backward(self) -> tuple[Case, dict[str, Run]]:
        """Gradients of q, k and v alone (their forward pass is done beforehand), and the dense ways of getting them."""
        inputs = [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]
        s, n = self.shape, self.kept_count
        work = Work(5.0 * self.batch * s.q_heads * n * (n + 1) * s.dim, 0.0)

        def of(run: Run, leaves: list[torch.Tensor]) -> Run:
            with torch.enable_grad():
                out = run()
            assert isinstance(out, torch.Tensor)
            grad = self.grad.to(out.dtype)
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

        runs = {
            "ours": of(lambda: sparse_prefill(*inputs, self.kept), inputs),
            "gather + sdpa": of(self.forced("torch", *inputs), inputs),
        }
        if self.q.device.type == "cuda":
            runs["triton"] = of(self.forced("triton", *inputs), inputs)
        with torch.enable_grad():
            dense = {name: of(run, inputs) for name, run in self.dense(*inputs).items()}
        return Case("sparse_prefill", "backward", work, runs), dense
