"""collapse diagnose."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.commands.guard import images_of, protect, recipe, sources
from collapse.commands.shared import (
    add_model,
    add_result,
    count,
    deliver,
    groups,
    load_encoder,
    place,
    positive,
    progress,
    share,
    still_free,
)

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
    command.set_defaults(run=_diagnose)
    command.add_argument("source", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument("images", metavar="IMAGES", help="a folder of images, a zip of one, or a .txt list")
    command.add_argument("--views", type=groups, default=4, metavar="V", help="augmented views of each image (4)")
    command.add_argument(
        "--augmentation", metavar="PRESET", help="the views of a trainer's preset (digits, cifar10, ...) or JSON file"
    )
    command.add_argument("--threshold", type=share, default=1e-6, help="collapsed: below it times the largest (1e-6)")
    command.add_argument("--limit", type=positive, metavar="N", help="use the first N images")
    command.add_argument("--seed", type=count, default=0, help="of the views")
    add_result(command).add_argument("--report", type=Path, metavar="FILE.html", help="write a page that prints")
    add_model(command)


def _diagnose(options: argparse.Namespace) -> None:
    from collapse.diagnosis import before_crop, describe, diagnose, paper_augmentations
    from collapse.images import Images, pixel_batches
    from collapse.report import table

    inputs = [*sources(options.source), *images_of(options.images), *recipe(options.augmentation)]
    protect(inputs, {"--out": options.out, "--report": options.report}, options.force)
    if options.report and options.report.suffix not in (".html", ".htm"):
        raise InputError(f"{options.report}: a report is .html")
    device, images = place(options), Images(options.images, options.max_pixels)
    net = load_encoder(options, options.source)
    size = net.preprocess.crop or net.preprocess.resize
    if size is None:
        raise InputError(f"{options.source}: does not say how large its images are; give --resize and --crop")
    augmentations = paper_augmentations(size, options.augmentation)
    total, skipped = len(range(len(images))[: options.limit]), list[dict[str, str]]()
    step = max(1, options.batch_size // options.views)
    how = (step, options.workers, options.limit, None if options.strict else skipped)
    pixels = progress(pixel_batches(images, before_crop(net.preprocess), *how), "images", total)
    about: dict[str, Any] = {"path": str(images.source), "skipped": skipped}
    about["warnings"] = images.warnings
    if total < len(images):
        about["warnings"].append(
            f"the first {total} of {len(images)} images; in folders by class, of the first classes alone"
        )
    about["augmentation"] = describe(augmentations, options.augmentation or "the paper's")
    try:
        found = diagnose(
            net,
            pixels,
            options.views,
            augmentations=augmentations,
            threshold=options.threshold,
            seed=options.seed,
            device=device,
            batch_size=options.batch_size,
            precision=options.precision,
            **about,
        )
    except InputError as error:
        unread = f"; {len(skipped)} of {total} cannot be read, first {skipped[0]['path']}" if skipped else ""
        raise InputError(f"{images.source}: {error}{unread}") from error
    if skipped:
        found.about["warnings"].append(f"{len(skipped)} of {total} images were skipped")
    deliver(options, found.to_json(), table(found), *([lambda: _report(options, found)] if options.report else []))


def _report(options: argparse.Namespace, found: "Diagnosis") -> None:
    from collapse.report import page
    from collapse.results import save_text

    still_free(options, options.report)
    save_text(options.report, page(found))
