"""Two ways to add up rows in one pass and any order: float64 products, and a triangle that squares nothing.

`Gram` sums centred products in float64 with the pairwise update of Chan, Golub and LeVeque (1983): sum z z^T - n mean
mean^T would cancel where the mean dominates, as it does after a ReLU.  Squaring halves the digits, so eigenvalues below
some 2^-52 of the largest are rounding.  `Triangle` keeps the R of a QR decomposition of [1 Z] instead (TSQR): with the
ones first, R[1:, 1:] is the triangle of the centred rows, and nothing is squared.
Both take finite rows (b, d) of numpy or torch, and join: shards in one process, or processes of torch.distributed.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse.files.rows import is_tensor
from collapse.spectra.result import EPS


class Gram:
    """n, mean (d,) and scatter (d, d), its lower triangle, of the rows seen: numpy arrays, or tensors on a device."""

    STATE = ("n", "mean", "scatter")

    def __init__(self, zeros: Callable[..., Any], dim: int) -> None:
        self.n, self.mean, self.scatter = 0, zeros(dim), zeros((dim, dim))
        self.centred: Any = zeros((0, dim))  # kept between blocks: fresh memory costs as much as the pass over it
        if isinstance(self.scatter, np.ndarray):
            self.scatter = np.asfortranarray(self.scatter)

    def add(self, z: Any) -> None:
        """Add rows z (b, d), finite."""
        if not isinstance(z, np.ndarray):
            mean = z.mean(0)
            z = z - mean
            self.scatter.addmm_(z.T, z)
            self._move(len(z), mean)
            return
        from scipy.linalg.blas import dsyr, dsyrk

        if len(self.centred) < len(z):
            self.centred = np.empty(z.shape)
        centred, one = self.centred[: len(z)], np.ones(len(z))
        # Near the mean first, in the precision of the rows; what it misses is found exactly and taken off at the end.
        near = np.asarray(one.astype(z.dtype) @ z / len(z), np.float64)
        np.subtract(z, near, out=centred)
        missed = one @ centred / len(z)
        # One triangle of z^T z, added in place: half of a product, and no second matrix.
        self.scatter = dsyrk(1.0, centred.T, beta=1.0, c=self.scatter, lower=1, overwrite_c=1)
        self.scatter = dsyr(-float(len(z)), missed, a=self.scatter, lower=1, overwrite_a=1)
        self._move(len(z), near + missed)

    def join(self, other: "Gram") -> None:
        """Add another's rows."""
        if other.n:
            self.scatter = self.scatter + other.scatter
            self._move(other.n, other.mean)

    def _move(self, n: int, mean: Any) -> None:
        """Count n rows whose scatter about their own mean has been added (Chan, Golub and LeVeque 1983)."""
        total, delta = self.n + n, mean - self.mean
        between = self.n * n / total
        if between and isinstance(self.scatter, np.ndarray):
            from scipy.linalg.blas import dsyr

            self.scatter = dsyr(between, delta, a=self.scatter, lower=1, overwrite_a=1)
        elif between:
            self.scatter += delta[:, None] * delta * between
        self.n, self.mean = total, self.mean + delta * (n / total)

    def all_reduce(self) -> None:
        """Join with the other processes' statistics: each recentres on the common mean, then scatters add up."""
        import torch
        from torch import distributed

        count = torch.cat([torch.tensor([float(self.n)]), torch.as_tensor(self.mean).cpu() * self.n]).to(self._tensor())
        distributed.all_reduce(count)
        n, mean = int(count[0]), count[1:] / max(1.0, float(count[0]))
        delta = torch.as_tensor(self.mean).to(mean) - mean
        scatter = self._tensor() + torch.outer(delta, delta) * self.n
        distributed.all_reduce(scatter)
        if isinstance(self.scatter, np.ndarray):
            self.scatter, self.mean = np.asfortranarray(scatter.numpy()), mean.numpy()
        else:
            self.scatter, self.mean = scatter, mean
        self.n = n

    def _tensor(self) -> Any:
        import torch

        return torch.as_tensor(self.scatter)

    def eigenvalues(self) -> tuple[NDArray, NDArray, float]:
        """Unsorted eigenvalues of the scatter and of Z^T Z, and the largest mean square of a column.

        Z^T Z = scatter + n mean mean^T.  A reflection that takes the mean to the first axis leaves the scatter's
        eigenvalues alone, and reducing it to tridiagonal form T leaves the first axis alone: both spectra then are
        those of tridiagonal matrices, T and T + n |mean|^2 e1 e1^T, for the price of one reduction.
        """
        if is_tensor(self.scatter):
            return self._eigenvalues_there()
        from scipy.linalg import eigvalsh_tridiagonal
        from scipy.linalg.lapack import dsytrd, dsytrd_lwork

        mean, scatter = self.centre(), self.scattered()
        column = float((scatter.diagonal() / self.n + mean**2).max())
        length = float(np.linalg.norm(mean))
        if length > 0:
            v = mean / length
            v[0] += math.copysign(1.0, v[0])
            v /= np.linalg.norm(v)
            w = scatter @ v
            w -= v * (v @ w)
            scatter -= 2 * (v[:, None] * w + w[:, None] * v)
        work = int(dsytrd_lwork(self.dim, lower=1)[0])
        _, diagonal, off, _, _ = dsytrd(np.asfortranarray(scatter), lower=1, lwork=work, overwrite_a=1)
        shifted = diagonal.copy()
        shifted[0] += self.n * length**2
        both = (eigvalsh_tridiagonal(d, off).clip(min=0) for d in (diagonal, shifted))
        return next(both), next(both), column

    def _eigenvalues_there(self) -> tuple[NDArray, NDArray, float]:
        """The same, two decompositions on the device: at d = 8192 the CPU takes minutes."""
        import torch

        scatter = self.scatter.tril() + self.scatter.tril(-1).T
        moment = scatter + self.n * torch.outer(self.mean, self.mean)
        found = [torch.linalg.eigvalsh(matrix).clamp(min=0).cpu().numpy() for matrix in (scatter, moment)]
        return found[0], found[1], float(moment.diagonal().max() / self.n)

    def centre(self) -> NDArray:
        """(d,): the mean."""
        return np.asarray(self.mean.cpu() if is_tensor(self.mean) else self.mean)

    def scattered(self) -> NDArray:
        """(d, d): the scatter with both triangles."""
        scatter = np.asarray(self.scatter.cpu() if is_tensor(self.scatter) else self.scatter)
        return np.tril(scatter) + np.tril(scatter, -1).T

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d): eigenvectors of the scatter as columns, by descending eigenvalue; or the last so many of them."""
        from scipy.linalg import eigh

        few = {} if last is None else {"subset_by_index": (0, last - 1)}
        return eigh(self.scattered(), overwrite_a=True, **few)[1][:, ::-1]

    @property
    def dim(self) -> int:
        """d."""
        return len(self.mean)

    def rounding(self, scatter: NDArray, moment: NDArray) -> float:
        """Largest eigenvalue of the scatter that rounding alone makes."""
        return float(2 * math.sqrt(scatter.size) * EPS * scatter.max())


class Triangle:
    """R (d + 1, d + 1) of the QR decomposition of [1 Z - shift]; rows wait until a block is worth a decomposition.

    The shift is the mean of the first rows: rounding is relative to the size of what is decomposed.
    """

    STATE = ("n", "waiting", "shift")

    def __init__(self, zeros: Callable[..., Any], dim: int) -> None:
        self.n, self.waiting, self.dim, self.zeros = 0, [zeros((0, dim + 1))], dim, zeros
        self.shift: Any = None

    def add(self, z: Any) -> None:
        """Add rows z (b, d), finite."""
        if self.shift is None:
            self.shift = z.mean(0)
        rows = self.zeros((len(z), self.dim + 1))
        rows[:, 0], rows[:, 1:] = 1, z - self.shift
        self.n += len(z)
        self.waiting.append(rows)
        if sum(map(len, self.waiting[1:])) >= max(2 * self.dim, 4096):  # fewer rows cost more calls and more rereading
            self._reduce()

    def join(self, other: "Triangle") -> None:
        """Add another's rows, moved to this shift."""
        if other.n:
            shift = other.shift if self.shift is None else self.shift
            self.waiting += [self._moved(rows, other.shift - shift) for rows in other.waiting]
            self.n, self.shift = self.n + other.n, shift
            self._reduce()

    @staticmethod
    def _moved(rows: Any, by: Any) -> Any:
        """The same rows for a shift that is `by` smaller: the column of ones says how much of it each holds."""
        rows = rows + 0
        rows[:, 1:] += rows[:, :1] * by
        return rows

    def all_reduce(self) -> None:
        """Join with the other processes' triangles; these are few, and small beside the rows."""
        from torch import distributed

        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, (self.n, self.shift, self.waiting))
        total = Triangle(self.zeros, self.dim)
        for n, shift, waiting in everyone:
            part = Triangle(self.zeros, self.dim)
            part.n, part.shift, part.waiting = n, shift, waiting
            total.join(part)
        self.n, self.shift, self.waiting = total.n, total.shift, total.waiting

    def _reduce(self) -> None:
        if is_tensor(self.waiting[0]):
            import torch

            self.waiting = [torch.linalg.qr(torch.cat(self.waiting), mode="r").R]
        elif len(self.waiting[0]) <= self.dim:
            from scipy.linalg.lapack import dgeqrf, dgeqrf_lwork

            rows = _by_columns(self.waiting)
            work = int(dgeqrf_lwork(*rows.shape)[0])
            factors, *_ = dgeqrf(rows, lwork=work, overwrite_a=1)
            self.waiting = [np.triu(factors[: self.dim + 1])]
        elif len(self.waiting) > 1:
            from scipy.linalg.lapack import dtpqrt

            # Rows below a triangle: its zeros are left alone, which a decomposition of the stack would fill.
            rows, width = _by_columns(self.waiting[1:]), min(64, max(16, self.dim // 10), self.dim + 1)
            self.waiting = [dtpqrt(0, width, np.asfortranarray(self.waiting[0]), rows, overwrite_b=1)[0]]

    def eigenvalues(self) -> tuple[NDArray, NDArray, float]:
        """As `Gram.eigenvalues`, from the singular values of the triangle without and with its first row."""
        centred = self._centred()
        rows = self._moved(self.waiting[0], self.shift)
        triangle = np.asarray(rows.cpu() if is_tensor(rows) else rows)
        values = (np.zeros(self.dim), np.zeros(self.dim))
        for out, part in zip(values, (centred, triangle[:, 1:]), strict=True):
            found = np.linalg.svd(part, compute_uv=False) if part.size else np.zeros(0)
            out[: len(found)] = found[: self.dim] ** 2
        return *values, float((triangle[:, 1:] ** 2).sum(0).max() / self.n)

    def _centred(self) -> NDArray:
        """The triangle of the centred rows."""
        self._reduce()
        triangle = self.waiting[0]
        return np.asarray(triangle.cpu() if is_tensor(triangle) else triangle)[1:, 1:]

    def centre(self) -> NDArray:
        """As `Gram.centre`."""
        self._reduce()
        first = self._moved(self.waiting[0], self.shift)[0]  # its first entry is sqrt(n), up to the sign
        row = np.asarray(first.cpu() if is_tensor(first) else first)
        return row[1:] / row[0]

    def scattered(self) -> NDArray:
        """As `Gram.scattered`."""
        triangle = self._centred()
        return triangle.T @ triangle

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d): right singular vectors of the centred rows as columns, by descending singular value; or the last."""
        return np.linalg.svd(self._centred())[2].T[:, -(last or self.dim) :]

    def rounding(self, scatter: NDArray, moment: NDArray) -> float:
        """As `Gram.rounding`."""
        return float((self.dim * EPS) ** 2 * moment.sum())


def _by_columns(parts: list[NDArray]) -> NDArray:
    """Row blocks as one array in Fortran's order, which LAPACK decomposes in place."""
    rows = np.empty((sum(map(len, parts)), parts[0].shape[1]), order="F")
    return np.concatenate(parts, out=rows)
