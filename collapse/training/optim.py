"""Optimisers and the schedule of the paper's recipe (LARS: arXiv 1708.03888)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, warmup: float, peak: float, last: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine from `peak` to `last` at `steps`: of the step alone."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
    return peak * share + last * (1 - share)


def target_momentum(step: int, steps: int, base: float) -> float:
    """Share of itself that BYOL's target keeps at a step, from `base` to 1 along half a cosine (arXiv 2006.07733)."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / steps))


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay and adapt; vectors (biases, batch norm, diagonals) do neither. Fixed ones are left."""
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "adapt": True},
        {"params": vectors, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled, tensor by tensor, to a fixed share of the weights.

    With d = grad + weight_decay p:  d <- eta |p| / |d| d  in groups that adapt (1 where a norm is 0),
    m <- momentum m + d,  p <- p - lr m.  No value is read back from the device.

    timm.optim.Lars takes the same step without weight decay; with it, it divides by |grad| + weight_decay |p|.  It goes
    from tensor to tensor: 503 operations a step of a ResNet-18, where this takes 22, and each is a launch on a GPU.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 1e-3
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients as they are; these are overwritten."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(group, params, [p.grad for p in params if p.grad is not None])

    def _step(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        if group["adapt"]:
            weights, steps = (torch.stack(torch._foreach_norm(x)) for x in (params, updates))
            trust = torch.where((weights > 0) & (steps > 0), group["eta"] * weights / steps, 1.0)
            torch._foreach_mul_(updates, list(trust.unbind()))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def make_optimizer(name: str, groups: list[dict[str, Any]], momentum: float, eta: float) -> torch.optim.Optimizer:
    """ "lars" or "sgd", with groups whose learning rate is set at each step."""
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum, eta=eta)
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)
