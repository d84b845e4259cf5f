"""One step of descent on one batch: the gradient of each loss in the embeddings, and what the optimiser makes of it.

Notation:  R runs at once;  z (R, 2 N, m) the embeddings of both views of a batch of N, the first N rows the first view;
tau the temperature.  Each loss is a mean over the batch, as its own code has it:

dot            cross-entropy of z . z' / tau in one direction, that of the official toy scripts
cosine         the same of normalised rows
euclidean      the paper's section 4 (identities.py)
spectral       -z_i . z'_i / tau + (z_i . z'_j)^2 / (2 tau^2), j != i: half the spectral contrastive loss
               (arXiv 2106.04156) of embeddings over sqrt(tau)
barlow_twins   |(z^T z' + z'^T z) / 2 N - 1|^2, Barlow Twins as in arXiv 2303.15438
vicreg         variance, invariance and covariance as in the code of arXiv 2105.04906
The last two have no temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VICREG_EPSILON = 1e-4  # added to a variance before its root is taken


@dataclass(frozen=True)
class Descent:
    """How to descend; the defaults are the official toy scripts'.

    Attributes:
        lr, steps, batch: learning rate, number of steps, N.
        temperature: tau of the contrastive losses.
        similarity: the loss, a name of this module's list.
        activation: "linear", or "relu" after each layer but the last.
        momentum: beta, v <- beta v + g, W <- W - lr v, as in torch.
        weight_decay: gamma, added to the gradient as gamma W, as in torch.
        trust: LARS's eta: a layer's gradient, decay included, is scaled to the length eta |W|.  0 is plain SGD.
        vicreg: weights of VICReg's invariance, variance and covariance terms.

    Examples:
        >>> fast = Descent(lr=0.01, momentum=0.9)
        >>> round(fast.clock, 6), round(fast.inertia, 6)
        (0.1, 0.95)
    """

    lr: float = 1e-3
    steps: int = 10_000
    batch: int = 128
    temperature: float = 0.1
    similarity: str = "dot"
    activation: str = "linear"
    momentum: float = 0.0
    weight_decay: float = 0.0
    trust: float = 0.0
    vicreg: tuple[float, float, float] = (25.0, 25.0, 1.0)

    @property
    def clock(self) -> float:
        """Time of the flow that a step takes, lr / (1 - beta): momentum is a faster clock."""
        return self.lr / (1 - self.momentum)

    @property
    def inertia(self) -> float:
        """mu of the flow mu W'' + W' = -dL/dW that steps with momentum follow to second order in the clock.

        W_n+1 - W_n = beta (W_n - W_n-1) - lr g, with W_n = W(clock n): mu = lr (1 + beta) / (2 (1 - beta)^2).
        Steps begin with W_0 = W_-1: the flow rests half a step early, so that step n > 0 is at time clock (n + 1 / 2)
        of a flow that starts at rest.
        """
        return self.clock * (1 + self.momentum) / (2 * (1 - self.momentum))


class Optimizer:
    """SGD with momentum, weight decay and LARS, on layers (R, rows, columns), each run by itself.

    Examples:
        >>> import torch
        >>> W = torch.ones(1, 2, 2)
        >>> Optimizer(Descent(lr=0.5), [W]).step([W], [torch.ones_like(W)], [torch.eye(2)])
        >>> W[0].tolist()
        [[0.5, 1.0], [1.0, 0.5]]
    """

    def __init__(self, descent: Descent, layers: Sequence[Tensor]) -> None:
        """Start with no velocity."""
        self.descent = descent
        self.velocities = [torch.zeros_like(W) for W in layers] if descent.momentum else None

    def step(self, layers: Sequence[Tensor], gradients: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
        """Move the layers, in place; gradients, and masks where there are any, are of the layers' shapes.

        What a mask holds at zero neither moves nor decays.
        """
        for index, (W, gradient, mask) in enumerate(zip(layers, gradients, masks, strict=True)):
            if self.descent.weight_decay:
                gradient = gradient + self.descent.weight_decay * W
            if mask is not None:
                gradient = gradient * mask
            if self.descent.trust:
                norms = W.norm(dim=(1, 2), keepdim=True), gradient.norm(dim=(1, 2), keepdim=True)
                gradient = gradient * (self.descent.trust * norms[0] / norms[1].clamp_min(1e-30))
            if self.velocities:
                gradient = self.velocities[index].mul_(self.descent.momentum).add_(gradient)
            W.sub_(gradient, alpha=self.descent.lr)


def dot_product_gradient(W: Tensor, x: Tensor, temperature: float) -> Tensor:
    """dL/dW, (m, d), for z = W x, x (n, d): W (B + B^T), B = x^T (softmax - 1) x_prime.

    That is one large product, where the gradient of the rows has two.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[[1, 0], [0, 1], [1, 0], [0, 1]]]).double()  # two views of two samples
        >>> dot_product_gradient(torch.eye(2)[None].double(), x, temperature=1.0)[0].round(decimals=3).tolist()
        [[-0.269, 0.269], [0.269, -0.269]]
    """
    first, second = x.chunk(2, dim=1)
    logits = (first @ (W.mT @ W / temperature)) @ second.mT
    error = torch.softmax(logits, 2, out=logits)
    B = first.mT @ (error @ second - second)
    return W @ (B + B.mT) / (temperature * first.shape[1])


def _dot_gradient(z: Tensor, descent: Descent) -> Tensor:
    """Gradient of the mean cross-entropy of z . z' / tau with respect to both views stacked, (R, 2 batch, m)."""
    first, second = z.chunk(2, dim=1)
    # The small factors are scaled, not the logits.
    first, second = first / descent.temperature, second / descent.temperature
    error = torch.softmax(first @ (second * descent.temperature).mT, dim=2)
    error.diagonal(dim1=1, dim2=2).sub_(1)
    return torch.cat([error @ second, error.mT @ first], dim=1) / z.shape[1] * 2


def _cosine_gradient(z: Tensor, descent: Descent) -> Tensor:
    """The same of normalised rows: the part of the gradient along a row does nothing."""
    norm = z.norm(dim=2, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    unit = z / norm
    gradient = _dot_gradient(unit, descent)
    return (gradient - (gradient * unit).sum(2, keepdim=True) * unit) / norm


def _euclidean_gradient(z: Tensor, descent: Descent) -> Tensor:
    """Lemma 1, over tau, averaged over anchors; negatives come from the first view."""
    first, second = z.chunk(2, dim=1)
    # Differences of one shift keep the digits that |a|^2 + |b|^2 - 2 a.b would lose far from the origin.
    shift = first.mean(1, keepdim=True)
    first, second = first - shift, second - shift
    squares = (first**2).sum(2)
    logits = first @ first.mT - squares[:, None, :] / 2
    positive = (first * second).sum(2) - (second**2).sum(2) / 2
    logits.diagonal(dim1=1, dim2=2).copy_(positive)
    alpha = torch.softmax(logits / descent.temperature, dim=2)
    alpha.diagonal(dim1=1, dim2=2).zero_()
    rows, columns = alpha.sum(2)[..., None], alpha.sum(1)[..., None]
    g_first = (alpha + alpha.mT) @ first - rows * second - columns * first
    return torch.cat([g_first, rows * (second - first)], dim=1) / (descent.temperature * first.shape[1])


def _spectral_gradient(z: Tensor, descent: Descent) -> Tensor:
    """Attraction is linear in the other view, repulsion a sum over the other view's rows."""
    first, second = z.chunk(2, dim=1)
    count, tau = first.shape[1], descent.temperature
    products = first @ second.mT
    products.diagonal(dim1=1, dim2=2).zero_()
    repulsion = torch.cat([products @ second, products.mT @ first], dim=1) / (tau**2 * (count - 1))
    return (repulsion - torch.cat([second, first], dim=1) / tau) / count


def _barlow_twins_gradient(z: Tensor, descent: Descent) -> Tensor:
    """2 z' (A - 1) / N for the first view, A the symmetric cross-covariance."""
    first, second = z.chunk(2, dim=1)
    cross = first.mT @ second
    error = (cross + cross.mT) / (2 * first.shape[1]) - torch.eye(z.shape[2], dtype=z.dtype)
    return torch.cat([second, first], dim=1) @ (2 / first.shape[1] * error)


def _vicreg_gradient(z: Tensor, descent: Descent) -> Tensor:
    """Invariance pulls views together, variance pushes each entry up to a deviation of 1, covariance decorrelates."""
    invariance, variance, covariance = descent.vicreg
    count, dim = z.shape[1] // 2, z.shape[2]
    views = torch.stack(z.chunk(2, dim=1))
    apart = views[0] - views[1]
    centred = views - views.mean(2, keepdim=True)
    spread = centred.mT @ centred / (count - 1)
    deviation = (spread.diagonal(dim1=-2, dim2=-1) + VICREG_EPSILON).sqrt()[..., None, :]
    spread.diagonal(dim1=-2, dim2=-1).zero_()
    push = centred * (4 * covariance) @ spread - variance / 2 * centred * (deviation < 1) / deviation
    pull = 2 * invariance / count * torch.stack([apart, -apart])
    return torch.cat(list((push / (count - 1) + pull) / dim), dim=1)


GRADIENTS: dict[str, Callable[[Tensor, Descent], Tensor]] = {
    "dot": _dot_gradient,
    "cosine": _cosine_gradient,
    "euclidean": _euclidean_gradient,
    "spectral": _spectral_gradient,
    "barlow_twins": _barlow_twins_gradient,
    "vicreg": _vicreg_gradient,
}
