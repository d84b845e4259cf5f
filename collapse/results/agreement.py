"""How far a result made anew lies from the stored one: another processor rounds otherwise, and the rest is a change.

What is compared is a value's change over the value itself.  Sums of n float64 numbers in another order differ by some
1e-16 sqrt(n) of their largest terms, of float32 by 6e-8, and training multiplies that: how much is measured, script by
script, and stated as a `Tolerance`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collapse.results.documents import parse_json, to_json

MADE_BY = ("schema", "command", "versions")  # who made a result, not what it is


@dataclass(frozen=True)
class Tolerance:
    """What may lie between two results of the same computation.

    relative: share of a value that it may change by.
    floor: share of the largest value of its array below which a value may change by as much as one of that size.
    bound: values up to this size are rounding altogether: any two agree.
    of: tolerances of some arrays, whole numbers too, and of entries of meta, as `r2` or `r2.all`, by name.

    Examples:
        >>> Tolerance(of={"residual": Tolerance(bound=1e-13)}).named("meta.r2") == Tolerance()
        True
    """

    relative: float = 1e-5
    floor: float = 1e-3
    bound: float = 0.0
    of: Mapping[str, "Tolerance"] = field(default_factory=dict)

    def named(self, name: str) -> "Tolerance":
        """That of an array, or of `meta.KEY.KEY`."""
        parts = name.removeprefix("meta.").split(".")
        stems = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.of[stem] for stem in stems if stem in self.of), replace(self, of={}))


class Change(NamedTuple):
    """The change of a value that is the largest beside what is allowed.

    share: of the value, infinite where two do not compare.  allowed: what rounding may do there.  where: in words.
    """

    share: float
    allowed: float
    where: str

    @property
    def rounding(self) -> bool:
        """Whether it is no more than is allowed."""
        return self.share <= self.allowed


def change(
    new: tuple[Mapping[str, Any], Mapping[str, NDArray]],
    stored: tuple[Mapping[str, Any], Mapping[str, NDArray]],
    tolerance: Tolerance,
) -> Change:
    """The largest change between two results, (meta, arrays of any shapes by name) each.

    Command and versions do not count.  Truth, text and whole numbers without a tolerance of their own change by an
    infinite share; so do names, shapes, dtypes and what is not finite.

    Examples:
        >>> stored = {"r2": 0.5}, {"x": np.array([1.0, 2.0])}
        >>> change(({"r2": 0.5}, {"x": np.array([1.0, 2.5])}), stored, Tolerance())
        Change(share=0.25, allowed=1e-05, where='x[1] is 2.5, was 2')
    """
    parts = [_named(meta, arrays) for meta, arrays in (new, stored)]
    if lone := sorted(parts[0].keys() ^ parts[1].keys()):
        return Change(np.inf, tolerance.relative, f"{lone[0]} is {'new' if lone[0] in parts[0] else 'gone'}")
    changes = (_largest(name, value, parts[1][name], tolerance) for name, value in parts[0].items())
    return max(changes, key=lambda one: one.share / one.allowed, default=Change(0.0, tolerance.relative, "nothing"))


def _named(meta: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Every array, and every value of meta as one."""
    told = parse_json(to_json({key: value for key, value in meta.items() if key not in MADE_BY}), "meta")
    return {name: np.asarray(value) for name, value in (*_values(told, "meta"), *arrays.items())}


def _values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, f"{name}.{key}")
    elif isinstance(value, list) and not (value and all(isinstance(item, float) for item in value)):
        for index, item in enumerate(value):
            yield from _values(item, f"{name}.{index}")
    else:
        yield name, str(value) if value is None else value  # numbers in a list are an array


def _largest(name: str, new: NDArray, old: NDArray, tolerance: Tolerance) -> Change:
    own = tolerance.named(name)
    if new.shape != old.shape or new.dtype != old.dtype:
        return Change(np.inf, own.relative, f"{name} is {new.dtype} {new.shape}, was {old.dtype} {old.shape}")
    if not old.size:
        return Change(0.0, own.relative, name)
    counts = old.dtype.kind in "iu" and any(own is one for one in tolerance.of.values())
    shares = _shares(new, old, own) if old.dtype.kind == "f" or counts else np.where(new == old, 0.0, np.inf)
    at = np.unravel_index(int(shares.argmax()), shares.shape)
    place = f"[{', '.join(map(str, at))}]" if at else ""
    return Change(float(shares[at]), own.relative, f"{name}{place} is {_short(new[at])}, was {_short(old[at])}")


def _shares(new: NDArray, old: NDArray, tolerance: Tolerance) -> NDArray:
    """Change over value of arrays of numbers of one shape."""
    same = (new == old) | (np.isnan(new) & np.isnan(old)) | (np.maximum(np.abs(new), np.abs(old)) <= tolerance.bound)
    finite = np.isfinite(new) & np.isfinite(old)
    sizes = np.abs(np.where(finite, old, 0))
    sizes = np.maximum(sizes, tolerance.floor * sizes.max())
    apart = np.abs(np.where(finite, new, 0) - np.where(finite, old, 0))
    shares = np.divide(apart, sizes, out=np.full(old.shape, np.inf), where=finite & (sizes > 0))
    return np.where(same, 0.0, shares)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)
