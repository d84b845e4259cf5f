"""collapse train, collapse probe and collapse knn."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.arguments import device_of
from collapse.commands.guard import RUN, data_of, protect, recipe, sources, spare_all
from collapse.commands.shared import (
    above_zero,
    add_max_pixels,
    cores,
    count,
    deliver,
    positive,
    progress,
    tell,
)

if TYPE_CHECKING:
    from collapse.checkpoints import Encoder


def add_train(commands: Any) -> None:
    """The arguments of `collapse train`."""
    from collapse.training.config import flags, presets

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
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    command.add_argument("--workers", type=count, default=max(1, min(16, share)), help="processes that decode, a rank")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    command.add_argument("--json", action="store_true", help="print the log's last line as one JSON document")
    watch = command.add_argument_group("watching and saving")
    watch.add_argument("--save-every", type=positive, metavar="STEPS", help="default: every epoch, or ten minutes")
    watch.add_argument("--spectrum-every", type=count, metavar="STEPS", help="default: every epoch; 0: never")
    watch.add_argument("--knn-every", type=count, default=10, metavar="EPOCHS", help="default 10; 0: never")
    watch.add_argument("--keep-every", type=count, default=0, metavar="EPOCHS", help="keep encoder-EPOCH.safetensors")
    watch.add_argument("--log-every", type=positive, default=50, metavar="STEPS")
    watch.add_argument("--held", type=positive, default=10_000, metavar="N", help="images of each measurement")
    watch.add_argument("--tensorboard", action="store_true", help="write its event files into RUN too")
    fast = command.add_argument_group("computing")
    fast.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    fast.add_argument("--checkpoint", action="store_true", help="recompute activations: less memory")
    add_max_pixels(fast)
    values = command.add_argument_group("the recipe (defaults: the preset's)")
    for name, kind, many in flags():
        options: dict[str, Any] = {"type": kind, "nargs": many, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        values.add_argument(f"--{name.replace('_', '-')}", dest=f"config_{name}", **options)


def _train(options: argparse.Namespace) -> None:
    from collapse.training import parallel
    from collapse.training.config import make_config
    from collapse.training.data import open_data, same_classes
    from collapse.training.network import memory_estimate, resolve
    from collapse.training.run import Signals
    from collapse.training.train import Options, train

    given = {k[7:]: v for k, v in vars(options).items() if k.startswith("config_") and v is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    written = {name: options.out / name for name in RUN}
    spare_all([*data_of(options.data), *recipe(options.preset)], written)
    config = resolve(make_config(options.preset, **given))
    data, val = (open_data(options.data, split, options.max_pixels) for split in ("train", "val"))
    same_classes(data, val, options.data)
    device = parallel.start(device_of(options.device))
    compiled = device.startswith("cuda") if options.compile is None else options.compile
    names = "workers save_every spectrum_every knn_every keep_every log_every held checkpoint tensorboard"
    chosen = {name: getattr(options, name) for name in names.split()}
    lead = parallel.rank() == 0
    size = memory_estimate(config, config.batch_size // parallel.world()) / 2**30
    if lead:
        _warn(data, val)
        tell("\n".join(f"{name} = {value}" for name, value in config.as_dict().items()))
        tell(f"activations: about {size:.1f} GiB a process without --checkpoint")
    try:
        with Signals() as signals:
            how = Options(device=device, compile=compiled, stop=signals, **chosen)
            lines = train(options.out, config, data, val, how)
            last = _watch(lines, config.epochs * (len(data) // config.batch_size), lead)
    finally:
        parallel.stop()
    if lead:
        _finish_run(options, last)


def _warn(*parts: Any) -> None:
    """Say on stderr what was left out of the sets."""
    for text in (text for part in parts for text in part.warnings):
        tell(f"warning: {text}")


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


def _finish_run(options: argparse.Namespace, last: dict[str, Any] | None) -> None:
    """A line that sums the run up, and the spectrum figure."""
    from collapse.results import command, to_json, versions

    last = _last_line(options.out) if last is None else last
    about = {"schema": "collapse.training/1", "run": options.out, "encoder": options.out / "encoder.safetensors"}
    made = {"command": command(), "versions": versions("numpy", "torch", "torchvision")}
    given = argparse.Namespace(json=options.json, out=None)
    deliver(given, to_json({**about, **last, **made}), _in_a_line(options.out, last), lambda: _draw_run(options.out))


def _last_line(folder: Path) -> dict[str, Any]:
    """The last line of a run's log; nothing if the log is gone or damaged, which is said."""
    from collapse.training.run import last_line

    try:
        return last_line(folder)
    except InputError as error:
        tell(f"warning: {error}")
        return {}


def _in_a_line(folder: Path, last: dict[str, Any]) -> str:
    shown = {
        "loss": "epoch_loss",
        "effective rank": "effective_rank",
        "kNN": "knn_top1",
        "classifier": "classifier_top1",
    }
    numbers = {name: last.get(key) for name, key in shown.items()}
    values = ", ".join(f"{name} {v:.4g}" for name, v in numbers.items() if isinstance(v, (int, float)))
    done = f"{last['epoch']} epochs, {last['step']} steps: {values}" if {"epoch", "step"} <= last.keys() else "finished"
    return f"{folder}: {done}; {folder / 'encoder.safetensors'}\n"


def _draw_run(folder: Path) -> None:
    from collapse import plots
    from collapse.training.run import spectra_of

    path = folder / "spectra.npz"
    if (stored := spectra_of(path)) is None:
        if path.exists():
            tell(f"warning: {path}: damaged; spectrum.png is not drawn")
        return
    spectra = {name: values[-1] for name, values in stored.items() if name != "steps"}
    with plots.style():
        fig, ax = plots.figure()
        plots.plot_spectra(ax, spectra)
        plots.save_figure(fig, folder / "spectrum", [".png"])


def _add_evaluation(commands: Any, name: str, text: str, act: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: collapse {name} resnet50.pth --data imagenet"
    )
    command.set_defaults(run=act)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument("--data", required=True, help="train/CLASS/* and val/CLASS/*, as a folder or a zip")
    command.add_argument("--batch-size", type=positive, default=256)
    command.add_argument("--workers", type=count, default=min(16, cores()), help="processes that decode")
    add_max_pixels(command)
    command.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    command.add_argument("--seed", type=count, default=0)
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON to a file")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    return command


def add_probe(commands: Any) -> None:
    """The arguments of `collapse probe`."""
    command = _add_evaluation(commands, "probe", "a linear classifier on the representation: top-1 and top-5", _probe)
    command.add_argument(
        "--recipe",
        default="fast",
        choices=("fast", "paper"),
        help="fast: L-BFGS on features of the centre crops; paper: SGD for 100 epochs on random crops and flips",
    )
    command.add_argument("--epochs", type=positive, default=100, help="of the paper's recipe")


def add_knn(commands: Any) -> None:
    """The arguments of `collapse knn`."""
    command = _add_evaluation(commands, "knn", "nearest training images' vote: top-1 and top-5", _knn)
    command.add_argument("--k", type=positive, default=20, help="neighbours (20)")
    command.add_argument("--temperature", type=above_zero, default=0.07, help="weights: exp(cosine / temperature)")


def _probe(options: argparse.Namespace) -> None:
    from collapse.evaluate import probe
    from collapse.training.probes import probe_paper

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
    from collapse.training.data import open_data, same_classes

    protect([*sources(options.checkpoint), *data_of(options.data)], {"--out": options.out}, options.force)
    device = device_of(options.device)
    train, val = (open_data(options.data, split, options.max_pixels) for split in ("train", "val"))
    same_classes(train, val, options.data)
    _warn(train, val)
    return load(options.checkpoint).to(device), train, val, device


def _features(options: argparse.Namespace, net: "Encoder", data: Any, device: str) -> tuple[Any, Any]:
    from collapse.evaluate import features

    pixels = progress(data.batches(net.preprocess, options.batch_size, options.workers), "images", len(data))
    return features(net, pixels, net.preprocess, device), data.labels


def _report_accuracy(options: argparse.Namespace, kind: str, net: "Encoder", found: Any, how: dict[str, Any]) -> None:
    from collapse.results import command, to_json, versions

    about = {"schema": f"collapse.{kind}/1", "source": net.source("representation"), "data": options.data, **how}
    document = {**about, **found.as_dict(), "command": command(), "versions": versions("torch", "torchvision")}
    lines = []
    for name in ("top1", "top5"):
        low, high = (100 * end for end in document[f"{name}_interval"])
        lines.append(f"{name} {100 * document[name]:.2f} % ({low:.2f} to {high:.2f}), {found.n} images\n")
    deliver(options, to_json(document), "".join(lines))
