"""Token ids and patches -> the tensors that transformers' own forward and `generate` take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BatchFeature

from zipr1.models.families import FAMILIES
from zipr1.models.processors import Processor
from zipr1.models.visual import Visual


def model_inputs(
    rows: Sequence[tuple[torch.Tensor, Sequence[Visual]]], processor: Processor, family: str
) -> BatchFeature:
    """rows: ids `(l,)` and visuals of each prompt. family: its model_type. Returns left-padded `input_ids` and
    `attention_mask` `(B, L)`, `mm_token_type_ids` of families whose positions follow from it, and what the family's
    forward takes for the pictures and clips."""
    longest = max(len(ids) for ids, _ in rows)
    pad = processor.tokenizer.pad_token_id
    ids = torch.full((len(rows), longest), pad if pad is not None else processor.end_id)
    mask = torch.zeros_like(ids)
    for b, (own, _) in enumerate(rows):
        ids[b, longest - len(own) :], mask[b, longest - len(own) :] = own, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    known = FAMILIES[family]
    if known.mrope:
        types = torch.zeros_like(ids, dtype=torch.int)
        for number, kind in enumerate(("image", "video"), start=1):
            if kind in processor.placeholder:
                types[ids == processor.placeholder[kind]] = number
        inputs["mm_token_type_ids"] = types
    return BatchFeature({**inputs, **known.inputs([visuals for _, visuals in rows])})
