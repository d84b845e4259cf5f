"""From anything to its spectrum in one call: arrays, files, iterables of batches; with standard errors if asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError
from collapse.covariance import METHODS, Covariance, blocks, require_memory
from collapse.results import stale
from collapse.spectra import Spectrum


@contextmanager
def _batches(
    z: Any, max_unpacked: float | None, limit: int | None
) -> Iterator[tuple[Mapping[str, Any], Iterable[Any]]]:
    """(source, batches) of anything that `spectrum` takes; the source is whole when the block ends."""
    if isinstance(z, (str, PathLike)):
        from collapse.files.arrays import open_array

        with open_array(Path(z), max_unpacked) as (source, rows):
            yield source, blocks(rows, limit)
        return
    if isinstance(z, (list, tuple)) and z and not hasattr(z[0], "ndim"):
        z = np.asarray(z)
    yield {"kind": "array"}, blocks(z, limit)


def choose_method(method: str, batch: Any) -> tuple[str, list[str]]:
    """(method, notes): "auto" takes qr for float64 rows, which hold digits that covariances lose, else covariance."""
    if method not in METHODS:
        raise InputError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if method != "auto":
        return method, []
    if str(getattr(batch, "dtype", "float64")).endswith("float64"):
        return "qr", ["method qr: float64 rows may hold singular values below what a covariance resolves"]
    return "covariance", []


class Measurement:
    """Rows, batch by batch -> `Spectrum`: a `Covariance`, or one for each jackknife group, made at the first batch.

    name: what errors call the rows. Other arguments, and errors, as for `spectrum`.
    """

    def __init__(
        self,
        normalize: bool = True,
        method: str = "auto",
        device: str | None = None,
        jackknife: int = 0,
        name: str = "embeddings",
    ) -> None:
        self.normalize, self.method, self.device, self.jackknife = normalize, method, device, jackknife
        self.name = name
        self.groups: list[Covariance] = []
        self.notes: list[str] = []

    def update(self, z: Any) -> "Measurement":
        """Add a batch (b, d): row i of all rows to group i mod their number, however they are cut into batches."""
        if not self.groups:
            if getattr(z, "ndim", 0) != 2:
                raise InputError(f"{self.name}: a batch of shape {tuple(getattr(z, 'shape', ()))}, expected (b, d)")
            method, self.notes = choose_method(self.method, z)
            count = max(1, self.jackknife)
            require_memory(self.name, z.shape[1], method, self.device, count)
            self.groups = [Covariance(z.shape[1], method, self.normalize, self.device, self.name) for _ in range(count)]
        seen, count = sum(group.n for group in self.groups), len(self.groups)
        roundoff, rows = self.groups[0].checked(z, seen)
        for first in range(min(count, len(rows))):
            self.groups[(seen + first) % count].add(roundoff, rows[first::count])
        return self

    def spectrum(
        self, threshold: float = 1e-6, vectors: bool = False, rounding: NDArray | None = None, **about: Any
    ) -> Spectrum:
        """The result; about: provenance (source, images, warnings)."""
        if not self.groups:
            raise InputError(f"{self.name}: no rows; a covariance needs at least 2")
        errors = jackknife_errors(self.groups, threshold) if self.jackknife else None
        about = {**about, "errors": errors, "warnings": self.notes + list(about.get("warnings", []))}
        return _merged(self.groups).spectrum(threshold, vectors, rounding, **about)


def spectrum(
    z: ArrayLike | Iterable[Any] | str | PathLike,
    normalize: bool = True,
    method: str = "auto",
    *,
    threshold: float = 1e-6,
    device: str | None = None,
    vectors: bool = False,
    jackknife: int = 0,
    rounding: NDArray | None = None,
    limit: int | None = None,
    max_unpacked: float | None = None,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **about: Any,
) -> Spectrum:
    """Singular values of the covariance of embeddings (arXiv 2110.09348, section 3), in one pass.

    Args:
        z: (n, d) array, tensor or memmap of any real dtype; a path of an array file; or an iterable of (b, d) batches.
        normalize: divide each row by its norm first, as the paper does.
        method: "covariance", "qr" or "auto"; see `Covariance` and `choose_method`.
        threshold: what counts as collapsed, as a share of the largest singular value.
        device: None for numpy, or a torch device to accumulate on.
        vectors: keep the singular vectors in the result.
        jackknife: standard errors from this many groups of rows, 2 or more; 0 for none. Memory and the time at the
            end grow by that factor.
        rounding: (b, d) errors that some rows are known to have, for the floor (evaluate.rounding).
        limit: use the first rows only, this many.
        max_unpacked: GiB that a packed array file may unpack to although it is far smaller (a bomb is refused).
        watch: gets the batches and passes them on, as a progress bar does.
        about: provenance for the result (source, images, warnings).

    Raises:
        InputError: not two-dimensional, not numeric, fewer than two rows, NaN or infinity (the row is named), more
            memory needed than there is; for a file as `collapse.files.arrays.open_array` says.
    """
    with _batches(z, max_unpacked, limit) as (source, batches):
        about = {"source": source, **about}
        measurement = Measurement(normalize, method, device, jackknife, about["source"].get("path") or "embeddings")
        for batch in watch(batches):
            measurement.update(batch)
    source = about["source"]  # with the digest of the bytes that were read
    notes = [*source.get("warnings", ()), *stale(str(source.get("path") or ""), source.get("sha256"))]
    about["warnings"] = [*about.get("warnings", ()), *notes]
    return measurement.spectrum(threshold, vectors, rounding, **about)


def _merged(parts: Sequence[Covariance]) -> Covariance:
    """An accumulator of the rows of all parts, which stay as they are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    total = Covariance(first.dim, first.method, first.normalize, first.device)
    for part in parts:
        total.merge(part)
    return total


def jackknife_errors(groups: Sequence[Covariance], threshold: float) -> dict[str, Any]:
    """Standard errors of singular values and metrics by leaving out one of G groups at a time: `Spectrum.errors`.

    sqrt((G - 1) / G sum (x_g - mean x)^2) (Tukey 1958). Rows are taken as independent; a metric that jumps, such as a
    count, gets a rough error. O(G d^2) memory, G spectra to compute.

    Raises InputError: fewer than two groups, or fewer than two rows a group.
    """
    count = len(groups)
    if count < 2 or min(group.n for group in groups) < 2:
        raise InputError(
            f"jackknife: {count} groups of {min(g.n for g in groups)} rows; give 2 groups of 2 rows or more"
        )
    left_out = [_merged([*groups[:i], *groups[i + 1 :]]).spectrum(threshold) for i in range(count)]

    def error(samples: list) -> Any:
        return np.sqrt((count - 1) * np.var(np.array(samples, dtype=np.float64), axis=0))

    measures = [result.metrics() for result in left_out]
    return {
        "groups": count,
        "singular_values": error([result.singular_values for result in left_out]),
        "metrics": {name: float(error([values[name] for values in measures])) for name in measures[0]},
    }
