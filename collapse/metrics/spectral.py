"""Measures of a spectrum alone, each one plain function of its numbers."""

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


def of_spectrum(function: Callable[..., T]) -> Callable[..., T]:
    """Let the first argument be a Spectrum; as an array it is given by its keyword.

    What the Spectrum knows itself (n, threshold, floor) takes the place of the other defaults.

    Examples:
        >>> from collapse import spectrum
        >>> s = spectrum(np.random.default_rng(0).standard_normal((100, 3)))
        >>> rankme(s) == rankme(of_rows=(s.moments * s.n) ** 0.5) == s.rankme
        True
    """
    names = list(signature(function).parameters)

    @wraps(function)
    def measure(*args: Any, **options: Any) -> T:
        if not args:
            return function(**options)
        first, *rest = args
        if hasattr(first, "above_floor"):
            others = [name for name in names[1:] if name != "moments"]
            if len(rest) > len(others):
                raise TypeError(
                    f"{function.__name__}: {len(rest)} arguments behind the Spectrum, at most {len(others)}"
                )
            given = dict(zip(others[: len(rest)], rest, strict=True))
            return function(**first.above_floor(names) | given | options)
        warnings.warn(
            f"{function.__name__}: give a Spectrum, or {names[0]}=, so that no other array is taken for it; an array "
            "by position is taken for one release",
            DeprecationWarning,
            stacklevel=2,
        )
        return function(*args, **options)

    return measure


def float64(values: ArrayLike) -> NDArray:
    """Numbers of any shape in float64; of a tensor its values, be it on a GPU, in bfloat16 or part of a graph.

    Raises InputError: text, complex numbers, or rows of several lengths.

    Examples:
        >>> float64([1, 2]).dtype
        dtype('float64')
    """
    array: Any = values
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = (array if array.is_complex() else array.double()).numpy()
    try:
        if np.iscomplexobj(array):
            raise TypeError("they are complex")
        return np.asarray(array, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise InputError(f"no array of real numbers ({error})") from error


def descending(values: ArrayLike) -> NDArray:
    """Singular values (d,) in descending order, float64.

    Raises InputError: not one axis, no value, NaN, infinity, or a negative one.

    Examples:
        >>> descending([1, 3, 2]).tolist()
        [3.0, 2.0, 1.0]
    """
    values = float64(values)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"singular values: got shape {values.shape}, expected (d,) with d >= 1")
    good = (values >= 0) & (values < math.inf)
    if not good.all():
        raise InputError(f"singular values: {values[~good][0]:g} is not a number >= 0, and finite")
    return np.sort(values)[::-1]


def _share(values: ArrayLike) -> NDArray:
    """The non-zero values over their sum, descending: a probability vector (empty if all are zero)."""
    values = descending(values)
    shares = values / max(values[0], np.finfo(float).tiny)
    shares = shares[shares > np.finfo(float).tiny]  # what is smaller adds nothing to a sum, and has a poor logarithm
    return shares / shares.sum()


def entropy_rank(values: ArrayLike) -> float:
    """exp H(p), p = values / sum(values), (d,): how many equal values have the same entropy. NaN if all are zero.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> round(entropy_rank([3, 3, 3]), 6)
        3.0
    """
    p = _share(values)
    return math.exp(-(p * np.log(p)).sum()) if p.size else math.nan


@of_spectrum
def effective_rank(of_covariance: ArrayLike) -> float:
    """exp H(lambda / sum lambda) of lambda (d,), in 1..d (Roy and Vetterli, EUSIPCO 2007, with A = C).

    reptrix calls this number RankMe; effdim calls it shannon_entropy.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> round(effective_rank(of_covariance=[1, 1, 0, 0]), 6)
        2.0
    """
    return entropy_rank(of_covariance)


@of_spectrum
def rankme(of_rows: ArrayLike, epsilon: float = 0.0) -> float:
    """exp H(p), p = s / sum s + epsilon, of the singular values s (d,) of Z, uncentred (RankMe, arXiv 2210.02885).

    The paper adds 1e-7 to each share, stable-pretraining's callback 1e-5, without dividing by the new sum: the value
    may then exceed d.  A large mean alone makes RankMe small.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; epsilon is.

    Examples:
        >>> round(rankme(of_rows=[2, 2, 2, 0]), 6)
        3.0
    """
    s = descending(of_rows)
    if epsilon < 0:
        raise InputError(f"epsilon= is {epsilon}, expected a number of at least 0")
    if epsilon == 0 or not s[0]:
        return entropy_rank(s)
    p = s / s.sum() + epsilon
    return math.exp(-(p * np.log(p)).sum())


@of_spectrum
def participation_ratio(of_covariance: ArrayLike) -> float:
    """(sum lambda)^2 / sum lambda^2 of lambda (d,), in 1..d: exp of the Renyi entropy of order 2.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> participation_ratio(of_covariance=[1, 1, 1, 1])
        4.0
    """
    p = _share(of_covariance)
    return float(1 / (p**2).sum()) if p.size else math.nan


@of_spectrum
def stable_rank(of_covariance: ArrayLike) -> float:
    """sum lambda / lambda_1 of lambda (d,), |Zc|_F^2 / |Zc|_2^2, in 1..d; also called NESum (He and Ozay, ICML 2022).

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> stable_rank(of_covariance=[2, 1, 1])
        2.0
    """
    p = _share(of_covariance)
    return float(1 / p[0]) if p.size else math.nan


@of_spectrum
def numerical_rank(of_covariance: ArrayLike, floor: float = 0.0) -> int:
    """Count of lambda_k, (d,), above both `floor` and lambda_1 d 2^-52 (numpy.linalg.matrix_rank's rule on C).

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> numerical_rank(of_covariance=[1, 1e-3, 1e-18])
        2
    """
    values = descending(of_covariance)
    return int((values > max(floor, values[0] * values.size * np.finfo(np.float64).eps)).sum())


@of_spectrum
def collapsed_dimensions(of_covariance: ArrayLike, threshold: float = 1e-6) -> int:
    """Count of lambda_k, (d,), below threshold lambda_1; d when all are zero.

    The paper counts by eye ("about 30 of 128"); the threshold is ours, and a result always states it.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> collapsed_dimensions(of_covariance=[1, 1e-3, 1e-7])
        1
        >>> collapsed_dimensions(of_covariance=[1, 1e-3, 1e-7], threshold=1e-2)
        2
    """
    values = descending(of_covariance)
    return int((values < threshold * values[0]).sum()) if values[0] > 0 else values.size


class PowerLaw(NamedTuple):
    """lambda_k ~ k^-alpha over k = first..last; r2 of the weighted fit of ln lambda_k on ln k.

    Examples:
        >>> power_law(of_covariance=1 / np.arange(1, 31.0)).last
        30
    """

    alpha: float
    r2: float
    first: int
    last: int


@of_spectrum
def power_law(of_covariance: ArrayLike, first: int = 11, last: int = 100) -> PowerLaw:
    """Weighted least-squares line of ln lambda_k on ln k, weights 1/k, over k = first..min(last, numerical rank).

    Stringer et al. 2019; alpha-ReQ, NeurIPS 2022. NaN with fewer than 10 points: the tail of a low-rank matrix
    is rounding, and a line through it is a number without meaning.

    of_covariance: (d,) singular values of C.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; first is below 1.

    Examples:
        >>> fit = power_law(of_covariance=np.arange(1, 101.0) ** -2)
        >>> round(fit.alpha, 6), round(fit.r2, 6), fit.first, fit.last
        (2.0, 1.0, 11, 100)
    """
    values = descending(of_covariance)
    if first < 1:
        raise InputError(f"first= is {first}, expected at least 1, the largest singular value")
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


@of_spectrum
def alpha(of_covariance: ArrayLike, first: int = 11, last: int = 100) -> float:
    """The exponent of `power_law`, of lambda (d,). alpha-ReQ wishes for about 1; higher is more collapsed.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; first is below 1.

    Examples:
        >>> round(alpha(of_covariance=np.arange(1, 101.0) ** -1.5), 6)
        1.5
    """
    return power_law(of_covariance=of_covariance, first=first, last=last).alpha


@of_spectrum
def condition(of_covariance: ArrayLike) -> float:
    """lambda_d / lambda_1 of lambda (d,), in 0..1: the inverse of the condition number, infinite when collapsed.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> condition(of_covariance=[4, 2, 1])
        0.25
    """
    values = descending(of_covariance)
    return float(values[-1] / values[0]) if values[0] > 0 else math.nan


@of_spectrum
def auc(of_covariance: ArrayLike, count: int | None = None, power: int = 1) -> float:
    """Mean over k = 1..count of the share cumsum(c^power)_k / sum c^power, c_k = sqrt(lambda_k), (d,).

    arXiv 2209.15007, eq. 2, has power 1, though it speaks of variances; those are power 2.
    1/2 + 1/(2 count) for a flat spectrum, 1 for a single direction. count: min(N, d); default d.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; count is below 1.

    Examples:
        >>> auc(of_covariance=[1, 1, 1, 1])
        0.625
    """
    if count is not None and count < 1:
        raise InputError(f"count= is {count}, expected at least 1")
    c = np.sqrt(descending(of_covariance))[:count] ** power
    return float((np.cumsum(c) / c.sum()).mean()) if c[0] > 0 else math.nan


@of_spectrum
def isoscore(of_covariance: ArrayLike) -> float:
    """IsoScore (arXiv 2108.07344) in closed form, (participation ratio - 1) / (d - 1): 0 one direction, 1 flat.

    of_covariance: (d,) singular values of C; NaN for d = 1.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> isoscore(of_covariance=[1, 1, 1]), isoscore(of_covariance=[1, 0, 0])
        (1.0, 0.0)
    """
    d = descending(of_covariance).size
    return (participation_ratio(of_covariance=of_covariance) - 1) / (d - 1) if d > 1 else math.nan


@of_spectrum
def vendi(moments: ArrayLike, order: float = 1.0) -> float:
    """Vendi score, linear kernel (arXiv 2210.02410): exp of the Renyi entropy of the eigenvalues of Z^T Z / N, (d,).

    Rows are of unit length. order: 1 is Shannon's entropy; math.inf counts 1 / the largest share.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> round(vendi(moments=[0.5, 0.5, 0]), 6)
        2.0
    """
    p = _share(moments)
    if order == 1 or p.size == 0:
        return entropy_rank(moments)
    return float(1 / p[0] if order == math.inf else (p**order).sum() ** (1 / (1 - order)))


@of_spectrum
def self_clustering(moments: ArrayLike, n: int) -> float:
    """(sum_ij (z_i.z_j)^2 - E) / (N^2 - E), E = N + N (N - 1) / d, unit rows (arXiv 2305.16562).

    moments: (d,) eigenvalues of Z^T Z / N. About 0 for random directions, 1 for a single point.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative.

    Examples:
        >>> self_clustering(moments=[1, 0], n=10)
        1.0
    """
    moments = descending(moments)
    expected = n + n * (n - 1) / moments.size
    return float((n**2 * (moments**2).sum() - expected) / (n**2 - expected)) if n > 1 < moments.size else math.nan


@of_spectrum
def mean_cosine(of_covariance: ArrayLike, moments: ArrayLike) -> float:
    """Mean of z_i . z_j over all pairs i != j of unit rows, in -1/(N - 1)..1, from two traces: tr(Z^T Z / N) - tr C.

    1 is complete collapse; about 0 are directions without a common one, far from it in text and retrieval models.
    No N x N matrix is formed, and a zero row has cosine 0 with every other.

    of_covariance: (d,) singular values of C; moments: (d,) eigenvalues of Z^T Z / N.

    Raises InputError: the values are not (d,), or one is NaN, infinite or negative; they are not of one length.

    Examples:
        >>> mean_cosine(of_covariance=[0, 0], moments=[1, 0])  # all rows are one
        1.0
    """
    moments, values = descending(moments), descending(of_covariance)
    if len(moments) != len(values):
        raise InputError(f"moments: got {len(moments)} for {len(values)} singular values; give those of the same rows")
    return float(moments.sum() - values.sum())
