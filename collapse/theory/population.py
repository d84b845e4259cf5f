"""The limit of an infinite batch of Gaussian data: losses in closed form, trajectories, and where the flow stops.

Notation:  x0 ~ N(0, C0) clean data, a view is x0 + e, e ~ N(0, Ce);  C = C0 + Ce;  W the product of L layers,
S = W C W^T;  c0, ce, c eigenvalues where the covariances commute, m_k = w_k^2 squared singular values of W;
tau the temperature;  T times, K modes.  Time is learning rate x steps of the loss averaged over anchors.
Beyond the paper.  What a finite batch changes is in meanfield.py.  Arrays in and out as in identities.py.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from collapse import InputError
from collapse.theory.arrays import (
    Array,
    Floats,
    check_choice,
    check_depth,
    check_not_negative,
    check_positive,
    check_shapes,
    same_kind,
)

SIMILARITIES = ("euclidean", "dot")


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
    check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
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
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
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
    check_depth(depth)
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


@same_kind
def euclidean_modes(t: Array, m0: Array, c0: Array, ce: Array) -> Array:
    """m_k(t) = sigma_k^2 of one layer, Euclidean loss, infinite batch, temperature 1: the modes decouple.

    d ln m / dt = -4 ce + 2 c (2 + s) / (1 + s)^2, s = m c.  It fits finite batches as long as s is small.

    Args:
        t: (T,) times, ascending, the first of them the start.
        m0: (K,) initial values, > 0.
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode.

    Returns:
        (T, K) float64.
    """
    check_shapes(t=(t, ("T",)), m0=(m0, ("K",)), c0=(c0, ("K",)), ce=(ce, ("K",)))
    times, start, a, v = (array.detach().cpu().numpy() for array in (t, m0, 4 * ce, c0 + ce))

    def rate(_: float, log_m: Floats) -> Floats:
        s = np.exp(log_m) * v
        return 2 * v * (2 + s) / (1 + s) ** 2 - a

    flow = solve_ivp(rate, (times[0], times[-1]), np.log(start), "LSODA", t_eval=times, rtol=1e-8, atol=1e-10)
    return torch.as_tensor(np.exp(flow.y.T), device=t.device)


@same_kind
def cosine_modes(c0: Array, ce: Array, temperature: float = 0.1) -> Array:
    """t_k = s_k / tr S, the share of each mode in the embedding's variance, where the cosine loss is least.

    Infinite batch, wide embeddings (z / |z| ~ z / sqrt(tr S)), commuting covariances: the shares of `water_level` for
    the signal fractions c0 / (c0 + ce).

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode, not both zero.
        temperature: tau > 0.

    Returns:
        (K,) float64, adding up to 1.
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    check_positive("temperature", temperature)
    return _water_level(c0 / (c0 + ce), temperature)[1]


@same_kind
def water_level(fractions: Array, temperature: float = 0.1) -> tuple[Array, Array]:
    """(mu, t): the level and the shares t_k = tau (rho_k + mu)+ of the cosine loss, which add up to 1.

    Directions of rho_k <= -mu die exactly: unlike the other similarities, normalisation turns shrinkage into collapse,
    and more of it the higher the temperature.  Infinite batch, wide embeddings.

    Args:
        fractions: (K,) signal fractions rho = c0 / (c0 + ce).  Measured ones may lie a little outside [0, 1].
        temperature: tau > 0.

    Returns:
        mu, a float64 number, and t, (K,) float64.

    Raises:
        InputError: fractions is not a vector of at least one entry, or the temperature is not positive.
    """
    check_shapes(fractions=(fractions, ("K",)))
    check_positive("temperature", temperature)
    if not len(fractions):
        raise InputError("fractions: is empty; give one signal fraction a direction")
    return _water_level(fractions, temperature)


def _water_level(rho: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    descending = rho.sort(descending=True).values
    count = torch.arange(1, len(rho) + 1, dtype=rho.dtype, device=rho.device)
    levels = (1 / temperature - descending.cumsum(0)) / count
    # The modes above water are the first ones, as many as lie above the level that they themselves set.
    mu = levels[int((descending + levels > 0).sum()) - 1]
    return mu, temperature * (rho + mu).clamp(min=0)


@same_kind
def escape_time(w0: Array, w: Array, c0: Array, depth: int, temperature: float = 0.1) -> Array:
    """Time in which a mode of balanced layers grows from w0 to w, both far below where it stops; dot-product loss.

    tau ln(w / w0) / (2 c0) for L = 1, tau (w0^-b - w^-b) / (2 L b c0) with b = 2 - 2/L for L >= 2: logarithmic in the
    initial scale for one layer, a power of it for more.  Infinite batch; a finite one is slower (meanfield.py).

    Args:
        w0, w, c0: (K,) initial and final singular value of the product, variance of the clean data; > 0.
        depth: L >= 1.
        temperature: tau > 0.

    Returns:
        (K,) float64 times; negative where w < w0.
    """
    check_shapes(w0=(w0, ("K",)), w=(w, ("K",)), c0=(c0, ("K",)))
    check_depth(depth)
    check_positive("temperature", temperature)
    if depth == 1:
        return temperature / (2 * c0) * torch.log(w / w0)
    b = 2 - 2 / depth
    return temperature * (w0**-b - w**-b) / (2 * depth * b * c0)


def collapsed_modes(
    w0: Floats, c0: Floats, ce: Floats, depth: int, horizon: float, temperature: float = 0.1, threshold: float = 1e-2
) -> NDArray[np.bool_]:
    """Which modes count as collapsed at time `horizon`, in closed form: by augmentation, or by depth.

    A mode is collapsed by augmentation if the place where it stops, m* = tau c0 / c^2, lies below threshold times the
    largest; by depth if it takes longer than `horizon` to reach the threshold.  Balanced layers, infinite batch.

    Args:
        w0: (K,) initial singular values of the product.
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode.
        depth: L >= 1.
        horizon: time at which modes are counted.
        threshold: of m = w^2 against the largest m*.

    Returns:
        (K,) bool.
    """
    stationary = stationary_modes(c0, ce, "dot", temperature)
    level = np.full(len(w0), np.sqrt(threshold * stationary.max()))
    return (stationary < level**2) | (escape_time(w0, level, c0, depth, temperature) > horizon)
