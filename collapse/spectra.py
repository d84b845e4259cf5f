"""The spectrum of embeddings: singular values of their covariance, what is known about them, and the rank measures.

`Spectrum` is what `collapse.spectrum` and `Covariance.spectrum` return (covariance.py), and what is stored as JSON.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, metrics
from collapse.results import command, load_result, save_result, save_text, to_json, versions

EPS = float(np.finfo(np.float64).eps)


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
        source: provenance, as in the JSON schema collapse.spectrum/1.
        images: likewise, of a checkpoint's; None for an array.
        warnings: what a reader should know before using the numbers.
        vectors: (d, d) float64, the singular vectors of C as columns in the same order; None unless asked for.
        errors: standard errors by a delete-a-group jackknife, None unless asked for: {"groups": count,
            "singular_values": (d,), "metrics": {name: number}}.
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

        What lies at or below the floor counts as zero in all of them.
        """
        values = np.where(self.singular_values > self.floor, self.singular_values, 0.0)
        squared = self.dim * EPS * self.moments[0] if self.method == "covariance" else 0.0
        moments = np.where(self.moments > max(self.floor, squared), self.moments, 0.0)
        unit = moments if self.l2_normalized else np.zeros(1)
        fit = metrics.power_law(values)
        noise = metrics.noise_variance(values, self.n)
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
            "mp_edge": metrics.marchenko_pastur_edges(self.n, self.dim, noise)[1],
            "above_edge": metrics.above_edge(values, self.n, noise),
        }

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
            "errors": self.errors,
            "command": self.command,
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """Strict JSON text of schema collapse.spectrum/1."""
        return to_json(self.to_dict())

    def save(self, path: Path) -> None:
        """Write `to_json` to a file and, if the vectors were kept, these beside it, as .npz."""
        save_text(path, self.to_json())
        if self.vectors is not None:
            save_result(path.with_suffix(".npz"), {"spectrum": path.name}, vectors=self.vectors)

    @classmethod
    def load(cls, path: Path) -> "Spectrum":
        """Read what `save` wrote. Raises InputError if it is no result of `collapse spectrum`."""
        try:
            result = cls.from_json(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a result ({error})") from error
        beside = path.with_suffix(".npz")
        if not beside.exists():
            return result
        vectors = load_result(beside)[1].get("vectors")
        if vectors is None or vectors.shape != (result.dim, result.dim):
            raise InputError(f"{beside}: does not hold the {result.dim} singular vectors of {path.name}")
        return replace(result, vectors=vectors)

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


def load_results(path: Path) -> list[Spectrum]:
    """The spectra of a result file: one, or those of all layers. Raises InputError if it is neither."""
    try:
        document = json.loads(path.read_text())
        if document.get("schema") != "collapse.spectra/1":
            return [Spectrum.load(path)]
        return [Spectrum.from_json(json.dumps(layer)) for layer in document["layers"]]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a result of collapse spectrum ({error})") from error
