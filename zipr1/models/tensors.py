"""Are the tensors of a file those of a model? Names, shapes and finite values, told by name where they are not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from zipr1.core.errors import InputError

Shape = tuple[int, ...]


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_names(where: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises InputError, as `refuse`, unless both have the same names and shapes."""
    refuse(
        where,
        wanted.keys() - found.keys(),
        found.keys() - wanted.keys(),
        {
            name: (found[name], shape)
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        },
    )


def refuse(
    where: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshaped: Mapping[str, tuple[Shape, Shape]],
) -> None:
    """Raises InputError with the first names of each kind; nothing where all are empty.

    where: the file or folder. misshaped: the shape in the file, and the model's.
    """
    parts = []
    if missing:
        parts.append(f"{_some(missing)} {_is(missing)} missing")
    if unexpected:
        parts.append(f"{_some(unexpected)} {_is(unexpected)} not of this model")
    if misshaped:
        name = min(misshaped)
        here, wanted = misshaped[name]
        rest = f" (and {len(misshaped) - 1} more of other shapes)" if len(misshaped) > 1 else ""
        parts.append(f"{name} is {list(here)} and the model's is {list(wanted)}{rest}")
    if parts:
        raise InputError(
            f"{where}: its tensors are not those of the model: {'; '.join(parts)}; copy the folder again, or name "
            "the model that the files belong to"
        )


def check_finite(where: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises InputError that names the first tensor that holds NaN or infinity. Makes no copy of any."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            what = "NaN" if bool(low.isnan()) else "infinity"
            raise InputError(
                f"{where}: the tensor {name} holds {what} in {str(tensor.dtype).removeprefix('torch.')}; use "
                "weights from before that, or another dtype if it is infinity"
            )


def _some(names: Collection[str]) -> str:
    """The first three names in alphabetical order, and how many there are besides."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _is(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"
