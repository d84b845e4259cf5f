"""Singular values of the covariance of embeddings, in one pass over any number of rows.

Z (n, d), rows are samples;  C = Zc^T Zc / (n - 1), centred: its singular values are those of the paper's figures 2, 8
and 10 (arXiv 2110.09348, section 3).  `Covariance` accumulates and merges, `Spectrum` is the result, `spectrum` does
both in one call.  Rank measures are in metrics.py, array files in arrays.py.

Two accumulators. `_Gram` sums centred products in float64 with the pairwise update of Chan, Golub and LeVeque (1983):
sum z z^T - n mean mean^T would cancel where the mean dominates, as it does after a ReLU.  Squaring halves the digits,
so values below about d 2^-52 lambda_1 are rounding.  `_Triangle` keeps the R of a QR decomposition of [1 Z] instead
(TSQR): with the ones first, R[1:, 1:] is the triangle of the centred rows, and nothing is squared.
Both merge: shards in one process, or processes of torch.distributed.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError, metrics
from collapse.results import command, to_json, versions

EPS = float(np.finfo(np.float64).eps)
LARGEST = 1e150  # an entry whose square, summed, stays in float64's range
BLOCK = 1 << 22  # entries of a float64 block: 32 MiB
METHODS = ("auto", "covariance", "qr")


def _is_tensor(z: Any) -> bool:
    return type(z).__module__.partition(".")[0] == "torch"


class _Gram:
    """n, mean (d,) and scatter (d, d), its lower triangle, of the rows seen: numpy arrays, or tensors on a device."""

    def __init__(self, zeros: Callable[..., Any], dim: int) -> None:
        self.n, self.mean, self.scatter = 0, zeros(dim), zeros((dim, dim))
        if isinstance(self.scatter, np.ndarray):
            self.scatter = np.asfortranarray(self.scatter)

    def add(self, z: Any) -> None:
        mean = z.mean(0)
        z -= mean
        if isinstance(z, np.ndarray):
            from scipy.linalg.blas import dsyrk

            # One triangle of z^T z, added in place: half of a product, and no second matrix.
            self.scatter = dsyrk(1.0, z.T, beta=1.0, c=self.scatter, lower=1, overwrite_c=1)
        else:
            self.scatter.addmm_(z.T, z)
        self._move(len(z), mean)

    def join(self, other: "_Gram") -> None:
        if other.n:
            self.scatter = self.scatter + other.scatter
            self._move(other.n, other.mean)

    def _move(self, n: int, mean: Any) -> None:
        """Count n rows whose scatter about their own mean has been added (Chan, Golub and LeVeque 1983)."""
        total, delta = self.n + n, mean - self.mean
        if self.n:
            self.scatter += delta[:, None] * delta * (self.n * n / total)
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
        from scipy.linalg import eigvalsh_tridiagonal
        from scipy.linalg.lapack import dsytrd, dsytrd_lwork

        mean, scatter = (np.asarray(a.cpu() if _is_tensor(a) else a) for a in (self.mean, self.scatter))
        scatter = np.tril(scatter) + np.tril(scatter, -1).T
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

    @property
    def dim(self) -> int:
        return len(self.mean)

    def rounding(self, scatter: NDArray, moment: NDArray) -> float:
        return float(scatter.size * EPS * scatter.max())


class _Triangle:
    """R (d + 1, d + 1) of the QR decomposition of [1 Z - shift]; rows wait until a block is worth a decomposition.

    The shift is the mean of the first rows: rounding is relative to the size of what is decomposed.
    """

    def __init__(self, zeros: Callable[..., Any], dim: int) -> None:
        self.n, self.waiting, self.dim, self.zeros = 0, [zeros((0, dim + 1))], dim, zeros
        self.shift: Any = None

    def add(self, z: Any) -> None:
        if self.shift is None:
            self.shift = z.mean(0)
        rows = self.zeros((len(z), self.dim + 1))
        rows[:, 0], rows[:, 1:] = 1, z - self.shift
        self.n += len(z)
        self.waiting.append(rows)
        if sum(map(len, self.waiting[1:])) >= 2 * self.dim:
            self._reduce()

    def join(self, other: "_Triangle") -> None:
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
        total = _Triangle(self.zeros, self.dim)
        for n, shift, waiting in everyone:
            part = _Triangle(self.zeros, self.dim)
            part.n, part.shift, part.waiting = n, shift, waiting
            total.join(part)
        self.n, self.shift, self.waiting = total.n, total.shift, total.waiting

    def _reduce(self) -> None:
        if _is_tensor(self.waiting[0]):
            import torch

            self.waiting = [torch.linalg.qr(torch.cat(self.waiting), mode="r").R]
        else:
            self.waiting = [np.linalg.qr(np.concatenate(self.waiting), mode="r")]

    def eigenvalues(self) -> tuple[NDArray, NDArray, float]:
        """As `_Gram.eigenvalues`, from the singular values of the triangle without and with its first row."""
        self._reduce()
        rows = self._moved(self.waiting[0], self.shift)
        triangle = np.asarray(rows.cpu() if _is_tensor(rows) else rows)
        centred = np.asarray(self.waiting[0].cpu() if _is_tensor(rows) else self.waiting[0])[1:, 1:]
        values = (np.zeros(self.dim), np.zeros(self.dim))
        for out, part in zip(values, (centred, triangle[:, 1:]), strict=True):
            found = np.linalg.svd(part, compute_uv=False) if part.size else np.zeros(0)
            out[: len(found)] = found[: self.dim] ** 2
        return *values, float((triangle[:, 1:] ** 2).sum(0).max() / self.n)

    def rounding(self, scatter: NDArray, moment: NDArray) -> float:
        return float((self.dim * EPS) ** 2 * moment.sum())


class Covariance:
    """Streaming covariance of embeddings: one pass, O(d^2) memory, mergeable.

    Batches may have any size and come in any order; shards are joined with `merge`.

    Args:
        dim: d, the width of a row.
        method: "covariance" (float64 products; right down to about 1e-7 of the largest singular value of Z) or
            "qr" (right down to about 1e-12 of it; about four times slower).
        normalize: divide each row by its Euclidean norm first (a zero row stays zero and is counted).
        device: None accumulates with numpy; "cpu", "cuda", ... with torch float64 there.
    """

    def __init__(
        self, dim: int, method: str = "covariance", normalize: bool = False, device: str | None = None
    ) -> None:
        if dim < 1:
            raise InputError(f"embeddings: width {dim}; a covariance needs at least 1 column")
        if method not in METHODS[1:]:
            raise InputError(f"method: got {method!r}, expected covariance or qr")
        self.dim, self.method, self.normalize, self.device = dim, method, normalize, device
        self.zero_rows = 0
        self.roundoff = EPS / 2  # unit roundoff of the coarsest dtype seen
        self._sum = (_Gram if method == "covariance" else _Triangle)(self._zeros, dim)

    @property
    def n(self) -> int:
        """Rows seen."""
        return self._sum.n

    def _zeros(self, shape: int | tuple[int, ...]) -> Any:
        if self.device is None:
            return np.zeros(shape)
        import torch

        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def update(self, z: Any) -> "Covariance":
        """Add a batch z, (n, d), array or tensor of any real dtype and device; n = 0 is allowed. Returns self.

        Raises InputError, and changes nothing, if z is not (n, d), is not numeric, or holds NaN or infinity.
        """
        roundoff, rows = self._float64(z)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise InputError(f"embeddings: got shape {tuple(rows.shape)}, expected (n, {self.dim})")
        if len(rows) == 0:
            return self
        if not max(float(rows.max()), -float(rows.min())) < LARGEST:
            self._refuse(rows)
        zero_rows = 0
        if self.normalize:
            # Powers of two first: squares of 1e-300 or 1e300 would leave float64's range.
            largest = abs(rows).max(1)
            largest = getattr(largest, "values", largest)
            zero_rows = int((largest == 0).sum())
            rows = rows / (largest + (largest == 0))[:, None]
            rows = rows / (((rows**2).sum(1) + (largest == 0)) ** 0.5)[:, None]
        self._sum.add(rows)
        self.zero_rows += zero_rows
        self.roundoff = max(self.roundoff, roundoff)
        return self

    def _float64(self, z: Any) -> tuple[float, Any]:
        """(unit roundoff of z's dtype, z in float64 on this accumulator's device)."""
        if _is_tensor(z):
            import torch

            if z.is_complex() or z.dtype == torch.bool or z.layout != torch.strided or z.is_quantized:
                raise InputError(f"embeddings: a {z.dtype}, {z.layout} tensor is no dense array of real numbers")
            roundoff = torch.finfo(z.dtype).eps / 2 if z.is_floating_point() else 0.0
            z = z.detach().to(device=self.device or "cpu", dtype=torch.float64, copy=True)
            return roundoff, z.numpy() if self.device is None else z
        z = np.asarray(z)
        if z.dtype.kind not in "fiu":
            raise InputError(f"embeddings: dtype {z.dtype} is not real numbers; give a float array (n, d)")
        roundoff, z = (np.finfo(z.dtype).eps / 2 if z.dtype.kind == "f" else 0.0), z.astype(np.float64, order="C")
        if self.device is None:
            return float(roundoff), z
        import torch

        return float(roundoff), torch.from_numpy(z).to(self.device)

    def _refuse(self, rows: Any) -> None:
        bad = ~np.isfinite(np.asarray(rows.cpu() if _is_tensor(rows) else rows))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"embeddings: row {self.n + row}, column {column} is NaN or infinite ({bad.any(1).sum()} such rows "
                "in this block); remove them, or look at the network that wrote them"
            )
        if not self.normalize:
            raise InputError(f"embeddings: squares of entries over {LARGEST:.0e} overflow float64; scale them down")

    def merge(self, other: "Covariance") -> "Covariance":
        """Join another shard's statistics, as if its rows had been seen here. Returns self."""
        for name in ("dim", "method", "normalize", "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(f"merge: {name} is {mine} here and {theirs} there; they must be equal")
        self._sum.join(other._sum)  # type: ignore[arg-type]
        self.zero_rows += other.zero_rows
        self.roundoff = max(self.roundoff, other.roundoff)
        return self

    def all_reduce(self) -> "Covariance":
        """Join with the other processes of `torch.distributed`, as if one had seen all rows. Returns self.

        Every process calls it, those without rows too; each then holds the statistics of all.
        """
        import torch
        from torch import distributed

        self._sum.all_reduce()
        about = torch.tensor([float(self.zero_rows), self.roundoff], dtype=torch.float64, device=self.device)
        distributed.all_reduce(about[:1])
        distributed.all_reduce(about[1:], distributed.ReduceOp.MAX)
        self.zero_rows, self.roundoff = int(about[0]), float(about[1])
        return self

    def spectrum(self, threshold: float = 1e-6, **about: Any) -> "Spectrum":
        """The singular values of C and what the rank measures need. about: further fields of `Spectrum`.

        Raises InputError if fewer than two rows were seen.
        """
        if self.n < 2:
            raise InputError(f"embeddings: {self.n} rows; a covariance needs at least 2")
        scatter, moment, column = self._sum.eigenvalues()
        notes = list(about.pop("warnings", []))
        if self.zero_rows:
            notes.append(f"{self.zero_rows} of {self.n} rows are zero and were left zero by the normalisation")
        if self.n <= self.dim:
            notes.append(f"{self.n} rows in {self.dim} dimensions: at most {self.n - 1} singular values are not zero")
        elif self.n < 10 * self.dim:
            notes.append(
                f"{self.n} rows for {self.dim} dimensions: small singular values are biased down; 10 d advised"
            )
        return Spectrum(
            singular_values=np.sort(scatter)[::-1] / (self.n - 1),
            moments=np.sort(moment)[::-1] / self.n,
            n=self.n,
            floor=max(self._stored(column), self._sum.rounding(scatter, moment) / (self.n - 1)),
            method=self.method,
            l2_normalized=self.normalize,
            threshold=threshold,
            warnings=notes,
            **about,
        )

    def _stored(self, column: float) -> float:
        """Largest singular value that rounding to the input's dtype alone makes.

        A rounding error is uniform within +-u |z|, variance u^2 z^2 / 3, and errors of different entries are
        independent: their covariance is white with at most u^2 column / 3, widened by the Marchenko-Pastur edge.
        """
        edge = (1 + math.sqrt(self.dim / (self.n - 1))) ** 2
        return self.roundoff**2 * column / 3 * edge


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the covariance of n embeddings, and where they came from.

    Attributes:
        singular_values: (d,) float64, descending, >= 0, natural scale; divisor n - 1.
        moments: (d,) float64, descending: eigenvalues of Z^T Z / n, uncentred (RankMe and Vendi are defined on them).
        n: rows.
        floor: singular values below it are rounding, of the input's dtype or of the method, not data.
        method: "covariance" or "qr".
        l2_normalized: whether rows were divided by their norm.
        threshold: a dimension counts as collapsed below threshold times the largest singular value.
        source, images: provenance, as in the JSON schema collapse.spectrum/1.
        warnings: what a reader should know before using the numbers.
    """

    singular_values: NDArray
    moments: NDArray
    n: int
    floor: float
    method: str
    l2_normalized: bool
    threshold: float = 1e-6
    source: Mapping[str, Any] = field(default_factory=lambda: {"kind": "array"})
    images: Mapping[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=command)
    versions: Mapping[str, str] = field(default_factory=lambda: versions("numpy", "torch", "torchvision"))

    @property
    def dim(self) -> int:
        """d, the width of an embedding."""
        return self.singular_values.size

    def metrics(self) -> dict[str, float]:
        """Every rank measure that follows from the spectrum, by name; NaN where it is undefined.

        What lies at or below the floor counts as zero in all of them.
        """
        values = np.where(self.singular_values > self.floor, self.singular_values, 0.0)
        squared = self.dim * EPS * self.moments[0] if self.method == "covariance" else 0.0
        moments = np.where(self.moments > max(self.floor, squared), self.moments, 0.0)
        unit = moments if self.l2_normalized else np.zeros(1)
        fit = metrics.power_law(values)
        return {
            "collapsed_dimensions": metrics.collapsed_dimensions(values, self.threshold),
            **{
                f"collapsed_dimensions_{threshold:.0e}": metrics.collapsed_dimensions(values, threshold)
                for threshold in (1e-3, 1e-4, 1e-8)
            },
            "numerical_rank": metrics.numerical_rank(values, self.floor),
            "effective_rank": metrics.effective_rank(values),
            "rankme": metrics.rankme(np.sqrt(moments)),
            "rankme_centered": metrics.rankme(np.sqrt(values)),
            "stable_rank": metrics.stable_rank(values),
            "participation_ratio": metrics.participation_ratio(values),
            "alpha": fit.alpha,
            "alpha_r2": fit.r2,
            "condition": metrics.condition(values),
            "auc": metrics.auc(values, min(self.n, self.dim)),
            "isoscore": metrics.isoscore(values),
            "vendi": metrics.vendi(unit),
            "self_clustering": metrics.self_clustering(unit, self.n) if self.l2_normalized else math.nan,
        }

    def plot(self, ax: Any = None) -> Any:
        """Draw ln of the singular values by index, with the floor as a band; returns the axes."""
        from collapse import plots

        with plots.style():
            if ax is None:
                _, ax = plots.figure()
            plots.plot_spectra(ax, {str(self.source.get("layer") or "spectrum"): self.singular_values}, self.floor)
        return ax

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.spectrum/1, with values that may still be NaN."""
        measures = self.metrics()
        undefined = [name for name, value in measures.items() if math.isnan(value)]
        notes = self.warnings + ([f"undefined for this input: {', '.join(undefined)}"] if undefined else [])
        empty = dict.fromkeys(("path", "sha256", "architecture", "branch", "layer", "keys", "preprocessing"))
        return {
            "schema": "collapse.spectrum/1",
            "source": {"kind": "array", **empty, "foreign": [], **self.source, "warnings": notes},
            "images": self.images,
            "n": self.n,
            "dim": self.dim,
            "l2_normalized": self.l2_normalized,
            "method": self.method,
            "singular_values": self.singular_values,
            "moments": self.moments,
            "floor": self.floor,
            "threshold": self.threshold,
            "metrics": measures,
            "command": self.command,
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """Strict JSON text of schema collapse.spectrum/1."""
        return to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Spectrum":
        """Read what `to_json` wrote. Raises InputError for any other text."""
        try:
            document = json.loads(text)
            if document["schema"] != "collapse.spectrum/1":
                raise InputError(f"spectrum: schema {document['schema']!r}, expected collapse.spectrum/1")
            names = {f.name for f in fields(cls)}
            kept = {key: value for key, value in document.items() if key in names}
            kept["warnings"] = [w for w in document["source"].pop("warnings") if not w.startswith("undefined for")]
            return cls(**{**kept, **{key: np.array(kept[key]) for key in ("singular_values", "moments")}})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"spectrum: not a collapse.spectrum/1 document ({error!r})") from error


def blocks(z: Any) -> Iterator[Any]:
    """Row blocks of about 32 MiB in float64 of an array, memmap or tensor (n, d)."""
    if z.ndim != 2:
        raise InputError(f"embeddings: got shape {tuple(z.shape)}, expected (n, d); pool or flatten the rest first")
    rows = max(1, BLOCK // max(1, z.shape[1]))
    for start in range(0, len(z), rows):
        yield z[start : start + rows]


def _batches(z: Any) -> tuple[Mapping[str, Any], Iterable[Any]]:
    """(source, batches) of anything that `spectrum` takes."""
    if isinstance(z, (str, PathLike)):
        from collapse.arrays import open_array

        source, array = open_array(Path(z))
        return source, blocks(array)
    if hasattr(z, "ndim"):
        return {"kind": "array"}, blocks(z)
    if isinstance(z, (list, tuple)) and z and not hasattr(z[0], "ndim"):
        return {"kind": "array"}, blocks(np.asarray(z))
    return {"kind": "array"}, z


def choose_method(method: str, batch: Any) -> tuple[str, list[str]]:
    """(method, notes): "auto" takes qr for float64 rows, which hold digits that covariances lose, else covariance."""
    if method not in METHODS:
        raise InputError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if method != "auto":
        return method, []
    if str(getattr(batch, "dtype", "float64")).endswith("float64"):
        return "qr", ["method qr: float64 rows may hold singular values below what a covariance resolves"]
    return "covariance", []


def spectrum(
    z: ArrayLike | Iterable[Any] | str | PathLike,
    normalize: bool = True,
    method: str = "auto",
    *,
    threshold: float = 1e-6,
    device: str | None = None,
    **about: Any,
) -> Spectrum:
    """Singular values of the covariance of embeddings (arXiv 2110.09348, section 3), in one pass.

    Args:
        z: (n, d) array, tensor or memmap of any real dtype; a path of an array file; or an iterable of (b, d) batches.
        normalize: divide each row by its norm first, as the paper does.
        method: "covariance", "qr" or "auto"; see `Covariance` and `choose_method`.
        threshold: what counts as collapsed, as a share of the largest singular value.
        device: None for numpy, or a torch device to accumulate on.
        about: provenance for the result (source, images, warnings).

    Raises:
        InputError: not two-dimensional, not numeric, fewer than two rows, NaN or infinity (the row is named).
    """
    source, batches = _batches(z)
    total, notes = None, list(about.pop("warnings", []))
    for batch in batches:
        if total is None:
            chosen, reason = choose_method(method, batch)
            notes += reason
            if getattr(batch, "ndim", 0) != 2:
                shape = tuple(getattr(batch, "shape", ()))
                raise InputError(f"embeddings: a batch of shape {shape}, expected (b, d)")
            total = Covariance(batch.shape[1], chosen, normalize, device)
        total.update(batch)
    if total is None:
        raise InputError("embeddings: no rows; a covariance needs at least 2")
    return total.spectrum(threshold, **{"source": source, "warnings": notes, **about})
