"""Learning without negatives: BYOL, SimSiam, DirectPred, DirectCopy in linear layers (arXiv 2102.06810, 2110.04947).

Notation:  online network W, target network W_a, predictor P, views x, x' of covariance C = C0 + Ce and
cross-covariance C0;  J = E |P W x - W_a x'|^2 / 2, whose gradient does not reach the target.
Along a direction in which all commute: w, a, p of W, W_a, P;  c0, ce, c;  s = w^2 c the eigenvalue of the
representation's covariance;  rho = c0 / c.  gamma is a weight decay of W and P, and time is learning rate x steps.
The loss is quadratic: the mean gradient is that of an infinite batch at any batch size, and only noise is left.

With a target that follows at once and a predictor in balance with W, each method has dw/dt = w (p (c0 - c p) - gamma):
a direction ends at p = (c0 + sqrt(c0^2 - 4 c gamma)) / 2 c, if it starts above the other root, and dies otherwise.
Without a predictor (p = 1) every direction with noise dies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from collapse import InputError
from collapse.metrics.spectral import float64
from collapse.theory.arrays import (
    Array,
    Floats,
    check_choice,
    check_decay,
    check_not_negative,
    check_shapes,
    check_times,
    same_kind,
    total_variance,
)
from collapse.theory.descent import Descent
from collapse.theory.simulate import Views, batches, warn_divergence

PREDICTORS = ("trained", "directpred", "directcopy", "none")


@dataclass(frozen=True)
class Distillation:
    """What predicts the target, and how the target follows.

    Attributes:
        predictor: "trained" by gradient descent as in BYOL and SimSiam; "directpred", sqrt(F) + boost max(F), and
            "directcopy", F + boost max(F), set from the covariance F of the representation; "none", the identity.
        rate: alpha, learning rate of a trained predictor over that of W.
        target: beta, dW_a/dt = beta (W - W_a); 0 makes the target follow at once, as in SimSiam.
        boost: epsilon of DirectPred and DirectCopy.
        average: share of a batch's covariance in the running mean F (simulation only).

    Examples:
        >>> simsiam, byol = Distillation(), Distillation(target=0.1)
        >>> simsiam.predictor, simsiam.target, byol.target
        ('trained', 0.0, 0.1)
    """

    predictor: str = "trained"
    rate: float = 1.0
    target: float = 0.0
    boost: float = 0.0
    average: float = 0.1

    def __post_init__(self) -> None:
        """Raise InputError for an unknown predictor or a number out of range."""
        check_choice("predictor", self.predictor, PREDICTORS)
        for name in ("rate", "target", "boost"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: got {getattr(self, name)}, expected a finite number, at least 0")
        if not 0 < self.average <= 1:
            raise InputError(f"average: got {self.average}, expected a share in (0, 1]")


@same_kind
def predictor_roots(c0: Array, ce: Array, weight_decay: float = 0.0) -> tuple[Array, Array]:
    """(from, to): the predictor's eigenvalue from above which a direction survives, and where it ends.

    The roots of p (c0 - c p) = gamma, the same for a trained predictor (balanced, p^2 = alpha w^2, as decay makes it),
    DirectPred and DirectCopy; (infinity, 0) where gamma > c0^2 / (4 c): the direction dies from any start.  Collapse is
    complete where every direction dies, dimensional where some do.  The representation ends at s = p^2 c / alpha
    (trained), p^2 (DirectPred), p (DirectCopy), boost 0.

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each direction, >= 0, not both zero.
        weight_decay: gamma >= 0.

    Returns:
        Two (K,) float64.

    Raises:
        InputError: shapes do not fit, a variance or the decay is negative, or both variances are zero.

    Examples:
        >>> start, end = predictor_roots([1, 0.1], [1, 1], weight_decay=0.1)
        >>> start.round(3).tolist(), end.round(3).tolist()
        ([0.138, inf], [0.362, 0.0])
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    check_decay(weight_decay)
    c = total_variance(c0, ce)
    inside = c0**2 - 4 * c * weight_decay
    alive = (inside > 0) & (c0 > 0)
    high = (c0 + torch.sqrt(inside.clamp(min=0))) / (2 * c)
    low = weight_decay / (c * torch.where(high > 0, high, 1.0))  # the product of the roots is gamma / c
    return torch.where(alive, low, torch.inf), torch.where(alive, high, 0.0)


@same_kind
def predictor_modes(
    t: Array,
    w0: Array,
    p0: Array,
    c0: Array,
    ce: Array,
    method: Distillation | None = None,
    weight_decay: float = 0.0,
) -> tuple[Array, Array]:
    """(p_k(t), s_k(t)): eigenvalues of the predictor and of the representation's covariance, aligned.

    dw/dt = p (a c0 - p w c) - gamma w, da/dt = beta (w - a), and for a trained predictor
    dp/dt = alpha w (a c0 - p w c) - gamma p; p^2 / alpha - w^2 decays as exp(-2 gamma t) where a = w.

    Args:
        t: (T,) times, ascending, the first of them the start.
        w0: (K,) initial singular values of W and of the target.
        p0: (K,) initial eigenvalues of a trained predictor; not used by the others.
        c0, ce: (K,) variance of the clean data and of the augmentation along each direction.
        method: the predictor and the target; a trained predictor and no lag by default.
        weight_decay: gamma >= 0.

    Returns:
        Two (T, K) float64.

    Raises:
        InputError: shapes do not fit, times do not ascend, or the decay is negative.

    Examples:
        >>> p, s = predictor_modes([0, 100], w0=[0.5, 0.5], p0=[0.5, 0.5], c0=[1, 0.1], ce=[1, 1], weight_decay=0.1)
        >>> p[1].round(3).tolist()  # the second dies
        [0.362, 0.0]
    """
    check_shapes(t=(t, ("T",)), w0=(w0, ("K",)), p0=(p0, ("K",)), c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_times(t)
    check_decay(weight_decay)
    method = method or Distillation()
    times, start, first, signal, view = (array.detach().cpu().numpy() for array in (t, w0, p0, c0, c0 + ce))
    trained = method.predictor == "trained"

    def rate(_: float, state: Floats) -> Floats:
        w, a, p = state.reshape(3, -1)
        a, p = a if method.target else w, _predictor(p, w**2 * view, method)
        pull = a * signal - p * w * view
        moves = trained * (method.rate * w * pull - weight_decay * p)
        return np.concatenate([p * pull - weight_decay * w, method.target * (w - a), moves])

    state = np.concatenate([start, start, first])
    flow = solve_ivp(rate, (times[0], times[-1]), state, "LSODA", t_eval=times, rtol=1e-8, atol=1e-12)
    w, _, p = flow.y.T.reshape(len(times), 3, -1).swapaxes(0, 1)
    s = w**2 * view
    return torch.as_tensor(_predictor(p, s, method), device=t.device), torch.as_tensor(s, device=t.device)


def _predictor(p: Floats, s: Floats, method: Distillation) -> Floats:
    """The predictor's eigenvalues: its own if trained, else set from those of the representation's covariance."""
    if method.predictor in ("trained", "none"):
        return p if method.predictor == "trained" else np.ones_like(s)
    chosen = np.sqrt(s) if method.predictor == "directpred" else s
    return chosen + method.boost * s.max(-1, keepdims=True)


def distil(
    weights: NDArray,
    predictors: NDArray,
    views: Views,
    seeds: Sequence[int],
    descent: Descent,
    at: Sequence[int],
    method: Distillation | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SGD on J, averaged over a batch and over both orders of the views, R runs at once; the target starts at W.

    Args:
        weights: (R, m, d) initial W.
        predictors: (R, m, m) initial P of a trained predictor.
        views: where the batches come from.
        seeds: R seeds, one a run.
        descent: lr, steps, batch and weight_decay are used.
        at: ascending steps to keep, each in [0, descent.steps].
        method: the predictor and the target.

    Returns:
        (P, W), (len(at), R, m, m) and (len(at), R, m, d) float64.

    Raises:
        InputError: the shapes do not fit one another and the seeds, or `at` is out of range.
        CollapseWarning: a run diverged; its weights are NaN or infinite.

    Examples:
        >>> from collapse.theory import Descent, GaussianViews
        >>> views = GaussianViews(clean=[1.0, 0.1], noise=[0.1, 0.1])
        >>> P, W = distil([0.1 * np.eye(2)], [np.eye(2)], views, [0], Descent(lr=0.1, steps=20, batch=32), at=[0, 20])
        >>> P.shape, W.shape
        ((2, 1, 2, 2), (2, 1, 2, 2))
    """
    method = method or Distillation()
    W, P = (torch.tensor(float64(array), dtype=torch.float32) for array in (weights, predictors))
    if W.ndim != 3 or len(W) != len(seeds) or P.shape != (len(W), W.shape[1], W.shape[1]):
        raise InputError(f"weights, predictors: got shapes {tuple(W.shape)} and {tuple(P.shape)}, expected "
                         f"({len(seeds)}, m, d) and ({len(seeds)}, m, m)")  # fmt: skip
    if not len(at) or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] > descent.steps:
        raise InputError(f"at: got {list(at)}, expected ascending steps from 0 to {descent.steps}")
    target, F = W.clone(), None
    kept, wanted = [], set(at)
    for step, x in batches(views, [torch.Generator().manual_seed(int(seed)) for seed in seeds], descent):
        z = x @ W.mT
        if method.predictor != "trained":
            covariance = z.mT @ z / z.shape[1]
            F = covariance if F is None else torch.lerp(F, covariance, method.average)
            P = _set_predictor(F, method)
        if step - 1 in wanted:
            kept.append((P.clone(), W.clone()))
        _distil_step(P, W, target, x, z, descent, method)
    if descent.steps in wanted:
        kept.append((P.clone(), W.clone()))
    result = tuple(torch.stack(part).double().numpy() for part in zip(*kept, strict=True))
    warn_divergence(result, at)
    return result  # type: ignore[return-value]


def _set_predictor(F: Tensor, method: Distillation) -> Tensor:
    values, vectors = torch.linalg.eigh(F)
    values = values.clamp(min=0)
    if method.predictor == "none":
        return torch.eye(F.shape[1]).expand_as(F)
    chosen = values.sqrt() if method.predictor == "directpred" else values
    return (vectors * (chosen + method.boost * values[:, -1:])[:, None]) @ vectors.mT


def _distil_step(
    P: Tensor, W: Tensor, target: Tensor, x: Tensor, z: Tensor, descent: Descent, method: Distillation
) -> None:
    """One step, in place: of P if it is trained, of W, and of the target."""
    swapped = torch.cat(x.chunk(2, dim=1)[::-1], dim=1)
    error = (z @ P.mT - swapped @ target.mT) / x.shape[1]
    of_P, of_W = error.mT @ z, (error @ P).mT @ x
    if method.predictor == "trained":
        P.sub_(method.rate * of_P + descent.weight_decay * P, alpha=descent.lr)
    W.sub_(of_W + descent.weight_decay * W, alpha=descent.lr)
    target.lerp_(W, min(1.0, method.target * descent.lr) if method.target else 1.0)
