"""vLLM's Qwen2-VL and Qwen2.5-VL with decoder layers that run on kept tokens alone.

vLLM's layers, kernels and attention backends are used as they are. In a prefill a layer computes keys and values of all
tokens and queries of the probes, chooses, computes queries of the kept, and attends among them: for the backend it is
ordinary causal attention over shorter prompts, whose keys and values it writes into the first slots of each request's
blocks. Later tokens are written behind them, and attend to what the layer has: each layer has its own lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.v1.attention.backend import CommonAttentionMetadata

from zipr1.core.recipe import Sparse
from zipr1.serving.vllm import limits
from zipr1.serving.vllm.choose import keep
from zipr1.serving.vllm.ledger import Ledger
from zipr1.serving.vllm.projections import Apart
from zipr1.serving.vllm.settings import KEY
from zipr1.serving.vllm.step import Part, Step


class Decoder:
    """The sparse forward passes of a model's decoder layers."""

    def __init__(self, layers: Any, settings: Sparse, config: VllmConfig, ledger: Ledger) -> None:
        self.settings = settings
        self.config = config
        self.ledger = ledger
        self.names = [layer.self_attn.attn.layer_name for layer in layers]
        self.step: Step | None = None
        self.builder: Any = None
        for index, layer in enumerate(layers):
            backend = layer.self_attn.attn.get_attn_backend().get_name()
            if backend not in limits.BACKENDS:
                raise limits.refuse(
                    f"the attention backend {backend} is not known; {', '.join(limits.BACKENDS)} are"
                )
            Apart.of(layer.self_attn.qkv_proj)
            layer.forward = functools.partial(self.forward, index, layer, layer.forward)

    def forward(
        self,
        index: int,
        layer: Any,
        stock: Any,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a Qwen2DecoderLayer. positions: `(n,)` or `(3, n)`; hidden_states, residual: `(n, hidden)`."""
        metadata = get_forward_context().attn_metadata
        if not self.ledger.open or metadata is None:  # a trial run of vLLM's
            return stock(positions, hidden_states, residual)  # type: ignore[no-any-return]
        if index == 0:
            self.step = self.begin(metadata[self.names[0]], layer.self_attn.attn)
        assert self.step is not None
        if not self.step.reading:  # every layer's lengths are announced
            return stock(positions, hidden_states, residual)  # type: ignore[no-any-return]
        attention = layer.self_attn
        if residual is None:
            residual = hidden_states
            hidden_states = layer.input_layernorm(hidden_states)
        else:
            hidden_states, residual = layer.input_layernorm(hidden_states, residual)
        apart = attention.qkv_proj.quant_method
        key = turned(attention, positions, apart.project(apart.keys, hidden_states))
        query = functools.partial(queries, attention, positions, hidden_states)
        part = self.step.part(index, functools.partial(self.choose, index, attention, query, key))
        self.announce(self.names[index], part)
        rows = part.rows
        value = apart.project(apart.values, hidden_states if rows is None else hidden_states[rows])
        if rows is None:
            out, _ = attention.o_proj(attention.attn(query(slice(None)), key, value))
            hidden_states, residual = layer.post_attention_layernorm(out, residual)
            return layer.mlp(hidden_states), residual
        out = attention.attn(query(rows), key[rows], value)
        out, _ = attention.o_proj(out)
        if self.settings.skip == "attention":
            out = torch.zeros_like(residual).index_copy_(0, rows, out)
            hidden_states, residual = layer.post_attention_layernorm(out, residual)
            return layer.mlp(hidden_states), residual
        out, kept = layer.post_attention_layernorm(out, residual[rows])
        out = layer.mlp(out)
        return torch.zeros_like(residual).index_copy_(0, rows, out), residual.index_copy(
            0, rows, kept
        )

    def choose(
        self,
        index: int,
        attention: Any,
        query: Callable[[torch.Tensor], torch.Tensor],
        key: torch.Tensor,
        start: int,
        end: int,
    ) -> torch.Tensor:
        """`(end - start,)` bool: what the layer keeps of the prompt in these rows."""
        heads = (-1, attention.head_dim)
        return keep(
            lambda places: query(places + start).unflatten(-1, heads),
            key[start:end].unflatten(-1, heads),
            index,
            self.settings,
            attention.scaling,
            total=_over_ranks,
        )

    def begin(self, metadata: Any, attn: Any) -> Step:
        """The engine's step, from the attention metadata that vLLM made for all layers."""
        spec = attn.get_kv_cache_spec(self.config)
        if self.builder is None:
            make = attn.get_attn_backend().get_builder_cls()
            device = metadata.seq_lens.device
            self.builder = make(spec, self.names, self.config, device)
        step = Step(
            self.ledger,
            starts=metadata.query_start_loc,
            lengths=metadata.seq_lens,
            table=metadata.block_table,
            tokens=metadata.num_actual_tokens,
            size=spec.block_size,
            layers=len(self.names),
        )
        if not step.reading:
            for name, part in zip(self.names, step.parts(), strict=True):
                self.announce(name, part)
        return step

    def announce(self, name: str, part: Part) -> None:
        """Puts a layer's own lengths and slots where vLLM's attention looks for them."""
        context = get_forward_context()
        assert isinstance(context.attn_metadata, dict)
        assert isinstance(context.slot_mapping, dict)
        common = CommonAttentionMetadata(
            query_start_loc=part.starts.to(part.table.device),
            query_start_loc_cpu=part.starts,
            seq_lens=part.lengths,
            num_reqs=len(part.lengths),
            num_actual_tokens=len(part.slots),
            max_query_len=part.widest,
            max_seq_len=part.longest,
            block_table_tensor=part.table,
            slot_mapping=part.slots,
        )
        context.attn_metadata[name] = self.builder.build(0, common)
        context.slot_mapping[name] = part.slots


def queries(
    attention: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    rows: torch.Tensor | slice,
) -> torch.Tensor:
    """`(n, HQ * D)`: of these rows, after RoPE. hidden_states: after the layer's norm."""
    apart = attention.qkv_proj.quant_method
    plain = apart.project(apart.queries, hidden_states[rows])
    return turned(attention, positions[..., rows], plain)


def turned(attention: Any, positions: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """RoPE for queries or for keys `(n, heads * D)`. vLLM's wants both: one head stands in for the others."""
    done, _ = attention.rotary_emb(positions, heads, heads[:, : attention.head_dim].clone())
    return done  # type: ignore[no-any-return]


def _over_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Scores are sums over heads, and each rank of tensor parallelism has some of them."""
    if get_tensor_model_parallel_world_size() == 1:
        return scores
    return tensor_model_parallel_all_reduce(scores)


class Sparsity:
    """Goes in front of a model class of vLLM's."""

    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        layers = self.language_model.model.layers
        self.ledger = Ledger(len(layers))
        settings = Sparse.model_validate(getattr(config, KEY)["sparse"])
        self.decoder = Decoder(layers, settings, vllm_config, self.ledger)
        # As `zipr1.load` has it: placeholders without a picture are never said.
        self.unsaid = [config.image_token_id, config.video_token_id]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        if logits is not None:
            logits[:, self.unsaid] = float("-inf")
        return logits


class SparseQwen2VL(Sparsity, Qwen2VLForConditionalGeneration):
    """Named by the plugin; made by vLLM."""


class SparseQwen25VL(Sparsity, Qwen2_5_VLForConditionalGeneration):
    """Named by the plugin; made by vLLM."""
