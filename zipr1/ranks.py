"""Several processes of one run, one for each device, as `torchrun` starts them.

Every rank reads the same recipe and prompts and keeps the same state; the questions of a step are dealt out whole, so
a group is never split. Gradients are joined by PyTorch's DistributedDataParallel or its fully_shard (FSDP2); nothing
of that is written here. A rank that dies ends the run: torchrun stops the others and names it.

With FSDP2 the policy's weights are whole while it answers, and then the reference's: those parts need no communication,
and cannot hang when one rank has less to do. Only the update runs in step, and there every rank makes the same number
of passes (zipr1/update.py).

Alone, every function here does nothing or gives back what it was given.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from zipr1.errors import InputError, ZipError

T = TypeVar("T")


def size() -> int:
    """Processes in the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def is_first() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def device(asked: str | None) -> str | None:
    """The device of this rank: `cuda` becomes `cuda:LOCAL_RANK`. Raises InputError for one device asked of all."""
    if size() == 1 or asked == "cpu" or not torch.cuda.is_available():
        return asked
    if asked not in (None, "cuda"):
        raise InputError(f"--device {asked}: each of {size()} ranks takes its own; leave it out")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextlib.contextmanager
def joined(where: torch.device) -> Iterator[None]:
    """Inside, the ranks can talk. where: this rank's device."""
    if size() == 1:
        yield
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # After an error the others may be gone: torchrun ends them, and there is nobody to say goodbye to.
        if dist.is_initialized():
            dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """Everyone's value, by rank. The values are small Python objects."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def first(work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, for all of them; what it refuses, all of them refuse."""
    if size() == 1:
        return work()
    said: list[Any] = [None, None]
    if is_first():
        try:
            said = [work(), None]
        except ZipError as error:
            said = [None, error]
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    result: T = said[0]
    return result


def deal(count: int) -> list[int]:
    """Which of `count` things are this rank's: every `size()`-th."""
    return list(range(rank(), count, size()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A shard's whole tensor; any other as it is. All ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in whole tensors on the CPU. All ranks must ask."""
    # One at a time, so that no device ever holds the whole model; tied weights stay one tensor.
    found: dict[int, torch.Tensor] = {}
    named = model.state_dict(keep_vars=True)
    for value in named.values():
        if id(value) not in found:
            found[id(value)] = whole(value.detach()).cpu()
    return {name: found[id(value)] for name, value in named.items()}


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as `model` is, if that is a shard."""
    if isinstance(model, DTensor):
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor


class Whole(torch.nn.Module):
    """A module whose forward pass is whatever is done with the model: DDP and FSDP2 prepare what they wrap when it is
    called, and a step looks at pictures, decodes and scores through other doors than the model's own forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Parallel:
    """A model on one device, or replicated (`ddp`) or cut up (`fsdp`) over all ranks; the reference with it.

    layers: the decoder layers of a model, each of which is one unit of FSDP2. frozen: parameters that stay whole.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.sharded: list[Any] = []

    def spread(
        self,
        kind: str,
        dtype: torch.dtype | None,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        reference: torch.nn.Module | None,
        reference_layers: Sequence[torch.nn.Module],
        frozen: Sequence[torch.nn.Parameter],
    ) -> None:
        """Wrap the model in place; its parameters are other objects afterwards with `fsdp`. dtype: of gathered weights
        and what is computed with them, by default the shards' own; gradients are summed in float32."""
        if size() == 1:
            return
        if kind == "ddp":
            self.model = DistributedDataParallel(Whole(model))
            return
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        pairs = [(model, layers)]
        if reference is not None:
            pairs.append((reference, reference_layers))
        for one, parts in pairs:
            for part in parts:
                fully_shard(part, mp_policy=mixed)
            whole = fully_shard(Whole(one), mp_policy=mixed, ignored_params=set(frozen))
            self.sharded.append(whole)
        self.model = self.sharded[0]

    def apart(self, work: Callable[[], T], policy: bool = False, reference: bool = False) -> T:
        """Work without gradients that every rank does at its own pace, with whole weights of the models it needs; with
        adapters the reference is the policy. All ranks must come."""
        roots = {}
        if self.sharded and policy:
            roots[0] = self.sharded[0]
        if self.sharded and reference:
            roots[len(self.sharded) - 1] = self.sharded[-1]
        return self._unsharded(work, list(roots.values()))

    def _unsharded(self, work: Callable[[], T], roots: list[Any]) -> T:
        if not roots:
            return work()
        root, *rest = roots
        parts = [m for m in root.modules() if isinstance(m, FSDPModule)]

        def inside() -> T:
            for part in parts:
                part.unshard()
                part.set_reshard_after_forward(False, recurse=False)
            return self._unsharded(work, rest)

        try:
            with torch.no_grad():
                out: T = root(inside)
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not root, recurse=False)
        return out

    def refer(self, work: Callable[[], T]) -> T:
        """A pass of the reference without gradients, in step with the other ranks. With adapters the reference is
        the model itself."""
        if not self.sharded:
            return work()
        with torch.no_grad():
            out: T = self.sharded[-1](work)
        return out

    def backward(self, work: Callable[[], torch.Tensor], last: bool) -> None:
        """The gradient of what `work` returns, added to the parameters' and summed over ranks by the `last` pass."""
        if self.model is None:
            work().backward()
            return
        waits = contextlib.nullcontext() if last or self.sharded else self.model.no_sync()
        with waits:
            # Both kinds of wrapper take the mean over ranks.
            (self.model(work) * size()).backward()
