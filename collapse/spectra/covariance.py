"""Singular values of the covariance of embeddings, in one pass over any number of rows.

Z (n, d), rows are samples;  C = Zc^T Zc / (n - 1), centred: its singular values are those of the paper's figures 2, 8
and 10 (arXiv 2110.09348, section 3).  `Covariance` checks, normalises and accumulates rows (accumulators.py), merges,
and says what of its spectrum is rounding; the result is a `Spectrum` (result.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.arguments import choice, device_of, flag, share, whole
from collapse.errors import warn
from collapse.files.rows import blocks, check_memory, is_tensor
from collapse.metrics import marchenko_pastur_edges
from collapse.spectra.accumulators import RANGE, U32, Gram, Gram32, Triangle, refuse_range, tile, tile32
from collapse.spectra.result import EPS, Spectrum

METHODS = ("auto", "covariance", "qr", "float32")
KINDS = {"covariance": Gram, "qr": Triangle, "float32": Gram32}


class Covariance:
    """Streaming covariance of embeddings: one pass, O(d^2) memory, mergeable.

    Batches may have any size and come in any order; shards are joined with `merge`.

    Args:
        dim: d, the width of a row.
        method: "covariance" (float64 products; right down to about 1e-7 of the largest singular value of Z),
            "qr" (right down to about 1e-12 of it; about three times slower) or "float32" (float32 products, added up
            in float64; right down to about 1e-3 of it; up to twice as fast, for rows that are not float64).
        normalize: divide each row by its Euclidean norm first, as the paper does (a zero row stays zero and is
            counted).
        device: None accumulates with numpy; "cpu", "cuda", ... with torch float64 there.  The host then waits for the
            device only when a result is read, and a row that is not finite is an error there and not in `update`.
        name: what errors call the rows.

    Raises InputError: no column, an unknown method, or more memory needed than there is.

    Examples:
        >>> z = np.random.default_rng(0).standard_normal((500, 3))
        >>> shards = [Covariance(3).update(part) for part in (z[:100], z[100:])]
        >>> shards[0].merge(shards[1]).spectrum().n
        500
    """

    def __init__(
        self,
        dim: int,
        method: str = "covariance",
        normalize: bool = True,
        device: str | None = None,
        name: str = "embeddings",
    ) -> None:
        whole("dim", dim, 1)
        choice("method", method, METHODS[1:])
        flag("normalize", normalize)
        if device not in (None, "cpu"):
            device_of(device)
        require_memory(name, dim, method, device)
        self.dim, self.method, self.normalize, self.device, self.name = dim, method, normalize, device, name
        self.dtype = "float32" if method == "float32" else "float64"
        # Unit roundoff of the coarsest dtype seen; float32 rows round where they are stored, normalised and centred.
        self.roundoff = math.sqrt(3) * U32 if method == "float32" else EPS / 2
        self._zero_rows = 0
        self._room = np.empty((0, dim), self.dtype)
        self._sum = self._make_sum()

    def _make_sum(self) -> Any:
        if self.device is None:
            return KINDS[self.method](self.dim)
        from collapse.spectra.streams import KINDS as STREAMS

        return STREAMS[self.method](self.dim, self.device, self.normalize, self.name)

    @property
    def n(self) -> int:
        """Rows seen."""
        return int(self._sum.n)

    @property
    def zero_rows(self) -> int:
        """Rows that are zero and were left so by the normalisation."""
        return self._zero_rows if self.device is None else int(self._sum.zero_rows)

    def number(self, numbers: range) -> "Covariance":
        """Let errors call the rows by these numbers instead of 0, 1, ...; on a device. Returns self."""
        if self.device is not None:
            self._sum.numbers = numbers
        return self

    def update(self, z: Any) -> "Covariance":
        """Add a batch z, (n, d), array or tensor of any real dtype and device; n = 0 is allowed. Returns self.

        Raises InputError, and changes nothing, if z is not (n, d), is not numeric, is float64 for method float32, or
        holds NaN, infinity, or entries whose squares float64, or float32, cannot hold.  On a device what z holds is
        looked at when a result is read.
        """
        self.add(*self.checked(z, self.n))
        return self

    def checked(self, z: Any, first: int) -> tuple[float, Any]:
        """(unit roundoff, rows) of a batch that `add` takes; `first` is the index of its first row, for the message.

        Raises InputError: as `update`.
        """
        roundoff, rows = self._rows(z)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise InputError(f"{self.name}: got shape {tuple(rows.shape)}, expected (n, {self.dim})")
        if self.method == "float32" and 0 < roundoff < U32:
            raise InputError(f"{self.name}: float64 rows, which method float32 would round; give covariance or qr")
        if self.method == "qr":
            require_memory(self.name, self.dim, "qr", self.device, rows=self.n + len(rows))
        for part in blocks(rows) if self.device is None else ():
            self._check(part, first)
            first += len(part)
        return roundoff, rows

    def add(self, roundoff: float, rows: Any) -> None:
        """Add rows that `checked` has passed."""
        if self.device is None:
            step = (tile32 if self.method == "float32" else tile)(self.dim)
            for start in range(0, len(rows), step):
                self._sum.add(self._prepared(rows[start : start + step]))
        else:
            self._sum.add(rows)
        if len(rows):
            self.roundoff = max(self.roundoff, roundoff)

    def _prepared(self, rows: NDArray) -> NDArray:
        """A tile of rows, over their norms if so wished, in memory that is kept: fresh memory costs a pass over it."""
        if len(self._room) < len(rows):
            self._room = np.empty(rows.shape, self.dtype)
        z = self._room[: len(rows)]
        np.copyto(z, rows)
        if self.normalize:
            self._zero_rows += _normalize(z)
        return z

    def _rows(self, z: Any) -> tuple[float, Any]:
        """(unit roundoff of z's dtype, z as float32 or float64 of numpy, or as floating on the device)."""
        if is_tensor(z):
            import torch

            if z.is_complex() or z.dtype == torch.bool or z.layout != torch.strided or z.is_quantized:
                raise InputError(f"{self.name}: a {z.dtype}, {z.layout} tensor is no dense array of real numbers")
            roundoff = torch.finfo(z.dtype).eps / 2 if z.is_floating_point() else 0.0
            if self.device is not None:
                return roundoff, z.detach().to(self.device, z.dtype if z.is_floating_point() else torch.float64)
            kept = z.dtype in (torch.float32, torch.float64)
            return roundoff, z.detach().to("cpu", z.dtype if kept else torch.float64).numpy()
        z = np.asarray(z)
        if z.dtype.kind not in "fiu":
            raise InputError(f"{self.name}: dtype {z.dtype} is not real numbers; give a float array (n, d)")
        roundoff = float(np.finfo(z.dtype).eps / 2) if z.dtype.kind == "f" else 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # long doubles that become infinite, which `_check` finds
            z = z if z.dtype in (np.float32, np.float64) else z.astype(np.float64)
        if self.device is None:
            return roundoff, z
        import torch

        return roundoff, torch.from_numpy(np.ascontiguousarray(z)).to(self.device)

    def _check(self, rows: Any, first: int) -> None:
        """Refuse NaN, infinity, and squares that overflow; `first` is the index of the first row."""
        flat = rows.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            # One pass tells of all; only float32 overflows, or vanishes, without cause.
            if RANGE[self.dtype][1] ** 2 <= float(flat @ flat) < RANGE[self.dtype][0] ** 2:
                return
        rows = np.asarray(rows)
        bad = ~np.isfinite(rows)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"{self.name}: row {first + row}, column {column} is NaN or infinite ({bad.any(1).sum()} such rows "
                "in this block); remove them, or look at the network that wrote them"
            )
        if not self.normalize:
            refuse_range(self.name, float(np.abs(rows).max(initial=0)), self.dtype)

    def merge(self, other: "Covariance") -> "Covariance":
        """Join another shard's statistics, as if its rows had been seen here. Returns self.

        Raises InputError: another width, method, normalisation or device.
        """
        for name in ("dim", "method", "normalize", "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(f"merge: {name} is {mine} here and {theirs} there; they must be equal")
        self._sum.join(other._sum)
        self._zero_rows += other._zero_rows
        self.roundoff = max(self.roundoff, other.roundoff)
        return self

    def all_reduce(self) -> "Covariance":
        """Join with the other processes of `torch.distributed`, as if one had seen all rows. Returns self.

        Every process calls it, those without rows too; each then holds the statistics of all.
        """
        import torch
        from torch import distributed

        self._sum.all_reduce()
        counts = torch.as_tensor(np.array([self._zero_rows, self.roundoff])).to(self.device or "cpu")
        distributed.all_reduce(counts[:1])
        distributed.all_reduce(counts[1:], distributed.ReduceOp.MAX)
        self._zero_rows, self.roundoff = int(counts[0]), float(counts[1])
        return self

    def matrix(self) -> NDArray:
        """(d, d) float64: the covariance itself, divisor n - 1. Raises InputError: fewer than two rows were seen."""
        if self.n < 2:
            raise InputError(f"{self.name}: {self.n} rows; a covariance needs at least 2")
        return self._sum.scattered() / (self.n - 1)

    def constant(self, errors: NDArray | None = None) -> NDArray:
        """(d,) bool: columns whose variance is zero, or rounding of their own values.

        errors: (b, d) that some rows are known to have, as for `spectrum`.
        """
        variance = self.matrix().diagonal()
        square = variance * (1 - 1 / self.n) + self._sum.centre() ** 2
        made = (4 * self.roundoff) ** 2 * square
        if errors is not None:
            made = np.maximum(made, 2 * (errors**2).mean(0))
        return variance <= made

    def moments(self) -> Any:
        """(d + 1, d + 1) float64 tensor on the device, of method "covariance" there; the host does not wait for it.

        The first row is n and the mean (d,), the rest of the first column is the number of zero rows and zeros, and
        what remains is the scatter (d, d) about the mean, of which the lower triangle counts.
        """
        return self._sum.moments()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything as numbers and tensors, for a checkpoint."""
        names = ("dim", "method", "normalize", "device", "zero_rows", "roundoff")
        return {**{name: getattr(self, name) for name in names}, "sum": self._sum.state()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Covariance":
        """The accumulator that `state_dict` described."""
        total = cls(state["dim"], state["method"], state["normalize"], state["device"])
        total.roundoff = state["roundoff"]
        total._sum.restore(state["sum"])
        if total.device is None:
            total._zero_rows = state["zero_rows"]
        elif "facts" not in state["sum"]:  # as versions before streams saved it
            total._sum.facts[0] = state["zero_rows"]
        return total

    def spectrum(
        self,
        threshold: float = 1e-6,
        vectors: bool = False,
        rounding: NDArray | None = None,
        *,
        source: Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> Spectrum:
        """The singular values of C and what the rank measures need; what it warns of are Python warnings too.

        threshold: what counts as collapsed, as a share of the largest; vectors: keep the singular vectors;
        rounding: (b, d) errors that some rows are known to have, for the floor; source, images, warnings: provenance
        for the result.

        Raises InputError: fewer than two rows were seen, an impossible threshold.
        """
        result = self.measured(threshold, vectors, rounding, source=source, images=images, warnings=warnings)
        warn(result.warnings)
        return result

    def measured(
        self,
        threshold: float = 1e-6,
        vectors: bool = False,
        rounding: NDArray | None = None,
        *,
        source: Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> Spectrum:
        """What `spectrum` gives, without a Python warning: a part of a larger result.

        rounding: (b, d); the rest as for `spectrum`.

        Raises InputError: as `spectrum`.
        """
        share("threshold", threshold)
        if self.n < 2:
            raise InputError(f"{self.name}: {self.n} rows; a covariance needs at least 2")
        scatter, moment, column, rounded = self._sum.eigenvalues()
        notes = list(warnings)
        if zero_rows := self.zero_rows:
            notes.append(f"{zero_rows} of {self.n} rows are zero and were left zero by the normalisation")
        if self.n <= self.dim:
            notes.append(f"{self.n} rows in {self.dim} dimensions: at most {self.n - 1} singular values are not zero")
        elif self.n < 10 * self.dim:
            notes.append(
                f"{self.n} rows for {self.dim} dimensions: small singular values are biased down; 10 d advised"
            )
        basis = self._sum.vectors() if vectors else None
        made = self._white(self.roundoff**2 * column / 3)
        if rounding is not None:
            eighth = max(1, self.dim // 8)
            tail = rounding @ (self._sum.vectors(eighth) if basis is None else basis[:, -eighth:])
            made = max(made, 2 * float(np.linalg.norm(tail, 2) ** 2 / len(tail)))
        floor = max(made, rounded / (self.n - 1))
        largest = float(scatter.max()) / (self.n - 1)
        if threshold * largest < floor < largest:
            notes.append(
                f"threshold {threshold:g} lies in the rounding, which reaches {floor / largest:.1g} of the largest "
                "singular value: collapsed_dimensions counts what is not data"
            )
        return Spectrum(
            singular_values=np.sort(scatter)[::-1] / (self.n - 1),
            moments=np.sort(moment)[::-1] / self.n,
            n=self.n,
            floor=floor,
            vectors=basis if vectors else None,
            method=self.method,
            l2_normalized=self.normalize,
            threshold=threshold,
            warnings=notes,
            source={"kind": "array"} if source is None else source,
            images=images,
        )

    def _white(self, variance: float) -> float:
        """Largest singular value that independent errors of this variance in each entry make by themselves.

        The rounding error of storing z is uniform within +-u |z|, of variance u^2 z^2 / 3.  Errors of different
        entries are nearly independent, so their covariance is white, up to the Marchenko-Pastur edge.  Those of a
        forward pass are not: most lie along the largest directions, so of these `spectrum` takes twice the largest
        mean square along any of the smallest eighth; 16 rows tell it to a third.
        """
        return marchenko_pastur_edges(self.n, self.dim, variance)[1]


def require_memory(
    name: str, dim: int, method: str, device: str | None, groups: int = 1, rows: int | None = None
) -> None:
    """Raise InputError if accumulators of `dim` columns, or the QR of so many rows, need more memory than there is.

    At the end a covariance holds five matrices (d, d) at once, and a QR five copies of the rows that wait for it.
    """
    if device not in (None, "cpu"):
        return
    if method != "qr":
        what, needed = f"the covariance of {dim} columns", 8 * (groups + 4) * dim**2
    else:
        waiting = min(rows or 0, 4096 + 3 * dim)
        what, needed = f"the QR decomposition of {waiting} rows of {dim} columns", 40 * waiting * (dim + 1)
    hint = "; take fewer columns" + ("" if method == "qr" else ", or, for few rows, give method=qr")
    if needed > 1 << 30:
        check_memory(name, needed, what, hint)


def _normalize(z: NDArray) -> int:
    """Divide rows by their norms, in place; how many are zero and stay so."""
    with np.errstate(over="ignore"):
        square = np.vecdot(z, z)
    far = 1e250 if z.dtype == np.float64 else 1e30
    odd = ~((square > 1 / far) & (square < far))
    if odd.any():  # squares of 1e-200 or 1e200 leave float64's range: divide by the largest entry first
        largest = abs(z[odd]).max(1)
        z[odd] /= (largest + (largest == 0))[:, None]
        square[odd] = (z[odd] ** 2).sum(1)
    zero = square == 0
    z *= ((square + zero) ** -0.5)[:, None]
    return int(zero.sum())
