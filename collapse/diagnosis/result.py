"""What a diagnosis found: the document of schema collapse.diagnosis/1, drawn and read back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from collapse import InputError
from collapse.metrics.attribution import CAUSES, Attribution, augmentation_at_line
from collapse.moved import Renamed
from collapse.results import (
    Result,
    command,
    integer_of,
    list_of,
    number_or_nan,
    require_schema,
    value_of,
    versions,
)
from collapse.spectra import Spectrum

SCHEMA = "collapse.diagnosis/1"
LISTS = ("blocks", "rank_lost", "verdict", "command", "versions", "schema")  # of the document, beside `provenance`


@dataclass(frozen=True, eq=False, repr=False)
class Block(Result):
    """What was found at one layer.

    spectrum: of all rows, not normalised.  attribution: its directions by cause.  signal_fraction: (d,) generalised
    eigenvalues of S against T, descending; NaN for as many as lie at or below the floor.  variance_share: (d,) what
    share of the variance each of these modes has; NaN likewise; empty in documents of before.  lidar: LiDAR (arXiv
    2312.04000).  last_map: of the last layers, how their last linear map treats what is collapsed
    (attribution.examine_map), or None.

    Examples:
        >>> import torch
        >>> from collapse import diagnose
        >>> (block,) = diagnose(torch.nn.Flatten(), torch.rand(60, 3, 2, 2), views=2).blocks
        >>> block.layer, sum(block.attribution.counts().values()), block.signal_fraction.shape
        ('representation', 12, (12,))
    """

    spectrum: Spectrum
    attribution: Attribution
    found = Renamed("attribution")
    signal_fraction: NDArray
    lidar: float
    last_map: dict[str, Any] | None = None
    variance_share: NDArray = field(default_factory=lambda: np.zeros(0))

    @property
    def layer(self) -> str:
        """Its name."""
        return str(self.spectrum.source["layer"])

    def signal_order(self) -> float:
        """Spearman's rank correlation of variance_share with signal_fraction; NaN for fewer than 3 modes.

        At rest a loss leaves the more variance, the higher the signal fraction (theory.collapse_line): 1.
        """
        known = np.flatnonzero(np.isfinite(self.variance_share))
        pair = self.signal_fraction[known], self.variance_share[known]
        if len(known) < 3 or any(values.min() == values.max() for values in pair):
            return math.nan
        return float(stats.spearmanr(*pair).statistic)

    def to_dict(self) -> dict[str, Any]:
        """Its part of the document collapse.diagnosis/1."""
        collapsed = self.attribution.collapsed()
        return {
            "layer": self.layer,
            "spectrum": self.spectrum.to_dict(),
            "signal_fraction": self.signal_fraction,
            "variance_share": self.variance_share,
            "signal_order": self.signal_order(),
            "lidar": self.lidar,
            "rankme": self.spectrum.metrics()["rankme"],
            "attribution": self.attribution.counts(),
            "undecided": int(self.attribution.undecided.sum()),
            "augmentation_at_line": augmentation_at_line(self.attribution),
            "alive": {"signal_fraction": self.attribution.fractions[self.attribution.of("alive")]},
            "collapsed": {
                "cause": self.attribution.causes[collapsed],
                "variance": self.attribution.variances[collapsed],
                "signal_fraction": self.attribution.fractions[collapsed],
                "undecided": self.attribution.undecided[collapsed],
            },
            "last_map": self.last_map,
        }

    def sentence(self) -> str:
        """How many directions are alive."""
        counts = self.attribution.counts()
        gone = ", ".join(f"{counts[cause]} {cause}" for cause in CAUSES[1:] if counts[cause])
        return f"{self.layer}, {counts['alive']} of {self.spectrum.dim} directions are alive{'; ' * bool(gone)}{gone}."

    @classmethod
    def _of(cls, document: Any, where: str) -> "Block":
        if not isinstance(document, Mapping):
            raise InputError(f"{where}: is no object")
        spectrum = Spectrum._of(value_of(document, "spectrum", where, dict), f"{where}: spectrum")
        fractions = _numbers(document, "signal_fraction", where)
        if len(fractions) != spectrum.dim:
            raise InputError(f"{where}: {len(fractions)} signal fractions for {spectrum.dim} dimensions; it is cut")
        shares = _numbers({"variance_share": [], **document}, "variance_share", where)
        if len(shares) not in (0, len(fractions)):
            raise InputError(f"{where}: {len(shares)} shares of the variance for {len(fractions)} modes; it is cut")
        lidar = number_or_nan(document, "lidar", where)
        last_map = value_of({"last_map": None, **document}, "last_map", where, dict, type(None))
        return cls(spectrum, _attribution(document, spectrum, where), fractions, lidar, last_map, shares)


def _attribution(document: Mapping[str, Any], spectrum: Spectrum, where: str) -> Attribution:
    """The directions by cause, without the directions themselves, which no document holds.

    Alive ones have the largest variances of the spectrum, rounding ones the least.
    """
    counts = value_of(document, "attribution", where, dict)
    sizes = {cause: integer_of(counts, cause, 0, f"{where}: attribution") for cause in CAUSES}
    alive = _numbers(value_of(document, "alive", where, dict), "signal_fraction", f"{where}: alive")
    collapsed, at = value_of(document, "collapsed", where, dict), f"{where}: collapsed"
    causes = list_of(collapsed, "cause", at, str)
    measures = {name: _numbers(collapsed, name, at) for name in ("variance", "signal_fraction")}
    undecided = list_of(collapsed, "undecided", at, bool)
    told = {cause: causes.count(cause) for cause in CAUSES[1:3]}
    lengths = {len(causes), len(undecided), *map(len, measures.values())}
    if sum(sizes.values()) != spectrum.dim or len(lengths) != 1 or sizes != {**sizes, **told, "alive": len(alive)}:
        raise InputError(
            f"{where}: its attribution does not add up to its {spectrum.dim} directions; it is cut or edited"
        )
    lost, dead = sizes["rounding"], sizes["dead"]
    values, blank = spectrum.singular_values, np.full(lost + dead, np.nan)
    below = values[len(values) - lost - dead : len(values) - dead]
    return Attribution(
        np.zeros((spectrum.dim, 0)),
        np.array([*["alive"] * len(alive), *causes, *["rounding"] * lost, *["dead"] * dead], dtype="<U12"),
        np.concatenate([values[: len(alive)], measures["variance"], below, np.zeros(dead)]),
        np.concatenate([alive, measures["signal_fraction"], blank]),
        np.array([*[False] * len(alive), *undecided, *[False] * (lost + dead)], bool),
    )


def _numbers(document: Mapping[str, Any], key: str, where: str) -> NDArray:
    values = list_of(document, key, where, int, float, type(None))
    return np.array([np.nan if value is None else value for value in values], np.float64)


def rank_lost(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """See `Diagnosis.rank_lost`."""
    rows = []
    for before, after in pairwise(blocks):
        pair = (before, after)
        rows.append(
            {
                "from": before.layer,
                "to": after.layer,
                "effective_rank": [b.spectrum.effective_rank for b in pair],
                "alive": [b.attribution.counts()["alive"] for b in pair],
                "width": [b.spectrum.dim for b in pair],
            }
        )
    return rows


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result):
    """The blocks in the order of the forward pass, how they were measured, and what it comes to.

    provenance: source, images, views, seed, threshold, augmentation, warnings, as in the document collapse.diagnosis/1.
    verdict: one paragraph with the numbers it rests on.

    Examples:
        >>> import torch
        >>> from collapse import diagnose
        >>> diagnosis = diagnose(torch.nn.Flatten(), torch.rand(60, 3, 2, 2), views=2)
        >>> [(block.layer, block.spectrum.dim) for block in diagnosis.blocks]
        [('representation', 12)]
    """

    blocks: list[Block]
    provenance: dict[str, Any]
    about = Renamed("provenance")
    verdict: str
    command: list[str] = field(default_factory=command)
    versions: Mapping[str, str] = field(default_factory=lambda: versions("numpy", "scipy", "torch", "torchvision"))

    def rank_lost(self) -> list[dict[str, Any]]:
        """Effective rank, alive directions and width before and after each block but the first."""
        return rank_lost(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.diagnosis/1, with values that may still be NaN."""
        return {
            "schema": SCHEMA,
            **self.provenance,
            "blocks": [block.to_dict() for block in self.blocks],
            "rank_lost": self.rank_lost(),
            "verdict": self.verdict,
            "command": self.command,
            "versions": self.versions,
        }

    def inputs(self) -> list[str]:
        """The network and the images."""
        return [path for path in (self.provenance["source"].get("path"), self.provenance["images"]["path"]) if path]

    def notes(self) -> list[str]:
        """The warnings."""
        return list(self.provenance["warnings"])

    def sentence(self) -> str:
        """What the verdict begins with."""
        return ". ".join(self.verdict.split(". ")[:2]).removesuffix(".") + "."

    def table(self) -> list[tuple[str, ...]]:
        """A row a block: width, effective rank, and its directions by cause."""
        rows: list[tuple[str, ...]] = [("layer", "width", "eff. rank", *CAUSES)]
        for block in self.blocks:
            counts, name = block.attribution.counts(), block.layer
            numbers = (str(block.spectrum.dim), f"{block.spectrum.effective_rank:.2f}", *map(str, counts.values()))
            rows.append((name if len(name) < 18 else f"...{name[-14:]}", *numbers))
        return rows

    def plot(self, ax: Any = None) -> Any:
        """Each layer's directions by cause, as shares of its width, and its effective rank; returns the axes."""
        from collapse import plots

        with plots.style():
            if ax is None:
                _, ax = plots.figure(plots.TEXT, 2.8)
            counts = {cause: [block.attribution.counts()[cause] for block in self.blocks] for cause in CAUSES}
            widths = [block.spectrum.dim for block in self.blocks]
            ranks = [block.spectrum.effective_rank for block in self.blocks]
            plots.plot_causes_by_depth(ax, [block.layer for block in self.blocks], counts, widths, ranks)
        return ax

    @classmethod
    def _of(cls, document: Any, where: str) -> "Diagnosis":
        document = require_schema(document, SCHEMA, where)
        blocks = [
            Block._of(block, f"{where}: block {index}")
            for index, block in enumerate(list_of(document, "blocks", where, dict))
        ]
        if not blocks:
            raise InputError(f"{where}: holds no block")
        provenance = {name: value for name, value in document.items() if name not in LISTS}
        value_of(value_of(provenance, "source", where, dict), "architecture", where, str)
        images = value_of(provenance, "images", where, dict)
        value_of(images, "path", where, str, type(None))
        integer_of(images, "count", 0, where)
        list_of(provenance, "warnings", where, str)
        told = {"verdict": str, "versions": dict}
        read = {name: value_of(document, name, where, kind) for name, kind in told.items()}
        return cls(blocks, provenance, command=list_of(document, "command", where, str), **read)
