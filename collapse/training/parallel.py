"""Several processes train as one: gradients, gathers that carry them, batch norm over all ranks.

Without `torch.distributed` (one process) every function here does what it would do for a world of one; the start, and
agreement, are those of encoders/processes.py.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from collapse.encoders.processes import collect, world


def distributed(net: nn.Module) -> nn.Module:
    """The network with its gradients averaged over the processes, if there are several.

    Buffers are not sent: batch norms over all ranks keep them equal.
    """
    if world() == 1:
        return net
    wrapper = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers"  # its name from torch 2.14 on
    sync = {new if new in inspect.signature(wrapper).parameters else "broadcast_buffers": False}
    return wrapper(net, gradient_as_bucket_view=True, **sync)  # type: ignore[arg-type]


def mean(values: Tensor) -> Tensor:
    """The mean over processes of tensors of one shape, any; every process calls it."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world()


class _Gather(torch.autograd.Function):
    """Rows of all ranks in the order of ranks; the gradient of a row is the sum of what every rank asks of it.

    One message each way, by the operations that torch.compile knows as parts of a graph.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(n, ...) of this rank -> (world n, ...) of all."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(rows.contiguous(), world(), _group()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The sum over ranks of the gradients of this rank's rows."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.reduce_scatter_tensor(grads[0].contiguous(), "sum", world(), _group()))


def _group() -> str:
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of this rank -> (world n, ...) of all, differentiable; every rank has the same n."""
    return rows if world() == 1 else _Gather.apply(rows)


def all_rows(rows: Tensor) -> Tensor:
    """Rows (n, ...) of every rank, in the order of ranks, on their device; n may differ from rank to rank, from 1."""
    counts = [int(n) for n in collect(len(rows))]
    padded = torch.cat([rows, rows[:1].expand(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:n] for part, n in zip(gather(padded).split(max(counts)), counts, strict=True)])


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks in plain tensor operations: on any device, and one graph when compiled.

    A rank sends the mean and the scatter of its rows in one message, and all are joined as Chan, Golub and LeVeque
    (1983) do.  Every rank has as many rows.  drop, act: what timm's norms do after theirs.
    """

    def __init__(self, old: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        self.drop, self.act = (getattr(old, name, nn.Identity()) for name in ("drop", "act"))
        self.load_state_dict(old.state_dict())
        for mine, theirs in zip(self.parameters(), old.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)  # DDP waits for all that ask for one

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, ...) -> the same shape; statistics over the rows of all ranks while training."""
        if not self.training:
            return self.act(self.drop(super().forward(input)))
        dims = [d for d in range(input.ndim) if d != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input if input.dtype == torch.float64 else input.float()
        own = x.numel() // x.shape[1]
        count, mean = world() * own, x.mean(dims)
        scatter = (x - mean.view(shape)).square().sum(dims)
        means, scatters = gather(torch.stack([mean, scatter])[None]).unbind(1)
        mean = means.mean(0)
        var = (scatters.sum(0) + own * (means - mean).square().sum(0)) / count
        centred = x - mean.view(shape)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum or 0.1)
                self.running_var.lerp_(var * count / (count - 1), self.momentum or 0.1)
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(y.to(input.dtype)))


def synchronise(net: nn.Module, device: str, compiled: bool) -> nn.Module:
    """The same network with every batch norm over the rows of all ranks.

    torch's kernels on CUDA; ours on the CPU, which those refuse, and in compiled networks, whose graph those break.
    """
    if world() == 1:
        return net
    if device.startswith("cuda") and not compiled:
        return convert_sync_batchnorm(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = SyncBatchNorm(child)
                setattr(module, name, new.to(child.weight.dtype) if child.affine else new)
    return net
