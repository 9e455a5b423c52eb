"""Which tokens of a prompt a layer keeps: the scoring and selection of training, for one prompt at a time.

The only file of this room that touches the kernels and zipr1/models/sparse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from zipr1_kernels import probe_scores

from zipr1.core.recipe import Sparse
from zipr1.models.sparse.probes import probe_slots
from zipr1.models.sparse.request import dense_below
from zipr1.models.sparse.rules import Draw, select
from zipr1.models.transfer import send

SEED = 0  # of the probes, as `zipr1.load` has it


def keep(
    query: Callable[[torch.Tensor], torch.Tensor],
    key: torch.Tensor,
    layer: int,
    settings: Sparse,
    scale: float,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
) -> torch.Tensor:
    """`(P,)` bool: the tokens of a prompt that `layer` keeps.

    query: places `(n,)` of the prompt -> their queries `(n, HQ, D)`; asked of the probes alone. key: `(P, H, D)` of the
    whole prompt. Both after RoPE. total: scores of this process's heads -> scores of all heads, where heads are shared
    out.
    """
    length, device = len(key), key.device
    prompt = torch.ones(1, length, dtype=torch.bool, device=device)
    if settings.p >= 1 or length < dense_below(settings, device, key.dtype):
        return prompt[0]
    if settings.rule == "random":
        scores = torch.zeros(1, length, device=device)
    else:
        slots, _ = probe_slots([length], [0], [layer], SEED, settings.probes)
        (places,) = send(device, slots[0])
        scores = total(
            probe_scores(
                query(places[0]).transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                places,
                prompt,
                scale=scale,
                normalise=settings.normalise,
            )
        )
    always = torch.zeros_like(prompt)
    always[:, -settings.keep_last :] = True
    p = torch.tensor([settings.p], device=device)
    return select(settings.rule, scores, p, prompt, always, Draw(SEED, layer))[0]
