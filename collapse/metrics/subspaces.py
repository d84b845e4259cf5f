"""Directions: which subspace is it that two models share, or that collapses in both."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError


def principal_angles(a: ArrayLike, b: ArrayLike) -> NDArray:
    """Angles, in radians, descending, between the spans of the columns of a (d, k) and b (d, k'): (min(k, k'),).

    Example:
        >>> np.degrees(principal_angles([[1], [0]], [[1], [1]])).round(6).tolist()
        [45.0]
    """
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

    Example:
        >>> variance_within([3, 1], np.eye(2), np.eye(2)).tolist()
        [0.75, 1.0]
    """
    values, vectors, basis = (np.asarray(a, np.float64) for a in (values, vectors, basis))
    if vectors.shape != (len(values), len(values)) or basis.shape[:1] != values.shape:
        raise InputError(f"directions: got shapes {vectors.shape} and {basis.shape} for {len(values)} singular values")
    return np.cumsum((basis.T @ vectors) ** 2 @ values) / values.sum()
