"""The parts of a spectrum's document, read back: every value has its type, and no numbers that no rows have."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.results import LARGEST, integer_of, list_of, value_of


def check_possible(values: NDArray, moments: NDArray, n: int, unit: bool, where: str, slack: float = 1e-6) -> None:
    """Raise InputError for singular values and moments, (d,) each, that no rows have.

    Taking the mean off only takes away, and rows of norm 1 have mean square 1; slack: as a share, what rounds.
    """
    total = moments.sum() * (1 + slack)
    if values.sum() * (1 - 1 / n) > total or (unit and moments.sum() > 1 + slack):
        raise InputError(f"{where}: no rows have these singular_values and moments; it is cut or edited")


def source_of(source: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Provenance, whose values must have their types; what is not known is kept."""
    value_of(source, "kind", where, str)
    for key in ("path", "sha256", "architecture", "branch", "layer"):
        value_of(source, key, where, str, type(None))
    for key in ("keys", "preprocessing"):
        value_of(source, key, where, dict, type(None))
    for key in ("foreign", "warnings"):
        list_of(source, key, where, str)
    return source


def images_of(document: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    images = value_of(document, "images", where, dict, type(None))
    if images is None:
        return None
    value_of(images, "path", f"{where}: images", str, type(None))
    integer_of(images, "count", 0, f"{where}: images")
    for entry in list_of(images, "skipped", f"{where}: images", dict):
        value_of(entry, "path", f"{where}: images skipped", str)
        value_of(entry, "why", f"{where}: images skipped", str)
    return dict(images)


def versions_of(document: Mapping[str, Any], where: str) -> dict[str, str]:
    versions: dict[str, str] = value_of(document, "versions", where, dict)
    for name in versions:
        value_of(versions, name, f"{where}: versions", str)
    return versions


def check_files(document: Mapping[str, Any], where: str) -> None:
    """What lies beside the document, by name, if it says so at all."""
    named = value_of({"files": {}, **document}, "files", where, dict)
    for name in named:
        entry = value_of(named, name, f"{where}: files", dict)
        value_of(entry, "sha256", f"{where}: files", str)
        integer_of(entry, "size", 0, f"{where}: files")


def errors_of(document: Mapping[str, Any], dim: int, where: str) -> dict[str, Any] | None:
    """Standard errors; null stands for one that is undefined.

    Raises InputError: not as many as there are singular values.
    """
    errors = value_of({"errors": None, **document}, "errors", where, dict, type(None))
    if errors is None:
        return None
    where = f"{where}: errors"
    values = list_of(errors, "singular_values", where, float, int, type(None))
    measures = value_of(errors, "metrics", where, dict)
    if len(values) != dim:
        raise InputError(f"{where}: {len(values)} standard errors for {dim} singular values; it is cut or edited")
    return {
        "groups": integer_of(errors, "groups", 2, where),
        "singular_values": np.array([_error(value, where) for value in values]),
        "metrics": {name: _error(value_of(measures, name, where, float, int, type(None)), where) for name in measures},
    }


def _error(value: float | None, where: str) -> float:
    if value is not None and not 0 <= value <= LARGEST:
        raise InputError(f"{where}: a standard error is {str(value)[:40]}, expected a finite number from 0")
    return math.nan if value is None else float(value)
