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
from zipr1.models.transfer import send


def last_column(valid: torch.Tensor) -> torch.Tensor:
    """`(B, L)` bool on the CPU, True in the last slot: where left-padded prompts are read."""
    read_at = torch.zeros(valid.shape, dtype=torch.bool)
    read_at[:, -1] = True
    return read_at


def slots_of(read_at: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`(n,)` int64 on `device`, ascending: where `read_at` `(B, L)` bool is True, among the flattened batch. `read_at`
    should lie on the CPU, where their number is known."""
    (slots,) = send(device, read_at.flatten().nonzero()[:, 0])
    return slots


def finished(slots: torch.Tensor, packed: Kept | None = None) -> OutputRows:
    """What is left to do where the output is read. packed: the layer has these tokens alone, the read ones among
    them."""
    at = slots if packed is None else torch.searchsorted(packed.flat, slots)
    return OutputRows(o_proj=at, mlp=at)
