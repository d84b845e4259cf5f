"""The limit of an infinite batch of Gaussian data: losses in closed form, trajectories, and where the flow stops.

Notation:  x0 ~ N(0, C0) clean data, a view is x0 + e, e ~ N(0, Ce);  C = C0 + Ce;  W the product of L layers,
S = W C W^T;  c0, ce, c eigenvalues where the covariances commute, m_k = w_k^2 squared singular values of W;
tau the temperature;  T times, K modes.  Time is learning rate x steps of the loss averaged over anchors.
gamma is a weight decay as in torch.optim.SGD, on that loss: it adds gamma |W_l|^2 / 2 for each layer.
Beyond the paper.  What a finite batch changes is in meanfield.py.  Arrays in and out as in identities.py.
"""

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from collapse import InputError
from collapse.theory.arrays import (
    Array,
    Floats,
    check_choice,
    check_decay,
    check_depth,
    check_entries,
    check_not_negative,
    check_positive,
    check_shapes,
    check_share,
    check_times,
    same_kind,
    total_variance,
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

    Examples:
        >>> float(population_loss([[1]], C0=[[1]], Ce=[[0.5]], similarity="dot"))  # -1 + 1.5^2 / 2
        0.125
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
def stationary_modes(
    c0: Array,
    ce: Array,
    similarity: str = "euclidean",
    temperature: float = 1.0,
    weight_decay: float = 0.0,
    depth: int = 1,
) -> Array:
    """sigma_k^2 of the product of balanced layers at which the population flow stops, for commuting covariances.

    dot: tau (c0 - gamma tau / 2)+ / c^2 for one layer; for L layers the larger root of
    m^(1 - 1/L) (c0 - c^2 m / tau) = gamma tau / 2, or 0 where there is none.
    euclidean: s = sigma^2 c / tau solves (2 + s) / (1 + s)^2 = (2 ce + gamma tau) / c; infinite where that is 0.
    cosine: t_k / c with the shares t_k of `water_level`, at the scale tr S = 1.  The loss does not depend on the scale,
    so that decay, which shrinks it, moves no share.
    Without decay the first two are zero only where c0 = 0; with decay a direction dies where c0 <= gamma tau / 2.

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each direction, >= 0, not both zero.
        similarity: "euclidean", "dot" or "cosine".
        temperature: tau > 0.
        weight_decay: gamma >= 0.
        depth: L >= 1; above 1 for the dot product and the cosine.  A start below `critical_start` ends at 0.

    Returns:
        (K,) float64.

    Raises:
        InputError: shapes do not fit, a variance or the decay is negative, both variances are zero, the similarity is
            unknown, the temperature is not positive, or the depth is below 1 (for the Euclidean loss, not 1).

    Examples:
        >>> stationary_modes([1, 1, 0], [0, 1, 1], "dot").tolist()  # c0 / c^2
        [1.0, 0.25, 0.0]
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    check_choice("similarity", similarity, (*SIMILARITIES, "cosine"))
    check_positive("temperature", temperature)
    check_decay(weight_decay)
    check_depth(depth)
    c = total_variance(c0, ce)
    if similarity == "cosine":
        return _water_level(c0 / c, temperature)[1] / c
    if similarity == "dot":
        return _dot_roots(c0, c, temperature, weight_decay, depth)[1]
    if depth > 1:
        raise InputError(f"depth: got {depth} for the Euclidean loss, expected 1; only dot and cosine have more")
    signal = (c0 - weight_decay * temperature / 2).clamp(min=0)
    ratio = 2 - 2 * signal / c if weight_decay else 2 * ce / c
    # The root of ratio (1 + s)^2 = 2 + s with 2 - ratio = 2 signal / c put in, so that no difference cancels.
    s = (2 * signal / c) / (ratio * (1 + 2 / (1 + torch.sqrt(1 + 4 * ratio))))
    return temperature * s / c


@same_kind
def critical_start(c0: Array, ce: Array, depth: int, temperature: float = 0.1, weight_decay: float = 0.0) -> Array:
    """The least initial singular value of the product from which a mode survives weight decay; dot-product loss.

    L balanced layers: sqrt of the smaller root of m^(1 - 1/L) (c0 - c^2 m / tau) = gamma tau / 2.  One layer survives
    from any start, or dies from any.  With two or more zero is stable as soon as there is decay: death depends on the
    start, and at the largest decay that a mode survives it keeps (L - 1) / (2 L - 1) of its undecayed size.

    Args:
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode.
        depth: L >= 1.
        temperature: tau > 0.
        weight_decay: gamma >= 0.

    Returns:
        (K,) float64; infinite where a mode dies from any start.

    Raises:
        InputError: shapes do not fit, depth is below 1, a variance or the decay is negative, or the temperature is not
            positive.

    Examples:
        >>> critical_start([1, 0.1], [0, 0], depth=2, weight_decay=1).round(4).tolist()
        [0.0514, inf]
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    check_positive("temperature", temperature)
    check_decay(weight_decay)
    check_depth(depth)
    return _dot_roots(c0, c0 + ce, temperature, weight_decay, depth)[0].sqrt()


def _dot_roots(c0: Tensor, c: Tensor, tau: float, gamma: float, depth: int) -> tuple[Tensor, Tensor]:
    """(smaller, larger root) of m^a (c0 - c^2 m / tau) = gamma tau / 2, a = 1 - 1/L; (infinity, 0) without a root.

    Both are found by Newton's method in x = c^2 m / (tau c0), where x^a (1 - x) is concave around each, from the side
    on which the tangent does not overshoot.
    """
    lost = gamma * tau / 2
    if depth == 1:
        alive = c0 > lost
        return torch.where(alive, 0.0, torch.inf), tau * ((c0 - lost).clamp(min=0) / c) / c
    a, size = 1 - 1 / depth, tau * (c0 / c) / c
    safe = torch.where(c0 > 0, c0, 1.0)
    level = lost / (safe * torch.where(c0 > 0, size, 1.0) ** a)
    peak = a / (1 + a)
    alive = (c0 > 0) & (level < peak**a * (1 - peak))
    level = torch.where(alive, level, 0.0)
    low, high = level ** (1 / a), torch.ones_like(level)
    for _ in range(60):
        low, high = (x - (x**a * (1 - x) - level) / (a * x ** (a - 1) * (1 - x) - x**a) for x in (low, high))
        low = torch.where(level > 0, low, 0.0)
    return torch.where(alive, low * size, torch.inf), torch.where(alive, high * size, 0.0)


@same_kind
def population_modes(
    t: Array,
    w0: Array,
    c0: Array,
    ce: Array,
    depth: int = 1,
    temperature: float = 0.1,
    weight_decay: float = 0.0,
) -> Array:
    """w_k(t) of balanced aligned layers, dot-product loss, infinite batch: the modes decouple.

    dw/dt = (2 L / tau) w^(3 - 2/L) (c0 - c^2 w^2 / tau) - L gamma w; for L = 1, w^2 is logistic in t.

    Args:
        t: (T,) times, ascending, the first of them the start.
        w0: (K,) initial singular values of the product, > 0.
        c0, ce: (K,) variance of the clean data and of the augmentation along each mode.
        depth: L >= 1.
        temperature: tau > 0.
        weight_decay: gamma >= 0.

    Returns:
        (T, K) float64.

    Raises:
        InputError: shapes do not fit, depth is below 1, the temperature is not positive, or the decay is negative; with
            more layers than one, times do not ascend, or an initial value is not positive.

    Examples:
        >>> population_modes([0, 0.2, 2], w0=[0.01], c0=[1], ce=[0]).round(4).tolist()
        [[0.01], [0.2737], [0.3162]]
    """
    check_shapes(t=(t, ("T",)), w0=(w0, ("K",)), c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_depth(depth)
    check_positive("temperature", temperature)
    check_decay(weight_decay)
    c = c0 + ce
    if depth == 1:
        k = 4 * c0 / temperature - 2 * weight_decay
        elapsed = (t - t[0])[:, None]
        safe = torch.where(k == 0, 1.0, k)
        grown = torch.where(k == 0, elapsed, -torch.expm1(-safe * elapsed) / safe)
        return w0 / torch.sqrt(torch.exp(-k * elapsed) + 4 * (w0 * c / temperature) ** 2 * grown)
    check_times(t)
    check_entries(w0=w0)
    times, start, signal, view = (array.detach().cpu().numpy() for array in (t, w0, c0, c))

    def rate(_: float, log_w: Floats) -> Floats:
        w = np.exp(log_w)
        pull = 2 / temperature * w ** (2 - 2 / depth) * (signal - view**2 * w**2 / temperature)
        return depth * (pull - weight_decay)

    flow = solve_ivp(rate, (times[0], times[-1]), np.log(start), "LSODA", t_eval=times, rtol=1e-8, atol=1e-10)
    return torch.as_tensor(np.exp(flow.y.T), device=t.device)


@same_kind
def population_gradient(W: Array, C0: Array, Ce: Array, temperature: float = 0.1) -> Array:
    """dL/dW of `population_loss` for the dot product: 2 (S W C / tau - W C0) / tau.

    Args:
        W: (m, d) the product of all layers.
        C0, Ce: (d, d) covariance of the clean data and of the augmentation.
        temperature: tau > 0.

    Returns:
        (m, d) float64.

    Raises:
        InputError: shapes do not fit, or the temperature is not positive.

    Examples:
        >>> population_gradient([[1]], C0=[[1]], Ce=[[1]], temperature=1).tolist()  # 2 (w^3 c^2 - w c0)
        [[6.0]]
    """
    check_shapes(W=(W, ("m", "d")), C0=(C0, ("d", "d")), Ce=(Ce, ("d", "d")))
    check_positive("temperature", temperature)
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

    Raises:
        InputError: shapes do not fit, times do not ascend, or an initial value is not positive.

    Examples:
        >>> euclidean_modes([0, 1, 9], m0=[0.01], c0=[0.5], ce=[0.5]).round(3).tolist()
        [[0.01], [0.062], [0.618]]
    """
    check_shapes(t=(t, ("T",)), m0=(m0, ("K",)), c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_times(t)
    check_entries(m0=m0)
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

    Raises:
        InputError: shapes do not fit, a variance is negative, both are zero, or the temperature is not positive.

    Examples:
        >>> cosine_modes([1, 1, 0.1], [0.1, 1, 0.9], temperature=1).round(3).tolist()
        [0.705, 0.295, 0.0]
    """
    check_shapes(c0=(c0, ("K",)), ce=(ce, ("K",)))
    check_not_negative(c0=c0, ce=ce)
    check_positive("temperature", temperature)
    return _water_level(c0 / total_variance(c0, ce), temperature)[1]


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

    Examples:
        >>> mu, t = water_level([1, 0.5, 0.1], temperature=1)
        >>> round(float(mu), 3), t.round(3).tolist()
        (-0.25, [0.75, 0.25, 0.0])
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
def collapse_line(
    fractions: Array, threshold: float = 1e-6, similarity: str = "cosine", temperature: float = 0.1
) -> Array:
    """The signal fraction below which a loss at rest leaves a direction less than threshold of the largest variance.

    The variances at rest are those of `stationary_modes` times c: tau (rho + mu)+ for the cosine (`water_level`),
    tau rho for the dot product, and for the Euclidean loss tau s with (2 + s) / (1 + s)^2 = 2 (1 - rho).  They rise
    with rho, so one line parts the directions.  Only the cosine's moves with the temperature.

    Args:
        fractions: (K,) signal fractions rho = c0 / (c0 + ce).  Measured ones may lie a little outside [0, 1].
        threshold: of the largest variance, in [0, 1).
        similarity: "cosine", "dot" or "euclidean".
        temperature: tau > 0.

    Returns:
        A float64 number, below the largest of fractions.

    Raises:
        InputError: fractions is not a vector of at least one entry, the similarity is unknown, or the threshold or the
            temperature is out of its range.

    Examples:
        >>> [round(float(collapse_line([1, 0.5, 0.1], 0.01, kind, 1.0)), 4) for kind in ("cosine", "dot")]
        [0.2575, 0.01]
    """
    mu, _ = water_level(fractions, temperature)
    check_choice("similarity", similarity, (*SIMILARITIES, "cosine"))
    check_share("threshold", threshold)
    largest = fractions.max()
    if similarity == "cosine":
        return threshold * largest - (1 - threshold) * mu
    if similarity == "dot":
        return threshold * largest
    lost = 2 * (1 - largest).clamp(min=torch.finfo(torch.float64).tiny)
    rest = threshold * (2 - lost) / (lost * (1 + 2 / (1 + torch.sqrt(1 + 4 * lost))))
    return (rest * (3 + 2 * rest) / (2 * (1 + rest) ** 2)).clamp(max=largest)


@same_kind
def escape_time(
    w0: Array, w: Array, c0: Array, depth: int, temperature: float = 0.1, weight_decay: float = 0.0
) -> Array:
    """Time in which a mode of balanced layers grows from w0 to w, both far below where it stops; dot-product loss.

    tau ln(w / w0) / (2 c0) for L = 1, tau (w0^-b - w^-b) / (2 L b c0) with b = 2 - 2/L for L >= 2: logarithmic in the
    initial scale for one layer, a power of it for more.  With weight decay gamma, ln(w / w0) / (2 c0 / tau - gamma) and
    ln((1 - h w^-b) / (1 - h w0^-b)) / (L b gamma), h = gamma tau / (2 c0).
    Infinite batch; a finite one is slower (meanfield.py).

    Args:
        w0, w, c0: (K,) initial and final singular value of the product, variance of the clean data; > 0.
        depth: L >= 1.
        temperature: tau > 0.
        weight_decay: gamma >= 0.

    Returns:
        (K,) float64 times; negative where the mode was at w before, infinite where it never gets there.

    Raises:
        InputError: shapes do not fit, depth is below 1, a value is not positive, or the decay is negative.

    Examples:
        >>> escape_time([0.01], [0.1], c0=[1], depth=1).round(4).tolist()  # 0.1 ln(10) / 2
        [0.1151]
    """
    check_shapes(w0=(w0, ("K",)), w=(w, ("K",)), c0=(c0, ("K",)))
    check_depth(depth)
    check_positive("temperature", temperature)
    check_decay(weight_decay)
    check_entries(w0=w0, w=w, c0=c0)
    if depth == 1:
        rate = 2 * c0 / temperature - weight_decay
        return torch.where((rate <= 0) & (w >= w0), torch.inf, torch.log(w / w0) / rate)
    b = 2 - 2 / depth
    if not weight_decay:
        return temperature * (w0**-b - w**-b) / (2 * depth * b * c0)
    h = weight_decay * temperature / (2 * c0)
    before, after = 1 - h * w0**-b, 1 - h * w**-b
    never = (before * after <= 0) | ((before < 0) & (w >= w0))
    # ln(after / before), without the digits that a small decay would lose.
    passed = torch.log1p(h * (w0**-b - w**-b) / before)
    return torch.where(never, torch.inf, passed / (depth * b * weight_decay))


@same_kind
def collapsed_modes(
    w0: Array, c0: Array, ce: Array, depth: int, horizon: float, temperature: float = 0.1, threshold: float = 1e-2
) -> Array:
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

    Raises:
        InputError: as for `stationary_modes` and `escape_time`.

    Examples:
        >>> collapsed_modes([0.01, 0.01, 0.01], c0=[1, 1, 0.1], ce=[0.1, 20, 0.1], depth=2, horizon=10).tolist()
        [False, True, True]
    """
    stationary = stationary_modes(c0, ce, "dot", temperature)
    level = (threshold * stationary.max()).sqrt().expand(len(w0))
    return (stationary < level**2) | (escape_time(w0, level, c0, depth, temperature) > horizon)
