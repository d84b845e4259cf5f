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
    from collapse.covariance import Spectrum


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
    _add_train(commands)
    _add_probe(commands)
    _add_knn(commands)
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
    from collapse.covariance import blocks, spectrum

    if options.layer != "representation":
        raise InputError(f"{options.source}: --layer wants a checkpoint and images")
    source, array = open_array(Path(options.source))
    rows = progress(blocks(array[: options.limit]), "rows", None)
    return spectrum(rows, not options.raw, options.method, threshold=options.threshold, source=source, device=None)


def _of_model(options: argparse.Namespace) -> "Spectrum":
    from collapse.checkpoints import load
    from collapse.covariance import spectrum
    from collapse.evaluate import embed
    from collapse.images import Images, pixel_batches

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


def _add_train(commands: Any) -> None:
    from collapse.config import flags, presets

    command = commands.add_parser(
        "train",
        help="contrastive training: SimCLR with any head, or DirectCLR",
        description="Train contrastively; the same command goes on with an unfinished RUN. "
        "Under torchrun, `torchrun ... -m collapse train ...`, it uses all processes.",
        epilog="example: collapse train --preset digits --data sklearn:digits --method directclr --out runs/directclr",
    )
    command.set_defaults(run=_train)
    command.add_argument("--data", required=True, help="train/CLASS/*, val/CLASS/* in a folder or zip; more: docs")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    command.add_argument("--preset", default="imagenet", help=f"{', '.join(presets())}, or a JSON file (imagenet)")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    command.add_argument("--workers", type=_count, default=max(1, min(16, cores)), help="processes that decode, a rank")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    watch = command.add_argument_group("watching and saving")
    watch.add_argument("--save-every", type=_positive, metavar="STEPS", help="default: every epoch, or ten minutes")
    watch.add_argument("--spectrum-every", type=_count, metavar="STEPS", help="default: every epoch; 0: never")
    watch.add_argument("--knn-every", type=_count, default=10, metavar="EPOCHS", help="default 10; 0: never")
    watch.add_argument("--log-every", type=_positive, default=50, metavar="STEPS")
    watch.add_argument("--held", type=_positive, default=10_000, metavar="N", help="images of each measurement")
    watch.add_argument("--tensorboard", action="store_true", help="write its event files into RUN too")
    fast = command.add_argument_group("computing")
    fast.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    fast.add_argument("--checkpoint", action="store_true", help="recompute activations: less memory, the same result")
    fast.add_argument("--nvjpeg", action="store_true", help="decode JPEGs on the device instead of in the workers")
    values = command.add_argument_group("the recipe (defaults: the preset's)")
    for name, kind, count in flags():
        options: dict[str, Any] = {"type": kind, "nargs": count, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        values.add_argument(f"--{name.replace('_', '-')}", dest=f"config_{name}", **options)


def _train(options: argparse.Namespace) -> None:
    from collapse import parallel
    from collapse.config import make_config
    from collapse.data import open_data, same_classes
    from collapse.network import memory_estimate, resolve
    from collapse.run import Signals
    from collapse.train import Options, train

    given = {k[7:]: v for k, v in vars(options).items() if k.startswith("config_") and v is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = resolve(make_config(options.preset, **given))
    data, val = (open_data(options.data, split) for split in ("train", "val"))
    same_classes(data, val, options.data)
    device = parallel.start(choose_device(options.device))
    compiled = device.startswith("cuda") if options.compile is None else options.compile
    names = "workers save_every spectrum_every knn_every log_every held checkpoint nvjpeg tensorboard"
    chosen = {name: getattr(options, name) for name in names.split()}
    lead = parallel.rank() == 0
    if lead:
        print("\n".join(f"{name} = {value}" for name, value in config.as_dict().items()), file=sys.stderr)
        size = memory_estimate(config, config.batch_size // parallel.world()) / 2**30
        print(f"activations: about {size:.1f} GiB a process without --checkpoint", file=sys.stderr)
    try:
        with Signals() as signals:
            how = Options(device=device, compile=compiled, stop=signals, **chosen)
            lines = train(options.out, config, data, val, how)
            last = _watch(lines, config.epochs * (len(data) // config.batch_size), lead)
    finally:
        parallel.stop()
    if lead:
        _finish_run(options.out, last)


def _watch(lines: Iterable[dict[str, Any]], steps: int, lead: bool) -> dict[str, Any] | None:
    """Follow a run with a bar on stderr, if that is a terminal; returns the last line of its log."""
    from tqdm import tqdm

    last, rank = None, float("nan")
    with tqdm(total=steps, unit=" steps", dynamic_ncols=True, disable=None if lead else True) as bar:
        for last in lines:
            if last is not None:
                rank = last.get("effective_rank", rank)
                speed = f"{last['images_per_second']:.0f}"
                bar.set_postfix(
                    {"images/s": speed, "loss": f"{last['loss']:.3f}", "rank": f"{rank:.1f}"}, refresh=False
                )
                bar.update(last["step"] - bar.n)
    return last


def _finish_run(folder: Path, last: dict[str, Any] | None) -> None:
    """The spectrum figure and a line that sums the run up."""
    import json

    import numpy as np

    if last is None:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if (folder / "spectra.npz").exists():
        from collapse import plots

        with np.load(folder / "spectra.npz", allow_pickle=False) as file:
            spectra = {name: file[name][-1] for name in file.files if name != "steps"}
        with plots.style():
            fig, ax = plots.figure()
            plots.plot_spectra(ax, spectra)
            plots.save_figure(fig, folder / "spectrum", [".png"])
    shown = {
        "loss": "epoch_loss",
        "effective rank": "effective_rank",
        "kNN": "knn_top1",
        "classifier": "classifier_top1",
    }
    values = ", ".join(f"{name} {last[key]:.4g}" for name, key in shown.items() if last.get(key) is not None)
    print(f"{folder}: {last['epoch']} epochs, {last['step']} steps: {values}; {folder / 'encoder.safetensors'}")


def _add_evaluation(commands: Any, name: str, text: str, act: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: collapse {name} resnet50.pth --data imagenet"
    )
    command.set_defaults(run=act)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument("--data", required=True, help="train/CLASS/* and val/CLASS/*, as a folder or a zip")
    command.add_argument("--batch-size", type=_positive, default=256)
    command.add_argument("--workers", type=_count, default=min(16, os.cpu_count() or 1), help="processes that decode")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    command.add_argument("--seed", type=_count, default=0)
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON to a file")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    return command


def _add_probe(commands: Any) -> None:
    command = _add_evaluation(commands, "probe", "a linear classifier on the representation: top-1 and top-5", _probe)
    command.add_argument(
        "--recipe",
        default="fast",
        choices=("fast", "paper"),
        help="fast: L-BFGS on features of the centre crops; paper: SGD for 100 epochs on random crops and flips",
    )
    command.add_argument("--epochs", type=_positive, default=100, help="of the paper's recipe")


def _add_knn(commands: Any) -> None:
    command = _add_evaluation(commands, "knn", "nearest training images' vote: top-1 and top-5", _knn)
    command.add_argument("--k", type=_positive, default=20, help="neighbours (20)")
    command.add_argument("--temperature", type=float, default=0.07, help="weights are exp(cosine / temperature)")


def _probe(options: argparse.Namespace) -> None:
    from collapse.evaluate import probe
    from collapse.probes import probe_paper

    net, train, val, device = _open_evaluation(options)
    if options.recipe == "paper":
        how = {"epochs": options.epochs, "batch_size": options.batch_size, "seed": options.seed}
        found = probe_paper(net, train, val, device, options.workers, **how)
    else:
        found = probe(*_features(options, net, train, device), *_features(options, net, val, device))
    how = {"recipe": options.recipe, "epochs": options.epochs if options.recipe == "paper" else None}
    _report_accuracy(options, "probe", net, found, how)


def _knn(options: argparse.Namespace) -> None:
    from collapse.evaluate import knn

    net, train, val, device = _open_evaluation(options)
    pairs = (*_features(options, net, train, device), *_features(options, net, val, device))
    found = knn(*pairs, k=options.k, temperature=options.temperature)
    _report_accuracy(options, "knn", net, found, {"k": options.k, "temperature": options.temperature})


def _open_evaluation(options: argparse.Namespace) -> tuple["Encoder", Any, Any, str]:
    from collapse.checkpoints import load
    from collapse.data import open_data, same_classes
    from collapse.results import refuse_existing

    if options.out:
        refuse_existing(options.out, options.force)
    device = choose_device(options.device)
    train, val = (open_data(options.data, split) for split in ("train", "val"))
    same_classes(train, val, options.data)
    return load(options.checkpoint).to(device), train, val, device


def _features(options: argparse.Namespace, net: "Encoder", data: Any, device: str) -> tuple[Any, Any]:
    from collapse.evaluate import features

    pixels = progress(data.batches(net.preprocess, options.batch_size, options.workers), "images", len(data))
    return features(net, pixels, net.preprocess, device), data.labels


def _report_accuracy(options: argparse.Namespace, kind: str, net: "Encoder", found: Any, how: dict[str, Any]) -> None:
    from collapse.results import command, save_text, to_json, versions

    about = {"schema": f"collapse.{kind}/1", "source": _source(net, "representation"), "data": options.data, **how}
    document = {**about, **found.as_dict(), "command": command(), "versions": versions("torch", "torchvision")}
    if options.out:
        save_text(options.out, to_json(document))
    if options.json:
        print(to_json(document), end="")
        return
    for name in ("top1", "top5"):
        low, high = document[f"{name}_interval"]
        print(f"{name} {100 * document[name]:.2f} % ({100 * low:.2f} to {100 * high:.2f}), {found.n} images")
