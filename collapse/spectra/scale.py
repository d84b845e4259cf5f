"""A scale for a number: spectra of known networks, and where another lies among them.

The package holds a few, as `collapse spectrum` wrote them (reference/NAME.json).  A folder of results is read likewise.
"""

import math
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from collapse import InputError
from collapse.results.screen import fitted, paragraph
from collapse.spectra.result import Spectrum, load_results

FOLDER = Path(__file__).with_name("reference")
CIFAR = "4,096 of the 10,000 test images of CIFAR-10"
# Lines of the headline: conventions, not theorems.
HALF, TENTH, NARROW = 0.5, 0.1, 2.0
STUDY = "the study's narrow ResNet-26, 3 epochs of CIFAR-10"
ABOUT = {
    "all-minilm-l6-v2": "all-MiniLM-L6-v2, sentence-transformers; 4,096 of 6,191 docstrings of Python 3.11",
    "directclr-cifar10": f"DirectCLR, {STUDY}; {CIFAR}",
    "resnet20-cifar10": f"ResNet-20, supervised on CIFAR-10; {CIFAR}",
    "resnet32-cifar10": f"ResNet-32, supervised on CIFAR-10; {CIFAR}",
    "resnet50-untrained": f"ResNet-50 with random weights of torchvision, seed 0; {CIFAR}, 64 px",
    "resemblyzer-voices": "Resemblyzer's voice encoder; 4,096 of 6,289 recordings in 29 languages",
    "simclr-linear-cifar10": f"SimCLR behind a linear projector, {STUDY}; {CIFAR}",
    "simclr-mlp-cifar10": f"SimCLR behind a two-layer projector, {STUDY}; {CIFAR}",
    "simclr-none-cifar10": f"SimCLR without a projector, {STUDY}; {CIFAR}",
    "vit-small-untrained": f"ViT-S/16 with random weights of timm, seed 0; {CIFAR}, 64 px",
}


def references(*places: Any) -> dict[str, Spectrum]:
    """Spectra of known networks by name, a scale for your own.

    Args:
        places: names of the package's references, results of `collapse spectrum`, folders of such results, or
            `Spectrum` objects. Without any: all references of the package.

    Raises InputError: no such reference or file, no result of `collapse spectrum`, or a folder without one.

    Examples:
        >>> known = references()
        >>> known["resnet20-cifar10"].dim, round(share(known["resnet20-cifar10"]), 3)
        (64, 0.214)
    """
    named: dict[str, Spectrum] = {}
    for name, found in (pair for place in places or sorted(ABOUT) for pair in _found(place)):
        first, count = name, 2
        while name in named:
            name, count = f"{first} ({count})", count + 1
        named[name] = found
    return named


def _found(place: Any) -> Iterator[tuple[str, Spectrum]]:
    """(name, spectrum) of each that a place holds."""
    if isinstance(place, Spectrum):
        yield place.name, place
        return
    if not isinstance(place, (str, PathLike)):
        raise InputError(f"against: got a {type(place).__name__}, give names, paths or spectra")
    path = Path(place)
    if fspath(place) in ABOUT:
        if path.exists():
            raise InputError(f"{place}: is a reference and a file here; give ./{place} for the file")
        yield fspath(place), Spectrum.load(FOLDER / f"{place}.json")
    elif path.is_dir():
        results = sorted(path.glob("*.json"))
        if not results:
            raise InputError(f"{path}: holds no result; write some: collapse spectrum ... --out {path}/NAME.json")
        yield from ((result.stem, one) for result in results for one in _last(result))
    elif path.suffix == ".json":
        yield from ((one.name, one) for one in load_results(path))
    else:
        raise InputError(f"{place}: is no reference and no result; there are {', '.join(ABOUT)}")


def _last(result: Path) -> list[Spectrum]:
    """The spectrum of a result, or the last of those of all layers."""
    return load_results(result)[-1:]


def share(s: Spectrum) -> float:
    """The effective rank as a share of the width, which compares across widths; NaN where nothing varies."""
    return s.effective_rank / s.dim


def placed(s: Spectrum, others: Mapping[str, Spectrum] | None = None) -> str:
    """A sentence on where the effective rank of s lies among others, as a share of the width.

    others: default the package's references.  Empty where it says nothing: nothing varies, rows are as they are, or
    there are too few of them.
    """
    mine = share(s)
    if mine != mine or s.n - 1 < s.dim or not s.l2_normalized:
        return ""
    whose = "those given" if others is not None else "`collapse references`"
    known = {name: share(one) for name, one in (references() if others is None else others).items()
             if one.l2_normalized and share(one) == share(one)}  # fmt: skip
    if not known:
        return ""
    told = {name: f"{name} ({part:.1%})" for name, part in known.items()}
    below = max((name for name in known if known[name] <= mine), key=known.__getitem__, default=None)
    above = min((name for name in known if known[name] > mine), key=known.__getitem__, default=None)
    if below is not None and above is not None:
        where = f"between {told[below]} and {told[above]}"
    else:
        where = f"below {told[above]}, the lowest" if above else f"at or above {told[below or '']}, the highest"
    return f"The effective rank is {mine:.1%} of the width, {where} of {whose}."


def described(known: Mapping[str, Spectrum]) -> str:
    """References for a reader: a table, the lowest share first, and what each of the package's is."""
    heads = ("reference", "rows", "width", "eff. rank", "of width", "rankme", "collapsed")
    rows = [
        (
            name, str(s.n), str(s.dim), f"{s.effective_rank:.2f}", f"{share(s):.1%}", f"{s.rankme:.2f}",
            str(s.collapsed_dimensions),
        )
        for name, s in sorted(known.items(), key=lambda item: share(item[1]))
    ]  # fmt: skip
    told = [paragraph(f"{name}: {ABOUT[name]}.") for name in sorted(known) if name in ABOUT]
    return "\n".join([fitted([heads, *rows]), "", *told]) + "\n"


class Headline(NamedTuple):
    """What a spectrum comes to: a colour (green, amber, red, unknown) and a sentence."""

    colour: str
    text: str


def headline(s: Spectrum) -> Headline:
    """What it comes to, by a rule of lines that are conventions, not theorems.

    Cannot tell: no more rows than dimensions.  Red: complete collapse, or more than half of the dimensions collapsed.
    Amber: some are, or the effective rank is below a tenth of the width.  Green: neither.
    """
    rank, gone, d = s.effective_rank, s.collapsed_dimensions, s.dim
    if s.n - 1 < d:
        return Headline("unknown", f"Cannot tell: {s.n} {_rows(s)} can show at most {s.n - 1} of {d} directions.")
    if math.isnan(rank) or rank < NARROW:
        shown = "nothing varies" if math.isnan(rank) else f"effective rank {rank:.1f} of {d}"
        return Headline("red", f"Complete collapse: {shown}.")
    told = f"{gone} of {d} lie below {s.threshold:g} of the largest singular value; effective rank {rank:.1f}"
    if gone > HALF * d:
        return Headline("red", f"Dimensional collapse: {told}.")
    if gone or rank < TENTH * d:
        what = "Some dimensions are collapsed" if gone else "No dimension is collapsed, but few carry the variance"
        return Headline("amber", f"{what}: {told}.")
    return Headline("green", f"No dimensional collapse: {told}.")


def verdict(s: Spectrum, others: Mapping[str, Spectrum] | None = None) -> str:
    """At most three sentences: what it comes to, what weakens the numbers, and where they lie among others."""
    few = f"{s.n} {_rows(s)} are few for {s.dim} dimensions, which biases small values down (10 d advised)."
    if s.n - 1 < s.dim:
        few = f"They show {s.dim - s.collapsed_dimensions}; use {10 * s.dim:,} {_rows(s)} (10 d)."
    parts = (headline(s).text, few if s.n < 10 * s.dim else "", placed(s, others))
    return " ".join(filter(None, parts))


def meaning(name: str, s: Spectrum) -> str:
    """What a metric's number is, and of how much; docs/cheatsheet.md has it at length."""
    return MEANINGS[name].format(d=s.dim, n=f"{s.n:,}", threshold=f"{s.threshold:g}")


# Of every metric, what a reader of its number needs, in the width that a terminal of 80 columns leaves.
MEANINGS = {
    "collapsed_dimensions": "of {d}; below {threshold} of the largest",
    "collapsed_dimensions_1e-03": "of {d}; below 1e-03 of the largest",
    "collapsed_dimensions_1e-04": "of {d}; below 1e-04 of the largest",
    "collapsed_dimensions_1e-08": "of {d}; below 1e-08 of the largest",
    "numerical_rank": "of {d}; above the rounding",
    "effective_rank": "of {d}; a flat spectrum has all",
    "rankme": "of {d}; the mean not removed",
    "rankme_centered": "of {d}; the mean removed",
    "stable_rank": "of {d}; the sum over the largest",
    "participation_ratio": "of {d}; weighs the largest most",
    "alpha": "power of the decay; about 1 is good",
    "alpha_r2": "1: the decay is a power law",
    "condition": "smallest over largest; 1 is flat",
    "auc": "0.5 is flat, 1 one direction",
    "isoscore": "1 is flat, 0 one direction",
    "vendi": "of {n} rows; how many differ",
    "self_clustering": "0 spread evenly, 1 all rows alike",
    "mean_cosine": "of two rows; 1: all point one way",
    "mp_edge": "the largest value of pure noise",
    "above_edge": "of {d}; more than such noise has",
}


def takes_images(source: Mapping[str, Any]) -> bool:
    """Whether the network of a result takes images, not texts, sounds or clips."""
    return not {"frames", "max_length", "sampling_rate"} & (source.get("preprocessing") or {}).keys()


def _rows(s: Spectrum) -> str:
    """What a row is of."""
    return "images" if s.images is not None and takes_images(s.source) else "rows"
