"""collapse train, collapse probe and collapse knn."""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse.commands.guard import RUN, data_of, protect, recipe, sources, spare_all
from collapse.commands.shared import (
    above_zero,
    add_pixels,
    cores,
    count,
    deliver,
    device_here,
    leads,
    positive,
    range_of,
    share,
    warn_of,
    watched,
)
from collapse.commands.terminal import tell

if TYPE_CHECKING:
    from collapse.encoders.accuracy import Accuracy
    from collapse.training.result import Job, Trained


def add_train(commands: Any) -> None:
    """The arguments of `collapse train`."""
    from collapse.recipes.config import flags, presets

    command = commands.add_parser(
        "train",
        help="training: SimCLR with any head, DirectCLR, Barlow Twins, VICReg, SimSiam, BYOL",
        description="Train without labels; the same command goes on with an unfinished RUN. "
        "Under torchrun, `torchrun ... -m collapse train ...`, it uses all processes.",
        epilog="example: collapse train --preset digits --data sklearn:digits --method directclr --out runs/directclr",
    )
    command.set_defaults(run=_train)
    command.add_argument("--data", required=True, help="train/CLASS/*, val/CLASS/* in a folder or zip; more: docs")
    command.add_argument(
        "--holdout",
        type=share,
        metavar="SHARE",
        help="hold this share of the images out, where none are set apart (0.1)",
    )
    command.add_argument(
        "--labels", action=argparse.BooleanOptionalAction, default=True, help="--no-labels: folders are no classes"
    )
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    command.add_argument("--preset", default="imagenet", help=f"{', '.join(presets())}, or a JSON file (imagenet)")
    most = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    command.add_argument(
        "--workers",
        type=count,
        default=max(1, min(16, most)),
        metavar="N",
        help="processes that decode images, for each rank",
    )
    command.add_argument("--device", default="auto", help="where the network runs: auto, cpu or cuda[:i]")
    command.add_argument("--json", action="store_true", help="print the log's last line as one JSON document")
    watch = command.add_argument_group("watching and saving")
    watch.add_argument(
        "--save-every", type=positive, metavar="STEPS", help="save the state so often (each epoch, rarer on fast GPUs)"
    )
    watch.add_argument(
        "--save-seconds", type=above_zero, metavar="SECONDS", default=600.0, help="save the state also so often (600)"
    )
    watch.add_argument(
        "--spectrum-every",
        type=count,
        metavar="STEPS",
        help="measure the spectrum so often; 0: never (as --save-every)",
    )
    watch.add_argument(
        "--spectrum-seconds",
        type=above_zero,
        metavar="SECONDS",
        help="measure the spectrum so often, instead of each epoch",
    )
    watch.add_argument(
        "--knn-every", type=count, default=10, metavar="EPOCHS", help="measure the kNN accuracy so often; 0: never (10)"
    )
    watch.add_argument("--keep-every", type=count, default=0, metavar="EPOCHS", help="keep encoder-EPOCH.safetensors")
    watch.add_argument(
        "--log-every", type=positive, default=50, metavar="STEPS", help="write a line to the log so often (50)"
    )
    watch.add_argument(
        "--held", type=positive, default=10_000, metavar="N", help="use N images for each measurement (10000)"
    )
    watch.add_argument(
        "--tensorboard", action="store_true", help="write files for TensorBoard to RUN, with spectra drawn"
    )
    fast = command.add_argument_group("computing")
    fast.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the network with torch.compile (on CUDA)"
    )
    fast.add_argument("--checkpoint", action="store_true", help="recompute activations: less memory")
    add_pixels(fast)
    values = command.add_argument_group("the recipe (defaults: the preset's)")
    for name, kind, many in flags():
        options: dict[str, Any] = {"type": kind, "nargs": many, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        values.add_argument(f"--{name.replace('_', '-')}", dest=f"config_{name}", **options)


def _train(options: argparse.Namespace) -> None:
    from collapse.recipes.config import make_config
    from collapse.training.network import resolve
    from collapse.training.result import WATCHING, train

    recipe_values = {k[7:]: v for k, v in vars(options).items() if k.startswith("config_") and v is not None}
    written = {name: options.out / name for name in RUN}
    spare_all([*data_of(options.data), *recipe(options.preset)], written)
    resolve(
        make_config(options.preset, **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe_values.items()})
    )
    names = (*WATCHING, "compile", "preset", "device", "max_pixels", "holdout", "labels")
    chosen = {**{name: getattr(options, name) for name in names}, "pixel_range": range_of(options)}
    result = train(options.data, options.out, watch=_watch, **recipe_values, **chosen)
    if result.lead:
        _finish_run(options, result)


def _finish_run(options: argparse.Namespace, result: "Trained") -> None:
    """A line that sums the run up, and the spectrum figure."""
    given = argparse.Namespace(json=options.json, out=None)
    notes = [note for note in result.warnings if note.startswith(str(result.run))]
    deliver(given, result.to_json(), f"{result.sentence()}\n", lambda: _draw_run(result), notes=notes)


def _watch(job: "Job") -> Iterator[Any]:
    """Follow a run with a bar on stderr, if that is a terminal, after what is about to be done."""
    from tqdm import tqdm

    from collapse.encoders import processes
    from collapse.training.network import memory_estimate

    lead, rank = processes.rank() == 0, float("nan")
    size = memory_estimate(job.config, job.config.batch_size // processes.world()) / 2**30
    if lead:
        warn_of([*job.data.warnings, *(job.val.warnings if job.val else ())])
        tell("\n".join(f"{name} = {value}" for name, value in job.config.as_dict().items()))
        tell(f"activations: about {size:.1f} GiB a process without --checkpoint")
        if job.options.compile:
            tell(
                "the network is compiled before the first step, which takes a minute or so; --no-compile leaves it out"
            )
    with tqdm(total=job.total, unit=" steps", dynamic_ncols=True, disable=None if lead else True) as bar:
        for line in job:
            if line is not None:
                rank = line.get("effective_rank", rank)
                speed = f"{line['images_per_second']:.0f}"
                bar.set_postfix(
                    {"images/s": speed, "loss": f"{line['loss']:.3f}", "rank": f"{rank:.1f}"}, refresh=False
                )
                bar.update(line["step"] - bar.n)
            yield line


def _draw_run(result: "Trained") -> None:
    from collapse import plots

    path = result.run / "spectra.npz"
    if not result.spectra():
        if path.exists():
            tell(f"warning: {path}: damaged; spectrum.png is not drawn")
        return
    plots.save_figure(result.plot().figure, result.run / "spectrum", [".png"])


def _add_evaluation(commands: Any, name: str, text: str, act: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: collapse {name} resnet50.pth --data imagenet"
    )
    command.set_defaults(run=act, shares=True)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument("--data", required=True, help="train/CLASS/* and val/CLASS/*, as a folder or a zip")
    command.add_argument(
        "--batch-size", type=positive, default=256, metavar="N", help="images in one forward pass (256)"
    )
    command.add_argument("--workers", type=count, default=min(16, cores()), help="processes that decode")
    add_pixels(command)
    command.add_argument("--device", default="auto", help="where the network runs: auto, cpu or cuda[:i]")
    command.add_argument("--seed", type=count, default=0, help="the seed of what is drawn at random (0)")
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
    from collapse.probes.calls import probe

    how = {"recipe": options.recipe, "epochs": options.epochs}
    _deliver_accuracy(options, probe(options.checkpoint, options.data, **how, **_open_evaluation(options)))


def _knn(options: argparse.Namespace) -> None:
    from collapse.probes.calls import knn

    how = {"k": options.k, "temperature": options.temperature}
    _deliver_accuracy(options, knn(options.checkpoint, options.data, **how, **_open_evaluation(options)))


def _open_evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how it is measured, as arguments of the library, once nothing read is written over."""
    protect([*sources(options.checkpoint), *data_of(options.data)], {"--out": options.out}, options.force)
    names = ("batch_size", "workers", "seed", "max_pixels", "distributed")
    given = {**{name: getattr(options, name) for name in names}, "pixel_range": range_of(options)}
    return {**given, "device": device_here(options), "watch": partial(watched, options)}


def _deliver_accuracy(options: argparse.Namespace, result: "Accuracy") -> None:
    if not leads(options):
        return
    lines = []
    for name, part in (("top1", result.top1), ("top5", result.top5)):
        low, high = (100 * end for end in getattr(result, f"{name}_interval"))
        lines.append(f"{name} {100 * part:.2f} % ({low:.2f} to {high:.2f}), {result.n} images\n")
    deliver(options, result.to_json(), "".join(lines), notes=result.notes())
