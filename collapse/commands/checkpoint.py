"""collapse inspect and collapse embed."""

import argparse
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.commands.shared import (
    add_model,
    add_result,
    check_output,
    choose_device,
    load_encoder,
    pixels_of,
    positive,
)


def add_inspect(commands: Any) -> None:
    """The arguments of `collapse inspect`."""
    command = commands.add_parser(
        "inspect",
        help="what a checkpoint is, without images",
        description="What a checkpoint is: architecture, branch, projector, preprocessing, where every tensor went.",
        epilog="example: collapse inspect checkpoint.pth --json",
    )
    command.set_defaults(run=_inspect, plot=None, vectors=False)
    command.add_argument("source", metavar="CHECKPOINT")
    add_result(command)
    add_model(command)


def add_embed(commands: Any) -> None:
    """The arguments of `collapse embed`."""
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
    command.add_argument("--limit", type=positive, metavar="N", help="use the first N images")
    command.add_argument("--json", action="store_true", help="print the provenance")
    command.add_argument("--force", action="store_true", help="replace existing files")
    add_model(command)


def _inspect(options: argparse.Namespace) -> None:
    from collapse.results import save_text, to_json

    check_output(options, options.source)
    document = {"schema": "collapse.checkpoint/1", **load_encoder(options, options.source).report}
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
    from collapse.evaluate import embed
    from collapse.files.arrays import NpyWriter
    from collapse.images import Images
    from collapse.results import command, refuse_existing, save_text, to_json, versions

    if options.out.suffix != ".npy":
        raise InputError(f"{options.out}: embeddings are written as .npy")
    beside = [options.out.with_suffix(suffix) for suffix in (".json", ".txt")]
    for path in (options.out, *beside):
        refuse_existing(path, options.force)
    device = choose_device(options.device)
    net = load_encoder(options, options.source)
    layer, images = net.layer(options.layer), Images(options.images)
    skipped: list[dict[str, str]] = []
    with NpyWriter(options.out) as writer:
        for rows in embed(layer, pixels_of(options, images, net, skipped), net.preprocess, device, options.precision):
            writer.write(rows.cpu().numpy())
    lost = {entry["path"] for entry in skipped}
    names = [name for name in images.names[: options.limit] if str(images.source / name) not in lost]
    document = {
        "schema": "collapse.embeddings/1",
        "source": net.source(options.layer),
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
