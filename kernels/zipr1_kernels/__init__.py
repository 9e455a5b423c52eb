"""Operations on kept tokens: score a prompt, choose tokens, attend among them, prune the cache.

Torch and the standard library only; nothing of zipr1 is imported. Each operation is a folder whose
`__init__.py` is the public function with its checks and whose `reference.py` is plain PyTorch: the
definition that any faster version is tested against, and the path taken on a CPU. Tensors are
head-first, `(B, H, L, D)`, as transformers hands them over, but where an operation says otherwise. See
kernels/README.md.
"""

from zipr1_kernels.break_even import BREAK_EVEN, break_even
from zipr1_kernels.dispatch import ran, unusable, use
from zipr1_kernels.kept import Kept
from zipr1_kernels.kv_compact import kv_compact
from zipr1_kernels.kv_compact.reference import kv_compact as kv_compact_reference
from zipr1_kernels.norm_rope import norm_rope
from zipr1_kernels.packed_attention import packed_attention
from zipr1_kernels.probe_scores import probe_scores
from zipr1_kernels.probe_scores.reference import probe_scores as probe_scores_reference
from zipr1_kernels.select_top_p import (
    cut_points,
    pack_each,
    pack_indices,
    select_threshold,
    select_top_k,
    select_top_p,
)
from zipr1_kernels.select_top_p.reference import select_top_p as select_top_p_reference
from zipr1_kernels.sparse_decode import sparse_decode
from zipr1_kernels.sparse_decode.reference import sparse_decode as sparse_decode_reference
from zipr1_kernels.sparse_prefill import sparse_prefill
from zipr1_kernels.sparse_prefill.reference import sparse_prefill as sparse_prefill_reference

__all__ = [
    "BREAK_EVEN",
    "Kept",
    "break_even",
    "cut_points",
    "kv_compact",
    "kv_compact_reference",
    "norm_rope",
    "pack_each",
    "pack_indices",
    "packed_attention",
    "probe_scores",
    "probe_scores_reference",
    "ran",
    "select_threshold",
    "select_top_k",
    "select_top_p",
    "select_top_p_reference",
    "sparse_decode",
    "sparse_decode_reference",
    "sparse_prefill",
    "sparse_prefill_reference",
    "unusable",
    "use",
]
