"""Closed forms: a fixed X (theorems 1 to 3), depth, and the population limit of an infinite batch.

Notation:  X (d, d) the driving matrix of lemma 2, lam_k its eigenvalue along mode k;  W1, W2 layers, W their product;
sigma singular values of a layer, w those of the product;  x0 ~ N(0, C0) clean data, a view is x0 + e, e ~ N(0, Ce);
C = C0 + Ce;  S = W C W^T;  c0, ce, c their eigenvalues where they commute;  T times, K modes.
Time is learning rate x steps: of the loss summed over anchors for a fixed X, averaged over anchors in the population.
What a finite batch changes is in meanfield.py. Arrays in and out as in identities.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from collapse import InputError
from collapse.theory.arrays import Array, check_choice, check_positive, same_kind

Floats = NDArray[np.float64]
SIMILARITIES = ("euclidean", "dot")


@same_kind
def one_layer(t: Array, W0: Array, X: Array) -> Array:
    """W(t) = W0 exp(X t), the flow dW/dt = W X of a fixed X (paper theorem 1).

    Args:
        t: (T,) times.
        W0: (m, d) initial weights.
        X: (d, d), symmetric in lemma 2; any matrix is allowed.

    Returns:
        (T, m, d) float64.

    Raises:
        InputError: shapes do not fit, or W(t) leaves the range of float64.
    """
    _check_shapes(t=(t, ("T",)), W0=(W0, ("m", "d")), X=(X, ("d", "d")))
    W = W0 @ torch.linalg.matrix_exp(X * t[:, None, None])
    overflow = (~torch.isfinite(W)).flatten(1).any(1).nonzero()
    if len(overflow):
        raise InputError(f"W(t) overflows float64 at t = {float(t[overflow[0, 0]]):g}; shorten t or scale X")
    return W


@same_kind
def two_layer_modes(t: Array, lam: Array, sigma1: Array, sigma2: Array) -> Array:
    """s_k(t) = sigma1_k sigma2_k of two aligned layers under a fixed X (paper theorem 3, solved).

    c = |sigma1^2 - sigma2^2| is conserved, so that ds/dt = lam s sqrt(c^2 + 4 s^2) and
    s(t) = c / (2 sinh(asinh(c / (2 s(0))) - c lam t)).

    Args:
        t: (T,) times.
        lam: (K,) v_k^T X v_k; negative where augmentation outweighs the data.
        sigma1, sigma2: (K,) initial singular values, >= 0.

    Returns:
        (T, K) float64.

    Raises:
        InputError: shapes do not fit, a singular value is negative, or a mode has blown up before some t.
    """
    _check_shapes(t=(t, ("T",)), lam=(lam, ("K",)), sigma1=(sigma1, ("K",)), sigma2=(sigma2, ("K",)))
    _check_not_negative(sigma1=sigma1, sigma2=sigma2)
    # c -> 0 is a limit; at 1e-150 every term equals it to the last digit, without a branch.
    c = ((sigma1 - sigma2) * (sigma1 + sigma2)).abs().clamp(min=1e-150)
    u = torch.asinh(c / (2 * sigma1 * sigma2)) - c * lam * t[:, None]
    _check_blow_up(u > 0, t, lam)
    return c / (2 * torch.sinh(u))


@same_kind
def deep_modes(t: Array, lam: Array, w0: Array, depth: int) -> Array:
    """w_k(t), the product of `depth` balanced aligned layers under a fixed X: dw/dt = L lam w^(3 - 2/L).

    Args:
        t: (T,) times.
        lam: (K,) v_k^T X v_k.
        w0: (K,) initial singular values of the product, >= 0; each layer has w0^(1/L).
        depth: L >= 1.

    Returns:
        (T, K) float64: w0 exp(lam t) for L = 1, else w0 (1 - L b lam w0^b t)^(-1/b) with b = 2 - 2/L.

    Raises:
        InputError: shapes do not fit, w0 is negative, depth is below 1, or a mode has blown up before some t.
    """
    _check_shapes(t=(t, ("T",)), lam=(lam, ("K",)), w0=(w0, ("K",)))
    _check_not_negative(w0=w0)
    _check_depth(depth)
    if depth == 1:
        return w0 * torch.exp(lam * t[:, None])
    b = 2 - 2 / depth
    spent = depth * b * lam * w0**b * t[:, None]
    _check_blow_up(spent < 1, t, lam)
    return w0 * torch.exp(-torch.log1p(-spent) / b)


@same_kind
def alignment(W1: Array, W2: Array) -> Array:
    """|V2^T U1| of adjacent layers W1 = U1 S1 V1^T, W2 = U2 S2 V2^T, both sorted descending (paper theorem 2).

    Args:
        W1: (h, d) the layer that acts first.
        W2: (m, h) the layer that acts on its output.

    Returns:
        (min(m, h), min(h, d)) float64, entries in [0, 1]: row k is the k-th right singular vector of W2.

    Raises:
        InputError: shapes do not fit.
    """
    _check_shapes(W1=(W1, ("h", "d")), W2=(W2, ("m", "h")))
    U1 = torch.linalg.svd(W1, full_matrices=False).U
    V2h = torch.linalg.svd(W2, full_matrices=False).Vh
    return (V2h @ U1).abs()


@same_kind
def population_loss(W: Array, C0: Array, Ce: Array, similarity: str = "euclidean", temperature: float = 1.0) -> Array:
    """The loss a sample for an infinite batch of Gaussian data, less ln of the number of negatives.

    euclidean: tr(W Ce W^T) - ln det(I + S) / 2 - tr((I + S)^-1 S) / 2, with W / sqrt(tau) in place of W;
    dot: -tr(W C0 W^T) / tau + tr(S^2) / (2 tau^2).

    Args:
        W: (m, d) the product of all layers.
        C0, Ce: (d, d) covariance of the clean data and of the augmentation.
        similarity: "euclidean" or "dot".
        temperature: tau > 0.

    Returns:
        A float64 number (a tensor without dimensions for tensors); gradients flow through tensors.

    Raises:
        InputError: shapes do not fit, the similarity is unknown or the temperature not positive.
    """
    _check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
    check_choice("similarity", similarity, SIMILARITIES)
    check_positive("temperature", temperature)
    W = W / temperature**0.5
    S = W @ (C0 + Ce) @ W.T
    if similarity == "dot":
        return (S * S.T).sum() / 2 - torch.trace(W @ C0 @ W.T)
    spread = torch.eye(len(S), dtype=S.dtype, device=S.device) + S
    return torch.trace(W @ Ce @ W.T) - torch.logdet(spread) / 2 - torch.trace(torch.linalg.solve(spread, S)) / 2


@same_kind
def stationary_modes(c0: Array, ce: Array, similarity: str = "euclidean", temperature: float = 1.0) -> Array:
    """sigma_k^2 of W at which the population flow stops, for commuting covariances.

    dot: tau c0 / c^2.  euclidean: s = sigma^2 c / tau solves (2 + s) / (1 + s)^2 = 2 ce / c; infinite where ce = 0.
    Both are zero only where c0 = 0: a direction that carries signal shrinks but does not vanish.

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each direction, >= 0, not both zero.
        similarity: "euclidean" or "dot".
        temperature: tau > 0.

    Returns:
        (K,) float64.

    Raises:
        InputError: shapes do not fit, a variance is negative, or both are zero.
    """
    _check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    _check_not_negative(c0=c0, ce=ce)
    check_choice("similarity", similarity, SIMILARITIES)
    check_positive("temperature", temperature)
    c = c0 + ce
    if not c.all():
        raise InputError(f"c0, ce: direction {int((c == 0).nonzero()[0, 0])} has no variance at all; leave it out")
    if similarity == "dot":
        return temperature * (c0 / c) / c
    ratio = 2 * ce / c
    # The root of ratio (1 + s)^2 = 2 + s with 2 - ratio = 2 c0 / c put in, so that no difference cancels.
    s = (2 * c0 / c) / (ratio * (1 + 2 / (1 + torch.sqrt(1 + 4 * ratio))))
    return temperature * s / c


def population_modes(t: Floats, w0: Floats, c0: Floats, ce: Floats, depth: int = 1, temperature: float = 0.1) -> Floats:
    """w_k(t) of balanced aligned layers, dot-product loss, infinite batch: the modes decouple.

    dw/dt = (2 L / tau) w^(3 - 2/L) (c0 - c^2 w^2 / tau); for L = 1, w^2 is logistic in t.

    Args:
        t: (T,) times, ascending, the first of them the start.
        w0: (K,) initial singular values of the product, > 0.
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode.
        depth: L >= 1.
        temperature: tau > 0.

    Returns:
        (T, K) float64.

    Raises:
        InputError: depth is below 1.
    """
    _check_depth(depth)
    c = c0 + ce
    if depth == 1:
        k = 4 * c0 / temperature
        elapsed = (t - t[0])[:, None]
        safe = np.where(k == 0, 1.0, k)
        grown = np.where(k == 0, elapsed, -np.expm1(-safe * elapsed) / safe)
        return w0 / np.sqrt(np.exp(-k * elapsed) + 4 * (w0 * c / temperature) ** 2 * grown)

    def rate(_: float, log_w: Floats) -> Floats:
        w = np.exp(log_w)
        return 2 * depth / temperature * w ** (2 - 2 / depth) * (c0 - c**2 * w**2 / temperature)

    flow = solve_ivp(rate, (t[0], t[-1]), np.log(w0), "LSODA", t_eval=t, rtol=1e-8, atol=1e-10)
    return np.exp(flow.y.T)


def population_gradient(W: Floats, C0: Floats, Ce: Floats, temperature: float = 0.1) -> Floats:
    """dL/dW of `population_loss` for the dot product: 2 (S W C / tau - W C0) / tau. (m, d) float64."""
    WC = W @ (C0 + Ce)
    return 2 * ((WC @ W.T) @ WC / temperature - W @ C0) / temperature


def matrix_flow(
    t: Floats, weights: Sequence[Floats], gradient: Callable[[Floats], Floats], rtol: float = 1e-4, method: str = "RK23"
) -> list[Floats]:
    """The gradient flow dW_l/dt = -(W_L .. W_l+1)^T G (W_l-1 .. W_1)^T of any number of layers (paper lemma 3).

    Args:
        t: (T,) times, ascending, the first of them the start.
        weights: L initial layers; W_1 (h, d) acts first, W_L (m, h) last.
        gradient: the product W (m, d) -> G = dL/dW (m, d).
        rtol: error of a step, relative to the largest entries of the layers.

    Returns:
        L arrays (T, rows, columns) float64.
    """
    shapes = [W.shape for W in weights]
    ends = np.cumsum([W.size for W in weights])

    def layers(flat: Floats) -> list[Floats]:
        parts = np.split(flat, ends[:-1], axis=-1)
        return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]

    def rate(_: float, flat: Floats) -> Floats:
        return np.concatenate([v.ravel() for v in _velocity(layers(flat), gradient)])

    start = np.concatenate([W.ravel() for W in weights])
    flow = solve_ivp(rate, (t[0], t[-1]), start, method, t_eval=t, rtol=rtol, atol=rtol * np.abs(start).max())
    return layers(flow.y.T)


def _velocity(layers: list[Floats], gradient: Callable[[Floats], Floats]) -> list[Floats]:
    """Minus the gradient of the loss with respect to each layer."""
    before = [np.eye(layers[0].shape[1])]
    for W in layers:
        before.append(W @ before[-1])
    back = -gradient(before[-1])
    velocity = []
    for W, product in zip(reversed(layers), reversed(before[:-1]), strict=True):
        velocity.append(back @ product.T)
        back = W.T @ back
    return velocity[::-1]


def _check_shapes(**arrays: tuple[Tensor, tuple[str, ...]]) -> None:
    """Each array has its number of axes, and axes of one name have one length."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, axes) in arrays.items():
        if array.ndim != len(axes):
            raise InputError(f"{name}: got shape {tuple(array.shape)}, expected ({', '.join(axes)})")
        for axis, size in zip(axes, array.shape, strict=True):
            expected, owner = sizes.setdefault(axis, (size, name))
            if size != expected:
                raise InputError(f"{name}: got shape {tuple(array.shape)}, but {axis} = {expected} in {owner}")


def _check_not_negative(**arrays: Tensor) -> None:
    for name, array in arrays.items():
        if (array < 0).any():
            raise InputError(f"{name}: entry {int((array < 0).nonzero()[0, 0])} is {float(array.min()):g}, below zero")


def _check_depth(depth: int) -> None:
    if depth < 1 or depth != int(depth):
        raise InputError(f"depth: got {depth}, expected a whole number of layers, at least 1")


def _check_blow_up(alive: Tensor, t: Tensor, lam: Tensor) -> None:
    if not alive.all():
        step, k = (~alive).nonzero()[0].tolist()
        raise InputError(f"mode {k} (lam = {float(lam[k]):g}) has blown up before t = {float(t[step]):g}; shorten t")
