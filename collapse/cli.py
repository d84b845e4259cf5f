"""The command `collapse`: arguments -> one call -> text, JSON or a file. Exit 0 done, 2 bad input, 130 interrupted."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from collapse import InputError, __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collapse.checkpoints import Encoder
    from collapse.images import Images, Skipped
    from collapse.spectra import Spectrum


T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # Idle OpenMP threads that spin slow small matrices a hundredfold on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options = parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"collapse: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("collapse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has left (as `head` does); python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(prog="collapse", description="Measure dimensional collapse (arXiv 2110.09348).")
    root.add_argument("--version", action="version", version=f"collapse {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_spectrum(commands)
    _add_compare(commands)
    _add_inspect(commands)
    _add_embed(commands)
    return root


def _add_spectrum(commands: Any) -> None:
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
    _add_measure(command)
    command.add_argument(
        "--jackknife", type=_groups, default=0, metavar="G", help="standard errors from G groups of rows (as 20)"
    )
    command.add_argument(
        "--vectors", action="store_true", help="with --out FILE.json: keep the directions too, in FILE.npz"
    )
    command.add_argument(
        "--positions", type=_positive, default=0, metavar="K",
        help="of inner layers: K positions of each feature map as rows, instead of its mean",
    )  # fmt: skip
    command.add_argument("--seed", type=_count, default=0, help="of --positions")
    _add_output(command)
    _add_model(command)


def _add_compare(commands: Any) -> None:
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
    _add_measure(command)
    _add_output(command)
    _add_model(command)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="what a checkpoint is, without images",
        description="What a checkpoint is: architecture, branch, projector, preprocessing, where every tensor went.",
        epilog="example: collapse inspect checkpoint.pth --json",
    )
    command.set_defaults(run=_inspect, plot=None, vectors=False)
    command.add_argument("source", metavar="CHECKPOINT")
    _add_result(command)
    _add_model(command)


def _add_embed(commands: Any) -> None:
    command = commands.add_parser(
        "embed",
        help="the embeddings themselves, written in a stream",
        description="Embeddings (n, d) float32 as Z.npy, their provenance as Z.json, the images in order as Z.txt.",
        epilog="example: collapse embed resnet50.pth imagenet/val --out val.npy",
    )
    command.set_defaults(run=_embed)
    command.add_argument("source", metavar="CHECKPOINT")
    command.add_argument("images", metavar="IMAGES", help="a folder of images, a zip of one, or a .txt list")
    command.add_argument("--out", type=Path, metavar="Z.npy", required=True)
    command.add_argument("--layer", default="representation", help="representation (default), projector, or a module")
    command.add_argument("--limit", type=_positive, metavar="N", help="use the first N images")
    command.add_argument("--json", action="store_true", help="print the provenance")
    command.add_argument("--force", action="store_true", help="replace existing files")
    _add_model(command)


def _add_measure(command: argparse.ArgumentParser) -> None:
    command.add_argument("--raw", action="store_true", help="do not divide each embedding by its norm")
    command.add_argument("--method", default="auto", choices=("auto", "covariance", "qr"))
    command.add_argument("--threshold", type=_share, default=1e-6, help="collapsed: below it times the largest (1e-6)")
    command.add_argument("--limit", type=_positive, metavar="N", help="use the first N rows or images")


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("reading the checkpoint and the images")
    model.add_argument("--arch", help="the architecture it must be, as resnet50")
    model.add_argument("--branch", help="which of several encoders in the file")
    model.add_argument("--allow-unknown", action="store_true", help="go on when some tensors belong to nothing known")
    model.add_argument("--resize", type=_positive, metavar="PX", help="shorter side")
    model.add_argument("--crop", type=_positive, metavar="PX", help="centre crop")
    model.add_argument("--interpolation", choices=("bilinear", "bicubic"))
    model.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"))
    model.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    model.add_argument("--no-normalize", action="store_true", help="leave pixel values in 0..1")
    model.add_argument("--strict", action="store_true", help="an image that cannot be read is an error, not skipped")
    model.add_argument("--batch-size", type=_positive, default=64)
    model.add_argument(
        "--workers", type=_count, default=min(4, os.cpu_count() or 1), help="processes that decode images"
    )
    model.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")


def _add_output(command: argparse.ArgumentParser) -> None:
    output = _add_result(command)
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the spectrum: .png or .pdf")
    output.add_argument(
        "--kind", default="spectrum", choices=("spectrum", "explained", "noise"),
        help="what to draw: the spectrum, the cumulative share of variance, or against the Marchenko-Pastur law",
    )  # fmt: skip
    output.add_argument("--log10", action="store_true", help="draw log10 instead of ln")
    output.add_argument("--log-index", action="store_true", help="draw the index on a logarithmic axis")


def _add_result(command: argparse.ArgumentParser) -> Any:
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document")
    output.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON to a file")
    output.add_argument("--force", action="store_true", help="replace existing files")
    return output


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _groups(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 2")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _check_output(options: argparse.Namespace, *inputs: str) -> None:
    """Refuse, before any work, an output that cannot be written."""
    from collapse.results import refuse_existing

    beside = options.out.with_suffix(".npz") if options.out and options.vectors and len(inputs) == 1 else None
    for path in filter(None, (options.out, options.plot, beside)):
        refuse_existing(path, options.force)
        if any(path.resolve() == Path(given).resolve() for given in inputs):
            raise InputError(f"{path}: is the input; give another name")
    if options.plot and options.plot.suffix not in (".png", ".pdf"):
        raise InputError(f"{options.plot}: a plot is .png or .pdf")


def _spectrum(options: argparse.Namespace) -> None:
    from collapse.results import save_text, to_json

    _check_output(options, options.source)
    if options.vectors and not options.out:
        raise InputError("--vectors wants --out FILE.json, beside which the directions are kept")
    results = (
        _of_model(options, options.source, options.images) if options.images else [_of_array(options, options.source)]
    )
    if options.layer == "all":
        text = to_json({"schema": "collapse.spectra/1", "layers": [result.to_dict() for result in results]})
    else:
        text = results[0].to_json()
    if options.plot:
        _draw(options, {result.name: result for result in results})
    if options.out:
        if options.layer == "all":
            save_text(options.out, text)
        else:
            results[0].save(options.out)
    print(text if options.json else "\n".join(map(report, results)) if len(results) == 1 else by_depth(results), end="")


def _inspect(options: argparse.Namespace) -> None:
    from collapse.results import save_text, to_json

    _check_output(options, options.source)
    document = {"schema": "collapse.checkpoint/1", **_load(options, options.source).report}
    if options.out:
        save_text(options.out, to_json(document))
    print(to_json(document) if options.json else describe(document), end="")


def describe(document: dict[str, Any]) -> str:
    """A checkpoint's report for a reader."""
    lines = [f"{document['path']}: {document['architecture']}, {document['feature_dim']} features"]
    keys, projector = document["keys"], document["projector"]
    left = document["branches_left"]
    lines.append(f"  read as        {document['container']}, sha256 {str(document['sha256'])[:16]}")
    lines.append(f"  branch         {document['branch']}" + (f"; left: {', '.join(left)}" if left else ""))
    if projector:
        lines.append(f"  projector      {' -> '.join(map(str, projector['dims']))}, at {projector['prefix']}")
    lines.append(
        "  preprocessing  " + ", ".join(f"{name} {value}" for name, value in document["preprocessing"].items())
    )
    lines.append(f"  tensors        {keys['loaded']} loaded, {keys['projector']} of the projector, "
                 f"{keys['dropped']} dropped, {keys['unknown']} unknown")  # fmt: skip
    lines += [f"    dropped      {count} as {rule}" for rule, count in keys.get("dropped_by", {}).items()]
    if document["foreign"]:
        lines.append(f"  not loaded     {', '.join(document['foreign'])}")
    return "\n".join([*lines, *(f"warning: {note}" for note in document["warnings"])]) + "\n"


def _embed(options: argparse.Namespace) -> None:
    from collapse.arrays import NpyWriter
    from collapse.evaluate import embed
    from collapse.images import Images
    from collapse.results import command, refuse_existing, save_text, to_json, versions

    if options.out.suffix != ".npy":
        raise InputError(f"{options.out}: embeddings are written as .npy")
    beside = [options.out.with_suffix(suffix) for suffix in (".json", ".txt")]
    for path in (options.out, *beside):
        refuse_existing(path, options.force)
    device = choose_device(options.device)
    net = _load(options, options.source)
    layer, images = net.layer(options.layer), Images(options.images)
    skipped: list[dict[str, str]] = []
    with NpyWriter(options.out) as writer:
        for rows in embed(layer, _pixels(options, images, net, skipped), net.preprocess, device):
            writer.write(rows.cpu().numpy())
    lost = {entry["path"] for entry in skipped}
    names = [name for name in images.names[: options.limit] if str(images.source / name) not in lost]
    document = {
        "schema": "collapse.embeddings/1",
        "source": _source(net, options.layer),
        "images": {"path": str(images.source), "count": len(names), "skipped": skipped},
        "shape": list(writer.shape),
        "command": command(),
        "versions": versions("numpy", "torch", "torchvision"),
    }
    save_text(beside[0], to_json(document))
    save_text(beside[1], "".join(f"{name}\n" for name in names))
    note = f"; {len(skipped)} images were skipped" if skipped else ""
    print(
        to_json(document) if options.json else f"{options.out}: {writer.shape[0]} x {writer.shape[1]}{note}\n", end=""
    )


def _draw(options: argparse.Namespace, spectra: "dict[str, Spectrum]") -> None:
    from collapse import plots

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


def _compare(options: argparse.Namespace) -> None:
    from collapse.compare import comparison, table
    from collapse.results import save_text, to_json

    _check_output(options, *options.sources)
    found: dict[str, Spectrum] = {}
    for source in options.sources:
        for result in _read(options, source):
            name = result.name
            found[name if name not in found else f"{name} ({source})"] = result
    if len(found) < 2:
        raise InputError(f"{options.sources[0]}: a comparison wants two spectra or more")
    document = comparison(found)
    if options.plot:
        _draw(options, found)
    if options.out:
        save_text(options.out, to_json(document))
    print(to_json(document) if options.json else table(document), end="")


def _read(options: argparse.Namespace, source: str) -> "list[Spectrum]":
    """The spectra of a result, an array, or a checkpoint on --images."""
    from collapse.arrays import is_array
    from collapse.spectra import load_results

    if source.endswith(".json"):
        return load_results(Path(source))
    if options.images and not is_array(Path(source)):
        return _of_model(options, source, options.images)
    return [_of_array(options, source)]


def progress(batches: Iterable[T], unit: str, total: int | None) -> Iterator[T]:
    """Pass batches on, with a bar on stderr, if that is a terminal, that counts their rows."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, delay=0.5, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))  # type: ignore[arg-type]


def _of_array(options: argparse.Namespace, path: str) -> "Spectrum":
    from collapse.arrays import open_array
    from collapse.covariance import blocks
    from collapse.measure import spectrum

    if options.layer != "representation":
        raise InputError(f"{path}: --layer wants a checkpoint and images")
    source, array = open_array(Path(path))
    return spectrum(
        progress(blocks(array, options.limit), "rows", None),
        not options.raw,
        options.method,
        threshold=options.threshold,
        vectors=options.vectors,
        jackknife=options.jackknife,
        source=source,
    )


def _of_model(options: argparse.Namespace, path: str, images_path: str) -> "list[Spectrum]":
    """The spectrum of a layer, or those of all in the order of the forward pass."""
    from collapse.evaluate import embed_layers, rounding
    from collapse.images import Images
    from collapse.measure import Measurement

    device = choose_device(options.device)
    net = _load(options, path)
    every = [*net.blocks, "representation", *(["projector"] if net.projector else [])]
    names = every if options.layer == "all" else [options.layer]
    if options.layer != "all":
        net.layer(options.layer)  # refuses an unknown name with the list of those that are
    images = Images(images_path)
    count = len(range(len(images))[: options.limit])
    skipped: list[dict[str, str]] = []
    pixels = _pixels(options, images, net, skipped)
    on = None if device == "cpu" else device
    measured = {name: Measurement(not options.raw, options.method, on, options.jackknife) for name in names}
    how = {"device": device, "positions": options.positions, "seed": options.seed}
    errors: dict[str, NDArray] = {}
    for batch in pixels:
        errors = errors or rounding(net, names, batch[:16], not options.raw, **how)
        for name, rows in next(embed_layers(net, names, [batch], **how)).items():
            measured[name].update(rows)
    if len(skipped) > count - 2:
        raise InputError(
            f"{images.source}: {len(skipped)} of {count} images cannot be read, first {skipped[0]['path']}"
        )
    notes = net.report["warnings"] + ([f"{len(skipped)} of {count} images were skipped"] if skipped else [])
    seen = {"path": str(images.source), "count": count - len(skipped), "skipped": skipped}
    about = {"images": seen, "warnings": notes}
    return [
        measured[name].spectrum(options.threshold, options.vectors, errors[name], source=_source(net, name), **about)
        for name in names
    ]


def _pixels(options: argparse.Namespace, images: "Images", net: "Encoder", skipped: "Skipped") -> Iterator[Any]:
    """Batches of the images, with a bar; what cannot be read goes to `skipped`, or is an error with --strict."""
    from collapse.images import pixel_batches

    count = len(range(len(images))[: options.limit])
    how = (options.batch_size, options.workers, options.limit, None if options.strict else skipped)
    return progress(pixel_batches(images, net.preprocess, *how), "images", count)


def _load(options: argparse.Namespace, path: str) -> "Encoder":
    from collapse.checkpoints import load

    known = ("arch", "branch", "resize", "crop", "interpolation", "no_normalize", "allow_unknown")
    triples = {name: tuple(value) for name in ("mean", "std") if (value := getattr(options, name))}
    return load(path, **{name: getattr(options, name) for name in known}, **triples)


def _source(net: "Encoder", layer: str) -> dict[str, Any]:
    names = ("path", "sha256", "architecture", "branch", "keys", "preprocessing", "foreign")
    return {"kind": "checkpoint", "layer": layer, **{name: net.report[name] for name in names}}


def choose_device(name: str) -> str:
    """The device to run on; an absent one is an error, never a fallback."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise InputError(f"--device: got {name!r}, expected auto, cpu or cuda[:i]")
    if int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
    return name


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
