"""The spectrum of embeddings: singular values of their covariance, what is known about them, and the rank measures.

`Spectrum` is what `collapse.spectrum` and `Covariance.spectrum` return (covariance.py), and what is stored as JSON.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import GateError, InputError, metrics
from collapse.results import (
    Result,
    command,
    integer_of,
    list_of,
    load_json,
    load_result,
    number_of,
    numbers_of,
    parse_json,
    require_schema,
    save_text,
    to_json,
    value_of,
    versions,
    write_npz,
)
from collapse.results.outputs import atomic_write, digest, spare
from collapse.spectra.parts import check_files, check_possible, errors_of, images_of, source_of, versions_of

EPS = float(np.finfo(np.float64).eps)
SPECTRUM, SPECTRA, VECTORS = "collapse.spectrum/1", "collapse.spectra/1", "collapse.vectors/1"
METHODS = ("covariance", "qr", "float32")
# The metrics, in the order of the document; those that a screen shows.
METRICS = (
    "collapsed_dimensions", "collapsed_dimensions_1e-03", "collapsed_dimensions_1e-04", "collapsed_dimensions_1e-08",
    "numerical_rank", "effective_rank", "rankme", "rankme_centered", "stable_rank", "participation_ratio", "alpha",
    "alpha_r2", "condition", "auc", "isoscore", "vendi", "self_clustering",
    "mean_cosine", "mp_edge", "above_edge",
)  # fmt: skip
SHOWN = ("effective_rank", "rankme", "rankme_centered", "participation_ratio", "stable_rank", "numerical_rank",
         "collapsed_dimensions", "alpha")  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Result):
    """Singular values of the covariance of n embeddings, and where they came from.

    Each metric is an attribute too: `s.effective_rank` is `s.metrics()["effective_rank"]`.

    Attributes:
        singular_values: (d,) float64, descending, >= 0, natural scale; divisor n - 1.
        moments: (d,) float64, descending: eigenvalues of Z^T Z / n, uncentred (RankMe and Vendi are defined on them).
        n: rows.
        floor: singular values below it are rounding, of the input's dtype or of the method, not data.
        method: "covariance", "qr" or "float32".
        l2_normalized: whether rows were divided by their norm.
        threshold: a dimension counts as collapsed below threshold times the largest singular value.
        source: provenance, as in the JSON schema collapse.spectrum/1.
        images: likewise, of a checkpoint's; None for an array.
        warnings: what a reader should know before using the numbers.
        vectors: (d, d) float64, the singular vectors of C as columns in the same order; None unless asked for.
        errors: standard errors by a delete-a-group jackknife, None unless asked for: {"groups": count,
            "singular_values": (d,), "metrics": {name: number}}.

    Examples:
        >>> from collapse import spectrum
        >>> s = spectrum([[3.0, 0], [-3, 0], [0, 4], [0, -4]], normalize=False)
        >>> s.singular_values.round(3).tolist(), s.n, s.dim  # sums of squares over n - 1
        ([10.667, 6.0], 4, 2)
        >>> s.save("s.json")
        >>> Spectrum.load("s.json") == s
        True
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
    vectors: NDArray | None = None
    errors: Mapping[str, Any] | None = None

    @property
    def dim(self) -> int:
        """d, the width of an embedding."""
        return self.singular_values.size

    def metrics(self) -> dict[str, float]:
        """Every rank measure that follows from the spectrum, by name; NaN where it is undefined.

        What lies at or below the floor counts as zero in all of them.  They are computed once.
        """
        return dict(self._metrics)

    def __getattr__(self, name: str) -> float:
        if name not in METRICS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._metrics[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *filter(str.isidentifier, METRICS)})

    @cached_property
    def _held(self) -> dict[str, NDArray]:
        """The numbers above the floor, zero instead of the others, by the names that the measures have for them."""
        values = np.where(self.singular_values > self.floor, self.singular_values, 0.0)
        squared = self.dim * EPS * self.moments[0] if self.method == "covariance" else 0.0
        moments = np.where(self.moments > max(self.floor, squared), self.moments, 0.0)
        return {"of_covariance": values, "of_rows": np.sqrt(moments), "moments": moments}

    def above_floor(self, names: Collection[str]) -> dict[str, Any]:
        """What `collapse.metrics` takes of a spectrum, by the names of the arguments there.

        of_covariance, of_rows, moments: (d,) numbers, zero where they are rounding; n, threshold, floor, count.

        Raises InputError: moments, on which measures of unit rows are defined, of rows that were not normalised.
        """
        if "moments" in names and not self.l2_normalized:
            raise InputError("a measure of unit rows, and these were not normalised; measure with normalize=True")
        usual = {"n": self.n, "threshold": self.threshold, "floor": self.floor, "count": min(self.n, self.dim)}
        return {name: value for name, value in {**self._held, **usual}.items() if name in names}

    @cached_property
    def _metrics(self) -> dict[str, float]:
        values, moments = self._held["of_covariance"], self._held["moments"]
        unit = moments if self.l2_normalized else np.zeros(1)
        fit = metrics.power_law(of_covariance=values)
        noise = metrics.noise_variance(of_covariance=values, n=self.n)
        counts = {at: metrics.collapsed_dimensions(of_covariance=values, threshold=at) for at in (1e-3, 1e-4, 1e-8)}
        return {
            "collapsed_dimensions": metrics.collapsed_dimensions(of_covariance=values, threshold=self.threshold),
            **{f"collapsed_dimensions_{threshold:.0e}": count for threshold, count in counts.items()},
            "numerical_rank": metrics.numerical_rank(of_covariance=values, floor=self.floor),
            "effective_rank": metrics.effective_rank(of_covariance=values),
            "rankme": metrics.rankme(of_rows=np.sqrt(moments)),
            "rankme_centered": metrics.rankme(of_rows=np.sqrt(values)),
            "stable_rank": metrics.stable_rank(of_covariance=values),
            "participation_ratio": metrics.participation_ratio(of_covariance=values),
            "alpha": fit.alpha,
            "alpha_r2": fit.r2,
            "condition": metrics.condition(of_covariance=values),
            "auc": metrics.auc(of_covariance=values, count=min(self.n, self.dim)),
            "isoscore": metrics.isoscore(of_covariance=values),
            "vendi": metrics.vendi(moments=unit),
            "self_clustering": metrics.self_clustering(moments=unit, n=self.n) if self.l2_normalized else math.nan,
            "mean_cosine": metrics.mean_cosine(of_covariance=values, moments=moments)
            if self.l2_normalized
            else math.nan,
            "mp_edge": metrics.marchenko_pastur_edges(self.n, self.dim, noise)[1],
            "above_edge": metrics.above_edge(of_covariance=values, n=self.n, variance=noise),
        }

    def gate(self, under: Mapping[str, float] | None = None, over: Mapping[str, float] | None = None) -> None:
        """Raise GateError if a metric lies under, or over, its bound. One that is undefined passes no gate.

        under, over: {name of a metric: bound}; a value that equals its bound passes.

        Raises InputError: no such metric, or a bound that is no number.
        """
        failed = []
        for word, bounds in (("under", under or {}), ("over", over or {})):
            for name, bound in bounds.items():
                value, bound = self._metrics.get(name), float(bound)
                if value is None or bound != bound:
                    near = "".join(f"; did you mean {n}?" for n in get_close_matches(name, METRICS, 1))
                    what = f"no metric {name!r}{near or '; there are ' + ', '.join(METRICS)}"
                    raise InputError(f"fail_{word}: {what if value is None else f'{name}={bound} is no number'}")
                if value != value:
                    failed.append(f"{name} is undefined")
                elif value < bound if word == "under" else value > bound:
                    failed.append(f"{name} = {value:.6g} is {word} {bound:g}")
        if failed:
            raise GateError(f"{self.name}: not passed: {', '.join(failed)}")

    def plot(self, ax: Any = None, kind: str = "spectrum", log10: bool = False, log_index: bool = False) -> Any:
        """Draw the spectrum; returns the axes.

        kind: "spectrum" (logarithm by index, the floor as a band), "explained" (cumulative share of the variance) or
        "noise" (histogram against the Marchenko-Pastur law). log10, log_index: of "spectrum", instead of ln and linear.
        """
        from collapse import plots

        return plots.draw({self.name: self}, kind, ax, log10, log_index)

    @property
    def name(self) -> str:
        """A short name: the file's, and the layer's if it is not the representation."""
        path, layer = self.source.get("path"), self.source.get("layer")
        parts = [Path(str(path)).name if path else None, layer if layer != "representation" else None]
        return " ".join(filter(None, parts)) or layer or "spectrum"

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.spectrum/1, with values that may still be NaN."""
        empty = dict.fromkeys(("path", "sha256", "architecture", "branch", "layer", "keys", "preprocessing"))
        return {
            "schema": SPECTRUM,
            "source": {"kind": "array", **empty, "foreign": [], **self.source, "warnings": self.notes()},
            "images": self.images,
            "n": self.n,
            "dim": self.dim,
            "l2_normalized": self.l2_normalized,
            "method": self.method,
            "singular_values": self.singular_values,
            "moments": self.moments,
            "floor": self.floor,
            "threshold": self.threshold,
            "metrics": self.metrics(),
            "errors": self.errors,
            "files": {},
            "command": self.command,
            "versions": self.versions,
        }

    def notes(self) -> list[str]:
        """The warnings, and which metrics are undefined."""
        undefined = [name for name, value in self._metrics.items() if math.isnan(value)]
        return self.warnings + ([f"undefined for this input: {', '.join(undefined)}"] if undefined else [])

    def sentence(self) -> str:
        """What was measured, its effective rank, and what is collapsed."""
        rank = self.effective_rank
        effective = f"have effective rank {rank:.4g}" if rank == rank else "do not vary"
        unit = "of unit length" if self.l2_normalized else "as they are"
        below = f"{self.collapsed_dimensions} are collapsed (below {self.threshold:g} of the largest singular value)"
        name = "" if self.name == "spectrum" else f"{self.name}, "
        return f"{name}{self.n} rows of {self.dim} dimensions, {unit}, {effective}; {below}."

    def table(self) -> list[tuple[str, ...]]:
        """The metrics of SHOWN, with standard errors where they were asked for."""
        errors = self.errors["metrics"] if self.errors else {}
        rows: list[tuple[str, ...]] = [("metric", "value", "+-")] if errors else [("metric", "value")]
        for name in SHOWN:
            row = (name, f"{self._metrics[name]:.4g}")
            rows.append((*row, f"{errors.get(name, math.nan):.2g}") if errors else row)
        return rows

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        if self.vectors is None or other.vectors is None:
            return self.vectors is other.vectors and super().__eq__(other)
        return np.array_equal(self.vectors, other.vectors) and super().__eq__(other)

    def save(self, path: str | PathLike) -> None:
        """Write `to_json` to a file and, if the vectors were kept, these beside it, as .npz, which the JSON then names.

        Raises InputError: a file cannot be written, or is the one that this spectrum was measured from.
        """
        self.write(Path(path))

    def write(self, path: Path) -> str:
        """What `save` does; returns the JSON text as written.

        Raises InputError: the vectors would be written over it, or it cannot be written.
        """
        beside = path.with_suffix(".npz")
        spare(str(self.source.get("path") or ""), path, *([beside] if self.vectors is not None else []))
        if self.vectors is None:
            return save_text(path, self.to_json())
        if beside == path:
            raise InputError(f"{path}: the directions are kept there; give the result a name that ends in .json")
        with atomic_write(path) as text, atomic_write(beside) as directions:  # the JSON is replaced last
            write_npz(directions, {"schema": VECTORS, "spectrum": path.name}, vectors=self.vectors)
            document = to_json({**self.to_dict(), "files": {beside.name: digest(directions)}})
            text.write_text(document, encoding="utf-8")
        return document

    @classmethod
    def load(cls, path: str | PathLike) -> "Spectrum":
        """Read what `save` wrote. Raises InputError: no result of `collapse spectrum`, or its vectors were replaced."""
        return cls._beside(Path(path), load_json(Path(path)))

    @classmethod
    def _beside(cls, path: Path, document: Any) -> "Spectrum":
        """The result in a document of `path`, with the vectors that lie beside it."""
        result, beside = cls._of(document, str(path)), path.with_suffix(".npz")
        named = next((entry for name, entry in document.get("files", {}).items() if name.endswith(".npz")), None)
        if named is None or not beside.exists():
            odd = "is not named by it: not its directions" if beside.exists() else "is not there: no directions"
            notes = [f"{beside.name} beside {path.name} {odd}"] if named or beside.exists() else []
            return replace(result, warnings=[*result.warnings, *notes])
        if digest(beside) != named:
            raise InputError(
                f"{beside}: is not the file that {path.name} was written with (its digest differs); measure again"
            )
        vectors = load_result(beside, VECTORS)[1].get("vectors")
        square = vectors is not None and vectors.shape == (result.dim, result.dim) and vectors.dtype == np.float64
        if vectors is None or not square or not np.isfinite(vectors).all():
            raise InputError(f"{beside}: does not hold the {result.dim} singular vectors of {path.name}")
        return replace(result, vectors=vectors)

    @classmethod
    def from_json(cls, text: str) -> "Spectrum":
        """Read what `to_json` wrote; metrics are computed anew. Raises InputError for any other text."""
        return cls._of(parse_json(text, "spectrum"), "spectrum")

    @classmethod
    def _of(cls, document: Any, where: str) -> "Spectrum":
        document = require_schema(document, SPECTRUM, where)
        values = numbers_of(document, "singular_values", where)
        if (dim := integer_of(document, "dim", 1, where)) != len(values):
            raise InputError(f"{where}: {len(values)} singular values for {dim} dimensions; it is cut or edited")
        method = value_of(document, "method", where, str)
        if method not in METHODS:
            raise InputError(f"{where}: method {method[:40]!r}, expected {' or '.join(METHODS)}")
        source = dict(source_of(value_of(document, "source", where, dict), f"{where}: source"))
        notes = source.pop("warnings")
        n, unit = integer_of(document, "n", 2, where), value_of(document, "l2_normalized", where, bool)
        moments = numbers_of(document, "moments", where, dim)
        check_files(document, where)
        check_possible(values, moments, n, unit, where, 1e-5 if method == "float32" else 1e-6)
        return cls(
            singular_values=values,
            moments=moments,
            n=n,
            floor=number_of(document, "floor", where),
            method=method,
            l2_normalized=unit,
            threshold=number_of(document, "threshold", where, 1.0),
            source=source,
            images=images_of(document, where),
            warnings=[note for note in notes if not note.startswith("undefined for")],
            command=list_of(document, "command", where, str),
            versions=versions_of(document, where),
            errors=errors_of(document, dim, where),
        )


def load_results(path: Path) -> list[Spectrum]:
    """The spectra of a result file: one, or those of all layers. Raises InputError if it is neither."""
    document = load_json(path)
    if not (isinstance(document, dict) and str(document.get("schema")).startswith("collapse.spectra/")):
        return [Spectrum._beside(path, document)]
    layers = value_of(require_schema(document, SPECTRA, str(path)), "layers", str(path), list)
    if not layers:
        raise InputError(f"{path}: holds no layer")
    return [Spectrum._of(layer, f"{path}: layer {index}") for index, layer in enumerate(layers)]
