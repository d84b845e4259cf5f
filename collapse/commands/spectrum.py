"""collapse spectrum and collapse compare."""

import argparse
from collections.abc import Container, Iterable, Sequence
from functools import partial
from itertools import chain
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import GateError, InputError
from collapse.commands.guard import images_of, protect, sources
from collapse.commands.shared import (
    add_measure,
    add_model,
    add_output,
    bound,
    check_plot,
    deliver,
    groups,
    positive,
    progress,
    reading_of,
    still_free,
)

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
    command.set_defaults(run=_spectrum)
    command.add_argument("source", metavar="SOURCE", help="a checkpoint, or an array: .npy .pt .h5 .parquet ... [:KEY]")
    command.add_argument("images", metavar="IMAGES", nargs="?", help="for a checkpoint: images, texts or sounds")
    command.add_argument(
        "--layer", default="representation", help="representation (default), projector, a module's name, or all"
    )
    add_measure(command)
    command.add_argument(
        "--jackknife", type=groups, default=0, metavar="G", help="standard errors from G groups of rows (as 20)"
    )
    command.add_argument(
        "--vectors", action="store_true", help="with --out FILE.json: keep the directions too, in FILE.npz"
    )
    command.add_argument(
        "--positions", type=positive, default=0, metavar="K",
        help="of inner layers: K positions of each feature map as rows, instead of its mean",
    )  # fmt: skip
    add_output(command)
    gates = command.add_argument_group("gates for pipelines", "exit code 3 and one line where a metric lies beyond")
    for word in ("under", "over"):
        gates.add_argument(
            f"--fail-{word}", type=bound, action="append", default=[], metavar="NAME=VALUE",
            help=f"a metric must not lie {word} VALUE; may be given several times",
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
    command.set_defaults(run=_compare, layer="representation", vectors=True)
    command.add_argument(
        "sources", metavar="SOURCE", nargs="+",
        help="results of collapse spectrum (.json), arrays, or checkpoints with --images",
    )  # fmt: skip
    command.add_argument("--images", metavar="IMAGES", help="for checkpoints: a folder of images, a zip, ...")
    add_measure(command)
    add_output(command)
    add_model(command)


def _spectrum(options: argparse.Namespace) -> None:
    from collapse.results import to_json
    from collapse.spectra import SPECTRA

    beside = options.out.with_suffix(".npz") if options.out and options.vectors else None
    written = {"--out": options.out, "--vectors": beside, "--plot": options.plot}
    protect([*sources(options.source, options.weights or ""), *images_of(options.images)], written, options.force)
    check_plot(options.plot)
    if options.vectors and (not options.out or options.layer == "all"):
        raise InputError("--vectors wants --out FILE.json, beside which the directions are kept, and one --layer")
    results = _measured(options)
    whole = options.layer == "all"
    document = (
        {"schema": SPECTRA, "layers": [result.to_dict() for result in results]} if whole else results[0].to_dict()
    )
    notes = [note for result in results for note in result.warnings]
    draw = [lambda: _draw(options, {result.name: result for result in results})] if options.plot else []
    text = report(results[0]) if len(results) == 1 else by_depth(results)
    gates = partial(_gate, results, dict(options.fail_under), dict(options.fail_over))
    deliver(options, to_json(document), text, *draw, gates, save=None if whole else results[0].write, notes=notes)


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
        rows = {"max_unpacked": options.max_unpacked, "device": options.device, "watch": _bar_of_rows}
        return [spectrum(options.source, layer=options.layer, **how, **rows)]
    how |= {"positions": options.positions, **reading_of(options)}
    if options.layer == "all":
        return list(layer_spectra(options.source, options.images, **how).values())
    return [spectrum(options.source, options.images, layer=options.layer, **how)]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how rows become a spectrum."""
    names = ("method", "threshold", "limit", "sample", "seed", "vectors")
    return {"normalize": not options.raw, **{name: getattr(options, name) for name in names}}


def _bar_of_rows(batches: Iterable[Any]) -> Iterable[Any]:
    return progress(batches, "rows", None)


def _compare(options: argparse.Namespace) -> None:
    from collapse.spectra.comparison import comparison, text

    inputs = chain(sources(*options.sources, options.weights or ""), images_of(options.images))
    protect(inputs, {"--out": options.out, "--plot": options.plot}, options.force)
    check_plot(options.plot)
    if options.plot and options.kind == "noise":
        raise InputError("--kind noise draws a single spectrum; give it to collapse spectrum")
    found: dict[str, Spectrum] = {}
    for source in options.sources:
        for result in _read(options, source):
            found[_unused(result.name, source, found)] = result
    if len(found) < 2:
        raise InputError(f"{options.sources[0]}: a comparison wants two spectra or more")
    compared = comparison(found)
    draw = [lambda: _draw(options, found)] if options.plot else []
    deliver(options, compared.to_json(), text(compared), *draw, notes=compared.notes())


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
    rows = {"max_unpacked": options.max_unpacked, "device": options.device, "watch": _bar_of_rows}
    return spectra_of(source, **_measure(options), **rows)


def _draw(options: argparse.Namespace, spectra: "dict[str, Spectrum]") -> None:
    from collapse import plots

    still_free(options, options.plot)
    if options.layer == "all":
        with plots.style():
            _, ax = plots.figure(plots.TEXT, 3)
            layers = [str(s.source["layer"]) for s in spectra.values()]
            measures = [s.metrics() for s in spectra.values()]
            ranks = {name: [m[name] for m in measures] for name in ("numerical_rank", "rankme", "effective_rank")}
            plots.plot_rank_by_depth(ax, layers, ranks, [s.dim for s in spectra.values()])
    else:
        ax = plots.draw(spectra, options.kind, None, options.log10, options.log_index)
    plots.save_figure(ax.figure, options.plot.with_suffix(""), [options.plot.suffix])


def by_depth(results: "Sequence[Spectrum]") -> str:
    """A line a layer for a reader."""
    lines = [f"{'layer':<20}{'rows':>9}{'width':>7}{'num. rank':>11}{'rankme':>9}{'eff. rank':>11}{'collapsed':>11}"]
    for result in results:
        m = result.metrics()
        lines.append(
            f"{result.source['layer']:<20}{result.n:>9}{result.dim:>7}{m['numerical_rank']:>11}{m['rankme']:>9.2f}"
            f"{m['effective_rank']:>11.2f}{m['collapsed_dimensions']:>11}"
        )
    return "\n".join(lines) + "\n"


def report(result: "Spectrum") -> str:
    """A spectrum for a reader: what was measured, the metrics, the warnings."""
    document = result.to_dict()
    source = document["source"]
    what = " ".join(filter(None, (source["path"], source["architecture"], source["layer"])))
    values = result.singular_values
    lines = [
        what or "array",
        f"{result.n} embeddings of {result.dim} dimensions, "
        f"{'L2-normalised' if result.l2_normalized else 'as they are'}; method {result.method}",
        f"singular values of the covariance: {values[0]:.4g} (largest) ... {values[-1]:.4g} (smallest)",
        f"below {result.floor:.2g} is rounding; collapsed is below {result.threshold:g} of the largest",
        "",
    ]
    errors = result.errors["metrics"] if result.errors else {}
    for name, value in document["metrics"].items():
        shown = f"{value:d}" if isinstance(value, int) else ("undefined" if value != value else f"{value:.4f}")
        lines.append(f"  {name:<28}{shown:>12}" + (f"  +- {errors[name]:.2g}" if errors.get(name) else ""))
    return "\n".join(lines) + "\n"
