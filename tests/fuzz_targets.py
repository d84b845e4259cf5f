"""What is called with each mutant: the readers as the commands use them, and what an answer of theirs must be."""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # noqa: F401
import torch
from PIL import Image

import collapse
import collapse.checkpoints.library  # timm asks for packages that it can do without, pyarrow for cloudpickle
from collapse.images import Images, Preprocessing, pixel_batches
from collapse.spectra import load_results
from collapse.spectra.comparison import comparison
from collapse.training.config import Config, make_config
from collapse.training.data import open_data, same_classes, to_memory
from collapse.training.run import Run, last_line, spectra_of

PICTURE = Image.new("RGB", (40, 30), (10, 200, 90))


class Wrong(Exception):
    """An answer that no file can mean."""


def require(true: Any, what: str) -> None:
    """Raise Wrong unless it is true."""
    if not true:
        raise Wrong(what)


def checkpoint(path: Path) -> Any:
    """collapse inspect, and an image through what was found."""
    net = collapse.load(path)
    pixels = net.preprocess(PICTURE)
    require(torch.isfinite(pixels).all(), "the preprocessing gives no numbers")
    require(all(math.isfinite(v) for v in (*(net.preprocess.mean or ()), *(net.preprocess.std or ()))), "mean or std")
    if max(pixels.shape) <= 64:
        net(pixels[None])
    about = {
        key: net.report[key] for key in ("architecture", "feature_dim", "branch", "projector", "preprocessing", "keys")
    }
    return about, net.state_dict()


def array(path: Path) -> Any:
    """collapse spectrum of an array."""
    found = collapse.spectrum(path, vectors=True)
    _check(found)
    return found.singular_values, found.n


def _check(found: collapse.Spectrum) -> None:
    values = np.asarray(found.singular_values)
    require(
        values.ndim == 1 and values.dtype.kind == "f" and len(values) == found.dim, f"{values.dtype} {values.shape}"
    )
    require(np.isfinite(values).all() and (values >= 0).all() and (np.diff(values) <= 0).all(), f"values {values[:5]}")
    require(isinstance(found.n, int) and found.n >= 2, f"n = {found.n!r}")
    found.to_json()
    comparison({"a": found, "b": found})


def result(path: Path) -> Any:
    """collapse compare of results."""
    found = load_results(path)
    for each in found:
        _check(each)
    require(found, "no spectrum")
    return [(each.singular_values, each.n, each.name) for each in found]


def preset(path: Path) -> Any:
    """collapse train --preset FILE."""
    config = make_config(str(path))
    config.augmentation(0)
    return config.as_dict()


def images(path: Path) -> Any:
    """The images of collapse spectrum and embed."""
    skipped: list[dict[str, str]] = []
    batches = list(pixel_batches(Images(path), Preprocessing(16, 16), 2, skipped=skipped))
    for batch in batches:
        require(batch.shape[1:] == (3, 16, 16), f"{batch.dtype} {tuple(batch.shape)}")
        deep = batch.dtype == torch.float32 and 0 <= batch.min() <= batch.max() <= 1
        require(batch.dtype == torch.uint8 or deep, f"{batch.dtype} from {batch.min()} to {batch.max()}")
    for entry in skipped:
        require(entry["why"].strip() and "\n" not in entry["why"], f"skipped without a reason: {entry}")
        where = "/" if path.suffix == ".txt" else str(path)  # a list names images anywhere
        require(entry["path"].startswith(where), f"skipped without a place: {entry}")
    require(batches or skipped, "neither images nor reasons")
    return batches, [entry["path"] for entry in skipped]


def data(path: Path) -> Any:
    """The images and labels of collapse train, probe and knn."""
    parts = [open_data(path, split) for split in ("train", "val")]
    same_classes(*parts, str(path))
    found = []
    for part in parts:
        require(len(part) == len(part.labels) > 0 and part.labels.dtype == np.int64, f"{len(part)} {part.labels}")
        require(0 <= part.labels.min() <= part.labels.max() < len(part.classes), f"{part.labels} {part.classes}")
        found.append((part.labels, part.classes, [_opened(part, index) for index in range(min(len(part), 3))]))
        to_memory(part, 0)
    return found


def _opened(part: Any, index: int) -> Any:
    try:
        return np.array(part.images.open(index))
    except collapse.InputError as error:  # one image of many
        require("\n" not in str(error), f"{error!s}")
        return "unreadable"


def run(path: Path) -> Any:
    """A RUN that collapse train goes on with."""
    opened = Run(path, Config().as_dict(), {"train": "a digest"})
    try:
        state = opened.load()
        if opened.encoder.exists():
            return state, last_line(path)
        opened.cut_log(150)
        opened.check_spectra(2, 2)
        opened.add_spectra(3, {"representation": np.ones(5), "projector": np.ones(3)})
        found = spectra_of(path / "spectra.npz")
        require(found is not None and found["steps"][-1] == 3, "spectra.npz does not hold what was added")
    finally:
        opened.close()
    return state, found


TARGETS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": checkpoint,
    "array": array,
    "result": result,
    "preset": preset,
    "images": images,
    "data": data,
    "run": run,
}
# Formats in which every byte is under a checksum: where one differs the file is refused, or means the same.
SEALED = {"torch zip", "npz", "training npz"}


def digest(answer: Any) -> str:
    """A short digest of an answer: nested containers of arrays, tensors and plain values."""
    found = hashlib.sha256()
    _feed(answer, found.update)
    return found.hexdigest()[:16]


def _feed(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            update(repr(key).encode())
            _feed(item, update)
    elif isinstance(value, (list, tuple)):
        update(struct.pack("<q", len(value)))
        for item in value:
            _feed(item, update)
    elif isinstance(value, torch.Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    else:
        update(repr(value).encode("utf-8", "backslashreplace"))
