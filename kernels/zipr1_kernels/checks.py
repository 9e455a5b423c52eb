"""Argument checks shared by the operations: shapes and dtypes only, never values.

Looking at values would make a GPU wait for the host at every call.
"""

from __future__ import annotations

import torch


def shape(name: str, tensor: torch.Tensor, want: tuple[int | None, ...], spelt: str) -> None:
    """ValueError unless `tensor` has shape `want` (None: any size), written `spelt` for people."""
    got = tuple(tensor.shape)
    if len(got) != len(want) or any(w not in (None, g) for g, w in zip(got, want, strict=True)):
        sizes = tuple("*" if w is None else w for w in want)
        raise ValueError(f"{name} has shape {got}; expected {spelt} = {sizes}")


def boolean(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless `tensor` is bool."""
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.bool (True: counts)")


def heads(q: torch.Tensor, k: torch.Tensor) -> None:
    """ValueError unless the query heads are a multiple of the key heads (GQA)."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads; "
            "the first must be a multiple of the second"
        )


def same_dtype(**tensors: torch.Tensor) -> None:
    """ValueError unless all are of one floating dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or not next(iter(dtypes.values())).is_floating_point:
        said = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{said}; expected one floating dtype for all")


def integer(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless `tensor` holds integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected an integer")
