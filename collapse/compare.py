"""Several spectra side by side: a table of rank measures, and which directions two of them share."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from collapse import metrics
from collapse.results import command
from collapse.spectra import Spectrum

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


def comparison(spectra: Mapping[str, Spectrum]) -> dict[str, Any]:
    """The document of schema collapse.comparison/1: a row of measures for each name, and the subspaces of each pair."""
    rows = [
        {"name": name, "n": s.n, "dim": s.dim, "l2_normalized": s.l2_normalized, **s.metrics(), "warnings": s.warnings}
        for name, s in spectra.items()
    ]
    directed = {name: s for name, s in spectra.items() if s.vectors is not None and s.singular_values[0] > s.floor}
    pairs = [
        subspaces(a, directed[a], b, directed[b])
        for a in directed
        for b in directed
        if a != b and directed[a].dim == directed[b].dim
    ]
    return {"schema": "collapse.comparison/1", "rows": rows, "subspaces": pairs, "command": command()}


def subspaces(name_a: str, a: Spectrum, name_b: str, b: Spectrum) -> dict[str, Any]:
    """How much of A lives where B does.

    k: B's effective rank, rounded up;  variance_within: the share of A's variance in B's first k directions;
    angle: the largest principal angle, in radians, between the first k directions of both;
    collapsed_overlap: mean squared cosine between the collapsed directions of both (1: the same, or those of one
    contain those of the other), null where one has none.
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


def table(document: Mapping[str, Any]) -> str:
    """The comparison for a reader."""
    width = max(4, *(len(row["name"]) for row in document["rows"]))
    head = f"{'':<{width}}{'rows':>9}{'dim':>6}" + "".join(f"{text:>11}" for text in COLUMNS.values())
    lines = [head]
    for row in document["rows"]:
        cells = (_cell(row[name]) for name in COLUMNS)
        lines.append(f"{row['name']:<{width}}{row['n']:>9}{row['dim']:>6}" + "".join(f"{cell:>11}" for cell in cells))
    for pair in document["subspaces"]:
        lines.append(
            f"{pair['variance_within']:.1%} of the variance of {pair['a']} lies in the first {pair['k']} directions of "
            f"{pair['b']} (largest angle {math.degrees(pair['angle']):.1f} degrees)"
            + (
                f"; collapsed directions overlap {pair['collapsed_overlap']:.3f}"
                * (not math.isnan(pair["collapsed_overlap"]))
            )
        )
    if len({row["l2_normalized"] for row in document["rows"]}) > 1:
        lines.append("warning: some rows were normalised and some were not; their spectra do not compare")
    if len({row["n"] for row in document["rows"]}) > 1:
        lines.append("warning: different numbers of rows; small singular values grow with their number")
    notes = dict.fromkeys(note for row in document["rows"] for note in row["warnings"])
    lines += [f"warning: {note}" for note in notes]
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.2f}"
