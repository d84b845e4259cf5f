"""A diagnosis in words: one paragraph, and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from collapse.diagnosis.advice import step
from collapse.diagnosis.result import Block, Diagnosis, rank_lost
from collapse.metrics.attribution import CAUSES
from collapse.results.screen import fitted, paragraph
from collapse.spectra.scale import headline

ORDERED = 0.75  # of Block.signal_order; see docs/diagnosis.md for networks before and after training


def verdict(blocks: Sequence[Block], provenance: Mapping[str, Any]) -> str:
    """One paragraph on the last layer, on where rank is lost, and on how sure it is."""
    block = blocks[-1]
    parts = [_alive(block), _augmentation(block, provenance), _implicit(block, provenance), _order(block),
             _silent(block), _depth(blocks), _doubts(block, provenance)]  # fmt: skip
    return " ".join(filter(None, parts))


def _alive(block: Block) -> str:
    alive, d = block.attribution.counts()["alive"], block.spectrum.dim
    threshold = block.spectrum.threshold
    text = f"{block.layer}: {alive} of {d} directions hold at least {threshold:g} of the largest variance"
    rank = block.spectrum.metrics()["effective_rank"]
    text += f", effective rank {rank:.1f}" if rank == rank else ""
    if alive == d:
        return f"{text}: nothing is collapsed at this threshold."
    text += f", {d - alive} hold less or lie below the floor."
    fractions = block.attribution.fractions[block.attribution.of("alive")]
    return text + (f" Median signal fraction of the alive: {np.median(fractions):.2f}." if alive else "")


def _range(values: Any) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"


def _many(count: int, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"


def _known(provenance: Mapping[str, Any]) -> bool:
    """Whether the line is that of a loss that is known."""
    return provenance["temperature"] is not None or provenance.get("similarity", "cosine") != "cosine"


def _loss(provenance: Mapping[str, Any]) -> str:
    temperature = provenance["temperature"]
    return provenance.get("similarity", "cosine") + (
        f" loss of temperature {temperature:g}" if temperature else " loss"
    )


def _augmentation(block: Block, provenance: Mapping[str, Any]) -> str:
    chosen = block.attribution.of("augmentation")
    if not chosen.any():
        return ""
    fractions = _range(block.attribution.fractions[chosen])
    if _known(provenance):
        text = (
            f"Augmentation takes {chosen.sum()}: their signal fraction ({fractions}) lies below "
            f"{provenance['line']:.2g}, under which a {_loss(provenance)} at rest leaves a direction less than the "
            "threshold."
        )
        more = (block.attribution.fractions[block.attribution.of("alive")] < provenance["line"]).sum()
        return f"{text} So do {more} of those alive, which the loss has not taken." if more else text
    return (
        f"Augmentation outweighs signal along {chosen.sum()}: there the views of an image differ more than images do "
        f"(signal fraction {fractions})."
    )


def _implicit(block: Block, provenance: Mapping[str, Any]) -> str:
    chosen = block.attribution.of("implicit")
    if not chosen.any():
        return ""
    known = _known(provenance)
    why = f"their signal lies above {provenance['line']:.2g}" if known else "signal outweighs augmentation"
    text = (
        f"Implicit regularisation is left for {chosen.sum()}: {why} "
        f"(signal fraction {_range(block.attribution.fractions[chosen])}), and yet they are small."
    )
    last_map = block.last_map
    if last_map is None or last_map["gain"] is None:
        return f"{text} No last linear map could be read to say more."
    text += (
        f" The last map, {last_map['module']}, has {last_map['gain']:.1g} of its largest squared gain along them, its "
        f"input {last_map['input']:.1g} of its largest variance; they lie to {last_map['alignment']:.0%} in the "
        f"weakest directions of that input (by chance {last_map['chance']:.0%})."
    )
    if not 0.5 < last_map["explained"] < 2:
        text += (
            f" But the map makes {last_map['explained']:.2g} of their variance: something else is added, or it is not "
            "linear from there on, and its gain explains little."
        )
    return text


def _order(block: Block) -> str:
    """How far the layer is from where a loss orders it; only where a cause is named."""
    order = block.signal_order()
    if order != order or not block.attribution.collapsed().any():
        return ""
    text = f"Variance follows the signal fraction with rank correlation {order:.2f} (a loss at rest leaves 1)"
    if order < ORDERED:
        return (
            f"{text}: no contrastive loss has ordered this layer, which is so before training. What is collapsed need "
            "not be training's doing."
        )
    return f"{text}."


def _silent(block: Block) -> str:
    counts, text = block.attribution.counts(), []
    if counts["rounding"]:
        text.append(
            f"{_many(counts['rounding'], 'lies', 'lie')} at or below the floor ({block.spectrum.floor:.2g}), where "
            "rounding hides the cause."
        )
        last_map = block.last_map
        if last_map and last_map["killed"]:
            text.append(
                f"The last map, {last_map['module']}, lets nothing above it through along {last_map['killed']} "
                f"directions of its input; along {last_map['killed_augmentation']} of them the views of an image "
                "differ more than images do."
            )
    short = block.spectrum.dim - (block.spectrum.n - 1)
    if short > 0:
        text.append(f"{block.spectrum.n} rows leave {short} of them without variance whatever the network does.")
    if counts["dead"]:
        text.append(f"{_many(counts['dead'], 'unit is', 'units are')} constant.")
    return " ".join(text)


def _depth(blocks: Sequence[Block]) -> str:
    """Where the effective rank falls most, as a factor."""
    steps = [row for row in rank_lost(blocks) if all(rank == rank for rank in row["effective_rank"])]
    if not steps:
        return ""
    worst = min(steps, key=lambda row: row["effective_rank"][1] / row["effective_rank"][0])
    before, after = worst["effective_rank"]
    if after >= before:
        return "The effective rank falls between no two layers."
    return (
        f"The effective rank falls most from {worst['from']} to {worst['to']}, from {before:.1f} to {after:.1f} "
        f"(of {worst['width'][0]} and {worst['width'][1]} dimensions)."
    )


def _doubts(block: Block, provenance: Mapping[str, Any]) -> str:
    n = provenance["images"]["count"]
    attributed, undecided = int(block.attribution.collapsed().sum()), int(block.attribution.undecided.sum())
    text = []
    if undecided:
        text.append(
            f"The evidence is thin: {n} images leave open on which side {undecided} of the {attributed} attributed "
            "directions lie."
        )
    if attributed and (lines := provenance.get("lines")):
        fractions = block.attribution.fractions[block.attribution.collapsed()]
        (low, first), *_, (high, last) = lines.items()
        counts = [int((fractions < line).sum()) for line in (first, last)]
        text.append(
            f"The temperature of its loss is not known: a cosine loss of {low} to {high} has its line at {first:.2f} "
            f"to {last:.2f}, with which augmentation takes {counts[0]} to {counts[1]}."
        )
    if n < 10 * block.spectrum.dim:
        text.append(f"{n} images are few for {block.spectrum.dim} dimensions (10 times as many advised).")
    return " ".join(text)


# Heads where the screen is narrow.
SHORT = {"eff. rank": "rank", "augmentation": "augm.", "implicit": "impl.", "rounding": "round."}


def table(diagnosis: Diagnosis) -> str:
    """What it comes to and what to do, a line a block, and the verdict in full."""
    block = diagnosis.blocks[-1]
    counts = block.attribution.counts()
    lost = ", ".join(f"{counts[cause]} {cause}" for cause in CAUSES[1:] if counts[cause])
    brief = headline(block.spectrum).text + (f" Of {block.spectrum.dim} directions are lost: {lost}." if lost else "")
    rows = [("layer", "width", "eff. rank", "rankme", "LiDAR", *CAUSES), *map(cells, diagnosis.blocks)]
    act = step(block.spectrum, diagnosis)
    return (
        "\n".join([paragraph(brief), paragraph(act), "", fitted(rows, SHORT), "", paragraph(diagnosis.verdict)]) + "\n"
    )


def cells(block: Block) -> tuple[str, ...]:
    measures, counts = block.spectrum.metrics(), block.attribution.counts()
    ranks = (measures["effective_rank"], measures["rankme"], block.lidar)
    return (
        block.layer,
        str(block.spectrum.dim),
        *(f"{rank:.2f}" if rank == rank else "-" for rank in ranks),
        *(str(counts[cause]) for cause in CAUSES),
    )
