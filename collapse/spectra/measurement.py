"""Rows, batch by batch, to a spectrum, with standard errors if asked for."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, arguments
from collapse.spectra.covariance import METHODS, Covariance, require_memory
from collapse.spectra.result import Spectrum


@dataclass(frozen=True)
class Measure:
    """How rows become a spectrum, checked; the arguments of `spectrum`."""

    normalize: bool = True
    method: str = "auto"
    threshold: float = 1e-6
    jackknife: int = 0
    vectors: bool = False

    def __post_init__(self) -> None:
        for name in ("normalize", "vectors"):
            arguments.flag(name, getattr(self, name))
        arguments.choice("method", self.method, METHODS)
        arguments.share("threshold", self.threshold)
        arguments.whole("jackknife", self.jackknife, 0)
        if self.jackknife == 1:
            raise InputError("jackknife= is 1, expected 0 for none, or at least 2 groups of rows")


def choose_method(method: str, batch: Any) -> tuple[str, list[str]]:
    """(method, notes): "auto" takes qr for float64 rows, which hold digits that covariances lose, else covariance.

    Raises InputError: an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if method != "auto":
        return method, []
    if str(getattr(batch, "dtype", "float64")).endswith("float64"):
        return "qr", ["method qr: float64 rows may hold singular values below what a covariance resolves"]
    return "covariance", []


class Measurement:
    """Rows, batch by batch -> `Spectrum`: a `Covariance`, or one for each jackknife group, made at the first batch.

    device: as of `Covariance`.  name: what errors call the rows.
    """

    def __init__(self, measure: Measure | None = None, device: str | None = None, name: str = "embeddings") -> None:
        self.measure, self.device, self.name = measure or Measure(), device, name
        self.groups: list[Covariance] = []
        self.notes: list[str] = []
        self.seen = 0

    def update(self, z: Any, elsewhere: bool = False) -> "Measurement":
        """Add a batch (b, d): row i of all rows to group i mod their number, however they are cut into batches.

        elsewhere: another process adds these rows, which are counted alone.

        Raises InputError: a batch that is not (b, d).
        """
        if not self.groups:
            if getattr(z, "ndim", 0) != 2:
                raise InputError(f"{self.name}: a batch of shape {tuple(getattr(z, 'shape', ()))}, expected (b, d)")
            method, self.notes = choose_method(self.measure.method, z)
            count = max(1, self.measure.jackknife)
            require_memory(self.name, z.shape[1], method, self.device, count)
            kind = (z.shape[1], method, self.measure.normalize, self.device, self.name)
            self.groups = [Covariance(*kind).number(range(group, sys.maxsize, count)) for group in range(count)]
        seen, count = self.seen, len(self.groups)
        self.seen += len(z)
        if elsewhere:
            return self
        roundoff, rows = self.groups[0].checked(z, seen)
        for first in range(min(count, len(rows))):
            self.groups[(seen + first) % count].add(roundoff, rows[first::count])
        return self

    def all_reduce(self) -> "Measurement":
        """Join with the other processes, each of which has counted all rows. Returns self."""
        for group in self.groups:
            group.all_reduce()
        return self

    def spectrum(
        self,
        rounding: NDArray | None = None,
        *,
        source: Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
        warnings: Sequence[str] = (),
    ) -> Spectrum:
        """The result, (d,) values; rounding, (b, d), and provenance are as for `Covariance.spectrum`.

        Raises InputError: fewer than two rows.
        """
        if not self.groups:
            raise InputError(f"{self.name}: no rows; a covariance needs at least 2")
        threshold, vectors = self.measure.threshold, self.measure.vectors
        errors = jackknife_errors(self.groups, threshold) if self.measure.jackknife else None
        provenance: dict[str, Any] = {"source": source, "images": images, "warnings": [*self.notes, *warnings]}
        return replace(_merged(self.groups).measured(threshold, vectors, rounding, **provenance), errors=errors)


def _merged(parts: Sequence[Covariance]) -> Covariance:
    """An accumulator of the rows of all parts, which stay as they are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    total = Covariance(first.dim, first.method, first.normalize, first.device, first.name)
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
    left_out = [_merged([*groups[:i], *groups[i + 1 :]]).measured(threshold) for i in range(count)]

    def error(samples: list) -> Any:
        return np.sqrt((count - 1) * np.var(np.array(samples, dtype=np.float64), axis=0))

    measures = [result.metrics() for result in left_out]
    return {
        "groups": count,
        "singular_values": error([result.singular_values for result in left_out]),
        "metrics": {name: float(error([values[name] for values in measures])) for name in measures[0]},
    }
