"""Several processes of one run, one for each device, as `torchrun` or `accelerate launch` starts them.

Training: every rank reads the same recipe and prompts and keeps the same state; the questions of a step are dealt out
whole, so a group is never split. Evaluation: questions are dealt out, and every rank scores all answers. Gradients are
joined by PyTorch's DistributedDataParallel or its fully_shard (FSDP2); nothing
of that is written here. A rank that dies, refuses or hangs ends the run, and all tell which one it was
(zipr1/core/watch.py).

With FSDP2 the policy's weights are whole while it answers, and then the reference's: those parts need no communication,
and cannot hang when one rank has less to do. Only the update runs in step, and there every rank makes the same number
of passes (zipr1/train/update.py).

Alone, every function here does nothing or gives back what it was given.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from zipr1.core import launcher, signals, watch
from zipr1.core.errors import InputError, ZipError
from zipr1.core.text import reason

T = TypeVar("T")

# How long a word between ranks may take: long enough for any, for a rank that hangs is found by its silence.
PATIENCE = timedelta(hours=12)

_times = itertools.count()  # that this process has met others

# What a launcher tells a process about the others.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def size() -> int:
    """Processes in the run: those that have met, or before that those that the launcher speaks of."""
    if dist.is_initialized():
        return dist.get_world_size()
    return launcher.size()


def rank() -> int:
    """This process's number, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def is_first() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def device(asked: str | None) -> str | None:
    """The device of this rank: `cuda` becomes `cuda:LOCAL_RANK`. Raises InputError for one device asked of all, and
    for a rank without one."""
    if size() == 1 or asked == "cpu" or not torch.cuda.is_available():
        return asked
    if asked not in (None, "cuda"):
        raise InputError(f"--device {asked}: each of {size()} ranks takes its own; leave it out")
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= there:
        raise InputError(
            f"process {own + 1} of this machine has no GPU of its own, there are {there}; start {there}, or use "
            "--device cpu"
        )
    return f"cuda:{own}"


def shared_device() -> str | None:
    """The GPU of this rank where several ranks may share one, which is right while nothing is trained; None leaves the
    choice open."""
    if size() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


@contextlib.contextmanager
def hidden_launcher() -> Iterator[None]:
    """Inside, the environment looks like that of a single process, for libraries that share out work by it. The
    functions here go by the processes that have met, and see all of them."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _store() -> tuple[dist.Store, list[int]]:
    """Where the ranks of the launcher's variables meet, and the rank in whose process that is, unless it is torchrun's.
    Waits for that process alone. Raises InputError where there is none."""
    told = os.environ
    try:
        number = int(told["RANK"])
        keeper = [] if told.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]
        store = dist.TCPStore(
            told["MASTER_ADDR"],
            int(told["MASTER_PORT"]),
            is_master=number in keeper,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        why = f"{error.args[0]} is not set" if isinstance(error, KeyError) else reason(error, 160)
        raise InputError(
            f"WORLD_SIZE is {told.get('WORLD_SIZE')} and the processes do not meet ({why}); "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None
    # A launcher that starts all ranks again keeps its store, and so does a program that trains twice.
    again = f"{told.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_times)}"
    return dist.PrefixStore(f"zipr1/{again}", store), keeper


@contextlib.contextmanager
def joined(
    choose: Callable[[], torch.device], minutes: float, backend: str | None = None
) -> Iterator[torch.device]:
    """Inside, the ranks can talk, and what ends one of them ends all. Gives what `choose` gives, this rank's device;
    what that refuses, all ranks refuse. minutes: without a sign of life, after which a rank that the others wait for is
    said to hang. backend: PyTorch's, by default what the device needs.

    Raises InputError if they do not meet, and in every rank a ZipError with the same reason if one of them has ended
    with an error, has died, or hangs; the process of one that hangs ends.
    """
    if size() == 1:
        yield choose()
        return
    store, keeper = _store()
    own = store.clone()  # type: ignore[attr-defined]
    with watch.Watch(own, rank(), size(), 60 * minutes, keeper) as watched:
        try:
            where = choose()
            watched.everyone()
            backend = backend or ("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
            dist.init_process_group(
                backend, store=store, rank=rank(), world_size=size(), timeout=PATIENCE
            )
            yield where
        except BaseException as error:
            signals.hold()  # the launcher's signal, which comes now, would be told as the reason
            broken = isinstance(error, RuntimeError) and (
                isinstance(error, dist.DistError) or "gloo" in str(error)
            )
            if not broken:
                watched.leave(error)
                raise
            raise watched.gone().error() from None
        finally:
            # After an error the others may be gone: torchrun ends them, and there is nobody to say goodbye to.
            if dist.is_initialized():
                dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """Everyone's value, by rank. The values are small Python objects."""
    if size() == 1:
        return [value]
    watch.arrive()
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def agree(failure: str | None) -> str | None:
    """The first failure of any rank, known to all of them."""
    return next((f for f in gather(failure) if f is not None), None)


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
    watch.arrive()
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    result: T = said[0]
    return result


def deal(count: int) -> list[int]:
    """Which of `count` things are this rank's: every `size()`-th."""
    return list(range(rank(), count, size()))


def evened(dealt: Sequence[Sequence[int]]) -> list[list[int]]:
    """What each rank has, after those with most gave to those with none. All ranks do it alike, without a word.
    Raises InputError where there is less than one thing for each."""
    out = [list(own) for own in dealt]
    if sum(map(len, out)) < len(out):
        raise InputError(
            f"only {sum(map(len, out))} of the step's questions can be used and each of {len(out)} ranks needs one; "
            "mend the data, or raise train.prompts_per_step"
        )
    for poor in out:
        if not poor:
            poor.append(max(out, key=len).pop())
    return out


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A shard's whole tensor; any other as it is. All ranks must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    watch.arrive(meeting=False)
    return tensor.full_tensor()


def whole_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, by name, on the rank that writes files; nothing on the others. All ranks must ask."""
    # One at a time, so that no device ever holds the whole model; tied weights stay one tensor.
    found: dict[int, torch.Tensor | None] = {}
    for value in tensors.values():
        if id(value) not in found:
            full = whole(value.detach())
            found[id(value)] = full.cpu() if is_first() else None
    out = {name: found[id(value)] for name, value in tensors.items()}
    return {name: value for name, value in out.items() if value is not None}


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as `model` is, if that is a shard."""
    if isinstance(model, DTensor):
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor


class ForwardProxy(torch.nn.Module):
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
        watch.arrive()
        if kind == "ddp":
            self.model = DistributedDataParallel(ForwardProxy(model))
            return
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        pairs = [(model, layers)]
        if reference is not None:
            pairs.append((reference, reference_layers))
        for one, parts in pairs:
            for part in parts:
                fully_shard(part, mp_policy=mixed)
            whole = fully_shard(ForwardProxy(one), mp_policy=mixed, ignored_params=set(frozen))
            self.sharded.append(whole)
        self.model = self.sharded[0]

    def close(self) -> None:
        """Free the wrappers; before the ranks part. DDP's reducer, if it is the last to hold their group, waits for
        gloo's thread without giving up Python's lock, for which that thread waits (pytorch/pytorch#56297)."""
        if self.model is not None:
            self.model, self.sharded = None, []
            gc.collect()  # DDP refers to itself

    def run_unsharded(
        self, work: Callable[[], T], policy: bool = False, reference: bool = False
    ) -> T:
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
        watch.arrive(meeting=False)
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

    def reference_forward(self, work: Callable[[], T]) -> T:
        """A pass of the reference without gradients, in step with the other ranks. With adapters the reference is
        the model itself."""
        if not self.sharded:
            return work()
        watch.arrive(meeting=False)
        with torch.no_grad():
            out: T = self.sharded[-1](work)
        return out

    def backward(self, work: Callable[[], tuple[torch.Tensor, T]], last: bool) -> T:
        """The gradient of the loss that `work` returns, added to the parameters' and summed over ranks by the `last`
        pass. Returns what `work` gives besides: numbers, without a gradient."""
        if self.model is None:
            loss, out = work()
            loss.backward()
            return out
        waits = contextlib.nullcontext() if last or self.sharded else self.model.no_sync()
        if self.sharded:
            watch.arrive(meeting=False)
        with waits:
            loss, out = self.model(work)
            if self.sharded or last:
                watch.arrive(meeting=False)
            # Both kinds of wrapper take the mean over ranks.
            (loss * size()).backward()
        return out
