"""Tensors between the host and a device, many in one copy, so that a GPU is not waited for more often than needed.

Copying from ordinary memory makes the host wait until the GPU has done all that it was given before; from pinned memory
it does not. What a GPU has computed has to be waited for, once for all that is wanted at that moment.
"""

from __future__ import annotations

import torch

# Bytes that each tensor's place in the common buffer is a multiple of: any dtype may be read there.
ALIGNMENT = 16


def send(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same on `device`, where they share memory with each other. Those there already are given back as they are.
    Not differentiable."""
    going = [t for t in tensors if t.device.type == "cpu" and t.numel()]
    if device.type == "cpu" or not going:
        return tuple(t.to(device) for t in tensors)
    pinned = torch.empty(_size(going), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_parts(pinned, going), going, strict=True):
        place.copy_(_bytes(tensor))
    there = pinned.to(device, non_blocking=True)
    sent = iter(_parts(there, going))
    return tuple(
        next(sent).view(t.dtype).view(t.shape)
        if t.device.type == "cpu" and t.numel()
        else t.to(device)
        for t in tensors
    )


def fetch(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same on the CPU, for all of which a GPU is waited for once. Not differentiable."""
    if all(t.device.type == "cpu" for t in tensors):
        return tensors
    coming = [t for t in tensors if t.device.type != "cpu" and t.numel()]
    here = torch.cat([_filled(_bytes(t)) for t in coming]).cpu() if coming else torch.empty(0)
    got = iter(_parts(here, coming))
    return tuple(
        next(got).view(t.dtype).view(t.shape) if t.device.type != "cpu" and t.numel() else t.cpu()
        for t in tensors
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _filled(flat: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % ALIGNMENT))


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors)


def _parts(buffer: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of each tensor within the common buffer."""
    parts, start = [], 0
    for tensor in tensors:
        parts.append(buffer[start : start + tensor.nbytes])
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return parts
