"""Measures of collapse: one plain function each, on anybody's singular values, or on embeddings where these are needed.

Notation: Z (N, d) embeddings, rows are samples;  C = Zc^T Zc / (N - 1) the covariance of the centred rows;
`values` (d,) its singular values lambda_k;  s_k the singular values of Z itself, uncentred;
H(p) = -sum p_k ln p_k, with 0 ln 0 = 0.  No epsilon stands inside a logarithm: exact zeros are dropped instead.

A measure of a spectrum takes a `Spectrum`, of which it knows what to take, or by keyword the numbers that it is defined
on, which are not the same for all: `of_covariance` are the lambda_k, `of_rows` the s_k, `moments` the eigenvalues of
Z^T Z / N.  So `rankme(s.singular_values)`, which is another number, is said in a warning.

Published measures that share a name differ in matrix, centring, power and epsilon; each docstring says which one it is.
A value that is undefined for the input (complete collapse, too few points) is NaN, which JSON shows as null.
Functions take any array of non-negative numbers in any order and return float or int.
"""

import math
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError

T = TypeVar("T")


def _of_spectrum(function: Callable[..., T]) -> Callable[..., T]:
    """Let the first argument be a Spectrum; as an array it is given by its keyword.

    What the Spectrum knows itself (n, threshold, floor) takes the place of the other defaults.
    """
    names = list(signature(function).parameters)

    @wraps(function)
    def measure(*args: Any, **options: Any) -> T:
        if not args:
            return function(**options)
        first, *rest = args
        if hasattr(first, "above_floor"):
            others = [name for name in names[1:] if name != "moments"]
            return function(**first.above_floor(names) | dict(zip(others, rest, strict=False)) | options)
        warnings.warn(
            f"{function.__name__}: give a Spectrum, or {names[0]}=, so that no other array is taken for it; an array by "
            "position is taken for one release",
            DeprecationWarning,
            stacklevel=2,
        )
        return function(*args, **options)

    return measure


def _descending(values: ArrayLike) -> NDArray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"singular values: got shape {values.shape}, expected (d,) with d >= 1")
    if not (values >= 0).all():
        raise InputError(f"singular values: {values[~(values >= 0)][0]:g} is not a number >= 0")
    return np.sort(values)[::-1]


def _share(values: ArrayLike) -> NDArray:
    """The non-zero values over their sum, descending: a probability vector (empty if all are zero)."""
    values = _descending(values)
    shares = values / max(values[0], np.finfo(float).tiny)
    shares = shares[shares > np.finfo(float).tiny]  # what is smaller adds nothing to a sum, and has a poor logarithm
    return shares / shares.sum()


def entropy_rank(values: ArrayLike) -> float:
    """exp H(p), p = values / sum(values): how many equal values have the same entropy. NaN if all are zero."""
    p = _share(values)
    return math.exp(-(p * np.log(p)).sum()) if p.size else math.nan


@_of_spectrum
def effective_rank(of_covariance: ArrayLike) -> float:
    """exp H(lambda / sum lambda) of the covariance, in 1..d (Roy and Vetterli, EUSIPCO 2007, with A = C).

    reptrix calls this number RankMe; effdim calls it shannon_entropy.
    """
    return entropy_rank(of_covariance)


@_of_spectrum
def rankme(of_rows: ArrayLike, epsilon: float = 0.0) -> float:
    """exp H(p), p = s / sum s + epsilon, of the singular values s of Z, `of_rows`, uncentred (RankMe, arXiv 2210.02885).

    The paper adds 1e-7 to each share, stable-pretraining's callback 1e-5, without dividing by the new sum: the value
    may then exceed d.  A large mean alone makes RankMe small.
    """
    if epsilon == 0 or not np.any(of_rows):
        return entropy_rank(of_rows)
    p = _descending(of_rows) / np.sum(of_rows) + epsilon
    return math.exp(-(p * np.log(p)).sum())


@_of_spectrum
def participation_ratio(of_covariance: ArrayLike) -> float:
    """(sum lambda)^2 / sum lambda^2, in 1..d: exp of the Renyi entropy of order 2."""
    p = _share(of_covariance)
    return float(1 / (p**2).sum()) if p.size else math.nan


@_of_spectrum
def stable_rank(of_covariance: ArrayLike) -> float:
    """sum lambda / lambda_1 = |Zc|_F^2 / |Zc|_2^2, in 1..d; the same number as NESum (He and Ozay, ICML 2022)."""
    p = _share(of_covariance)
    return float(1 / p[0]) if p.size else math.nan


@_of_spectrum
def numerical_rank(of_covariance: ArrayLike, floor: float = 0.0) -> int:
    """Count of lambda_k above both `floor` and lambda_1 d 2^-52 (numpy.linalg.matrix_rank's rule on C)."""
    values = _descending(of_covariance)
    return int((values > max(floor, values[0] * values.size * np.finfo(np.float64).eps)).sum())


@_of_spectrum
def collapsed_dimensions(of_covariance: ArrayLike, threshold: float = 1e-6) -> int:
    """Count of lambda_k < threshold lambda_1; d when all are zero.

    The paper counts by eye ("about 30 of 128"); the threshold is ours, and a result always states it.
    """
    values = _descending(of_covariance)
    return int((values < threshold * values[0]).sum()) if values[0] > 0 else values.size


class PowerLaw(NamedTuple):
    """lambda_k ~ k^-alpha over k = first..last; r2 of the weighted fit of ln lambda_k on ln k."""

    alpha: float
    r2: float
    first: int
    last: int


@_of_spectrum
def power_law(of_covariance: ArrayLike, first: int = 11, last: int = 100) -> PowerLaw:
    """Weighted least-squares line of ln lambda_k on ln k, weights 1/k, over k = first..min(last, numerical rank).

    Stringer et al. 2019; alpha-ReQ, NeurIPS 2022. NaN with fewer than 10 points: the tail of a low-rank matrix
    is rounding, and a line through it is a number without meaning.
    """
    values = _descending(of_covariance)
    last = min(last, numerical_rank(of_covariance=values))
    if last - first + 1 < 10:
        return PowerLaw(math.nan, math.nan, first, last)
    k = np.arange(first, last + 1)
    x, y, w = np.log(k), np.log(values[first - 1 : last]), 1 / k
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    slope = (w * x * y).sum() / (w * x * x).sum()
    spread = (w * y * y).sum()
    r2 = 1 - (w * (y - slope * x) ** 2).sum() / spread if spread > 0 else math.nan
    return PowerLaw(float(-slope), float(r2), first, last)


@_of_spectrum
def alpha(of_covariance: ArrayLike, first: int = 11, last: int = 100) -> float:
    """The exponent of `power_law`. alpha-ReQ wishes for about 1; higher is more collapsed."""
    return power_law(of_covariance=of_covariance, first=first, last=last).alpha


@_of_spectrum
def condition(of_covariance: ArrayLike) -> float:
    """lambda_d / lambda_1, in 0..1: the inverse of the condition number, which is infinite when collapsed."""
    values = _descending(of_covariance)
    return float(values[-1] / values[0]) if values[0] > 0 else math.nan


@_of_spectrum
def auc(of_covariance: ArrayLike, count: int | None = None, power: int = 1) -> float:
    """Mean over k = 1..count of the share cumsum(c^power)_k / sum c^power, c_k = sqrt(lambda_k).

    arXiv 2209.15007, eq. 2, has power 1, though it speaks of variances; those are power 2.
    1/2 + 1/(2 count) for a flat spectrum, 1 for a single direction. count: min(N, d); default d.
    """
    c = np.sqrt(_descending(of_covariance))[:count] ** power
    return float((np.cumsum(c) / c.sum()).mean()) if c[0] > 0 else math.nan


@_of_spectrum
def isoscore(of_covariance: ArrayLike) -> float:
    """IsoScore (arXiv 2108.07344) in closed form, (participation ratio - 1) / (d - 1): 0 one direction, 1 flat."""
    d = _descending(of_covariance).size
    return (participation_ratio(of_covariance=of_covariance) - 1) / (d - 1) if d > 1 else math.nan


@_of_spectrum
def vendi(moments: ArrayLike, order: float = 1.0) -> float:
    """Vendi score, linear kernel (arXiv 2210.02410): exp of the Renyi entropy of the eigenvalues of Z^T Z / N.

    Rows are of unit length. order: 1 is Shannon's entropy; math.inf counts 1 / the largest share.
    """
    p = _share(moments)
    if order == 1 or p.size == 0:
        return entropy_rank(moments)
    return float(1 / p[0] if order == math.inf else (p**order).sum() ** (1 / (1 - order)))


@_of_spectrum
def self_clustering(moments: ArrayLike, n: int) -> float:
    """(sum_ij (z_i.z_j)^2 - E) / (N^2 - E), E = N + N (N - 1) / d, unit rows (arXiv 2305.16562).

    moments: (d,) eigenvalues of Z^T Z / N. About 0 for random directions, 1 for a single point.
    """
    moments = _descending(moments)
    expected = n + n * (n - 1) / moments.size
    return float((n**2 * (moments**2).sum() - expected) / (n**2 - expected)) if n > 1 < moments.size else math.nan


@_of_spectrum
def mean_cosine(of_covariance: ArrayLike, moments: ArrayLike) -> float:
    """Mean of z_i . z_j over all pairs i != j of unit rows, in -1/(N - 1)..1, from two traces: tr(Z^T Z / N) - tr C.

    1 is complete collapse; about 0 are directions without a common one, far from it in text and retrieval models.
    No N x N matrix is formed, and a zero row has cosine 0 with every other.

    of_covariance: (d,) singular values of C; moments: (d,) eigenvalues of Z^T Z / N.
    """
    return float(_descending(moments).sum() - _descending(of_covariance).sum())


# Against noise: n samples of white noise have a spread of singular values too.


def marchenko_pastur_edges(n: int, d: int, variance: float = 1.0) -> tuple[float, float]:
    """Least and largest non-zero covariance singular value of n rows of white noise in d dimensions, for large n, d.

    Marchenko and Pastur, 1967.
    """
    ratio = math.sqrt(d / (n - 1))
    return variance * (1 - ratio) ** 2, variance * (1 + ratio) ** 2


def marchenko_pastur_density(x: ArrayLike, n: int, d: int, variance: float = 1.0) -> NDArray:
    """Density of the non-zero covariance singular values of white noise at x, (...); it integrates to 1."""
    low, high = marchenko_pastur_edges(n, d, variance)
    x = np.asarray(x, dtype=np.float64)
    inside = (x > low) & (x < high)
    root = np.sqrt(np.where(inside, (high - x) * (x - low), 0))
    return np.where(inside, root, 0) / (2 * math.pi * variance * min(1.0, d / (n - 1)) * np.where(inside, x, 1))


@_of_spectrum
def noise_variance(of_covariance: ArrayLike, n: int) -> float:
    """The variance of white noise whose median singular value is that of the non-zero `values` of n rows.

    scikit-dimension's lPCA(ver="MP").noise_var_. Embeddings are not white noise: it says how large a spread of their
    small singular values n samples make by themselves. NaN if all are zero.
    """
    values = _descending(of_covariance)
    held = values[: min(n - 1, values.size)]
    if n < 3 or held[0] == 0:
        return math.nan
    from scipy.integrate import quad
    from scipy.optimize import brentq

    low, high = marchenko_pastur_edges(n, values.size)

    # x = low + (high - low) sin^2 u takes the square roots of the density away at both edges.
    def density(u: float) -> float:
        x = low + (high - low) * math.sin(u) ** 2
        slope = (high - low) * math.sin(2 * u)
        return float(marchenko_pastur_density(x, n, values.size)) * slope

    half = quad(density, 0, math.pi / 2, epsabs=1e-13)[0] / 2
    u = brentq(lambda u: quad(density, 0, u, epsabs=1e-13)[0] - half, 0, math.pi / 2, xtol=1e-14)
    return float(np.median(held) / (low + (high - low) * math.sin(u) ** 2))


@_of_spectrum
def above_edge(of_covariance: ArrayLike, n: int, variance: float | None = None) -> int:
    """Count of singular values above the upper Marchenko-Pastur edge of noise of `variance` (default: estimated)."""
    variance = noise_variance(of_covariance=of_covariance, n=n) if variance is None else variance
    values = _descending(of_covariance)
    return int((values > marchenko_pastur_edges(n, values.size, variance)[1]).sum())


# Directions: which subspace is it that two models share, or that collapses in both.


def principal_angles(a: ArrayLike, b: ArrayLike) -> NDArray:
    """Angles, in radians, descending, between the spans of the columns of a (d, k) and b (d, k'): (min(k, k'),)."""
    from scipy.linalg import subspace_angles

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise InputError(f"directions: got shapes {a.shape} and {b.shape}, expected (d, k) and (d, k') of one d")
    return subspace_angles(a, b)


def variance_within(values: ArrayLike, vectors: ArrayLike, basis: ArrayLike) -> NDArray:
    """Share of the variance of A in the span of the first k columns of an orthonormal basis, for k = 1..K: (K,).

    Args:
        values, vectors: (d,) singular values and (d, d) singular vectors, columns, of A's covariance.
        basis: (d, K), as the singular vectors of another B, largest first.
    """
    values, vectors, basis = (np.asarray(a, np.float64) for a in (values, vectors, basis))
    if vectors.shape != (len(values), len(values)) or basis.shape[:1] != values.shape:
        raise InputError(f"directions: got shapes {vectors.shape} and {basis.shape} for {len(values)} singular values")
    return np.cumsum((basis.T @ vectors) ** 2 @ values) / values.sum()


# Measures of embeddings themselves: rows are samples, (n, d) arrays.


def _rows(z: ArrayLike, name: str = "embeddings") -> NDArray:
    z = np.asarray(z, dtype=np.float64)
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

    About 1 / sqrt(d) when healthy, 0 at complete collapse; blind to dimensional collapse, and not rotation-invariant.
    """
    return float(_unit(z).std(0, ddof=1).mean())


def uniformity(z: ArrayLike, t: float = 2.0) -> float:
    """ln mean over pairs i < j of exp(-t |z_i - z_j|^2) of unit rows (arXiv 2005.10242). 0 is a single point.

    O(n^2 d): give a few thousand rows.
    """
    from scipy.spatial.distance import pdist
    from scipy.special import logsumexp

    exponents = -t * pdist(_unit(z), "sqeuclidean")
    return float(logsumexp(exponents) - math.log(len(exponents)))


def alignment(z: ArrayLike, z_prime: ArrayLike, power: float = 2.0) -> float:
    """Mean |z_i - z'_i|^power of unit rows, two views of the same samples (arXiv 2005.10242). 0 is invariance."""
    z, z_prime = _unit(z), _unit(z_prime)
    if z.shape != z_prime.shape:
        raise InputError(f"alignment: shapes {z.shape} and {z_prime.shape} differ")
    return float((np.linalg.norm(z - z_prime, axis=1) ** power).mean())


def coherence(z: ArrayLike) -> float:
    """(n / r) max_i |U_i|^2, U (n, r) the left singular vectors of z, r = min(n, d) (arXiv 2305.16562): 1..n / r.

    Of a z of lower rank than r, some of U is arbitrary, and so is the value.
    """
    z = _rows(z)
    U = np.linalg.svd(z, full_matrices=False)[0]
    return float(len(z) / U.shape[1] * (U**2).sum(1).max())


def lidar(z: ArrayLike, samples: ArrayLike, delta: float = 1e-4) -> float:
    """Effective rank of Sw^-1/2 Sb Sw^-1/2 (LiDAR, arXiv 2312.04000, section 3), of several views of each sample.

    Sb is the covariance of the samples' means (divisor samples - 1), Sw the mean scatter within samples (divisor
    samples (views - 1)) plus delta, which is absolute: the value depends on the scale of z.

    Args:
        z: (n, d) embeddings.
        samples: (n,) which sample each row is a view of; the same number of views, at least 2, of each.
    """
    z, names = _rows(z), np.asarray(samples)
    _, index, views = np.unique(names, return_inverse=True, return_counts=True)
    if names.shape != (len(z),) or len(views) < 2 or views.min() < 2 or views.min() != views.max():
        raise InputError(
            f"lidar: {names.shape} samples for {len(z)} rows; equal numbers of views, 2 or more, are needed"
        )
    means = np.zeros((len(views), z.shape[1]))
    np.add.at(means, index, z / views[0])
    within = z - means[index]
    between = means - means.mean(0)
    Sw = within.T @ within / (len(views) * (views[0] - 1))
    return lidar_of(between.T @ between / (len(views) - 1), Sw, delta)


def lidar_of(between: ArrayLike, within: ArrayLike, delta: float = 1e-4) -> float:
    """`lidar` of its two covariances Sb and Sw, (d, d) each, Sw before delta is added."""
    from scipy.linalg import eigh

    Sb, Sw = np.asarray(between, np.float64), np.asarray(within, np.float64)
    return entropy_rank(eigh(Sb, Sw + delta * np.eye(len(Sw)), eigvals_only=True).clip(0))


def epps_pulley(x: ArrayLike, knots: int = 17, upper: float = 3.0) -> NDArray:
    """n times the weighted squared distance of each column's characteristic function from that of N(0, 1): (d,).

    integral over t in [-upper, upper] of |phi_n(t) - e^{-t^2/2}|^2 e^{-t^2/2} dt by the trapezoid rule with `knots`
    points on [0, upper], doubled (arXiv 2511.08544). Standard normal columns give about 1.05, whatever n.
    """
    x = _rows(x)
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

    It is not invariant to scale or mean: standardise first to ask for the shape alone.
    """
    z = _rows(z)
    directions = np.random.default_rng(seed).standard_normal((z.shape[1], slices))
    return float(epps_pulley(z @ (directions / np.linalg.norm(directions, axis=0))).mean())


def linear_cka(x: ArrayLike, y: ArrayLike, unbiased: bool = False) -> float:
    """|Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F), in 0..1 (arXiv 1905.00414): similarity of two embeddings.

    A similarity; some packages return its arc cosine, a distance.  unbiased: Song's estimator of each product (as in
    arXiv 2010.15327; ckatorch's unbiased=True), O(n^2): the biased one grows with d / n.
    """
    x, y = _same_rows(x, y)
    if not unbiased:
        return float(((y.T @ x) ** 2).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))
    K, L = x @ x.T, y @ y.T
    return _song(K, L) / math.sqrt(_song(K, K) * _song(L, L))


def _song(K: NDArray, L: NDArray) -> float:
    """Unbiased HSIC of two Gram matrices (Song et al. 2012, eq. 5), without its common factor 1 / (n (n - 3))."""
    n = len(K)
    K, L = (gram - np.diag(gram.diagonal()) for gram in (K, L))
    rows = K.sum(0) @ L.sum(0)
    return float((K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2))


def canonical_correlations(x: ArrayLike, y: ArrayLike) -> NDArray:
    """Cosines of the principal angles between the column spaces of centred x and y, descending: (min(d1, d2),).

    Needs n well above d1 + d2. Directions below rounding must be dropped first: in QR they read as 1.
    """
    x, y = _same_rows(x, y)
    return np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0], compute_uv=False).clip(0, 1)


def explained_variance(x: ArrayLike, y: ArrayLike) -> NDArray:
    """Share of the variance of x, (n, d), that the first k principal components of y, (n, m), explain: (min(n, m),).

    By least squares over the same rows; x and y may differ in width, as a representation and its projection do.
    """
    x, y = _same_rows(x, y)
    U, s, _ = np.linalg.svd(y, full_matrices=False)
    U = U * (s > s[:1] * max(y.shape) * np.finfo(np.float64).eps)  # what is rounding explains nothing
    return np.cumsum(((U.T @ x) ** 2).sum(1)) / (x**2).sum()
