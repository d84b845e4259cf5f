"""A diagnosis as a self-contained page that prints."""

import base64
import html
import io
import shlex
from collections.abc import Sequence
from typing import Any

from collapse.diagnosis.result import Block, Diagnosis
from collapse.diagnosis.wording import cells
from collapse.metrics.attribution import CAUSES

MEANING = {
    "alive": "variance at or above the threshold times the largest, and above the floor",
    "augmentation": "collapsed; the views of an image differ more along it than images do, as in mechanism one",
    "implicit": "collapsed, though images differ more along it than views do: by elimination, mechanism two",
    "rounding": "variance at or below the floor; nothing can be said of its cause",
    "dead": "a unit that is the same for every image",
}


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
.wide { overflow-x: auto } img { max-width: 100% } code { font-size: 0.87em; overflow-wrap: anywhere }
@media print { body { margin: 0; font-size: 10pt; max-width: none } h2, figure, tr { break-inside: avoid }
  h2 { break-after: avoid } .verdict, tr.collapsed td { background: none } @page { margin: 18mm } }
"""


def page(diagnosis: Diagnosis) -> str:
    """The report, one HTML file that needs nothing else."""
    provenance = diagnosis.provenance
    source = provenance["source"]
    name = source["path"] or source["architecture"]
    facts = {
        "network": f"{source['architecture']}, {name}",
        "images": f"{provenance['images']['count']} of {provenance['images']['path'] or 'a tensor'}, "
        f"{provenance['views']} views each",
        "augmentation": provenance["augmentation"]["recipe"],
        "seed": provenance["seed"],
        "threshold": f"{provenance['threshold']:g} of the largest variance",
        "command": shlex.join(diagnosis.command),
        "versions": ", ".join(f"{package} {number}" for package, number in diagnosis.versions.items()),
    }
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>Collapse of {_text(name)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
            f"<h1>Collapse of {_text(name)}</h1>",
            f'<p class="verdict">{_text(diagnosis.verdict)}</p>',
            *(f"<p>Warning: {_text(note)}</p>" for note in provenance["warnings"]),
            *sections(diagnosis),
            "<h2>How it was measured</h2>",
            rows(facts.items()),
            "</body></html>\n",
        ]
    )


def sections(diagnosis: Diagnosis) -> list[str]:
    """The parts of the page that show the layers and the causes."""
    return [
        "<h2>Layers, in the order of the forward pass</h2>",
        _layers(diagnosis),
        _figure(
            diagnosis.plot().figure, "Directions of each layer by cause, as a share of its width, and effective rank."
        ),
        "<h2>What the causes mean</h2>",
        rows((cause, MEANING[cause]) for cause in CAUSES),
        *_last(diagnosis),
    ]


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rows(pairs: Any) -> str:
    """Pairs of texts as a table."""
    body = "".join(f'<tr><td>{_text(key)}</td><td class="text">{_text(value)}</td></tr>' for key, value in pairs)
    return f'<div class="wide"><table>{body}</table></div>'


def _layers(diagnosis: Diagnosis) -> str:
    heads = ("layer", "width", "effective rank", "RankMe", "LiDAR", *CAUSES)
    head = "".join(f"<th>{_text(text)}</th>" for text in heads)
    body = ""
    for block in diagnosis.blocks:
        mark = ' class="collapsed"' if block.attribution.counts()["alive"] < block.spectrum.dim else ""
        body += f"<tr{mark}>" + "".join(f"<td>{_text(text)}</td>" for text in cells(block)) + "</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _last(diagnosis: Diagnosis) -> Sequence[str]:
    """The last layers in detail: their spectra with causes, and what is collapsed."""
    parts = []
    for block in diagnosis.blocks:
        if block.layer not in ("representation", "projector"):
            continue
        parts.append(f"<h2>{_text(block.layer)}</h2>")
        caption = "Variance and signal fraction of each direction; grey line: floor of rounding; dashed: threshold."
        parts.append(_figure(_spectrum_figure(block), caption))
        if block.last_map:
            told = {LAST_MAP[key]: _number(value) for key, value in block.last_map.items() if value is not None}
            parts.append(rows(told.items()))
    return parts


def _figure(fig: Any, caption: str) -> str:
    from matplotlib import pyplot as plt

    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=160)
    plt.close(fig)
    data = base64.b64encode(picture.getvalue()).decode()
    text = _text(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _spectrum_figure(block: Block) -> Any:
    from collapse import plots

    attribution = block.attribution
    limits = block.spectrum.floor, block.spectrum.threshold * float(block.spectrum.singular_values[0])
    with plots.style():
        fig, axes = plots.figure(plots.TEXT, 2.6, columns=2)
        plots.plot_causes(axes, attribution.variances, attribution.fractions, attribution.causes, *limits)
    return fig
