"""Directions: which subspace is it that two models share, or that collapses in both."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError
from collapse.metrics.spectral import float64


def principal_angles(a: ArrayLike, b: ArrayLike) -> NDArray:
    """Angles, in radians, descending, between the spans of the columns of a (d, k) and b (d, k'): (min(k, k'),).

    Raises InputError: not two axes each, another d, or what is not finite.

    Examples:
        >>> np.degrees(principal_angles([[1], [0]], [[1], [1]])).round(6).tolist()
        [45.0]
    """
    a, b = float64(a), float64(b)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or 0 in (*a.shape, *b.shape):
        raise InputError(f"directions: got shapes {a.shape} and {b.shape}, expected (d, k) and (d, k') of one d")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("directions: hold NaN or infinity")
    a, b = sorted((_basis(a), _basis(b)), key=lambda basis: -basis.shape[1])
    inner = a.T @ b
    cosines, sines = _singular(inner)[::-1].clip(0, 1), _singular(b - a @ inner).clip(0, 1)
    return np.where(cosines**2 >= 0.5, np.arcsin(sines), np.arccos(cosines))  # each where it has its digits


def _singular(a: NDArray) -> NDArray:
    """Singular values by QR iteration, which converges where divide and conquer may not."""
    from scipy.linalg import svd

    return svd(a, compute_uv=False, lapack_driver="gesvd")


def _basis(a: NDArray) -> NDArray:
    """An orthonormal basis of the span of the columns; columns that are one already stay."""
    from scipy.linalg import svd

    if np.abs(a.T @ a - np.eye(a.shape[1])).max() < 1e-8:
        return a
    u, s, _ = svd(a, full_matrices=False, lapack_driver="gesvd")
    return u[:, s > s[0] * max(a.shape) * np.finfo(np.float64).eps]


def variance_within(values: ArrayLike, vectors: ArrayLike, basis: ArrayLike) -> NDArray:
    """Share of the variance of A in the span of the first k columns of an orthonormal basis, for k = 1..K: (K,).

    Args:
        values, vectors: (d,) singular values and (d, d) singular vectors, columns, of A's covariance.
        basis: (d, K), as the singular vectors of another B, largest first.

    NaN where A does not vary.

    Raises InputError: the shapes do not fit one another, or a value is negative or not finite.

    Examples:
        >>> variance_within([3, 1], np.eye(2), np.eye(2)).tolist()
        [0.75, 1.0]
    """
    values, vectors, basis = (float64(a) for a in (values, vectors, basis))
    if vectors.shape != (len(values), len(values)) or basis.shape[:1] != values.shape:
        raise InputError(f"directions: got shapes {vectors.shape} and {basis.shape} for {len(values)} singular values")
    if not ((values >= 0) & (values < np.inf)).all() or not (np.isfinite(vectors).all() and np.isfinite(basis).all()):
        raise InputError("directions: a singular value is negative or not finite, or a vector is not")
    shares = np.cumsum((basis.T @ vectors) ** 2 @ values)
    return shares / values.sum() if values.any() else np.full(len(shares), np.nan)
