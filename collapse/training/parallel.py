"""Several processes train as one: gradients, gathers that carry them, batch norm over all ranks.

Without `torch.distributed` (one process) every function here does what it would do for a world of one; the start, and
agreement, are those of encoders/processes.py.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
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


class _Normalise(torch.autograd.Function):
    """Rows over the deviation of those of all ranks, by the fused kernels that one process has.

    A rank sends the mean and the scatter of its rows in one message, and all are joined as Chan, Golub and LeVeque
    (1983) do; back, the sums of the gradient and of its products with the rows.  Every rank has as many rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, c, ...), weight and bias (c,) -> (the same shape, mean (c,), variance (c,))."""
        count, dims = x.numel() // x.shape[1], [d for d in range(x.ndim) if d != 1]
        mean = x.mean(dims)
        var = (x - mean.view(_shape(x))).square_().mean(dims)  # torch.var_mean takes five times as long on a CPU
        means, vars_ = gather(torch.stack([mean, var])[None]).unbind(1)
        mean = means.mean(0)
        var = (vars_ + (means - mean).square()).mean(0)
        y = torch.ops.aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, world() * count
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of x, weight and bias; those of the last two are of this rank's rows."""
        x, weight, mean, var = ctx.saved_tensors
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(), x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([of_weight, of_bias]) / ctx.count
        if world() > 1:
            ops = torch.ops._c10d_functional
            sums = ops.wait_tensor(ops.all_reduce(sums, "sum", _group()))
        scale = (var + ctx.eps).rsqrt()
        along, straight = -scale.square() * weight * sums[0], scale * weight
        across = -straight * sums[1] - along * mean
        rest = torch.addcmul(across.view(_shape(x)), x, along.view(_shape(x)))
        return rest.addcmul_(grads[0], straight.view(_shape(x))), of_weight, of_bias, None


def _shape(x: Tensor) -> list[int]:
    """That of a value for each channel, beside x (n, c, ...)."""
    return [1, -1] + [1] * (x.ndim - 2)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks: on any device, and one graph when compiled.

    drop, act: what timm's norms do after theirs.
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
        x = input if input.dtype == torch.float64 else input.float()
        weight = self.weight if self.affine else x.new_ones(x.shape[1])
        y, mean, var = _Normalise.apply(x, weight, self.bias if self.affine else x.new_zeros(x.shape[1]), self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            count = world() * x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum or 0.1)
                self.running_var.lerp_(var * count / (count - 1), self.momentum or 0.1)
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return self.act(self.drop(y.to(input.dtype)))


def synchronise(net: nn.Module, device: str, compiled: bool) -> nn.Module:
    """The same network with every batch norm over the rows of all ranks.

    torch's kernels on CUDA; ours on the CPU, which those refuse, and in compiled networks, whose graph those break.
    """
    if world() == 1:
        return net
    if device.startswith("cuda") and not compiled:
        from timm.layers import convert_sync_batchnorm  # loads all of timm's networks

        return convert_sync_batchnorm(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = SyncBatchNorm(child)
                setattr(module, name, new.to(child.weight.dtype) if child.affine else new)
    return net
