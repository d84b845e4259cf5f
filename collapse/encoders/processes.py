"""Several processes as one: start, agreement, and the batches that each has of all.

Without `torch.distributed` (one process) every function here does what it would do for a world of one.  CPU tensors
travel by gloo and CUDA tensors by NCCL, so that agreement between hosts never waits for a device.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from collapse import InputError


def start(device: str, minutes: int | None = None) -> str:
    """Join the processes that torchrun started, if it did; returns this process's device.

    minutes: after which one that says nothing counts as lost; default: 10 on GPUs, 1 on CPUs.

    Raises InputError: the others did not come.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if device.startswith("cuda"):
        local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= cards:
            raise InputError(f"process {local} of this machine has no GPU, there are {cards}; lower --nproc-per-node")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    minutes = minutes or (10 if device.startswith("cuda") else 1)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"the processes cannot meet ({reason}); check torchrun's --rdzv-endpoint") from error
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether an operation failed because another process died or hangs."""
    signs = ("gloo", "connection", "nccl", "timed out")
    return world() > 1 and (isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs))


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(values: list[float]) -> list[float]:
    """The largest of each of `values` over all processes; every process calls it."""
    if world() == 1:
        return values
    box = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.tolist()


def collect(value: Any) -> list[Any]:
    """Every process's `value`, in the order of ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The first process's `value`, in all."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def lead(act: Callable[[], Any]) -> Any:
    """What `act` returns in the first process, in all; an InputError there is raised in all."""
    result: Any = None
    if rank() == 0:
        try:
            result = act()
        except InputError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, InputError):
        raise result
    return result


def agree(value: str, what: str) -> None:
    """Raise InputError, in every process, unless all hold the same `value`."""
    values = collect(value)
    other = [r for r, theirs in enumerate(values) if theirs != values[0]]
    if other:
        raise InputError(f"rank {other[0]} has another {what} than rank 0; start all ranks with the same command")


def require(wanted: bool) -> None:
    """Raise InputError if several processes are wanted, and torch.distributed was not started."""
    if wanted and not dist.is_initialized():
        raise InputError("distributed= wants the processes of torch.distributed, as torchrun starts them; leave it out")


def own_batches(n: int, size: int) -> NDArray:
    """(m,) the indices, of 0..n-1 in batches of `size`, that are in this process's: every `world()`-th batch."""
    indices = np.arange(n)
    return indices[indices // size % world() == rank()]


def in_turn(batches: Iterator[Any], n: int, size: int) -> Iterator[Any]:
    """This process's batches, of those of n items in batches of `size`; an empty one where only others have one."""
    for _ in range(-(-n // (size * world()))):
        yield next(batches, torch.empty(0))


def agreed(errors: Sequence[InputError | None]) -> None:
    """Raise the first of the errors that the processes had, in the order of their batches."""
    for error in errors:
        if error is not None:
            raise error


def in_order(outputs: Iterator[Any], distributed: bool) -> Iterator[Any]:
    """What every process makes of its batches, one each at a time, in the order of the batches, in every process.

    outputs: tensors (b, ...), or dicts of them by layer; empty where a process has no batch while others have one.

    Raises InputError: what a process raises, in all.
    """
    if not distributed:
        yield from outputs
        return
    while True:
        mine, error = None, None
        try:
            mine = next(outputs, None)
        except InputError as raised:
            error = raised
        turns = collect((None if mine is None else _on_cpu(mine), error))
        agreed([error for _, error in turns])
        if mine is None:
            return
        for place, (rows, _) in enumerate(turns):
            if len(rows):
                yield mine if place == rank() else rows


def _on_cpu(rows: Any) -> Any:
    return {name: z.cpu() for name, z in rows.items()} if isinstance(rows, dict) else rows.cpu()
