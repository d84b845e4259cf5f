"""Flags and steps that several commands share."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from collapse import GateError, InputError
from collapse.arguments import device_of
from collapse.commands.terminal import progress, show, tell
from collapse.files import limits

COUNTED = "a dimension counts as collapsed below THRESHOLD x the largest value (1e-6)"
ASIDE = ("method qr:", "undefined for this input:")
FLAGS = {"normalize"}  # the names of all flags as arguments of the library; the parser adds its own


@contextmanager
def together(options: argparse.Namespace) -> Iterator[None]:
    """Meet the processes that torchrun started, where a command shares its work over several, and leave them again.

    Raises InputError: they did not come, or one was lost.
    """
    options.distributed = getattr(options, "shares", False) and int(os.environ.get("WORLD_SIZE") or 1) > 1
    if not options.distributed:
        yield
        return
    from collapse.encoders import processes

    options.here = processes.start(device_of(options.device), minutes=10)
    try:
        yield
    except RuntimeError as error:
        if not processes.is_lost(error):
            raise
        raise InputError("another process was lost, or said nothing for ten minutes; start them again") from error
    finally:
        processes.stop()


def leads(options: argparse.Namespace) -> bool:
    """Whether this process is the one that prints and writes."""
    if not options.distributed:
        return True
    from collapse.encoders.processes import rank

    return rank() == 0


def watched(options: argparse.Namespace, batches: Any) -> Iterable[Any]:
    """The batches, with a bar of the images that this process embeds; of several processes, the first shows one."""
    if not options.distributed:
        return progress(batches, batches.unit, batches.total)
    from collapse.encoders.processes import world

    return progress(batches, "images", batches.total and -(-batches.total // world())) if leads(options) else batches


def add_measure(command: argparse.ArgumentParser) -> None:
    """How rows become a spectrum."""
    command.add_argument("--raw", action="store_true", help="do not divide each embedding by its norm")
    command.add_argument(
        "--method", default="auto", choices=("auto", "covariance", "qr", "float32"),
        help="covariance is fast; qr keeps all digits of float64; float32 is faster, and rounds below 1e-6 of the "
        "largest value; auto takes qr for float64 rows",
    )  # fmt: skip
    command.add_argument("--threshold", type=share, default=1e-6, help=COUNTED)
    command.add_argument("--limit", type=groups, metavar="N", help="use the first N rows or images")
    command.add_argument("--sample", type=groups, metavar="N", help="use N rows or images, drawn at random by --seed")
    command.add_argument("--seed", type=count, default=0, help="the seed of what is drawn at random (0)")
    command.add_argument(
        "--max-unpacked", type=above_zero, metavar="GIB",
        help="allow a packed array of up to GIB, even where its file is far smaller",
    )  # fmt: skip


def add_model(command: argparse.ArgumentParser) -> None:
    """Reading a checkpoint and images; the names are those of `Overrides`."""
    model = command.add_argument_group("reading the checkpoint and the images")
    model.add_argument("--arch", help="the architecture it must be, or timm's or torchvision's name of it")
    model.add_argument(
        "--weights", metavar="FILE", help="the tensors of your own network, where SOURCE is FILE.py:NAME or MODULE:NAME"
    )
    model.add_argument("--branch", help="which of several encoders in the file")
    model.add_argument("--projector", metavar="KEY", help="the prefix of the projector's keys, or none")
    model.add_argument("--projector-layers", type=positive, metavar="N", help="use N of the stored layers")
    model.add_argument("--heads", type=positive, metavar="N", help="how many attention heads there are")
    model.add_argument("--activation", choices=("gelu", "quick_gelu"), help="the activation of a transformer")
    model.add_argument(
        "--pool", "--pooling", choices=("cls", "mean", "max", "last"),
        help="the tokens of a transformer that are the representation; max and last are for texts alone",
    )  # fmt: skip
    model.add_argument("--dim", type=positive, metavar="D0", help="DirectCLR: the first D0 entries are the projector")
    model.add_argument("--stem-padding", type=count, metavar="PX", help="the padding of a 3 x 3 first convolution")
    model.add_argument(
        "--maxpool", action=argparse.BooleanOptionalAction, help="whether max-pooling follows a 3 x 3 first convolution"
    )
    model.add_argument("--allow-unknown", action="store_true", help="go on when some tensors belong to nothing known")
    model.add_argument("--resize", type=positive, metavar="PX", help="resize the shorter side to PX")
    model.add_argument("--crop", type=positive, metavar="PX", help="crop the centre, PX wide and high")
    model.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="how images are resized")
    model.add_argument(
        "--mean",
        type=numbers,
        metavar="X ...",
        help="subtract these from pixel values in 0..1: R G B, or as many as there are channels",
    )
    model.add_argument("--std", type=numbers, metavar="X ...", help="then divide by these")
    model.add_argument("--no-normalize", action="store_true", help="leave pixel values in 0..1, without mean and std")
    add_pixels(model)
    model.add_argument(
        "--strict", action="store_true", help="stop at an image that cannot be read, instead of skipping it"
    )
    model.add_argument(
        "--batch-size", type=positive, metavar="N", help="images in one forward pass (64, or 256 on CUDA)"
    )
    model.add_argument(
        "--workers", type=count, metavar="N", help="processes that decode images (up to 4, or 16 on CUDA)"
    )
    model.add_argument("--device", default="auto", help="where the network runs: auto, cpu or cuda[:i]")
    model.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "bf16"),
        help="of the forward pass; bf16 is faster on a GPU, and raises the floor",
    )


def add_pixels(command: Any) -> None:
    """How large an image may be, and what its numbers mean."""
    command.add_argument(
        "--max-pixels", type=positive, default=limits.PIXELS, metavar="N",
        help=f"do not decode images of more pixels, height times width ({limits.PIXELS:,})",
    )  # fmt: skip
    command.add_argument(
        "--pixel-range", type=float, nargs=2, metavar=("BLACK", "WHITE"),
        help="black and white of images of floats or of more than 8 bits (by their type, or a guess with a warning)",
    )  # fmt: skip


def add_output(command: argparse.ArgumentParser) -> None:
    """What goes where, and what is drawn."""
    output = add_result(command)
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the spectrum: .png or .pdf")
    output.add_argument(
        "--kind", default="spectrum", choices=("spectrum", "explained", "noise"),
        help="what to draw: the spectrum, the cumulative share of variance, or the spectrum beside that of pure noise",
    )  # fmt: skip
    output.add_argument("--log10", action="store_true", help="draw log10 instead of ln")
    output.add_argument("--log-index", action="store_true", help="draw the index on a logarithmic axis")


def add_result(command: argparse.ArgumentParser) -> Any:
    """Where a JSON document goes; returns the group of arguments."""
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document")
    output.add_argument("--out", type=Path, metavar="FILE", help="write the same JSON to a file")
    output.add_argument("--force", action="store_true", help="replace existing files")
    return output


def add_against(command: argparse.ArgumentParser) -> None:
    """Others to compare with."""
    command.add_argument(
        "--against", nargs="+", default=[], metavar="NAME",
        help="compare with: names of `collapse references`, results of collapse spectrum (.json), folders of such",
    )  # fmt: skip


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def numbers(text: str) -> list[float]:
    """Numbers with spaces between."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def groups(text: str) -> int:
    """A whole number of at least 2."""
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 2")
    return int(text)


def share(text: str) -> float:
    """A number in 0..1, 1 not among them."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def bound(text: str) -> tuple[str, float]:
    """NAME=VALUE: a metric and a number."""
    from collapse.spectra import METRICS

    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name not in METRICS:
        near = get_close_matches(name, METRICS, 1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
        raise argparse.ArgumentTypeError(f"no metric {name[:80]!r}; {known}")
    if value != value:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not NAME=VALUE, as effective_rank=100")
    return name, value


def check_plot(path: Path | None) -> None:
    """Raise InputError for a plot of an unknown kind."""
    if path and path.suffix not in (".png", ".pdf"):
        raise InputError(f"{path}: a plot is .png or .pdf")


def deliver(
    options: argparse.Namespace,
    document: str,
    text: str,
    *more: Callable[[], Any],
    save: Callable[[Path], str] | None = None,
    notes: Iterable[str] = (),
) -> None:
    """Write the JSON document to --out, print it or the text, and take the steps `more`, as drawing.

    save: writes to --out in its own way, and returns the document as written.  notes: warnings, said if all went well.
    Each step is taken though one before it failed, so that nothing computed is lost; then the first error is raised:
    an InputError where the file cannot be written, or standard output takes no more.
    """
    from collapse.results import save_text

    errors: list[Exception] = []
    if options.out:
        with _later(errors):
            still_free(options, options.out)
            document = save(options.out) if save else save_text(options.out, document)
    wrote = [lambda: tell(f"wrote {options.out}")] if options.out and not errors else []
    for step in (lambda: show(document if options.json else text), *wrote, *more):
        with _later(errors):
            step()
    if errors:
        raise errors[0]
    warn_of(notes)


def still_free(options: argparse.Namespace, path: Path) -> None:
    """Raise InputError, without --force, for a file that has appeared since the command began."""
    if os.path.lexists(path) and not options.force:
        raise InputError(f"{path}: has appeared meanwhile and is kept; give --force to replace it, or another name")


@contextmanager
def _later(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (InputError, GateError, OSError) as error:
        errors.append(error)


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how a checkpoint and images are read, as arguments of the library, with a bar."""
    given = overrides_of(options)
    given |= {name: getattr(options, name) for name in ("precision", "strict", "max_pixels", "batch_size")}
    given |= {"pixel_range": range_of(options)}
    given |= {"distributed": options.distributed, "watch": partial(watched, options)}
    return {**given, **placed(options)}


def range_of(options: argparse.Namespace) -> tuple[float, float] | None:
    """What --pixel-range says."""
    return options.pixel_range and (options.pixel_range[0], options.pixel_range[1])


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of a checkpoint."""
    from collapse.checkpoints import Overrides

    given = {name: getattr(options, name) for name in Overrides.__dataclass_fields__}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def placed(options: argparse.Namespace) -> dict[str, Any]:
    """Device, and workers where none are given: for a GPU all the cores that are its share."""
    device = device_here(options)
    share = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if options.distributed else 1
    workers = min(4, max(1, cores() // share)) if options.distributed else min(4, cores())
    if device.startswith("cuda"):
        import torch

        workers = max(1, cores() // torch.cuda.device_count())
    return {"device": device, "workers": workers if options.workers is None else options.workers}


def device_here(options: argparse.Namespace) -> str:
    """The device of this process. Raises InputError: it is not there."""
    return str(options.here) if options.distributed else device_of(options.device)


def with_flags(text: str) -> str:
    """A message of the library with its arguments as the flags of the command: resize= is --resize."""
    names = "|".join(sorted(FLAGS, key=len, reverse=True))
    return re.sub(rf"(?<![\w./=-])({names})=(?:\"([^\"]*)\"|(\w(?:[\w:]*\w)?)?)", _as_flag, text)


def _as_flag(match: re.Match[str]) -> str:
    name, value = match[1], match[2] or match[3] or ""
    if value == "False":
        return "--raw" if name == "normalize" else _flag(f"no_{name}")
    return _flag(name) + (f" {value}" if value and value != "True" else "")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def warn_of(notes: Iterable[str]) -> None:
    """What a reader should know, once each, on standard error; but not what the result shows by itself."""
    for note in dict.fromkeys(note for note in notes if not note.startswith(ASIDE)):
        tell(f"warning: {with_flags(note)}")
