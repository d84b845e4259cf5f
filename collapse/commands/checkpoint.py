"""collapse inspect and collapse embed."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.commands.guard import images_of, protect, sources
from collapse.commands.shared import (
    add_model,
    add_result,
    count,
    deliver,
    leads,
    overrides_of,
    positive,
    reading_of,
    still_free,
    warn_of,
)
from collapse.commands.terminal import show

if TYPE_CHECKING:
    from collapse.checkpoints import Checkpoint


def add_inspect(commands: Any) -> None:
    """The arguments of `collapse inspect`."""
    command = commands.add_parser(
        "inspect",
        help="what a checkpoint is, without images",
        description="What a checkpoint is: architecture, branch, projector, preprocessing, where every tensor went.",
        epilog="example: collapse inspect checkpoint.pth --json",
    )
    command.set_defaults(run=_inspect)
    command.add_argument("source", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
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
    command.set_defaults(run=_embed, shares=True)
    command.add_argument("source", metavar="CHECKPOINT", help="what `collapse spectrum` reads")
    command.add_argument("images", metavar="IMAGES", help="a folder of images, a zip, list, shards, table, array")
    command.add_argument("--out", type=Path, metavar="Z.npy", required=True, help="where the embeddings go")
    command.add_argument("--layer", default="representation", help="representation (default), projector, or a module")
    command.add_argument("--limit", type=positive, metavar="N", help="use the first N images")
    command.add_argument("--sample", type=positive, metavar="N", help="use N images, drawn at random by --seed")
    command.add_argument("--seed", type=count, default=0, help="the seed of --sample (0)")
    command.add_argument("--json", action="store_true", help="print the provenance")
    command.add_argument("--force", action="store_true", help="replace existing files")
    add_model(command)


def _inspect(options: argparse.Namespace) -> None:
    from collapse.checkpoints import inspect

    protect(sources(options.source, options.weights or ""), {"--out": options.out}, options.force)
    result = inspect(options.source, **overrides_of(options))
    deliver(options, result.to_json(), describe(result), notes=result.warnings)


def describe(result: "Checkpoint") -> str:
    """A checkpoint's report for a reader."""
    document = result.to_dict()
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
    return "\n".join(lines) + "\n"


def _embed(options: argparse.Namespace) -> None:
    from collapse.results import to_json

    if options.out.suffix != ".npy":
        raise InputError(f"{options.out}: embeddings are written as .npy")
    beside, listed = (options.out.with_suffix(suffix) for suffix in (".json", ".txt"))
    inputs = [*sources(options.source, options.weights or ""), *images_of(options.images)]
    protect(inputs, {"--out": options.out, "its provenance": beside, "its list of images": listed}, options.force)
    if not leads(options):
        _pass(options)
        return
    document, unit = _write_embeddings(options, beside, listed)
    (n, d), skipped = document["shape"], len(document["images"]["skipped"])
    note = f"; {skipped} {unit} were skipped" if skipped else ""
    show(to_json(document) if options.json else f"{options.out}: {n} x {d}{note}\n")
    warn_of([*document["source"]["warnings"], *document["warnings"]])


def _embedded(options: argparse.Namespace) -> Any:
    """What `rows_of` gives for the flags."""
    from collapse.encoders.embedding import rows_of

    chosen = {name: getattr(options, name) for name in ("limit", "sample", "seed")}
    return rows_of(options.source, options.images, layer=options.layer, **chosen, **reading_of(options))


def _pass(options: argparse.Namespace) -> None:
    """Embed this process's images for the one that writes."""
    with _embedded(options) as (_, _, batches):
        for _ in batches:
            pass


def _write_embeddings(options: argparse.Namespace, beside: Path, listed: Path) -> tuple[dict[str, Any], str]:
    """Write the rows, the list of their images and, last, the document that names both by digest.

    Returns it, and the word for what is embedded, as images.
    """
    from collapse.files.imagesets import line_of
    from collapse.results import command, to_json, versions
    from collapse.results.outputs import NpyWriter, atomic_write, digest

    with atomic_write(beside) as text, atomic_write(listed) as lines, atomic_write(options.out) as rows:
        with NpyWriter(rows) as writer, _embedded(options) as (net, pixels, batches):
            for batch in batches:
                writer.write(batch)
        names = pixels.read_names()
        lines.write_bytes(b"".join(os.fsencode(line_of(name)) + b"\n" for name in names))
        document = {
            "schema": "collapse.embeddings/1",
            "source": {**net.source(options.layer), "warnings": net.report["warnings"]},
            "images": {"path": pixels.path, "count": len(names), "skipped": pixels.skipped},
            "warnings": pixels.warnings,
            "shape": list(writer.shape),
            "files": {options.out.name: digest(rows), listed.name: digest(lines)},
            "command": command(),
            "versions": versions("numpy", "torch", "torchvision"),
        }
        text.write_text(to_json(document), encoding="utf-8")
        for path in (options.out, listed, beside):
            still_free(options, path)
    return document, pixels.unit
