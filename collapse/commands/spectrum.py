"""collapse spectrum and collapse compare."""

import argparse
from collections.abc import Container, Sequence
from itertools import chain
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.commands.guard import images_of, protect, sources
from collapse.commands.shared import (
    add_measure,
    add_model,
    add_output,
    check_plot,
    count,
    deliver,
    groups,
    load_encoder,
    pixels_of,
    place,
    positive,
    progress,
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
    command.add_argument(
        "source", metavar="SOURCE", help="a checkpoint, or an array: .npy .npz .pt .safetensors [:KEY]"
    )
    command.add_argument("images", metavar="IMAGES", nargs="?", help="for a checkpoint: a folder of images, or a zip")
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
    command.add_argument("--seed", type=count, default=0, help="of --positions")
    add_output(command)
    add_model(command)


def add_compare(commands: Any) -> None:
    """The arguments of `collapse compare`."""
    command = commands.add_parser(
        "compare",
        help="several results or sources in one table and one plot",
        description="Rank measures of several spectra in one table, and which directions they share.",
        epilog="example: collapse compare a.json b.json Z.npy --plot both.png",
    )
    command.set_defaults(run=_compare, layer="representation", vectors=True, jackknife=0, positions=0, seed=0)
    command.add_argument(
        "sources", metavar="SOURCE", nargs="+",
        help="results of collapse spectrum (.json), arrays, or checkpoints with --images",
    )  # fmt: skip
    command.add_argument("--images", metavar="IMAGES", help="for checkpoints: a folder of images, or a zip")
    add_measure(command)
    add_output(command)
    add_model(command)


def _spectrum(options: argparse.Namespace) -> None:
    from collapse.results import to_json
    from collapse.spectra import SPECTRA

    beside = options.out.with_suffix(".npz") if options.out and options.vectors else None
    written = {"--out": options.out, "--vectors": beside, "--plot": options.plot}
    protect([*sources(options.source), *images_of(options.images)], written, options.force)
    check_plot(options.plot)
    if options.vectors and (not options.out or options.layer == "all"):
        raise InputError("--vectors wants --out FILE.json, beside which the directions are kept, and one --layer")
    results = (
        _of_model(options, options.source, options.images) if options.images else [_of_array(options, options.source)]
    )
    whole = options.layer == "all"
    document = (
        {"schema": SPECTRA, "layers": [result.to_dict() for result in results]} if whole else results[0].to_dict()
    )
    draw = [lambda: _draw(options, {result.name: result for result in results})] if options.plot else []
    text = report(results[0]) if len(results) == 1 else by_depth(results)
    deliver(options, to_json(document), text, *draw, save=None if whole else results[0].write)


def _compare(options: argparse.Namespace) -> None:
    from collapse.compare import comparison, table
    from collapse.results import to_json

    inputs = chain(sources(*options.sources), images_of(options.images))
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
    document = comparison(found)
    draw = [lambda: _draw(options, found)] if options.plot else []
    deliver(options, to_json(document), table(document), *draw)


def _unused(name: str, source: str, taken: Container[str]) -> str:
    """The name itself, with its source if another has it, and numbered if that one is taken too."""
    names = chain((name, f"{name} ({source})"), (f"{name} ({source}, {number})" for number in count_up(2)))
    return next(candidate for candidate in names if candidate not in taken)


def _read(options: argparse.Namespace, source: str) -> "list[Spectrum]":
    """The spectra of a result, an array, or a checkpoint on --images."""
    from collapse.files.arrays import is_array
    from collapse.spectra import load_results

    if source.endswith(".json"):
        return load_results(Path(source))
    if options.images and not is_array(Path(source)):
        return _of_model(options, source, options.images)
    return [_of_array(options, source)]


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


def _of_array(options: argparse.Namespace, path: str) -> "Spectrum":
    from collapse.measure import spectrum

    if options.layer != "representation":
        raise InputError(f"{path}: --layer wants a checkpoint and images")
    return spectrum(
        path,
        not options.raw,
        options.method,
        threshold=options.threshold,
        vectors=options.vectors,
        jackknife=options.jackknife,
        limit=options.limit,
        max_unpacked=options.max_unpacked,
        watch=lambda batches: progress(batches, "rows", None),
    )


def _of_model(options: argparse.Namespace, path: str, images_path: str) -> "list[Spectrum]":
    """The spectrum of a layer, or those of all in the order of the forward pass."""
    from collapse.evaluate import embed_layers, rounding
    from collapse.images import Images
    from collapse.measure import Measurement

    device = place(options)
    net = load_encoder(options, path)
    every = [*net.blocks, "representation", *(["projector"] if net.projector else [])]
    names = every if options.layer == "all" else [options.layer]
    if options.layer != "all":
        net.layer(options.layer).taps.remove()  # refuses an unknown name with the list of those that are
    images = Images(images_path, options.max_pixels)
    count = len(range(len(images))[: options.limit])
    if count < 2:
        raise InputError(f"{images.source}: holds 1 image; a covariance needs at least 2")
    skipped: list[dict[str, str]] = []
    pixels = pixels_of(options, images, net, skipped)
    on = None if device == "cpu" else device
    measured = {name: Measurement(not options.raw, options.method, on, options.jackknife) for name in names}
    how = {"device": device, "positions": options.positions, "seed": options.seed, "precision": options.precision}
    first = next(pixels, None)
    errors = rounding(net, names, first[:16], not options.raw, **how) if first is not None else {}
    for rows in embed_layers(net, names, chain([first] if first is not None else [], pixels), **how):
        for name in names:
            measured[name].update(rows[name])
    if len(skipped) > count - 2:
        first = f"{skipped[0]['path']} ({skipped[0]['why']})"
        raise InputError(f"{images.source}: {len(skipped)} of {count} images cannot be read, first {first}")
    notes = [*net.report["warnings"], *images.warnings]
    notes += [f"{len(skipped)} of {count} images were skipped"] if skipped else []
    seen = {"path": str(images.source), "count": count - len(skipped), "skipped": skipped}
    about = {"images": seen, "warnings": notes}
    return [
        measured[name].spectrum(options.threshold, options.vectors, errors[name], source=net.source(name), **about)
        for name in names
    ]


def by_depth(results: "Sequence[Spectrum]") -> str:
    """A line a layer for a reader."""
    lines = [f"{'layer':<20}{'rows':>9}{'width':>7}{'num. rank':>11}{'rankme':>9}{'eff. rank':>11}{'collapsed':>11}"]
    for result in results:
        m = result.metrics()
        lines.append(
            f"{result.source['layer']:<20}{result.n:>9}{result.dim:>7}{m['numerical_rank']:>11}{m['rankme']:>9.2f}"
            f"{m['effective_rank']:>11.2f}{m['collapsed_dimensions']:>11}"
        )
    notes = dict.fromkeys(note for result in results for note in result.warnings)
    return "\n".join([*lines, "", *(f"warning: {note}" for note in notes)]) + "\n"


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
    lines += ["", *(f"warning: {note}" for note in source["warnings"])] if source["warnings"] else []
    return "\n".join(lines) + "\n"
