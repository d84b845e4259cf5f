"""Three ways to add up rows in one pass and any order: products, float64 or float32, and a triangle without squares.

`Gram` sums centred products in float64 with the pairwise update of Chan, Golub and LeVeque (1983): sum z z^T - n mean
mean^T would cancel where the mean dominates, as it does after a ReLU.  Squaring halves the digits, so eigenvalues below
some 2^-52 of the largest are rounding.  `Gram32` does so with products of float32, for half the time.  `Triangle` keeps
the R of a QR decomposition of [1 Z] instead (TSQR): with the ones first, R[1:, 1:] is the triangle of the centred rows,
and nothing is squared.
All take finite rows (b, d) of numpy, best as many at a time as `tile` says, and join: shards in one process, or
processes of torch.distributed.  On a device the same is done by streams.py.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files.rows import BLOCK
from collapse.spectra.result import EPS

RANGE = {"float64": (1e150, 1e-140), "float32": (1e15, 1e-12)}  # of entries whose squares, summed, stay in range
U32 = 2.0**-24  # unit roundoff of float32


def refuse_range(name: str, largest: float, dtype: str = "float64") -> None:
    """Raise InputError if squares of entries up to `largest` leave the range of the dtype in which they are summed."""
    most, least = RANGE[dtype]
    if largest >= most:
        raise InputError(f"{name}: squares of entries over {most:.0e} overflow {dtype}; scale them down")
    if 0 < largest < least:
        raise InputError(f"{name}: squares of entries below {least:.0e} vanish in {dtype}; scale them up")


def tile(dim: int) -> int:
    """Rows that are added at a time: in the cache from conversion to product, and enough for a product to be fast."""
    return max(1, (1 << 16) // dim, min(max(512, dim), BLOCK // dim))


def tile32(dim: int) -> int:
    """Rows of one float32 product: so many that adding it up in float64 takes about a tenth of its time."""
    return max(1, min(max(1024, dim), 2 * BLOCK // dim))


def rounding32(largest: float, total: float, column: float, squares: float, rows: int) -> float:
    """The largest eigenvalue that rounding makes in a scatter G (d, d) of float32 products, added up in float64.

    Args:
        largest, total: of G's eigenvalues, and their sum.
        column: the largest diagonal entry of G.
        squares: the same of its products, each squared, and then summed over the products.
        rows: b, of a product.

    A product is b additions.  Each rounds by an error of variance u^2 s^2 / 3, u = 2^-24, where s is the sum so far.
    After k rows of a product g, s^2 is about (k / b)^2 g_ij^2 + k / b^2 g_ii g_jj: what the entry tends to, and chance.
    So the entry gets a variance of u^2 / 3 (b g_ij^2 / 3 + g_ii g_jj / 2).  Of T equal products, g = G / T, those of
    row i sum to at most u^2 / (3 T) G_ii (b largest / 3 + total / 2) over its columns.  A symmetric matrix of errors
    that are independent has no eigenvalue beyond twice the root of that (Wigner 1958).  Where products differ,
    squares / column^2 stands for 1 / T.

    Where rows have few values, as zeros after a ReLU, the errors of one sum are alike: on such rows small eigenvalues
    were off by up to 2.6 times as much, on others by less than once.  So it is taken four times.
    """
    if not column:
        return 0.0
    return 8 * U32 * math.sqrt(squares / column * (rows * largest / 3 + total / 2) / 3)


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


class Gram32(Gram):
    """As `Gram`, of float32 rows, whose products are added up in float64; rows wait until `tile32` of them are there.

    squares: (d,) diagonals of the products, squared and summed: how evenly the products share the rounding.
    """

    def __init__(self, dim: int) -> None:
        self._room, self._waiting = np.empty((0, dim), np.float32), 0
        super().__init__(dim)
        self.squares, self._product = np.zeros(dim), np.zeros((0, 0), np.float32)

    @property
    def n(self) -> int:
        """Rows seen, those that wait among them."""
        return self._added + self._waiting

    @n.setter
    def n(self, rows: int) -> None:
        self._added = rows - self._waiting

    def add(self, z: NDArray) -> None:
        """Add rows z (b, d), finite float32, which are overwritten."""
        size = tile32(self.dim)
        while len(z):
            if not self._waiting and len(z) >= size:
                self._multiply(z[:size])
                z = z[size:]
            else:
                part, z = z[: size - self._waiting], z[size - self._waiting :]
                self._wait(part)

    def _wait(self, z: NDArray) -> None:
        """Keep rows until there is a tile of them."""
        if not len(self._room):
            self._room = np.empty((tile32(self.dim), self.dim), np.float32)
        self._room[self._waiting : self._waiting + len(z)] = z
        self._waiting += len(z)
        if self._waiting == len(self._room):
            self._flush()

    def _flush(self) -> None:
        """Add the rows that wait, however few."""
        rows, self._waiting = self._room[: self._waiting], 0
        if len(rows):
            self._multiply(rows)

    def _multiply(self, z: NDArray) -> None:
        """Add rows (b, d) by one product; they are overwritten."""
        from scipy.linalg.blas import dsyr, ssyrk

        b = len(z)
        near = (self.mean if self._added >= b else _sums(z) / b).astype(np.float32)
        z -= near
        missed = _sums(z) / b
        if not self._product.size:
            self._product = np.zeros((self.dim, self.dim), np.float32, order="F")
        self._product = ssyrk(1.0, z.T, beta=0.0, c=self._product, lower=1, overwrite_c=1)
        self.squares += self._product.diagonal().astype(np.float64) ** 2
        self.scatter += self._product
        self.scatter = dsyr(-b, missed, a=self.scatter, lower=1, overwrite_a=1)
        self._move(b, near + missed)

    def join(self, other: Gram) -> None:
        """Add another's rows."""
        assert isinstance(other, Gram32)
        self._flush()
        other._flush()
        super().join(other)
        self.squares = self.squares + other.squares

    def all_reduce(self) -> None:
        """As `Gram.all_reduce`."""
        import torch
        from torch import distributed

        self._flush()
        super().all_reduce()
        squares = torch.as_tensor(self.squares)
        distributed.all_reduce(squares)
        self.squares = squares.numpy()

    def state(self) -> dict[str, Any]:
        """Numbers and tensors, copies of all there is."""
        import torch

        kept = {"waiting": torch.tensor(self._room[: self._waiting]), "squares": torch.tensor(self.squares)}
        return {**super().state(), "n": self._added, **kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        super().restore(state)
        self.squares = state["squares"].cpu().numpy()
        self.add(state["waiting"].cpu().numpy())

    def eigenvalues(self) -> tuple[NDArray, NDArray, float, float]:
        """As `Gram.eigenvalues`; the last with the rounding of the products."""
        self._flush()
        values, moments, column, rounded = super().eigenvalues()
        diagonal, most = self.scatter.diagonal().max(), self.squares.max()
        rounded += rounding32(values.max(), values.sum(), diagonal, most, min(self.n, tile32(self.dim)))
        return values, moments, column, rounded

    def centre(self) -> NDArray:
        """(d,): the mean."""
        self._flush()
        return super().centre()

    def scattered(self) -> NDArray:
        """(d, d): the scatter with both triangles."""
        self._flush()
        return super().scattered()


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


def _sums(z: NDArray) -> NDArray:
    """(d,) float64: the sums of the columns of float32 rows (b, d), in float32 over 64 rows alone."""
    rows = len(z) // 64 * 64
    parts = np.ones(64, np.float32) @ z[:rows].reshape(-1, 64, z.shape[1])
    return parts.sum(0, dtype=np.float64) + z[rows:].sum(0, dtype=np.float64)


def _by_columns(parts: list[NDArray]) -> NDArray:
    """Row blocks as one array in Fortran's order, which LAPACK decomposes in place."""
    rows = np.empty((sum(map(len, parts)), parts[0].shape[1]), order="F")
    return np.concatenate(parts, out=rows)
