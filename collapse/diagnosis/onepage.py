"""Everything about one checkpoint on one self-contained page: a headline, its spectrum, its layers, what to do."""

import html
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.diagnosis import Diagnosis, diagnose
from collapse.diagnosis.advice import ADVICE, advised, first_step, step
from collapse.diagnosis.page import STYLE, rows, sections
from collapse.encoders.processes import rank
from collapse.results import save_text
from collapse.results.outputs import spare
from collapse.spectra import Spectrum
from collapse.spectra.measure import layer_spectra
from collapse.spectra.scale import HALF, NARROW, TENTH, headline, placed, references, share, takes_images

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

PAGE = """
.headline { border-left: 6px solid; padding: 0.5em 1em; font-size: 1.12em }
.green { border-color: #1a7f37; background: #1a7f3714 } .amber { border-color: #bf8700; background: #bf870018 }
.red { border-color: #cf222e; background: #cf222e14 } .unknown { border-color: #6e7781; background: #6e778118 }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto } #value { min-height: 1.4em; font-size: 0.87em }
svg text { font: 11px system-ui, sans-serif; fill: currentColor } svg .grid { stroke: currentColor; opacity: 0.15 }
pre { overflow-x: auto; background: #8881; padding: 0.6em } li { margin: 0.3em 0 }
@media (prefers-color-scheme: dark) { body { background: #15181c; color: #dde1e6 } th, td { border-color: #444 }
  tr.collapsed td { background: #4a3a1e } .verdict { background: #1d2a35 } figcaption { color: #aab }
  figure img { background: #fff } }
@media print { body { color: #000; background: #fff } #value { display: none } pre { white-space: pre-wrap } }
"""

# The page reads without it: every number of the drawing is in the table below, or in a title.
SCRIPT = """
document.querySelectorAll('svg.spectrum').forEach(svg => {
  const said = document.getElementById('value'), dots = [...svg.querySelectorAll('circle')];
  svg.addEventListener('mousemove', event => {
    const at = svg.createSVGPoint(); at.x = event.clientX; at.y = event.clientY;
    const p = at.matrixTransform(svg.getScreenCTM().inverse());
    const near = dots.reduce((a, b) => Math.hypot(a.cx.baseVal.value - p.x, a.cy.baseVal.value - p.y)
      < Math.hypot(b.cx.baseVal.value - p.x, b.cy.baseVal.value - p.y) ? a : b);
    said.textContent = near.querySelector('title').textContent;
  });
});
"""


def report(
    source: Any,
    images: Any,
    out: str | PathLike,
    *,
    against: Iterable[Any] = (),
    views: int = 4,
    temperature: float | None = None,
    similarity: str = "cosine",
    threshold: float = 1e-6,
    augmentations: Any = None,
    views_file: Any = None,
    told: Callable[[str], Any] | None = None,
    **options: Any,
) -> Path:
    """Write one HTML page about a network, which needs nothing else; returns its path.

    It holds a headline, the spectrum of the representation with its floor and threshold, the rank of every layer,
    the diagnosis, others' spectra beside it, what to do, warnings, and the commands that give each number again.

    Args:
        source: a checkpoint's path, FILE.py:NAME, what `collapse.load` gave, or any torch.nn.Module.
        images: as for `collapse.spectrum`; an iterator, which can be read once only, is refused.
        out: the page, .html or .htm.
        against: what `collapse.references` takes: names, results, folders, `Spectrum`; they are drawn beside it.
        views, temperature, similarity, augmentations, views_file: as for `collapse.diagnose`; of texts and sounds
            without augmentations or views_file there is no diagnosis.
        threshold: collapsed is below it times the largest singular value, or variance.
        told: called with each line of the page's headline, as a terminal shows them.
        options: as for `collapse.layer_spectra`.

    Raises:
        InputError: as `collapse.layer_spectra` and `collapse.diagnose` do, or `out` is no page or is read.
        TypeError: an unknown keyword.

    Examples:
        >>> import torch
        >>> page = report(torch.nn.Flatten(), torch.rand(40, 3, 1, 1), "page.html", views=2)
        >>> page.read_text()[:15]
        '<!doctype html>'
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"{path}: a report is .html")
    if isinstance(images, Iterator):
        raise InputError("images: an iterator can be read once, and a report reads images twice; give a path or a list")
    against = list(against)
    for text in filter(None, (source if isinstance(source, (str, PathLike)) else None, *_paths(against))):
        spare(str(text), path)
    others = references(*against) if against else {}
    layers = layer_spectra(source, images, threshold=threshold, **options)
    given = {"augmentations": augmentations, "views_file": views_file}
    how = {"views": views, "temperature": temperature, "similarity": similarity, "threshold": threshold, **given}
    diagnosis = None
    if augmentations is not None or views_file is not None or takes_images(layers["representation"].source):
        diagnosis = diagnose(source, None if views_file is not None else images, **how, **options)
    if rank() == 0 or not options.get("distributed"):
        save_text(path, page(layers, diagnosis, others))
        s = layers["representation"]
        if told is not None:
            told(headline(s).text)
            told(step(s, diagnosis))
    return path


def _paths(against: Iterable[Any]) -> list[Any]:
    return [other for other in against if isinstance(other, (str, PathLike))]


def page(layers: Mapping[str, Spectrum], diagnosis: Diagnosis | None, others: Mapping[str, Spectrum]) -> str:
    """The page as text."""
    s = layers["representation"]
    name = str(s.source.get("path") or s.source.get("architecture") or "a network")
    head, title = headline(s), html.escape(f"Collapse of {name}")
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}{PAGE}</style></head><body>",
            f"<h1>{title}</h1>",
            f'<p class="headline {head.colour}"><strong>{html.escape(head.text)}</strong><br>',
            f"{html.escape(step(s, diagnosis))}</p>",
            f"<p>{html.escape(first_step(s, diagnosis))}</p>",
            *(
                f"<p>Warning: {html.escape(note)}</p>"
                for note in dict.fromkeys([*s.notes(), *(diagnosis.notes() if diagnosis else [])])
            ),
            "<h2>Spectrum of the representation</h2>",
            drawn({"this network": s, **others}),
            '<p id="value" aria-live="polite"></p>',
            f"<p>{_coded(f'{s.sentence()} {placed(s)}')}</p>",
            "<p>Singular values of the covariance, of unit rows, over their index. Below "
            "the dotted line a dimension counts as collapsed; below the grey line is rounding.</p>",
            _metrics({"this network": s, **others}),
            "<h2>Rank by layer</h2>",
            _layers(layers),
            *_diagnosed(diagnosis),
            "<h2>Where each number comes from</h2>",
            _provenance(s, diagnosis),
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def _coded(text: str) -> str:
    """Text with what stands between backticks as code."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))


def drawn(spectra: Mapping[str, Spectrum], width: int = 720, height: int = 320) -> str:
    """Spectra as inline SVG: log10 of each singular value over its index from 1, each on its own largest value."""
    left, right, top, bottom = 52, 12, 12, 34
    wide, low = max(s.dim for s in spectra.values()), _lowest(spectra.values())

    def x(index: float) -> float:
        return left + (width - left - right) * (index - 1) / max(1, wide - 1)

    def y(share: float) -> float:
        return top + (height - top - bottom) * min(1.0, math.log10(max(share, 10.0**low)) / low)

    parts = [f'<svg class="spectrum" viewBox="0 0 {width} {height}" role="img" aria-label="singular values by index">']
    for power in range(0, low - 1, -max(1, -low // 6)):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 4}" text-anchor="middle">index, of {wide}</text>')
    for index, (name, s) in enumerate(spectra.items()):
        parts += _curve(name, s, COLOURS[index % len(COLOURS)], x, y)
    first = next(iter(spectra.values()))
    largest = float(first.singular_values[0]) or 1.0
    for height_of, dash, what in (
        (first.threshold, "2 4", f"threshold: {first.threshold:g} of the largest"),
        (first.floor / largest, "none", f"floor of rounding: {first.floor:.3g}"),
    ):
        at = y(height_of)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#888" '
            f'stroke-dasharray="{dash}">'
            f"<title>{what}</title></line>"
        )
    if first.effective_rank == first.effective_rank:
        at = x(first.effective_rank)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}" stroke="{COLOURS[0]}" opacity="0.5" '
            f'stroke-dasharray="6 3"><title>effective rank {first.effective_rank:.2f}</title></line>'
        )
    legend = "".join(
        f'<span style="color:{COLOURS[index % len(COLOURS)]}">&#9632;</span> {html.escape(name)} &emsp;'
        for index, name in enumerate(spectra)
    )
    return f"<figure>{''.join(parts)}</svg><figcaption>{legend} dashed: effective rank</figcaption></figure>"


def _lowest(spectra: Iterable[Spectrum]) -> int:
    """The power of ten at the foot of the drawing: below the smallest share, the threshold and the floor."""
    shares = [1e-8]
    for s in spectra:
        largest = float(s.singular_values[0])
        if largest > 0:
            shares += [s.threshold, *(float(v) / largest for v in s.singular_values if v > 0)]
    return max(-20, math.floor(math.log10(min(share for share in shares if share > 0))))


def _curve(name: str, s: Spectrum, colour: str, x: Any, y: Any) -> list[str]:
    """A line, and a dot with a title for each of at most 400 values."""
    values, largest = s.singular_values, float(s.singular_values[0]) or 1.0
    places = [(x(k + 1), y(float(v) / largest)) for k, v in enumerate(values)]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
    step = max(1, len(values) // 400)
    for k in range(0, len(values), step):
        told = f"{name}: singular value {k + 1} of {len(values)} is {float(values[k]):.4g}"
        a, b = places[k]
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{colour}"><title>{html.escape(told)}</title></circle>'
        )
    return parts


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


SCALE = {
    "effective_rank": "1 to d; a flat spectrum has d",
    "rankme": "1 to d; not centred",
    "participation_ratio": "1 to d; below the effective rank",
    "stable_rank": "1 to d; below the participation ratio",
    "collapsed_dimensions": "0 to d, below the threshold",
    "mean_cosine": "1 is complete collapse, 0 no common direction",
    "alpha": "about 1 is wished for; higher is steeper",
}


def _metrics(spectra: Mapping[str, Spectrum]) -> str:
    rows = [("rows", *(f"{s.n:,}" for s in spectra.values()), ""), ("d", *(str(s.dim) for s in spectra.values()), "")]
    rows.append(("effective_rank / d", *(_percent(share(s)) for s in spectra.values()), "compares across widths"))
    rows += [
        (name, *("undefined" if s.metrics()[name] != s.metrics()[name] else f"{s.metrics()[name]:.4g}"
                 for s in spectra.values()), scale)
        for name, scale in SCALE.items()
    ]  # fmt: skip
    return _table(("metric", *spectra, "scale"), rows)


def _percent(part: float) -> str:
    return "-" if part != part else f"{part:.1%}"


def _layers(layers: Mapping[str, Spectrum]) -> str:
    rows = []
    for name, s in layers.items():
        rank = s.effective_rank
        shown = "-" if rank != rank else f"{rank:.2f}"
        rows.append((name, str(s.dim), shown, _percent(share(s)), str(s.collapsed_dimensions)))
    return _table(("layer", "width", "effective rank", "of width", "collapsed"), rows)


def _diagnosed(diagnosis: Diagnosis | None) -> list[str]:
    if diagnosis is None:
        return ["<h2>What to do</h2>", f"<p>{html.escape(ADVICE['undiagnosed'])}</p>"]
    verdict = f'<p class="verdict">{html.escape(diagnosis.verdict)}</p>'
    return ["<h2>Diagnosis</h2>", verdict, *sections(diagnosis), "<h2>What to do</h2>", _advice(diagnosis)]


def _advice(diagnosis: Diagnosis) -> str:
    items = [f"<li><strong>{what}</strong>: {html.escape(text)}</li>" for what, text in advised(diagnosis)]
    lines = (
        f"<p>Red, amber and green are conventions of this page: red is more than {HALF:.0%} collapsed or an effective "
        f"rank below {NARROW:g}, amber any collapsed dimension or an effective rank below {TENTH:.0%} of the width.</p>"
    )
    return f"<ul>{''.join(items)}</ul>{lines}"


def _provenance(s: Spectrum, diagnosis: Diagnosis | None) -> str:
    source, images = s.source, s.images or {}
    network, pictures = str(source.get("path") or "NETWORK"), str(images.get("path") or "IMAGES")
    provenance = diagnosis.provenance if diagnosis else None
    facts = {
        "network": f"{source.get('architecture')}, {network}",
        "sha256": source.get("sha256") or "-",
        "branch": source.get("branch") or "-",
        "images": f"{images.get('count')} of {pictures}"
        + (f", {provenance['views']} views each for the diagnosis" if provenance else ""),
        **({"augmentation": provenance["augmentation"]["recipe"], "seed": provenance["seed"]} if provenance else {}),
        "versions": ", ".join(f"{package} {number}" for package, number in s.versions.items()),
        "command": shlex.join(s.command),
    }
    what = f"{shlex.quote(network)} {shlex.quote(pictures)}"
    commands = [f"collapse spectrum {what}", f"collapse spectrum {what} --layer all",
                *([f"collapse diagnose {what} --views {provenance['views']}"] if provenance else [])]  # fmt: skip
    shown = html.escape("\n".join(commands))
    return f"{rows(facts.items())}<p>Each part again, with the flags of the command above:</p><pre>{shown}</pre>"
