"""Against noise: n samples of white noise have a spread of singular values too."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError
from collapse.metrics.spectral import descending, float64, of_spectrum


def marchenko_pastur_edges(n: int, d: int, variance: float = 1.0) -> tuple[float, float]:
    """Least and largest non-zero covariance singular value of n rows of white noise in d dimensions, for large n, d.

    Marchenko and Pastur, 1967.

    Raises InputError: fewer than 2 rows, no dimension, or a negative variance.

    Examples:
        >>> low, high = marchenko_pastur_edges(n=401, d=100)
        >>> low, high
        (0.25, 2.25)
    """
    if n < 2 or d < 1 or variance < 0:
        raise InputError(f"n= is {n}, d= {d}, variance= {variance:g}; expected 2 rows, 1 dimension and 0 at least")
    ratio = math.sqrt(d / (n - 1))
    return variance * (1 - ratio) ** 2, variance * (1 + ratio) ** 2


def marchenko_pastur_density(x: ArrayLike, n: int, d: int, variance: float = 1.0) -> NDArray:
    """Density of the non-zero covariance singular values of white noise at x: (...), as x. It integrates to 1.

    Raises InputError: x is no numbers, or as `marchenko_pastur_edges`.

    Examples:
        >>> marchenko_pastur_density([0.1, 1.0, 3.0], n=401, d=100).round(3).tolist()
        [0.0, 0.616, 0.0]
    """
    low, high = marchenko_pastur_edges(n, d, variance)
    x = float64(x)
    inside = (x > low) & (x < high)
    root = np.sqrt(np.where(inside, (high - x) * (x - low), 0))
    return np.where(inside, root, 0) / (2 * math.pi * variance * min(1.0, d / (n - 1)) * np.where(inside, x, 1))


@of_spectrum
def noise_variance(of_covariance: ArrayLike, n: int) -> float:
    """The variance of white noise whose median singular value is that of the non-zero ones of n rows.

    of_covariance: (d,) singular values of C.

    scikit-dimension's lPCA(ver="MP").noise_var_. Embeddings are not white noise: it says how large a spread of their
    small singular values n samples make by themselves. NaN if all are zero.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> noise = np.random.default_rng(0).standard_normal((2000, 50))
        >>> round(noise_variance(of_covariance=np.linalg.eigvalsh(np.cov(noise.T)), n=2000), 2)
        1.0
    """
    values = descending(of_covariance)
    nonzero = values[: min(n - 1, values.size)]
    if n < 3 or nonzero[0] == 0:
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
    return float(np.median(nonzero) / (low + (high - low) * math.sin(u) ** 2))


@of_spectrum
def above_edge(of_covariance: ArrayLike, n: int, variance: float | None = None) -> int:
    """Count of singular values (d,) above the upper Marchenko-Pastur edge of noise of `variance`, estimated by default.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; or as `marchenko_pastur_edges`.

    Examples:
        >>> above_edge(of_covariance=[9, 1.1, 1, 0.9], n=1000, variance=1)
        1
    """
    variance = noise_variance(of_covariance=of_covariance, n=n) if variance is None else variance
    values = descending(of_covariance)
    return int((values > marchenko_pastur_edges(n, values.size, variance)[1]).sum())
