"""A diagnosis for a reader: one paragraph, a table, and a self-contained page that prints."""

import base64
import html
import io
import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from collapse.attribution import CAUSES, at_other_lines

if TYPE_CHECKING:
    from collapse.diagnosis import Block, Diagnosis

MEANING = {
    "alive": "variance at or above the threshold times the largest, and above the floor",
    "augmentation": "collapsed; the views of an image differ more along it than images do, as in mechanism one",
    "implicit": "collapsed, though images differ more along it than views do: by elimination, mechanism two",
    "rounding": "variance at or below the floor; nothing can be said of its cause",
    "dead": "a unit that is the same for every image",
}


def verdict(found: "Diagnosis") -> str:
    """One paragraph on the last layer, on where rank is lost, and on how sure it is."""
    block = found.blocks[-1]
    parts = [_alive(block), _augmentation(block), _implicit(block), _silent(block), _depth(found), _doubts(found)]
    return " ".join(filter(None, parts))


def _alive(block: "Block") -> str:
    alive, d = block.found.counts()["alive"], block.spectrum.dim
    threshold = block.spectrum.threshold
    text = f"{block.layer}: {alive} of {d} directions hold at least {threshold:g} of the largest variance"
    rank = block.spectrum.metrics()["effective_rank"]
    text += f", effective rank {rank:.1f}" if rank == rank else ""
    if alive == d:
        return f"{text}: nothing is collapsed at this threshold."
    text += f", {d - alive} hold less or lie below the floor."
    fractions = block.found.fractions[block.found.of("alive")]
    return text + (f" Median signal fraction of the alive: {np.median(fractions):.2f}." if alive else "")


def _range(values: Any) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"


def _many(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _augmentation(block: "Block") -> str:
    chosen = block.found.of("augmentation")
    if not chosen.any():
        return ""
    return (
        f"Augmentation outweighs signal along {chosen.sum()}: there the views of an image differ more than images do "
        f"(signal fraction {_range(block.found.fractions[chosen])})."
    )


def _implicit(block: "Block") -> str:
    chosen = block.found.of("implicit")
    if not chosen.any():
        return ""
    text = (
        f"Implicit regularisation is left for {chosen.sum()}: signal outweighs augmentation "
        f"(signal fraction {_range(block.found.fractions[chosen])}), and yet they are small."
    )
    through = block.last_map
    if through is None or through["gain"] is None:
        return f"{text} No last linear map could be read to say more."
    text += (
        f" The last map, {through['module']}, has {through['gain']:.1g} of its largest squared gain along them, its "
        f"input {through['input']:.1g} of its largest variance; they lie to {through['alignment']:.0%} in the weakest "
        f"directions of that input (by chance {through['chance']:.0%})."
    )
    if not 0.5 < through["explained"] < 2:
        text += (
            f" But the map makes {through['explained']:.2g} of their variance: something else is added, or it is not "
            "linear from there on, and its gain explains little."
        )
    return text


def _silent(block: "Block") -> str:
    counts, text = block.found.counts(), []
    if counts["rounding"]:
        text.append(
            f"{_many(counts['rounding'], 'lies', 'lie')} at or below the floor ({block.spectrum.floor:.2g}), where "
            "rounding hides the cause."
        )
        through = block.last_map
        if through and through["killed"]:
            text.append(
                f"The last map, {through['module']}, lets nothing above it through along {through['killed']} "
                f"directions of its input; along {through['killed_augmentation']} of them the views of an image "
                "differ more than images do."
            )
    short = block.spectrum.dim - (block.spectrum.n - 1)
    if short > 0:
        text.append(f"{block.spectrum.n} rows leave {short} of them without variance whatever the network does.")
    if counts["dead"]:
        text.append(f"{_many(counts['dead'], 'unit is', 'units are')} constant.")
    return " ".join(text)


def _depth(found: "Diagnosis") -> str:
    """Where the effective rank falls most, as a factor."""
    steps = [row for row in found.rank_lost() if all(rank == rank for rank in row["effective_rank"])]
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


def _doubts(found: "Diagnosis") -> str:
    block, n = found.blocks[-1], found.about["images"]["count"]
    judged, undecided = int(block.found.judged().sum()), int(block.found.thin.sum())
    text = []
    if undecided:
        text.append(
            f"The evidence is thin: {n} images leave open on which side {undecided} of the {judged} attributed "
            "directions lie."
        )
    lines = at_other_lines(block.found)
    if lines["1/3"] != lines["2/3"]:
        text.append(
            f"With the line at a signal fraction of 1/3 or 2/3 instead of 1/2, {lines['1/3']} or {lines['2/3']} would "
            "be augmentation's."
        )
    if n < 10 * block.spectrum.dim:
        text.append(f"{n} images are few for {block.spectrum.dim} dimensions (10 times as many advised).")
    return " ".join(text)


def table(found: "Diagnosis") -> str:
    """A line a block, the verdict, the warnings."""
    heads = ("layer", "width", "eff. rank", "rankme", "LiDAR", *CAUSES)
    rows = [heads, *map(_row, found.blocks)]
    sizes = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])]) for row in rows]
    paragraph = textwrap.fill(found.verdict, 110)
    return "\n".join([*lines, "", paragraph, *(f"warning: {note}" for note in found.about["warnings"])]) + "\n"


def _row(block: "Block") -> tuple[str, ...]:
    measures, counts = block.spectrum.metrics(), block.found.counts()
    ranks = (measures["effective_rank"], measures["rankme"], block.lidar)
    return (
        block.layer,
        str(block.spectrum.dim),
        *(f"{rank:.2f}" if rank == rank else "-" for rank in ranks),
        *(str(counts[cause]) for cause in CAUSES),
    )


LAST_MAP = {
    "module": "last linear map",
    "explained": "of the variance of implicit directions, the share it makes (median)",
    "gain": "its squared gain along them, of its largest (median)",
    "input": "variance of its input along them, of its largest (median)",
    "alignment": "share of them in the weakest directions of its input",
    "chance": "the same by chance",
    "killed": "directions of its input that it lets through at or below the floor only",
    "killed_augmentation": "of them, along which augmentation outweighs signal",
}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; font-size: 0.87em; font-variant-numeric: tabular-nums }
th, td { padding: 0.22em 0.7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
tr.collapsed td { background: #fff4e5 } td.text { text-align: left }
.verdict { border-left: 4px solid #0072b2; padding: 0.1em 1em; background: #f4f8fb }
figure { margin: 1em 0; break-inside: avoid } figcaption { color: #555; font-size: 0.87em }
img { max-width: 100% } code { font-size: 0.87em; overflow-wrap: anywhere }
@media print { body { margin: 0; font-size: 10pt; max-width: none } h2, figure, tr { break-inside: avoid }
  h2 { break-after: avoid } .verdict, tr.collapsed td { background: none } @page { margin: 18mm } }
"""


def page(found: "Diagnosis") -> str:
    """The report, one HTML file that needs nothing else."""
    from collapse.results import command, versions

    about = found.about
    source = about["source"]
    name = source["path"] or source["architecture"]
    facts = {
        "network": f"{source['architecture']}, {name}",
        "images": f"{about['images']['count']} of {about['images']['path'] or 'a tensor'}, {about['views']} views each",
        "augmentation": about["augmentation"]["recipe"],
        "seed": about["seed"],
        "threshold": f"{about['threshold']:g} of the largest variance",
        "command": shlex.join(map(str, command())),
        "versions": ", ".join(f"{package} {number}" for package, number in versions("numpy", "scipy", "torch").items()),
    }
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>Collapse of {_text(name)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f"<h1>Collapse of {_text(name)}</h1>",
            f'<p class="verdict">{_text(found.verdict)}</p>',
            *(f"<p>Warning: {_text(note)}</p>" for note in about["warnings"]),
            "<h2>Layers, in the order of the forward pass</h2>",
            _layers(found),
            _figure(
                _depth_figure(found), "Directions of each layer by cause, as a share of its width, and effective rank."
            ),
            "<h2>What the causes mean</h2>",
            _rows((cause, MEANING[cause]) for cause in CAUSES),
            *_last(found),
            "<h2>How it was measured</h2>",
            _rows(facts.items()),
            "</body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rows(pairs: Any) -> str:
    body = "".join(f'<tr><td>{_text(key)}</td><td class="text">{_text(value)}</td></tr>' for key, value in pairs)
    return f"<table>{body}</table>"


def _layers(found: "Diagnosis") -> str:
    heads = ("layer", "width", "effective rank", "RankMe", "LiDAR", *CAUSES)
    head = "".join(f"<th>{_text(text)}</th>" for text in heads)
    body = ""
    for block in found.blocks:
        mark = ' class="collapsed"' if block.found.counts()["alive"] < block.spectrum.dim else ""
        body += f"<tr{mark}>" + "".join(f"<td>{_text(text)}</td>" for text in _row(block)) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _last(found: "Diagnosis") -> Sequence[str]:
    """The last layers in detail: their spectra with causes, and what is collapsed."""
    parts = []
    for block in found.blocks:
        if block.layer not in ("representation", "projector"):
            continue
        parts.append(f"<h2>{_text(block.layer)}</h2>")
        caption = "Variance and signal fraction of each direction; grey line: floor of rounding; dashed: threshold."
        parts.append(_figure(_spectrum_figure(block), caption))
        if block.last_map:
            told = {LAST_MAP[key]: _number(value) for key, value in block.last_map.items() if value is not None}
            parts.append(_rows(told.items()))
    return parts


def _figure(fig: Any, caption: str) -> str:
    from matplotlib import pyplot as plt

    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=160)
    plt.close(fig)
    data = base64.b64encode(picture.getvalue()).decode()
    text = _text(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _depth_figure(found: "Diagnosis") -> Any:
    from collapse import plots

    with plots.style():
        fig, ax = plots.figure(plots.TEXT, 2.8)
        counts = {cause: [block.found.counts()[cause] for block in found.blocks] for cause in CAUSES}
        layers, widths = [block.layer for block in found.blocks], [block.spectrum.dim for block in found.blocks]
        ranks = [block.spectrum.metrics()["effective_rank"] for block in found.blocks]
        plots.plot_causes_by_depth(ax, layers, counts, widths, ranks)
    return fig


def _spectrum_figure(block: "Block") -> Any:
    from collapse import plots

    found = block.found
    limits = block.spectrum.floor, block.spectrum.threshold * float(block.spectrum.singular_values[0])
    with plots.style():
        fig, axes = plots.figure(plots.TEXT, 2.6, columns=2)
        plots.plot_causes(axes, found.variances, found.fractions, found.causes, *limits)
    return fig
