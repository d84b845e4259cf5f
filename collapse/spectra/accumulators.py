"""Two ways to add up rows in one pass and any order: float64 products, and a triangle that squares nothing.

`Gram` sums centred products in float64 with the pairwise update of Chan, Golub and LeVeque (1983): sum z z^T - n mean
mean^T would cancel where the mean dominates, as it does after a ReLU.  Squaring halves the digits, so eigenvalues below
some 2^-52 of the largest are rounding.  `Triangle` keeps the R of a QR decomposition of [1 Z] instead (TSQR): with the
ones first, R[1:, 1:] is the triangle of the centred rows, and nothing is squared.
Both take finite float64 rows (b, d) of numpy, best as many at a time as `tile` says, and join: shards in one process,
or processes of torch.distributed.  On a device the same is done by streams.py.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files.rows import BLOCK
from collapse.spectra.result import EPS

LARGEST, SMALLEST = 1e150, 1e-140  # of entries whose squares, summed, stay in float64's range


def refuse_range(name: str, largest: float) -> None:
    """Raise InputError if squares of entries up to `largest` leave float64's range."""
    if largest >= LARGEST:
        raise InputError(f"{name}: squares of entries over {LARGEST:.0e} overflow float64; scale them down")
    if 0 < largest < SMALLEST:
        raise InputError(f"{name}: squares of entries below {SMALLEST:.0e} vanish in float64; scale them up")


def tile(dim: int) -> int:
    """Rows that are added at a time: in the cache from conversion to product, and enough for a product to be fast."""
    return max(1, (1 << 16) // dim, min(max(512, dim), BLOCK // dim))


class Gram:
    """n, mean (d,) and scatter (d, d), its lower triangle, of the rows seen."""

    def __init__(self, dim: int) -> None:
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim), order="F")

    def add(self, z: NDArray) -> None:
        """Add rows z (b, d), finite float64, which are overwritten."""
        from scipy.linalg.blas import dsyr, dsyrk

        b, ones = len(z), np.ones(len(z))
        # The mean of at least as many rows serves as well as their own, and a pass over them is saved.
        near = self.mean if (common := self.n >= b) else ones @ z / b
        z -= near
        missed = ones @ z / b  # what it misses is found exactly and taken off at the end
        # One triangle of z^T z, added in place: half of a product, and no second matrix.
        self.scatter = dsyrk(1.0, z.T, beta=1.0, c=self.scatter, lower=1, overwrite_c=1)
        # About the common mean the new scatter is this less a share b / (n + b) of what was missed, at most a half.
        weight = b * b / (self.n + b) if common else float(b)
        self.scatter = dsyr(-weight, missed, a=self.scatter, lower=1, overwrite_a=1)
        if common:
            self.n, self.mean = self.n + b, near + missed * (b / (self.n + b))
        else:
            self._move(b, near + missed)

    def join(self, other: "Gram") -> None:
        """Add another's rows."""
        if other.n:
            self.scatter = self.scatter + other.scatter
            self._move(other.n, other.mean)

    def _move(self, n: int, mean: NDArray) -> None:
        """Count n rows whose scatter about their own mean has been added (Chan, Golub and LeVeque 1983)."""
        total, delta = self.n + n, mean - self.mean
        between = self.n * n / total
        if between:
            from scipy.linalg.blas import dsyr

            self.scatter = dsyr(between, delta, a=self.scatter, lower=1, overwrite_a=1)
        self.n, self.mean = total, self.mean + delta * (n / total)

    def all_reduce(self) -> None:
        """Join with the other processes' statistics: each recentres on the common mean, then scatters add up."""
        import torch
        from torch import distributed

        count = torch.cat([torch.tensor([self.n], dtype=torch.float64), torch.as_tensor(self.mean) * self.n])
        distributed.all_reduce(count)
        n, mean = int(count[0]), count[1:] / max(1.0, float(count[0]))
        delta = torch.as_tensor(self.mean) - mean
        scatter = torch.as_tensor(self.scatter) + torch.outer(delta, delta) * self.n
        distributed.all_reduce(scatter)
        self.n, self.scatter, self.mean = n, np.asfortranarray(scatter.numpy()), mean.numpy()

    def state(self) -> dict[str, Any]:
        """Numbers and tensors, copies of all there is."""
        import torch

        return {"n": self.n, "mean": torch.tensor(self.mean), "scatter": torch.as_tensor(self.scatter).clone()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.n, self.mean = state["n"], state["mean"].cpu().numpy()
        self.scatter = np.asfortranarray(state["scatter"].cpu().numpy())

    def eigenvalues(self) -> tuple[NDArray, NDArray, float, float]:
        """Unsorted eigenvalues of the scatter and of Z^T Z, the largest mean square of a column, and what is rounding.

        The first two are (d,) float64.  The last is the largest eigenvalue of the scatter that rounding alone makes.

        Z^T Z = scatter + n mean mean^T.  A reflection that takes the mean to the first axis leaves the scatter's
        eigenvalues alone, and reducing it to tridiagonal form T leaves the first axis alone: both spectra then are
        those of tridiagonal matrices, T and T + n |mean|^2 e1 e1^T, for the price of one reduction.
        """
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
        both = [eigvalsh_tridiagonal(d, off).clip(min=0) for d in (diagonal, shifted)]
        return both[0], both[1], column, float(2 * math.sqrt(self.dim) * EPS * both[0].max())

    def centre(self) -> NDArray:
        """(d,): the mean."""
        return self.mean

    def scattered(self) -> NDArray:
        """(d, d): the scatter with both triangles."""
        return np.tril(self.scatter) + np.tril(self.scatter, -1).T

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d): eigenvectors of the scatter as columns, by descending eigenvalue; or the `last` ones, (d, last)."""
        from scipy.linalg import eigh

        few = {} if last is None else {"subset_by_index": (0, last - 1)}
        return eigh(self.scattered(), overwrite_a=True, **few)[1][:, ::-1]

    @property
    def dim(self) -> int:
        """d."""
        return len(self.mean)


class Triangle:
    """R (d + 1, d + 1) of the QR decomposition of [1 Z - shift]; rows wait until a block is worth a decomposition.

    The shift is the mean of the first rows: rounding is relative to the size of what is decomposed.
    """

    def __init__(self, dim: int) -> None:
        self.n, self.waiting, self.dim = 0, [np.zeros((0, dim + 1))], dim
        self.shift: Any = None

    def add(self, z: NDArray) -> None:
        """Add rows z (b, d), finite."""
        if self.shift is None:
            self.shift = z.mean(0, dtype=np.float64)
        rows = np.ones((len(z), self.dim + 1))
        np.subtract(z, self.shift, out=rows[:, 1:])
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
        total = Triangle(self.dim)
        for n, shift, waiting in everyone:
            part = Triangle(self.dim)
            part.n, part.shift, part.waiting = n, shift, waiting
            total.join(part)
        self.n, self.shift, self.waiting = total.n, total.shift, total.waiting

    def state(self) -> dict[str, Any]:
        """Numbers and tensors, copies of all there is."""
        import torch

        shift = self.shift if self.shift is None else torch.tensor(self.shift)
        return {"n": self.n, "waiting": [torch.tensor(rows) for rows in self.waiting], "shift": shift}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.n, self.shift = state["n"], state["shift"] if state["shift"] is None else state["shift"].cpu().numpy()
        self.waiting = [np.asfortranarray(rows.cpu().numpy()) for rows in state["waiting"]]

    def _reduce(self) -> None:
        if len(self.waiting[0]) <= self.dim:
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

    def eigenvalues(self) -> tuple[NDArray, NDArray, float, float]:
        """As `Gram.eigenvalues`, (d,) twice, by singular values of the triangle without and with its first row."""
        centred = self._centred()
        triangle = self._moved(self.waiting[0], self.shift)
        values = (np.zeros(self.dim), np.zeros(self.dim))
        for out, part in zip(values, (centred, triangle[:, 1:]), strict=True):
            singular = np.linalg.svd(part, compute_uv=False) if part.size else np.zeros(0)
            out[: len(singular)] = singular[: self.dim] ** 2
        rounded = float((self.dim * EPS) ** 2 * values[1].sum())
        return *values, float((triangle[:, 1:] ** 2).sum(0).max() / self.n), rounded

    def _centred(self) -> NDArray:
        """The triangle of the centred rows."""
        self._reduce()
        return self.waiting[0][1:, 1:]

    def centre(self) -> NDArray:
        """(d,): the mean, as `Gram.centre`."""
        self._reduce()
        first = self._moved(self.waiting[0], self.shift)[0]  # its first entry is sqrt(n), up to the sign
        return first[1:] / first[0]

    def scattered(self) -> NDArray:
        """(d, d): the scatter, as `Gram.scattered`."""
        triangle = self._centred()
        return triangle.T @ triangle

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d): right singular vectors of the centred rows as columns, by descending singular value; or the last."""
        return np.linalg.svd(self._centred())[2].T[:, -(last or self.dim) :]


def _by_columns(parts: list[NDArray]) -> NDArray:
    """Row blocks as one array in Fortran's order, which LAPACK decomposes in place."""
    rows = np.empty((sum(map(len, parts)), parts[0].shape[1]), order="F")
    return np.concatenate(parts, out=rows)
