"""collapse diagnose and collapse report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.commands.guard import images_of, protect, recipe, sources
from collapse.commands.shared import (
    COUNTED,
    above_zero,
    add_against,
    add_model,
    add_result,
    count,
    deliver,
    groups,
    leads,
    positive,
    reading_of,
    share,
    still_free,
)
from collapse.commands.terminal import show, tell

if TYPE_CHECKING:
    from collapse.diagnosis import Diagnosis


def add_diagnose(commands: Any) -> None:
    """The arguments of `collapse diagnose`."""
    command = commands.add_parser(
        "diagnose",
        help="where in a network rank is lost, and to what",
        description="Each block's directions, from several augmented views of each image: alive, or collapsed by "
        "augmentation, by implicit regularisation, in the rounding, or dead; and a verdict.",
        epilog="example: collapse diagnose resnet50.pth imagenet/val --views 4 --report report.html",
    )
    command.set_defaults(run=_diagnose, shares=True)
    command.add_argument("source", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument(
        "images", metavar="IMAGES", nargs="?", help="a folder of images, a zip, list, shards, table, array"
    )
    _add_views(command)
    add_result(command).add_argument("--report", type=Path, metavar="FILE.html", help="write a page that prints")
    add_model(command)


def _add_views(command: argparse.ArgumentParser) -> None:
    """Which views of which images."""
    command.add_argument("--views", type=groups, default=4, metavar="V", help="augmented views of each image (4)")
    command.add_argument(
        "--views-file",
        metavar="FILE.jsonl",
        help="for texts: a file with a line of JSON for each, the list of its views",
    )
    command.add_argument(
        "--augmentation", metavar="PRESET", help="the views of a trainer's preset (digits, cifar10, ...) or JSON file"
    )
    command.add_argument("--threshold", type=share, default=1e-6, help=COUNTED)
    command.add_argument(
        "--temperature", type=above_zero, metavar="T",
        help="of the cosine loss that trained it, if the file does not say; it tells what is augmentation's",
    )  # fmt: skip
    command.add_argument(
        "--similarity", choices=("cosine", "dot", "euclidean"), default="cosine",
        help="of the loss that trained it (cosine)",
    )  # fmt: skip
    command.add_argument("--sample", type=groups, metavar="N", help="use N images, drawn at random by --seed")
    command.add_argument("--limit", type=positive, metavar="N", help="use the first N images")
    command.add_argument("--seed", type=count, default=0, help="the seed of the views and of --sample (0)")


def add_report(commands: Any) -> None:
    """The arguments of `collapse report`."""
    command = commands.add_parser(
        "report",
        help="everything about one checkpoint on one page",
        description="One self-contained HTML page: a headline, the spectrum, the rank of each layer, the diagnosis, "
        "results of others beside it, and what to do.",
        epilog="example: collapse report resnet50.pth imagenet/val --out report.html --against before.json",
    )
    command.set_defaults(run=_report_page, shares=True)
    command.add_argument("source", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument(
        "images", metavar="IMAGES", nargs="?", help="a folder of images, a zip, list, shards, table, array"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="PAGE.html", help="where the page goes, which needs no other file"
    )
    command.add_argument("--force", action="store_true", help="replace an existing page")
    add_against(command)
    _add_views(command)
    add_model(command)


def _report_page(options: argparse.Namespace) -> None:
    inputs = [*sources(options.source, options.weights or "", *options.against), *images_of(options.images)]
    protect(
        [*inputs, *recipe(options.augmentation), *recipe(options.views_file)], {"--out": options.out}, options.force
    )
    _check_inputs(options, "a report takes IMAGES")
    from collapse.diagnosis.onepage import report
    from collapse.results.screen import paragraph

    how = {
        name: getattr(options, name)
        for name in ("views", "threshold", "temperature", "similarity", "limit", "sample", "seed")
    }
    how["views_file"] = options.views_file
    how |= {"augmentations": options.augmentation, "against": options.against, **reading_of(options)}
    told: list[str] = []
    path = report(options.source, options.images, options.out, told=told.append, **how)
    if leads(options):
        show("".join(f"{paragraph(text)}\n" for text in told))
        tell(f"wrote {path}")


def _diagnose(options: argparse.Namespace) -> None:
    inputs = [
        *sources(options.source, options.weights or ""),
        *images_of(options.images),
        *recipe(options.augmentation),
        *recipe(options.views_file),
    ]
    protect(inputs, {"--out": options.out, "--report": options.report}, options.force)
    if options.report and options.report.suffix not in (".html", ".htm"):
        raise InputError(f"{options.report}: a report is .html")
    _check_inputs(options, "a network of texts may take --views-file instead", options.views_file)
    from collapse.diagnosis import diagnose
    from collapse.diagnosis.wording import table

    names = ("views", "threshold", "temperature", "similarity", "limit", "sample", "seed", "views_file")
    how = {name: getattr(options, name) for name in names}
    result = diagnose(options.source, options.images, augmentations=options.augmentation, **how, **reading_of(options))
    if not leads(options):
        return
    report = [lambda: _report(options, result)] if options.report else []
    deliver(options, result.to_json(), table(result), *report, notes=result.notes())


def _check_inputs(options: argparse.Namespace, hint: str, instead: str | None = None) -> None:
    """Refuse an array, which holds no network, and a call without images."""
    from collapse.files.arrays import is_array

    if Path(options.source).is_file() and is_array(Path(options.source)):
        raise InputError(
            f"{options.source}: is an array; layers and causes need the network and its images. "
            f"For the array: collapse spectrum {options.source} --plot spectrum.png"
        )
    if options.images is None and instead is None:
        raise InputError(f"IMAGES: none are given; {hint}")


def _report(options: argparse.Namespace, result: "Diagnosis") -> None:
    from collapse.diagnosis.page import page
    from collapse.results import save_text

    still_free(options, options.report)
    save_text(options.report, page(result))
    tell(f"wrote {options.report}")
