"""Other losses of one family, for linear embeddings of Gaussian data: exact means at any batch, and closed forms.

Notation:  C0, Ce covariances of clean data and augmentation, C = C0 + Ce;  W (m, d) the product of all layers;
S = W C W^T the covariance of an embedding, A = W C0 W^T the cross-covariance of two views;  N the batch.
Along a direction in which all commute: c0, ce, c, m = sigma^2 of W, signal fraction rho = c0 / c.
Which directions each keeps, at most as many as W has rows: the spectral contrastive loss those of largest rho, as
InfoNCE, and so does VICReg.  For Barlow Twins with an infinite batch any W with A = 1 is a minimum: from a small start
it keeps those of largest c0, which rise first, whatever the augmentation; a finite batch goes on from there to those of
largest rho, in a time of order N.
The sample losses, and how these are descended, are in descent.py.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from collapse import InputError
from collapse.metrics.spectral import float64
from collapse.theory.arrays import (
    Array,
    Floats,
    check_not_negative,
    check_positive,
    check_shapes,
    same_kind,
    total_variance,
)
from collapse.theory.descent import VICREG_EPSILON

QUANTILES = 512  # of a sample variance, over which its root is averaged


@same_kind
def spectral_loss(W: Array, C0: Array, Ce: Array) -> Array:
    """The mean spectral contrastive loss (arXiv 2106.04156), -2 E z . z' + E (z . z'_negative)^2 = -2 tr A + tr S^2.

    At W / sqrt(tau) it is twice `population_loss` of the dot product: with any batch it descends what InfoNCE descends
    with an infinite one, for its mean over batches does not depend on N.

    Args:
        W: (m, d).
        C0, Ce: (d, d).

    Returns:
        A float64 number (a tensor without dimensions for tensors); gradients flow through tensors.

    Raises:
        InputError: shapes do not fit.

    Examples:
        >>> float(spectral_loss([[1]], C0=[[1]], Ce=[[0.5]]))  # 1.5^2 - 2
        0.25
    """
    check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
    S = W @ (C0 + Ce) @ W.T
    return (S * S.T).sum() - 2 * torch.trace(W @ C0 @ W.T)


@same_kind
def barlow_twins_loss(W: Array, C0: Array, Ce: Array, batch: int | None = None) -> Array:
    """The mean of linear Barlow Twins (arXiv 2303.15438), |(z^T z' + z'^T z) / 2 N - 1|^2.

    |A - 1|^2 + ((tr S)^2 + (tr A)^2 + tr S^2 + tr A^2) / (2 N), by the fourth moments of Gaussian data.  An infinite
    batch whitens whatever carries signal; a finite one is a decay that kills directions of little of it.

    Args:
        W: (m, d).
        C0, Ce: (d, d).
        batch: N >= 1; None for an infinite one.

    Returns:
        A float64 number (a tensor without dimensions for tensors); gradients flow through tensors.

    Raises:
        InputError: shapes do not fit, or the batch is below 1.

    Examples:
        >>> W, C0, Ce = [[1]], [[1]], [[0.5]]
        >>> float(barlow_twins_loss(W, C0, Ce)), float(barlow_twins_loss(W, C0, Ce, batch=10))
        (0.0, 0.325)
    """
    check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
    _check_batch(batch, 1)
    A, S = W @ C0 @ W.T, W @ (C0 + Ce) @ W.T
    loss = ((A - torch.eye(len(A), dtype=A.dtype, device=A.device)) ** 2).sum()
    if batch is None:
        return loss
    noise = torch.trace(S) ** 2 + torch.trace(A) ** 2 + (S * S.T).sum() + (A * A.T).sum()
    return loss + noise / (2 * batch)


@same_kind
def vicreg_loss(
    W: Array,
    C0: Array,
    Ce: Array,
    batch: int | None = None,
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
) -> Array:
    """The mean of VICReg as its code has it (arXiv 2105.04906), for embeddings of m entries.

    lambda 2 tr(W Ce W^T) / m + mu mean_j (1 - sqrt(S_jj + 1e-4))+ + nu 2 sum_{i != j} S_ij^2 / m.  A finite batch
    averages the hinge over a chi-square variance of N - 1 degrees of freedom, and its covariance term gains
    (S_ii S_jj + S_ij^2) / (N - 1).

    Args:
        W: (m, d).
        C0, Ce: (d, d).
        batch: N >= 2; None for an infinite one.
        weights: lambda, mu, nu of invariance, variance and covariance.

    Returns:
        A float64 number (a tensor without dimensions for tensors); gradients flow through tensors.

    Raises:
        InputError: shapes do not fit, or the batch is below 2.

    Examples:
        >>> round(float(vicreg_loss([[1]], C0=[[1]], Ce=[[0.5]])), 6)  # 25 . 2 . 0.5: a deviation over 1 costs nothing
        25.0
    """
    check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
    _check_batch(batch, 2)
    invariance, variance, covariance = (float(weight) for weight in weights)
    S = W @ (C0 + Ce) @ W.T
    diagonal = S.diagonal()
    squares = (S * S.T).sum() - (diagonal**2).sum()
    if batch is None:
        hinge = (1 - torch.sqrt(diagonal + VICREG_EPSILON)).clamp(min=0).mean()
    else:
        drawn = torch.as_tensor(_variance_quantiles(batch - 1), dtype=S.dtype, device=S.device)
        hinge = (1 - torch.sqrt(diagonal[:, None] * drawn + VICREG_EPSILON)).clamp(min=0).mean()
        squares = squares + (diagonal.sum() ** 2 - (diagonal**2).sum() + squares) / (batch - 1)
    together = 2 * invariance * torch.trace(W @ Ce @ W.T) + 2 * covariance * squares
    return together / len(W) + variance * hinge


@lru_cache(maxsize=16)
def _variance_quantiles(freedom: int) -> Floats:
    """chi^2 / freedom at equally likely quantiles."""
    quantiles: Floats = chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, freedom) / freedom
    return quantiles


def _check_batch(batch: int | None, least: int) -> None:
    if batch is not None and batch < least:
        raise InputError(f"batch: got {batch}, expected at least {least}, or None for an infinite one")


def loss_gradient(loss: Callable[..., Tensor], C0: Floats, Ce: Floats, **options: object) -> Callable[[Floats], Floats]:
    """W (m, d) -> dL/dW (m, d) of one of this module's losses, for `matrix_flow`.

    loss: called with W, C0 and Ce as float64 tensors, and the options.
    C0, Ce: (d, d) covariance of the clean data and of the augmentation.

    Raises InputError: an array is not of real numbers; the gradient also as the loss.

    Examples:
        >>> gradient = loss_gradient(spectral_loss, C0=[[1]], Ce=[[0]])
        >>> gradient([[0.5]]).tolist()  # 4 (w^3 - w)
        [[-1.5]]
    """
    covariances = torch.as_tensor(float64(C0)), torch.as_tensor(float64(Ce))

    def gradient(W: Floats) -> Floats:
        tensor = torch.tensor(float64(W), requires_grad=True)
        return torch.autograd.grad(loss(tensor, *covariances, **options), tensor)[0].numpy()

    return gradient


@same_kind
def barlow_twins_modes(t: Array, g: Array, m0: Array) -> Array:
    """m_k(t) = sigma_k^2 of W under linear Barlow Twins, aligned: 1 / (g + (1 / m0 - g) exp(-8 g t)).

    dm/dt = 8 g m (1 - g m), the gradient flow of |W G W^T - 1|^2.  From a small start the modes rise one after another,
    mode k about ln(1 / (g m0)) / (8 g) late, the largest g first (arXiv 2303.15438).  A mode stops at 1 / g; one of
    g = 0 stands still, one of g < 0 shrinks.

    Args:
        t: (T,) times, learning rate x steps.
        g: (K,) eigenvalues of G, the cross-covariance of the two views: c0 for additive noise.
        m0: (K,) initial values, >= 0.

    Returns:
        (T, K) float64.

    Raises:
        InputError: shapes do not fit, or an initial value is negative.

    Examples:
        >>> barlow_twins_modes([0, 1, 3], g=[1, 0.5], m0=[0.01, 0.01]).round(3).tolist()  # to 1 / g, one after another
        [[0.01, 0.01], [0.968, 0.431], [1.0, 1.998]]
    """
    check_shapes(t=(t, ("T",)), g=(g, ("K",)), m0=(m0, ("K",)))
    check_not_negative(m0=m0)
    decay = torch.exp(-8 * g * t[:, None])
    return m0 / (m0 * g * (1 - decay) + decay)


@same_kind
def vicreg_modes(c0: Array, ce: Array, weights: tuple[float, float, float] = (25.0, 25.0, 1.0)) -> Array:
    """sigma_k^2 of W where VICReg's flow stops, one direction an entry of the embedding, infinite batch.

    sqrt(m c + 1e-4) = min(1, mu c / (4 lambda ce)).  The variance term pulls a small direction up at a rate that does
    not shrink with it until sqrt(m c) is 0.01, so that it keeps alive whatever has ce / c < 25 mu / lambda: with equal
    weights everything, at full size where ce / c <= 1 / 4.  Without it (mu = 0) every direction with noise dies.

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each direction, >= 0, not both zero.
        weights: lambda > 0, mu >= 0 and nu of invariance, variance and covariance; the last plays no part.

    Returns:
        (K,) float64.

    Raises:
        InputError: shapes do not fit, a variance is negative, both are zero, or a weight is out of range.

    Examples:
        >>> vicreg_modes([1, 1], [0.1, 10]).round(3).tolist()
        [0.909, 0.007]
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    invariance, variance, _ = (float(weight) for weight in weights)
    check_positive("lambda", invariance)
    if not variance >= 0:
        raise InputError(f"mu: got {variance}, expected a number, at least 0")
    c = total_variance(c0, ce)
    deviation = (variance * c / (4 * invariance * ce)).clamp(max=1) if variance else torch.zeros_like(c)
    return (deviation**2 - VICREG_EPSILON).clamp(min=0) / c
