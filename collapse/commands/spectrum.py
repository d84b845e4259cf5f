"""collapse spectrum and collapse compare."""

import argparse
from collections.abc import Container, Sequence
from functools import partial
from itertools import chain
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import GateError, InputError
from collapse.commands.guard import images_of, protect, sources
from collapse.commands.shared import (
    add_against,
    add_measure,
    add_model,
    add_output,
    bound,
    check_plot,
    deliver,
    groups,
    leads,
    positive,
    reading_of,
    still_free,
)
from collapse.commands.terminal import progress, tell

if TYPE_CHECKING:
    from collapse.spectra import Spectrum


def add_spectrum(commands: Any) -> None:
    """The arguments of `collapse spectrum`."""
    command = commands.add_parser(
        "spectrum",
        help="singular values of the embedding covariance, and rank metrics",
        description="Singular values of the covariance of embeddings, and the rank metrics that follow from them.",
        epilog="example: collapse spectrum resnet50.pth imagenet/val --plot spectrum.png --out spectrum.json",
    )
    command.set_defaults(run=_spectrum, usual=command.get_default, shares=True)
    command.add_argument(
        "source", metavar="SOURCE",
        help="a checkpoint, or an array: .npy .pt .h5 .parquet ... [:KEY]; or a result (.json), to show it again",
    )  # fmt: skip
    command.add_argument("images", metavar="IMAGES", nargs="?", help="for a checkpoint: images, texts or sounds")
    command.add_argument(
        "--layer", default="representation", help="representation (default), projector, a module's name, or all"
    )
    add_measure(command)
    command.add_argument(
        "--jackknife", type=groups, default=0, metavar="G", help="give standard errors, from G groups of rows (as 20)"
    )
    command.add_argument(
        "--vectors", action="store_true", help="with --out FILE.json: keep the directions too, in FILE.npz"
    )
    command.add_argument(
        "--positions", type=positive, default=0, metavar="K",
        help="of inner layers, take K positions of each feature map as rows, instead of its mean",
    )  # fmt: skip
    add_output(command)
    add_against(command)
    gates = command.add_argument_group(
        "gates for pipelines", "The command ends with exit code 3 and one line if a metric lies beyond."
    )
    for word in ("under", "over"):
        gates.add_argument(
            f"--fail-{word}", type=bound, action="append", default=[], metavar="NAME=VALUE",
            help=f"fail if the metric NAME lies {word} VALUE, as effective_rank=100; may be given several times",
        )  # fmt: skip
    add_model(command)


def add_compare(commands: Any) -> None:
    """The arguments of `collapse compare`."""
    command = commands.add_parser(
        "compare",
        help="several results or sources in one table and one plot",
        description="Rank measures of several spectra in one table, and which directions they share.",
        epilog="example: collapse compare a.json b.json Z.npy --plot both.png",
    )
    command.set_defaults(run=_compare, layer="representation", vectors=True, shares=True)
    command.add_argument(
        "sources", metavar="SOURCE", nargs="+",
        help="results of collapse spectrum (.json), arrays, or checkpoints with --images",
    )  # fmt: skip
    command.add_argument(
        "--images", metavar="IMAGES", help="for checkpoints: what they embed, as for `collapse spectrum`"
    )
    add_measure(command)
    add_output(command)
    add_model(command)


def add_references(commands: Any) -> None:
    """The arguments of `collapse references`."""
    command = commands.add_parser(
        "references",
        help="spectra of known networks, as a scale",
        description="Spectra of known networks, as a scale for yours: those of the package, or of folders of results.",
        epilog="example: collapse references --plot references.png",
    )
    command.set_defaults(run=_references, layer="representation")
    command.add_argument(
        "places", metavar="PLACE", nargs="*", help="names, results of collapse spectrum (.json), or folders of such"
    )
    add_output(command)


def _references(options: argparse.Namespace) -> None:
    from collapse.spectra.comparison import comparison
    from collapse.spectra.scale import described, references

    protect(sources(*options.places), {"--out": options.out, "--plot": options.plot}, options.force)
    check_plot(options.plot)
    known = references(*options.places)
    compared = comparison(known)
    draw = [lambda: _draw(options, known)] if options.plot else []
    deliver(options, compared.to_json(), described(known), *draw)


def _spectrum(options: argparse.Namespace) -> None:
    from collapse.results import to_json
    from collapse.spectra import SPECTRA
    from collapse.spectra.scale import references

    beside = options.out.with_suffix(".npz") if options.out and options.vectors else None
    written = {"--out": options.out, "--vectors": beside, "--plot": options.plot}
    read = [*sources(options.source, options.weights or "", *options.against), *images_of(options.images)]
    protect(read, written, options.force)
    check_plot(options.plot)
    if options.vectors and (not options.out or options.layer == "all"):
        raise InputError("--vectors wants --out FILE.json, beside which the directions are kept, and one --layer")
    others = references(*options.against) if options.against else {}
    results = _stored(options) or _measured(options)
    if not leads(options):
        return
    several = options.layer == "all" or len(results) > 1
    document = (
        {"schema": SPECTRA, "layers": [result.to_dict() for result in results]} if several else results[0].to_dict()
    )
    text, notes = _told(results, others)
    named = {result.name: result for result in results}
    draw = partial(_draw_depth, options, results) if several else partial(_draw, options, {**named, **others})
    gates = partial(_gate, results, dict(options.fail_under), dict(options.fail_over))
    steps = [draw, gates] if options.plot else [gates]
    deliver(options, to_json(document), text, *steps, save=None if several else results[0].write, notes=notes)


# What a stored result can be shown with; every other flag is of measuring.
SHOWING = {"source", "plot", "kind", "log10", "log_index", "json", "out", "force", "against", "fail_under", "fail_over",
           "run", "usual", "shares", "distributed", "here"}  # fmt: skip


def _stored(options: argparse.Namespace) -> "list[Spectrum]":
    """The spectra of a result that is shown again; none of a source that is to be measured.

    Raises InputError: a flag of measuring, which a result does not follow.
    """
    from collapse.spectra.result import load_results

    source = options.source
    if not source.endswith(".json") or source.endswith(".index.json") or not Path(source).is_file():
        return []
    results = load_results(Path(source))
    odd = next((n for n, value in vars(options).items() if n not in SHOWING and value != options.usual(n)), None)
    if odd is not None:
        raise InputError(
            f"{source}: is a result, already measured; leave out {'IMAGES' if odd == 'images' else f'{odd}='}"
        )
    return results


def _told(results: "list[Spectrum]", others: "dict[str, Spectrum]") -> tuple[str, list[str]]:
    """The verdict on one spectrum or on the last layer, the numbers, and the table beside others; and the warnings."""
    from collapse.results.screen import paragraph
    from collapse.spectra.comparison import comparison, text
    from collapse.spectra.scale import verdict

    last, notes = results[-1], [note for result in results for note in result.warnings]
    names = (last.source.get(key) for key in ("path", "architecture", "layer"))
    what = " ".join(map(str, filter(None, names))) or "array"
    parts = [
        f"{what}\n{paragraph(verdict(last, others or None))}\n",
        report(last) if len(results) == 1 else by_depth(results),
    ]
    if others:
        compared = comparison({"this": last, **others})
        parts.append(text(compared))
        notes += [note for note in compared.notes() if not any(note in row["warnings"] for row in compared.rows)]
    return "\n".join(parts), notes


def _gate(results: "list[Spectrum]", under: dict[str, float], over: dict[str, float]) -> None:
    """Raise GateError with the line of every result that does not pass."""
    lines = []
    for result in results:
        try:
            result.gate(under, over)
        except GateError as error:
            lines.append(str(error))
    if lines:
        raise GateError("; ".join(lines))


def _measured(options: argparse.Namespace) -> "list[Spectrum]":
    """The spectrum of an array or of a layer, or those of all layers in the order of the forward pass."""
    from collapse.spectra.measure import layer_spectra, spectrum

    how = {**_measure(options), "jackknife": options.jackknife}
    if not options.images:
        return [spectrum(options.source, layer=options.layer, **how, **_rows(options))]
    how |= {"positions": options.positions, **reading_of(options)}
    if options.layer == "all":
        return list(layer_spectra(options.source, options.images, **how).values())
    return [spectrum(options.source, options.images, layer=options.layer, **how)]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how rows become a spectrum."""
    names = ("method", "threshold", "limit", "sample", "seed", "vectors")
    return {"normalize": not options.raw, **{name: getattr(options, name) for name in names}}


def _rows(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how an array is read, with a bar."""
    bar = partial(progress, unit="rows", total=None, delay=0.5)
    watch = {"watch": bar if leads(options) else iter, "distributed": options.distributed}
    return {"max_unpacked": options.max_unpacked, "device": options.device, **watch}


def _compare(options: argparse.Namespace) -> None:
    from collapse.spectra.comparison import comparison, text

    inputs = chain(sources(*options.sources, options.weights or ""), images_of(options.images))
    protect(inputs, {"--out": options.out, "--plot": options.plot}, options.force)
    check_plot(options.plot)
    if options.plot and options.kind == "noise":
        raise InputError("--kind noise draws a single spectrum; give it to collapse spectrum")
    spectra: dict[str, Spectrum] = {}
    deep: dict[str, list[Spectrum]] = {}
    for source in options.sources:
        results = _read(options, source)
        if len(results) > 1:
            deep[_unused(Path(source).name, source, deep)] = results
        for result in results:
            spectra[_unused(result.name, source, spectra)] = result
    if not leads(options):
        return
    if len(spectra) < 2:
        raise InputError(f"{options.sources[0]}: a comparison wants two spectra or more")
    compared = comparison(spectra)
    draw = partial(_draw_layers, options, deep) if len(deep) > 1 else partial(_draw, options, spectra)
    deliver(options, compared.to_json(), text(compared), *([draw] if options.plot else []), notes=compared.notes())


def _unused(name: str, source: str, taken: Container[str]) -> str:
    """The name itself, with its source if another has it, and numbered if that one is taken too."""
    names = chain((name, f"{name} ({source})"), (f"{name} ({source}, {number})" for number in count_up(2)))
    return next(candidate for candidate in names if candidate not in taken)


def _read(options: argparse.Namespace, source: str) -> "list[Spectrum]":
    """The spectra of a result, an array, or a checkpoint on --images."""
    from collapse.files.arrays import is_array
    from collapse.spectra.comparison import spectra_of

    if source.endswith(".json"):
        return spectra_of(source)
    if options.images and not is_array(Path(source)):
        return spectra_of(source, options.images, **_measure(options), **reading_of(options))
    return spectra_of(source, **_measure(options), **_rows(options))


def _draw(options: argparse.Namespace, spectra: "dict[str, Spectrum]") -> None:
    from collapse import plots

    ax = plots.draw(spectra, options.kind, None, options.log10, options.log_index)
    _save(options, ax.figure)


def _draw_depth(options: argparse.Namespace, results: "Sequence[Spectrum]") -> None:
    """Ranks by layer."""
    from collapse import plots

    with plots.style():
        _, ax = plots.figure(plots.TEXT, 3)
        ranks = {name: [getattr(s, name) for s in results] for name in ("numerical_rank", "rankme", "effective_rank")}
        plots.plot_rank_by_depth(ax, [str(s.source["layer"]) for s in results], ranks, [s.dim for s in results])
        plots.legend_outside(ax)
    _save(options, ax.figure)


def _draw_layers(options: argparse.Namespace, deep: "dict[str, list[Spectrum]]") -> None:
    """A panel a layer, with the curves of all sources that have it, above the floor."""
    from collapse import plots

    layers: dict[str, dict[str, Any]] = {}
    for name, results in deep.items():
        for s in results:
            layers.setdefault(str(s.source["layer"]), {})[name] = s.singular_values * (s.singular_values > s.floor)
    _save(options, plots.draw_layers(layers, options.log10, options.log_index))


def _save(options: argparse.Namespace, figure: Any) -> None:
    from collapse import plots

    still_free(options, options.plot)
    plots.save_figure(figure, options.plot.with_suffix(""), [options.plot.suffix])
    tell(f"wrote {options.plot}")


def by_depth(results: "Sequence[Spectrum]") -> str:
    """A line a layer for a reader."""
    from collapse.results.screen import fitted

    rows = [("layer", "rows", "width", "num. rank", "rankme", "eff. rank", "collapsed")]
    for s in results:
        ranks = (f"{s.numerical_rank}", f"{s.rankme:.2f}", f"{s.effective_rank:.2f}")
        rows.append((str(s.source["layer"]), str(s.n), str(s.dim), *ranks, str(s.collapsed_dimensions)))
    return f"{fitted(rows)}\n"


def report(s: "Spectrum") -> str:
    """A spectrum for a reader: what was measured, and the metrics with what each is, as far as there is room."""
    from collapse.results.screen import columns, paragraph
    from collapse.spectra.scale import meaning

    values, errors = s.singular_values, s.errors["metrics"] if s.errors else {}
    how = f"{'L2-normalised' if s.l2_normalized else 'as they are'}; method {s.method}"
    said = (
        f"{s.n} embeddings of {s.dim} dimensions, {how}",
        f"singular values of the covariance: {values[0]:.4g} (largest) ... {values[-1]:.4g} (smallest)",
        f"below {s.floor:.2g} is rounding; collapsed is below {s.threshold:g} of the largest",
    )
    lines = []
    for name, value in s.metrics().items():
        error = f" +- {errors[name]:.2g}" if errors.get(name) else ""
        lines.append(f"  {name:<26}{_number(value):>10}" + (f"{error:<12}" if errors else ""))
    told = [f"{line}  {meaning(name, s)}" for name, line in zip(s.metrics(), lines, strict=True)]
    shown = told if max(map(len, told)) <= columns() else map(str.rstrip, lines)
    return "\n".join([*map(paragraph, said), "", *shown]) + "\n"


def _number(value: float) -> str:
    """Four places, or the digits of what these would make 0."""
    if isinstance(value, int) or value != value:
        return "undefined" if value != value else f"{value:d}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
