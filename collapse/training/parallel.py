"""Several processes as one: start and agreement, gathers that carry gradients, batch norm over all ranks.

Without `torch.distributed` (one process) every function here does what it would do for a world of one.  CPU tensors
travel by gloo and CUDA tensors by NCCL, so that agreement between hosts never waits for a device.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from collapse import InputError


def start(device: str) -> str:
    """Join the processes that torchrun started, if it did; returns this process's device.

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
    minutes = 10 if device.startswith("cuda") else 1
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


def largest(value: int) -> int:
    """The largest `value` of all processes; every process calls it."""
    if world() == 1:
        return value
    box = torch.tensor([value])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def mean(values: Tensor) -> Tensor:
    """The mean over processes of equal tensors' entries; every process calls it."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world()


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


def agree(value: str, what: str) -> None:
    """Raise InputError, in every process, unless all hold the same `value`."""
    values = collect(value)
    other = [r for r, theirs in enumerate(values) if theirs != values[0]]
    if other:
        raise InputError(f"rank {other[0]} has another {what} than rank 0; start all ranks with the same command")


class _Gather(torch.autograd.Function):
    """Rows of all ranks in the order of ranks; the gradient of a row is the sum of what every rank asks of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(n, ...) of this rank -> (world n, ...) of all."""
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The sum over ranks of the gradients of this rank's rows."""
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of this rank -> (world n, ...) of all, differentiable; every rank has the same n."""
    return rows if world() == 1 else _Gather.apply(rows)


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """The sum over ranks."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The sum over ranks of the gradients."""
        return _Sum.forward(ctx, grads[0])


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks in plain tensor operations, for the CPU, where torch's own refuses.

    drop, act: what timm's norms do after theirs.
    """

    def __init__(self, old: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        self.drop, self.act = (getattr(old, name, nn.Identity()) for name in ("drop", "act"))
        self.load_state_dict(old.state_dict())

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, ...) -> the same shape; statistics over the rows of all ranks while training."""
        if not self.training:
            return self.act(self.drop(super().forward(input)))
        dims = [d for d in range(input.ndim) if d != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input if input.dtype == torch.float64 else input.float()
        count = world() * x.numel() // x.shape[1]
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum or 0.1)
                self.running_var.lerp_(var * count / (count - 1), self.momentum or 0.1)
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(y.to(input.dtype)))


def synchronise(net: nn.Module, device: str) -> nn.Module:
    """The same network with every batch norm over the rows of all ranks: torch's kernels on CUDA, ours on the CPU."""
    if world() == 1:
        return net
    if device.startswith("cuda"):
        return convert_sync_batchnorm(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = _SyncBatchNorm(child)
                setattr(module, name, new.to(child.weight.dtype) if child.affine else new)
    return net
