"""Measures of embeddings themselves: rows are samples, (n, d) arrays."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError
from collapse.metrics.spectral import entropy_rank, float64


def _rows(z: ArrayLike, name: str = "embeddings") -> NDArray:
    z = float64(z)
    if z.ndim != 2 or 0 in z.shape:
        raise InputError(f"{name}: got shape {z.shape}, expected (n, d), neither of them 0")
    if not np.isfinite(z).all():
        raise InputError(f"{name}: row {np.argwhere(~np.isfinite(z))[0][0]} holds NaN or infinity")
    return z


def _unit(z: ArrayLike) -> NDArray:
    z = _rows(z)
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    return z / np.where(norm > 0, norm, 1)  # a zero row stays zero


def _same_rows(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    x, y = _rows(x, "first embeddings"), _rows(y, "second embeddings")
    if len(x) != len(y):
        raise InputError(f"embeddings: {len(x)} rows and {len(y)}; both must hold the same samples")
    return x - x.mean(0), y - y.mean(0)


def l2_std(z: ArrayLike) -> float:
    """Mean over columns of the standard deviation (divisor n - 1) of unit rows (SimSiam, arXiv 2011.10566; lightly).

    z: (n, d). About 1 / sqrt(d) when healthy, 0 at complete collapse; blind to dimensional collapse, and not
    rotation-invariant.  NaN of a single row.

    Raises InputError: z is not (n, d), or holds NaN or infinity.

    Examples:
        >>> round(l2_std([[1, 0], [-1, 0], [0, 1], [0, -1]]), 6)
        0.816497
    """
    unit = _unit(z)
    return float(unit.std(0, ddof=1).mean()) if len(unit) > 1 else math.nan


def uniformity(z: ArrayLike, t: float = 2.0) -> float:
    """ln mean over pairs i < j of exp(-t |z_i - z_j|^2) of unit rows, Z (n, d) (arXiv 2005.10242). 0 is a single point.

    O(n^2 d): give a few thousand rows.  NaN of a single one.

    Raises InputError: z is not (n, d), or holds NaN or infinity.

    Examples:
        >>> uniformity([[1, 0], [1, 0]])
        0.0
    """
    from scipy.spatial.distance import pdist
    from scipy.special import logsumexp

    exponents = -t * pdist(_unit(z), "sqeuclidean")
    if not len(exponents):
        return math.nan
    return float(logsumexp(exponents) - math.log(len(exponents)))


def alignment(z: ArrayLike, z_prime: ArrayLike, power: float = 2.0) -> float:
    """Mean |z_i - z'_i|^power of unit rows (n, d), two views of the same samples (arXiv 2005.10242). 0 is invariance.

    Raises InputError: the shapes differ, one is not (n, d), or one holds NaN or infinity.

    Examples:
        >>> alignment([[1, 0], [0, 2]], [[2, 0], [0, 1]])
        0.0
    """
    z, z_prime = _unit(z), _unit(z_prime)
    if z.shape != z_prime.shape:
        raise InputError(f"alignment: shapes {z.shape} and {z_prime.shape} differ")
    return float((np.linalg.norm(z - z_prime, axis=1) ** power).mean())


def coherence(z: ArrayLike) -> float:
    """(n / r) max_i |U_i|^2, U (n, r) the left singular vectors of z, r = min(n, d) (arXiv 2305.16562): 1..n / r.

    z: (n, d). Of a z of lower rank than r, some of U is arbitrary, and so is the value.

    Raises InputError: z is not (n, d), or holds NaN or infinity.

    Examples:
        >>> round(coherence(np.eye(3)), 6)
        1.0
    """
    z = _rows(z)
    U = np.linalg.svd(z, full_matrices=False)[0]
    return float(len(z) / U.shape[1] * (U**2).sum(1).max())


def lidar(z: ArrayLike, samples: ArrayLike, delta: float = 1e-4) -> float:
    """Effective rank of Sw^-1/2 Sb Sw^-1/2 (LiDAR, arXiv 2312.04000, section 3), of several views of each sample.

    Sb is the covariance of the samples' means (divisor samples - 1), Sw the scatter within samples (divisor n -
    samples: of equal numbers of views, samples (views - 1)) plus delta, which is absolute: the value depends on the
    scale of z.  Each sample's mean counts once, however many views it has.

    Args:
        z: (n, d) embeddings.
        samples: (n,) which sample each row is a view of; at least 2 views of each.

    Raises InputError: fewer than 2 samples, or one of fewer than 2 views; samples is not (n,); z is not (n, d), or
    holds NaN or infinity.  Raises InputError: as `lidar_of`, where delta is 0.

    Examples:
        >>> views = np.repeat(np.eye(4), 2, axis=0) + 0.01 * np.random.default_rng(0).standard_normal((8, 4))
        >>> round(lidar(views, samples=[0, 0, 1, 1, 2, 2, 3, 3]), 1)
        2.9
    """
    z, names = _rows(z), np.asarray(samples.detach().cpu() if hasattr(samples, "detach") else samples)
    _, index, views = np.unique(names, return_inverse=True, return_counts=True)
    if names.shape != (len(z),) or len(views) < 2 or views.min() < 2:
        raise InputError(f"lidar: {names.shape} samples for {len(z)} rows; 2 views or more of 2 samples are needed")
    means = np.zeros((len(views), z.shape[1]))
    np.add.at(means, index, z)
    means /= views[:, None]
    within = z - means[index]
    between = means - means.mean(0)
    return lidar_of(between.T @ between / (len(views) - 1), within.T @ within / (len(z) - len(views)), delta)


def lidar_of(between: ArrayLike, within: ArrayLike, delta: float = 1e-4) -> float:
    """`lidar` of its two covariances Sb and Sw, (d, d) each, Sw before delta is added.

    Raises InputError: not two finite (d, d), or Sw + delta is not positive definite.

    Examples:
        >>> lidar_of(between=np.diag([1.0, 1, 0]), within=np.eye(3))
        2.0
    """
    from scipy.linalg import LinAlgError, eigh

    Sb, Sw = float64(between), float64(within)
    if Sb.ndim != 2 or Sb.shape != Sb.shape[::-1] or Sb.shape != Sw.shape or not np.isfinite([Sb, Sw]).all():
        raise InputError(f"lidar: got shapes {Sb.shape} and {Sw.shape}, expected (d, d) twice, all of it finite")
    try:
        return entropy_rank(eigh(Sb, Sw + delta * np.eye(len(Sw)), eigvals_only=True).clip(0))
    except LinAlgError as error:
        raise InputError(f"lidar: the scatter within samples is not positive definite with delta= {delta:g}") from error


def epps_pulley(x: ArrayLike, knots: int = 17, upper: float = 3.0) -> NDArray:
    """n times the weighted squared distance of each column's characteristic function from N(0, 1)'s: (d,) of x (n, d).

    integral over t in [-upper, upper] of |phi_n(t) - e^{-t^2/2}|^2 e^{-t^2/2} dt by the trapezoid rule with `knots`
    points on [0, upper], doubled (arXiv 2511.08544). Standard normal columns give about 1.05, whatever n.

    Raises InputError: x is not (n, d), or holds NaN or infinity; there are fewer than 2 knots.

    Examples:
        >>> epps_pulley(np.zeros((100, 2))).round(3).tolist()
        [40.205, 40.205]
    """
    x = _rows(x)
    if knots < 2:
        raise InputError(f"knots= is {knots}, expected at least 2")
    t = np.linspace(0, upper, knots)
    weight = np.full(knots, 2 * upper / (knots - 1))
    weight[[0, -1]] /= 2
    window = np.exp(-(t**2) / 2)
    total = np.zeros(x.shape[1])
    for point, w, target in zip(t, weight * window, window, strict=True):
        total += w * ((np.cos(point * x).mean(0) - target) ** 2 + np.sin(point * x).mean(0) ** 2)
    return len(x) * total


def sigreg(z: ArrayLike, seed: int, slices: int = 1024) -> float:
    """Mean `epps_pulley` of z along random unit directions (SIGReg, arXiv 2511.08544): is z N(0, I)? 0 is best.

    z: (n, d). It is not invariant to scale or mean: standardise first to ask for the shape alone.

    Raises InputError: z is not (n, d), or holds NaN or infinity; there are no slices.

    Examples:
        >>> round(sigreg(np.random.default_rng(0).standard_normal((2000, 4)), seed=0), 1)
        0.6
    """
    z = _rows(z)
    if slices < 1:
        raise InputError(f"slices= is {slices}, expected at least 1")
    directions = np.random.default_rng(seed).standard_normal((z.shape[1], slices))
    return float(epps_pulley(z @ (directions / np.linalg.norm(directions, axis=0))).mean())


def linear_cka(x: ArrayLike, y: ArrayLike, unbiased: bool = False) -> float:
    """|Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F), in 0..1 (arXiv 1905.00414): similarity of two embeddings.

    Some packages return its arc cosine, a distance.  NaN of rows that are all alike, and unbiased of fewer than 4.

    x, y: (n, d1) and (n, d2).
    unbiased: Song's estimator of each product (as in arXiv 2010.15327; ckatorch's unbiased=True), O(n^2): the biased
    one grows with d / n.

    Raises InputError: x or y is not (n, d), holds NaN or infinity, or has another number of rows than the other.

    Examples:
        >>> x = np.array([[1.0, 2], [3, 1], [0, 5]])
        >>> round(linear_cka(x, 3 * x), 6)
        1.0
    """
    x, y = _same_rows(x, y)
    if unbiased and len(x) < 4:
        return math.nan
    if unbiased:
        K, L = x @ x.T, y @ y.T
        shared, norms = _song(K, L), (_song(K, K), _song(L, L))
    else:
        shared, norms = ((y.T @ x) ** 2).sum(), (((x.T @ x) ** 2).sum(), ((y.T @ y) ** 2).sum())
    return float(shared / (math.sqrt(norms[0]) * math.sqrt(norms[1]))) if min(norms) > 0 else math.nan


def _song(K: NDArray, L: NDArray) -> float:
    """Unbiased HSIC of two Gram matrices (Song et al. 2012, eq. 5), without its common factor 1 / (n (n - 3))."""
    n = len(K)
    K, L = (gram - np.diag(gram.diagonal()) for gram in (K, L))
    rows = K.sum(0) @ L.sum(0)
    return float((K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2))


def canonical_correlations(x: ArrayLike, y: ArrayLike) -> NDArray:
    """Cosines of the principal angles between the column spaces of centred x and y, descending: (min(d1, d2),).

    x, y: (n, d1) and (n, d2), n well above d1 + d2. Directions below rounding must be dropped first: in QR they read
    as 1.

    Raises InputError: x or y is not (n, d), holds NaN or infinity, or has another number of rows than the other.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((50, 2))
        >>> canonical_correlations(x, x @ [[1, 2], [0, 1]]).round(6).tolist()
        [1.0, 1.0]
    """
    x, y = _same_rows(x, y)
    return np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0], compute_uv=False).clip(0, 1)


def explained_variance(x: ArrayLike, y: ArrayLike) -> NDArray:
    """Share of the variance of x, (n, d), that the first k principal components of y, (n, m), explain: (min(n, m),).

    By least squares over the same rows; x and y may differ in width, as a representation and its projection do.
    NaN where x does not vary.

    Raises InputError: x or y is not (n, d), holds NaN or infinity, or has another number of rows than the other.

    Examples:
        >>> x = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
        >>> explained_variance(x, x).round(6).tolist()
        [0.8, 1.0]
    """
    x, y = _same_rows(x, y)
    U, s, _ = np.linalg.svd(y, full_matrices=False)
    U = U * (s > s[:1] * max(y.shape) * np.finfo(np.float64).eps)  # what is rounding explains nothing
    explained, total = np.cumsum(((U.T @ x) ** 2).sum(1)), (x**2).sum()
    return explained / total if total > 0 else np.full(len(explained), math.nan)
