"""Queries, keys and values apart, though vLLM holds the three projections of a layer as one matrix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from zipr1.serving.vllm import limits


class Apart(UnquantizedLinearMethod):
    """Takes the place of a projection's own method, and leaves what calls the whole matrix as it is.

    Its parts are rows of the matrix: views of it on a GPU, while on a CPU vLLM packs each matrix that it multiplies by
    into memory of its own.
    """

    queries: Any
    keys: Any
    values: Any

    @classmethod
    def of(cls, projection: Any) -> Apart:
        """Puts it into a QKVParallelLinear whose weights were not yet loaded. Raises RunError where another method than
        that of plain weights is there."""
        there = type(projection.quant_method)
        if there is not UnquantizedLinearMethod:
            raise limits.refuse(f"weights held by {there.__name__} are not known; plain ones are")
        projection.quant_method = cls()
        return projection.quant_method  # type: ignore[no-any-return]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM, which on a CPU removes the whole weight here."""
        sizes = layer.output_partition_sizes  # of this rank
        weights, biases = layer.weight.data.split(sizes), layer.bias.data.split(sizes)
        self.queries, self.keys, self.values = (
            SimpleNamespace(weight=frozen(weight), bias=frozen(bias))
            for weight, bias in zip(weights, biases, strict=True)
        )
        for part in (self.queries, self.keys, self.values, layer):
            super().process_weights_after_loading(part)

    def project(self, part: Any, rows: torch.Tensor) -> torch.Tensor:
        """rows `(n, hidden)` -> what `queries`, `keys` or `values` make of them, `(n, heads * head size)`."""
        return self.apply(part, rows, part.bias)  # type: ignore[no-any-return]


def frozen(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)
