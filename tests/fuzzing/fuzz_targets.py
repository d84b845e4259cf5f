"""What is called with each mutant: the readers as the commands use them, and what an answer of theirs must be."""

import hashlib
import math
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # noqa: F401
import soundfile  # noqa: F401
import tokenizers  # noqa: F401
import torch
import transformers.models.auto.modeling_auto
import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401
from PIL import Image

import collapse
import collapse.checkpoints.library  # timm asks for packages that it can do without, pyarrow for cloudpickle
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.data.labelled import open_data, same_classes, to_memory
from collapse.data.preprocessing import Preprocessing
from collapse.files import sounds as sound_files
from collapse.files import texts as text_files
from collapse.recipes.config import Config, make_config
from collapse.spectra import load_results
from collapse.spectra.comparison import comparison
from collapse.training.run import Run, last_line, spectra_of

PICTURE = Image.new("RGB", (40, 30), (10, 200, 90))
TEXTS = ("a dog runs", "Two cats sit on a red mat, and sleep.", "é 日本", "x" * 300)
SOUNDS = tuple(np.random.default_rng(0).standard_normal((2, 1200)).astype(np.float32) / 9)
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 32, 32), dtype=np.uint8)


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


def encoder(path: Path) -> Any:
    """collapse embed with an encoder of texts, of sounds or of clips, whose folder is called so."""
    given = {"texts": TEXTS, "sounds": SOUNDS, "clips": CLIPS}[path.name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = collapse.embed(path, given, batch_size=4)
    require(rows.ndim == 2 and len(rows) == len(given) and rows.dtype == np.float32, f"{rows.dtype} {rows.shape}")
    told = any("hold NaN or infinity" in str(one.message) for one in said)
    require(told or np.isfinite(rows).all(), "embeddings that are no numbers, without a warning")
    return rows


def texts(path: Path) -> Any:
    """The texts of collapse spectrum and embed."""
    found = text_files.read(path)
    require(found.texts and len(found.texts) == len(found.lines), f"{len(found.texts)} texts, {len(found.lines)} lines")
    require(all(isinstance(text, str) and text.strip() for text in found.texts), "a blank text")
    require(sorted({*found.lines, *found.blank}) == sorted([*found.lines, *found.blank]), "a line twice")
    return found.texts, found.lines


def sounds(path: Path) -> Any:
    """The sounds of collapse spectrum and embed, each read or left out with a reason."""
    found: list[Any] = []
    for name in sound_files.below(path)[0]:
        try:
            rate, samples = sound_files.read(path / name)
            require(samples.dtype == np.float32 and samples.ndim == 1 and len(samples), f"{samples.shape}")
            require(np.isfinite(samples).all(), "samples that are no numbers")
            found.append((rate, samples, len(sound_files.resampled(samples[:5000], rate, 16_000))))
        except sound_files.UnreadableSound as error:
            require(error.why.strip() and "\n" not in error.why, f"skipped without a reason: {error}")
            require(error.path == str(path / name), f"skipped without a place: {error}")
            found.append("unreadable")
    return found


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
    "encoder": encoder,
    "texts": texts,
    "sounds": sounds,
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
