"""Several spectra side by side: a table of rank measures, and which directions two of them share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from collapse import InputError, metrics
from collapse.arguments import is_module, known
from collapse.errors import warn
from collapse.files.arrays import is_array
from collapse.results import (
    Result,
    command,
    list_of,
    number_of,
    number_or_nan,
    numbers_of,
    require_schema,
    value_of,
    versions,
)
from collapse.results.screen import fitted, paragraph
from collapse.spectra.measure import KEYWORDS, reading, spectrum
from collapse.spectra.result import METRICS, Spectrum, load_results

SCHEMA = "collapse.comparison/1"

# The measures of the table, and their heads.
COLUMNS = {
    "effective_rank": "eff. rank",
    "rankme": "rankme",
    "participation_ratio": "particip.",
    "stable_rank": "stable",
    "numerical_rank": "num. rank",
    "collapsed_dimensions": "collapsed",
    "alpha": "alpha",
}


Source = Any  # what `compare` takes by name

ROW = {"name": str, "n": int, "dim": int, "l2_normalized": bool}


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Several spectra side by side.

    rows: name, n, dim, l2_normalized, every metric, singular_values, floor and warnings of each.
    subspaces: of each pair of one width whose directions were kept, see `subspaces`.

    Examples:
        >>> from collapse import spectrum
        >>> z = np.random.default_rng(0).standard_normal((1000, 4))
        >>> both = compare({"all": spectrum(z), "two": spectrum(z[:, :2])})
        >>> print(both.sentence())
        2 spectra; effective rank from 2 of 2 (two) to 3.996 of 4 (all).
    """

    rows: list[dict[str, Any]]
    subspaces: list[dict[str, Any]]
    command: list[str] = field(default_factory=command)
    versions: Mapping[str, str] = field(default_factory=lambda: versions("numpy", "scipy", "torch", "torchvision"))

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.comparison/1."""
        return {"schema": SCHEMA, "rows": self.rows, "subspaces": self.subspaces, "command": self.command,
                "versions": self.versions}  # fmt: skip

    def sentence(self) -> str:
        """Who has most, and who has least effective rank."""
        ranked = sorted((r for r in self.rows if r["effective_rank"] == r["effective_rank"]), key=_rank)
        if not ranked:
            return f"{len(self.rows)} spectra, none of which varies."
        low, high = ranked[0], ranked[-1]
        return (
            f"{len(self.rows)} spectra; effective rank from {_rank(low):.4g} of {low['dim']} ({low['name']}) "
            f"to {_rank(high):.4g} of {high['dim']} ({high['name']})."
        )

    def table(self) -> list[tuple[str, ...]]:
        """The metrics of each."""
        shown = ("effective_rank", "rankme", "numerical_rank", "collapsed_dimensions")
        rows: list[tuple[str, ...]] = [("", "rows", "dim", *(COLUMNS[name] for name in shown))]
        for row in self.rows:
            name = row["name"] if len(row["name"]) < 25 else f"...{row['name'][-21:]}"
            rows.append((name, str(row["n"]), str(row["dim"]), *(_cell(row[name]) for name in shown)))
        return rows

    def notes(self) -> list[str]:
        """What speaks against comparing, and what the spectra warn of."""
        notes = []
        if len({row["l2_normalized"] for row in self.rows}) > 1:
            notes.append("some rows were normalised and some were not; their spectra do not compare")
        if len({row["n"] for row in self.rows}) > 1:
            notes.append("different numbers of rows; small singular values grow with their number")
        return [*notes, *dict.fromkeys(note for row in self.rows for note in row["warnings"])]

    def plot(self, ax: Any = None, kind: str = "spectrum", log10: bool = False, log_index: bool = False) -> Any:
        """Draw the spectra, "spectrum" or "explained" as for `Spectrum.plot`; returns the axes."""
        from collapse import plots

        drawn = {row["name"]: SimpleNamespace(**row, errors=None) for row in self.rows}
        return plots.draw(drawn, kind, ax, log10, log_index)

    @classmethod
    def _of(cls, document: Any, where: str) -> "Comparison":
        document = require_schema(document, SCHEMA, where)
        rows = []
        for index, row in enumerate(list_of(document, "rows", where, dict)):
            at = f"{where}: row {index}"
            read = {key: value_of(row, key, at, kind) for key, kind in ROW.items()}
            read |= {key: number_or_nan(row, key, at) for key in METRICS}
            read["singular_values"] = numbers_of(row, "singular_values", at, read["dim"])
            rows.append({**read, "floor": number_of(row, "floor", at), "warnings": list_of(row, "warnings", at, str)})
        pairs = [
            {**pair, "collapsed_overlap": number_or_nan(pair, "collapsed_overlap", f"{where}: subspaces")}
            for pair in list_of(document, "subspaces", where, dict)
        ]
        named = {name: value_of(document, name, where, kind) for name, kind in (("command", list), ("versions", dict))}
        return cls(rows, pairs, **named)


def _rank(row: Mapping[str, Any]) -> float:
    return float(row["effective_rank"])


def compare(sources: Mapping[str, Source], images: Any = None, **options: Any) -> Comparison:
    """Several spectra in one table, and which directions each two of one width share.

    Args:
        sources: name -> a Spectrum, a result file (.json), or anything that `collapse.spectrum` takes.
        images: for those that are networks; not an iterator, which the first of them would use up.
        options: as for `collapse.spectrum`; the directions are kept.

    Raises:
        InputError: fewer than two spectra; as `collapse.spectrum` does.
        TypeError: an unknown keyword.

    Examples:
        >>> z = np.random.default_rng(0).standard_normal((1000, 6)).astype(np.float32)
        >>> both = compare({"all": z, "some": z * [1, 1, 1, 0, 0, 0]})
        >>> [(row["name"], row["numerical_rank"]) for row in both.rows]
        [('all', 6), ('some', 3)]
        >>> round(both.subspaces[1]["variance_within"], 3)  # of "some", in the directions of "all"
        1.0
    """
    if not isinstance(sources, Mapping):
        raise InputError(f"sources: got a {type(sources).__name__}, give a mapping of names to spectra or sources")
    if images is not None and hasattr(images, "__next__"):
        raise InputError("images: an iterator is used up by the first network; give a path, a tensor or a list")
    known("compare", options, [*KEYWORDS, *(reading() if images is not None else ())])
    named: dict[str, Spectrum] = {}
    for name, source in sources.items():
        spectra = spectra_of(source, images, **options)
        for s in spectra:
            layer = f" {s.source.get('layer')}" if len(spectra) > 1 else ""
            named[f"{name}{layer}"] = s
    if len(named) < 2:
        raise InputError("sources: a comparison wants two spectra or more")
    result = comparison(named)
    warn(note for note in result.notes() if not any(note in row["warnings"] for row in result.rows))
    return result


def spectra_of(source: Source, images: Any = None, **options: Any) -> list[Spectrum]:
    """The spectra of a result, an array, or a network and images; arguments as for `compare`.

    Raises InputError: as `compare`, of one source.
    """
    if isinstance(source, Spectrum):
        return [source]
    if isinstance(source, (str, PathLike)) and str(source).endswith(".json"):
        return load_results(Path(source))
    path = Path(source) if isinstance(source, (str, PathLike)) else None
    network = is_module(source) or isinstance(source, Mapping) or (path is not None and not is_array(path))
    if images is not None and network:
        chosen = {name: value for name, value in options.items() if name not in ("rounding", "max_unpacked")}
        return [spectrum(source, images, **{"vectors": True, **chosen})]
    rows = {name: value for name, value in options.items() if name in KEYWORDS and name != "layer"}
    return [spectrum(source, **{"vectors": True, **rows})]


def comparison(spectra: Mapping[str, Spectrum]) -> Comparison:
    """The same of spectra that are there."""
    rows = [
        {
            "name": name, "n": s.n, "dim": s.dim, "l2_normalized": s.l2_normalized, **s.metrics(),
            "singular_values": s.singular_values, "floor": s.floor, "warnings": s.warnings,
        }
        for name, s in spectra.items()
    ]  # fmt: skip
    directed = {name: s for name, s in spectra.items() if s.vectors is not None and s.singular_values[0] > s.floor}
    pairs = [
        subspaces(a, directed[a], b, directed[b])
        for a in directed
        for b in directed
        if a != b and directed[a].dim == directed[b].dim
    ]
    return Comparison(rows, pairs)


def subspaces(name_a: str, a: Spectrum, name_b: str, b: Spectrum) -> dict[str, Any]:
    """How much of A lives where B does.

    k: B's effective rank, rounded up;  variance_within: the share of A's variance in B's first k directions;
    angle: the largest principal angle, in radians, between the first k directions of both;
    collapsed_overlap: mean squared cosine between the collapsed directions of both (1: the same, or those of one
    contain those of the other), null where one has none.

    Examples:
        >>> from collapse import spectrum
        >>> z = np.random.default_rng(0).standard_normal((1000, 4))
        >>> a, b = (spectrum(z * scale, vectors=True) for scale in ([1, 1, 0, 0], [0, 1, 1, 0]))
        >>> round(subspaces("a", a, "b", b)["variance_within"], 1)
        0.5
    """
    assert a.vectors is not None
    assert b.vectors is not None
    k = math.ceil(b.metrics()["effective_rank"])
    dead = [s.vectors[:, s.singular_values < max(s.threshold * s.singular_values[0], s.floor)] for s in (a, b)]  # type: ignore[index]
    fewest = min(part.shape[1] for part in dead)
    return {
        "a": name_a,
        "b": name_b,
        "k": k,
        "variance_within": float(metrics.variance_within(a.singular_values, a.vectors, b.vectors[:, :k])[-1]),
        "angle": float(metrics.principal_angles(a.vectors[:, :k], b.vectors[:, :k])[0]),
        "collapsed_overlap": float(np.sum((dead[0].T @ dead[1]) ** 2) / fewest) if fewest else math.nan,
    }


# Heads where the screen is narrow.
SHORT = {"eff. rank": "eff.", "particip.": "part.", "num. rank": "num.", "collapsed": "coll."}


def text(result: Comparison) -> str:
    """The comparison for a reader."""
    rows = [("", "rows", "dim", *COLUMNS.values())]
    rows += [(r["name"], str(r["n"]), str(r["dim"]), *(_cell(r[name]) for name in COLUMNS)) for r in result.rows]
    told = []
    for pair in result.subspaces:
        line = (
            f"{pair['variance_within']:.1%} of the variance of {pair['a']} lies in the first {pair['k']} directions of "
            f"{pair['b']} (largest angle {math.degrees(pair['angle']):.1f} degrees)"
        )
        overlap = pair["collapsed_overlap"]
        told.append(paragraph(line if math.isnan(overlap) else f"{line}; collapsed directions overlap {overlap:.3f}"))
    return "\n".join([fitted(rows, SHORT), *told]) + "\n"


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.2f}"
