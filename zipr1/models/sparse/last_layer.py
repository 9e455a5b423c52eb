"""The last decoder layer, finished only where its output is read.

Its keys and values serve every later token, but its output is read at the answer's places alone: there the output
projection and the MLP are done, and elsewhere 0 stands for what they would have added. Of a model with D layers it is
about 1/D of a prompt's matrix products, forward and backward, that nobody would have looked at.

A sparse pass does it by its context (context.py), told by `PromptBatch.read_at`; a dense one is patched for it
(patch.py, `finished_at`). The one place that asks for either is `prefill` in zipr1/models/sampling.py.
"""

from __future__ import annotations

import torch
from zipr1_kernels import Kept

from zipr1.models.sparse.packing import OutputRows


def last_column(valid: torch.Tensor) -> torch.Tensor:
    """`(B, L)` bool, True in the last slot: where left-padded prompts are read."""
    read_at = torch.zeros_like(valid)
    read_at[:, -1] = True
    return read_at


def finished(read_at: torch.Tensor, packed: Kept | None = None) -> OutputRows:
    """What is left to do where the output is read; read_at `(B, L)` bool. packed: the layer has these tokens alone."""
    flat = read_at.flatten()
    at = (flat if packed is None else flat[packed.flat]).nonzero()[:, 0]
    return OutputRows(o_proj=at, mlp=at)
