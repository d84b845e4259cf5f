"""Rank measures of a spectrum: one plain function each, on anybody's singular values.

Notation: Z (N, d) embeddings, rows are samples;  C = Zc^T Zc / (N - 1) the covariance of the centred rows;
`values` (d,) its singular values lambda_k;  s_k the singular values of Z itself, uncentred;
H(p) = -sum p_k ln p_k, with 0 ln 0 = 0.  No epsilon stands inside a logarithm: exact zeros are dropped instead.

Published measures that share a name differ in matrix, centring, power and epsilon; each docstring says which one it is.
A value that is undefined for the input (complete collapse, too few points) is NaN, which JSON shows as null.
Functions take any array of non-negative numbers in any order and return float or int.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError


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


def effective_rank(values: ArrayLike) -> float:
    """exp H(lambda / sum lambda) of the covariance, in 1..d (Roy and Vetterli, EUSIPCO 2007, with A = C).

    reptrix calls this number RankMe; effdim calls it shannon_entropy.
    """
    return entropy_rank(values)


def rankme(s: ArrayLike) -> float:
    """exp H(s / sum s) of the singular values s of Z, uncentred (RankMe, arXiv 2210.02885, with epsilon 0).

    The paper adds 1e-7 to each share, stable-pretraining 1e-5; a large mean alone makes it small.
    """
    return entropy_rank(s)


def participation_ratio(values: ArrayLike) -> float:
    """(sum lambda)^2 / sum lambda^2, in 1..d: exp of the Renyi entropy of order 2."""
    p = _share(values)
    return float(1 / (p**2).sum()) if p.size else math.nan


def stable_rank(values: ArrayLike) -> float:
    """sum lambda / lambda_1 = |Zc|_F^2 / |Zc|_2^2, in 1..d; the same number as NESum (He and Ozay, ICML 2022)."""
    p = _share(values)
    return float(1 / p[0]) if p.size else math.nan


def numerical_rank(values: ArrayLike, floor: float = 0.0) -> int:
    """Count of lambda_k above both `floor` and lambda_1 d 2^-52 (numpy.linalg.matrix_rank's rule on C)."""
    values = _descending(values)
    return int((values > max(floor, values[0] * values.size * np.finfo(np.float64).eps)).sum())


def collapsed_dimensions(values: ArrayLike, threshold: float = 1e-6) -> int:
    """Count of lambda_k < threshold lambda_1; d when all are zero.

    The paper counts by eye ("about 30 of 128"); the threshold is ours, and a result always states it.
    """
    values = _descending(values)
    return int((values < threshold * values[0]).sum()) if values[0] > 0 else values.size


class PowerLaw(NamedTuple):
    """lambda_k ~ k^-alpha over k = first..last; r2 of the weighted fit of ln lambda_k on ln k."""

    alpha: float
    r2: float
    first: int
    last: int


def power_law(values: ArrayLike, first: int = 11, last: int = 100) -> PowerLaw:
    """Weighted least-squares line of ln lambda_k on ln k, weights 1/k, over k = first..min(last, numerical rank).

    Stringer et al. 2019; alpha-ReQ, NeurIPS 2022. NaN with fewer than 10 points: the tail of a low-rank matrix
    is rounding, and a line through it is a number without meaning.
    """
    values = _descending(values)
    last = min(last, numerical_rank(values))
    if last - first + 1 < 10:
        return PowerLaw(math.nan, math.nan, first, last)
    k = np.arange(first, last + 1)
    x, y, w = np.log(k), np.log(values[first - 1 : last]), 1 / k
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    slope = (w * x * y).sum() / (w * x * x).sum()
    spread = (w * y * y).sum()
    r2 = 1 - (w * (y - slope * x) ** 2).sum() / spread if spread > 0 else math.nan
    return PowerLaw(float(-slope), float(r2), first, last)


def alpha(values: ArrayLike, first: int = 11, last: int = 100) -> float:
    """The exponent of `power_law`. alpha-ReQ wishes for about 1; higher is more collapsed."""
    return power_law(values, first, last).alpha


def condition(values: ArrayLike) -> float:
    """lambda_d / lambda_1, in 0..1: the inverse of the condition number, which is infinite when collapsed."""
    values = _descending(values)
    return float(values[-1] / values[0]) if values[0] > 0 else math.nan


def auc(values: ArrayLike, count: int | None = None) -> float:
    """Mean over k = 1..count of the share cumsum(c)_k / sum c, c_k = sqrt(lambda_k) (arXiv 2209.15007, eq. 2).

    1/2 + 1/(2 count) for a flat spectrum, 1 for a single direction. count: min(N, d); default d.
    """
    c = np.sqrt(_descending(values))[:count]
    return float((np.cumsum(c) / c.sum()).mean()) if c[0] > 0 else math.nan


def isoscore(values: ArrayLike) -> float:
    """IsoScore (arXiv 2108.07344) in closed form, (participation ratio - 1) / (d - 1): 0 one direction, 1 flat."""
    d = _descending(values).size
    return (participation_ratio(values) - 1) / (d - 1) if d > 1 else math.nan


def vendi(moments: ArrayLike) -> float:
    """Vendi score of order 1, linear kernel (arXiv 2210.02410): exp H of the eigenvalues of Z^T Z / N, unit rows."""
    return entropy_rank(moments)


def self_clustering(moments: ArrayLike, n: int) -> float:
    """(sum_ij (z_i.z_j)^2 - E) / (N^2 - E), E = N + N (N - 1) / d, unit rows (arXiv 2305.16562).

    moments: (d,) eigenvalues of Z^T Z / N. About 0 for random directions, 1 for a single point.
    """
    moments = _descending(moments)
    expected = n + n * (n - 1) / moments.size
    return float((n**2 * (moments**2).sum() - expected) / (n**2 - expected)) if n > 1 < moments.size else math.nan
