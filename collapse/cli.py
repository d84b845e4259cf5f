"""The command `collapse`: arguments -> one call -> text, JSON or a file. Exit 0 done, 2 bad input, 130 interrupted."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from collapse import InputError, __version__

if TYPE_CHECKING:
    from collapse.checkpoints import Encoder
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
    command.add_argument("--layer", default="representation", help="representation (default), projector, or a module")
    command.add_argument("--raw", action="store_true", help="do not divide each embedding by its norm")
    command.add_argument("--method", default="auto", choices=("auto", "covariance", "qr"))
    command.add_argument("--threshold", type=_share, default=1e-6, help="collapsed: below it times the largest (1e-6)")
    command.add_argument("--limit", type=_positive, metavar="N", help="use the first N rows or images")
    _add_output(command)
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
    model.add_argument("--batch-size", type=_positive, default=64)
    model.add_argument(
        "--workers", type=_count, default=min(4, os.cpu_count() or 1), help="processes that decode images"
    )
    model.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")


def _add_output(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document")
    output.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON to a file")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the spectrum: .png or .pdf")
    output.add_argument("--force", action="store_true", help="replace existing files")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _check_output(options: argparse.Namespace) -> None:
    """Refuse, before any work, an output that cannot be written."""
    from collapse.results import refuse_existing

    for path in filter(None, (options.out, options.plot)):
        refuse_existing(path, options.force)
        if path.resolve() == Path(options.source).resolve():
            raise InputError(f"{path}: is the input; give another name")
    if options.plot and options.plot.suffix not in (".png", ".pdf"):
        raise InputError(f"{options.plot}: a plot is .png or .pdf")


def _spectrum(options: argparse.Namespace) -> None:
    from collapse.results import save_text

    _check_output(options)
    result = _of_model(options) if options.images else _of_array(options)
    if options.plot:
        from collapse.plots import save_figure

        save_figure(result.plot().figure, options.plot.with_suffix(""), [options.plot.suffix])
    if options.out:
        save_text(options.out, result.to_json())
    print(result.to_json() if options.json else report(result), end="")


def progress(batches: Iterable[T], unit: str, total: int | None) -> Iterator[T]:
    """Pass batches on, with a bar on stderr, if that is a terminal, that counts their rows."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, delay=0.5, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))  # type: ignore[arg-type]


def _of_array(options: argparse.Namespace) -> "Spectrum":
    from collapse.arrays import open_array
    from collapse.covariance import blocks
    from collapse.measure import spectrum

    if options.layer != "representation":
        raise InputError(f"{options.source}: --layer wants a checkpoint and images")
    source, array = open_array(Path(options.source))
    rows = progress(blocks(array[: options.limit]), "rows", None)
    return spectrum(rows, not options.raw, options.method, threshold=options.threshold, source=source, device=None)


def _of_model(options: argparse.Namespace) -> "Spectrum":
    from collapse.checkpoints import load
    from collapse.evaluate import embed
    from collapse.images import Images, pixel_batches
    from collapse.measure import spectrum

    device = choose_device(options.device)
    known = ("arch", "branch", "resize", "crop", "interpolation", "no_normalize", "allow_unknown")
    triples = {name: tuple(value) for name in ("mean", "std") if (value := getattr(options, name))}
    net = load(options.source, **{name: getattr(options, name) for name in known}, **triples)
    images = Images(options.images)
    count = len(range(len(images))[: options.limit])
    pixels = pixel_batches(images, net.preprocess, options.batch_size, options.workers, options.limit)
    batches = embed(net.layer(options.layer), progress(pixels, "images", count), net.preprocess, device)
    return spectrum(
        batches,
        not options.raw,
        options.method,
        threshold=options.threshold,
        device=None if device == "cpu" else device,
        source=_source(net, options.layer),
        images={"path": str(images.source), "count": count, "skipped": []},
        warnings=net.report["warnings"],
    )


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
    for name, value in document["metrics"].items():
        shown = f"{value:d}" if isinstance(value, int) else ("undefined" if value != value else f"{value:.4f}")
        lines.append(f"  {name:<28}{shown:>12}")
    lines += ["", *(f"warning: {note}" for note in source["warnings"])] if source["warnings"] else []
    return "\n".join(lines) + "\n"
