"""Labelled images for training and probes: folders and zips of classes, tar shards, arrays, CIFAR-10, the digits.

Every source is `len(images)` and `images.open(index)`, in a fixed order; files have `images.read(index)` too, their
bytes.  Batches for training are in loader.py.
"""

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse import InputError
from collapse.images import SUFFIXES, Images, Preprocessing, pixel_batches

IN_MEMORY = 2 << 30  # bytes of decoded pixels up to which a set is kept as one tensor


class Source(Protocol):
    """Images in a fixed order."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image `index`; raises InputError if it cannot be read."""


class Pixels:
    """Images in one tensor (n, 3, h, w) uint8."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        """Image `index`."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


class Subset:
    """Some images of a source."""

    def __init__(self, images: Source, indices: NDArray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        """Image `index` of the chosen ones."""
        return self.images.open(int(self.indices[index]))


def open_next(images: Source, index: int) -> tuple[int, Image.Image, list[str]]:
    """The first image from `index` on that can be read, of ten: its index, itself, what was wrong with the others.

    Raises InputError: none can be read.
    """
    unreadable: list[str] = []
    for candidate in range(index, index + 10):
        try:
            return candidate % len(images), images.open(candidate % len(images)), unreadable
        except InputError as error:
            unreadable.append(str(error))
    raise InputError(f"ten images in a row cannot be read, the last: {unreadable[-1]}")


class Tolerant:
    """A source in which an image that cannot be read is the next that can."""

    def __init__(self, images: Source) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """Image `index`, or the next that can be read."""
        return open_next(self.images, index)[1]


@dataclass(frozen=True)
class Labelled:
    """A set: images, labels (n,) int64, the classes' names, and a digest of all that identifies it."""

    images: Source
    labels: NDArray
    classes: tuple[str, ...]
    digest: str

    @property
    def names_digest(self) -> str:
        """As version 1 of a RUN keeps it."""
        return self.digest

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: NDArray) -> "Labelled":
        """The images at `indices`, in that order."""
        images: Source
        images = (
            Pixels(self.images.pixels[indices]) if isinstance(self.images, Pixels) else Subset(self.images, indices)
        )
        return Labelled(images, self.labels[indices], self.classes, self.digest)

    def batches(self, preprocess: Preprocessing, batch_size: int, workers: int) -> Iterator[Tensor]:
        """All images in order as a network's evaluation sees them, (b, 3, h, w) uint8."""
        if isinstance(self.images, Pixels) and preprocess.keeps(self.images.pixels.shape[-2:]):
            return iter(self.images.pixels.split(batch_size))
        return pixel_batches(self.images, preprocess, batch_size, workers)


def open_data(source: str | os.PathLike, split: str) -> Labelled:
    """The "train" or "val" part of a data set.

    source: a folder with train/CLASS/* and val/CLASS/*, or a zip of one; a folder with train*.tar and val*.tar shards
    of NAME.jpg and NAME.cls; a .npz of x_train, y_train, x_test, y_test, (n, h, w[, 3]) uint8 and (n,) integers;
    cifar10:FOLDER as torchvision stores it; or sklearn:digits (1,197 and 600 of them, at random but fixed).

    Raises InputError: no such thing, an empty class, labels that do not fit.
    """
    text = os.fspath(source)
    if text == "sklearn:digits":
        return _digits(split)
    if text.startswith("cifar10:"):
        return _cifar10(text.partition(":")[2], split)
    path = Path(text)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, split)
    shards = sorted(path.glob(f"{split}*.tar")) if path.is_dir() else []
    return _shards(shards) if shards else _classes(path, split)


def of_arrays(pixels: Tensor, labels: NDArray, classes: Iterable[str] | None = None) -> Labelled:
    """A set of images in memory, (n, 3, h, w) uint8, and their labels."""
    names = tuple(classes) if classes is not None else tuple(map(str, range(int(labels.max()) + 1)))
    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes() + np.asarray(labels, np.int64).tobytes())
    return Labelled(Pixels(pixels), np.asarray(labels, np.int64), names, digest.hexdigest())


def _digest(names: list[str], labels: NDArray) -> str:
    text = "\n".join(f"{name} {label}" for name, label in zip(names, labels.tolist(), strict=True))
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _classes(path: Path, split: str) -> Labelled:
    """One folder a class, in a folder or a zip, whose own top folder may be left out."""
    images = Images(_root(path, split))
    inside = (
        images.source.relative_to(images.archive).parts if images.archive else ()
    )  # of a zip, names are from its top
    places = [name.split("/")[len(inside) :] for name in images.names]
    names = sorted({place[0] for place in places if len(place) > 1}, key=os.fsencode)
    loose = next((place[0] for place in places if len(place) == 1), None)
    if loose is not None:
        raise InputError(f"{images.source / loose}: lies in no class; {split} wants one folder a class")
    if images.archive is None:
        empty = sorted(d.name for d in images.source.iterdir() if d.is_dir() and d.name not in names)
        empty = [name for name in empty if not name.startswith((".", "__MACOSX"))]
        if empty:
            raise InputError(f"{images.source / empty[0]}: a class without images; fill the folder or remove it")
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[place[0]] for place in places], np.int64)
    return Labelled(images, labels, tuple(names), _digest(images.names, labels))


def _root(path: Path, split: str) -> Path:
    """Where the classes of a split lie: path/split, or path/TOP/split in a zip that was made of a folder TOP."""
    if path.suffix != ".zip" or not path.is_file():
        if path.is_dir() and not (path / split).is_dir():
            raise InputError(f"{path}: has no folder {split}; --data wants train/CLASS/* and val/CLASS/*")
        return path / split
    names = Images(path).names
    place = next((name.split("/").index(split) for name in names if split in name.split("/")[:2]), None)
    if place is None:
        raise InputError(f"{path}: has no folder {split}; --data wants train/CLASS/* and val/CLASS/*")
    top = next(name for name in names if split in name.split("/")[:2]).split("/")[:place]
    return path.joinpath(*top, split)


def _npz(path: Path, split: str) -> Labelled:
    keys = ("x_train", "y_train") if split == "train" else ("x_test", "y_test")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            x, y = (file[key] for key in keys)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot read {' and '.join(keys)} ({error})") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3) or len(x) == 0:
        raise InputError(f"{path}: {keys[0]} is {x.dtype} {x.shape}, expected uint8 (n, h, w) or (n, h, w, 3)")
    if y.dtype.kind not in "iu" or y.size != len(x) or len(y) != len(x) or y.min() < 0:
        raise InputError(f"{path}: {keys[1]} is {y.dtype} {y.shape}, expected {len(x)} class numbers from 0")
    x = np.repeat(x[..., None], 3, 3) if x.ndim == 3 else x
    return of_arrays(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), y.reshape(-1))


def _digits(split: str) -> Labelled:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    chosen = order[:1197] if split == "train" else order[1197:]
    pixels = torch.from_numpy(np.rint(data.images[chosen] * 255 / 16).astype(np.uint8))
    return of_arrays(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target[chosen])


def _cifar10(folder: str, split: str) -> Labelled:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(folder, train=split == "train")
    except RuntimeError as error:
        raise InputError(f"{folder}: holds no CIFAR-10 (cifar-10-batches-py) as torchvision stores it") from error
    return of_arrays(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), np.array(data.targets), data.classes)


class Shards:
    """Images in tar files (WebDataset's layout), read where their headers say they lie: any order costs the same."""

    def __init__(self, entries: list[tuple[Path, str, int, int]]) -> None:
        self.entries = entries  # (shard, name, offset, bytes)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> bytes:
        """The file of image `index`."""
        path, name, offset, size = self.entries[index]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise InputError(f"{path}/{name}: not a readable image ({error.strerror})") from error

    def open(self, index: int) -> Image.Image:
        """Image `index`, decoded; raises InputError if it cannot be."""
        path, name, _, _ = self.entries[index]
        return Images.decode(self.read(index), path / name)


def _shards(paths: list[Path]) -> Labelled:
    entries, found = [], {}
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:  # compressed ones cannot be read at an offset
                for member in filter(tarfile.TarInfo.isfile, archive):
                    key, suffix = os.path.splitext(member.name)
                    if suffix.lower() in SUFFIXES:
                        entries.append((path, member.name, member.offset_data, member.size))
                    elif suffix in (".cls", ".json"):
                        found[path, key] = _label(archive, member, f"{path}/{member.name}")
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{path}: a damaged or compressed tar ({error})") from error
    missing = next((f"{p}/{n}" for p, n, _, _ in entries if (p, os.path.splitext(n)[0]) not in found), None)
    if missing or not entries:
        raise InputError(f"{missing or paths[0]}: no image with a label; shards want NAME.jpg beside NAME.cls")
    labels = np.array([found[path, os.path.splitext(name)[0]] for path, name, _, _ in entries], np.int64)
    names = [f"{path.name}/{name}" for path, name, _, _ in entries]
    return Labelled(Shards(entries), labels, tuple(map(str, range(labels.max() + 1))), _digest(names, labels))


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> int:
    file = archive.extractfile(member)
    try:
        value = json.loads(file.read() if file else b"")
        return int(value["label"] if isinstance(value, dict) else value)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: expected a class number") from error


def same_classes(train: Labelled, val: Labelled, source: str) -> None:
    """Raise InputError unless both parts have the same classes."""
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        where = "train" if odd[0] in train.classes else "val"
        raise InputError(f"{source}: class {odd[0]!r} is in {where} alone ({len(odd)} such classes)")


def to_memory(data: Labelled, workers: int) -> Labelled:
    """The same set in one tensor, if its images are of one size and small together; else as it is."""
    if isinstance(data.images, Pixels):
        return data
    whole = Preprocessing(None, None)
    try:
        first, last = (whole.pixels(data.images.open(index)) for index in (0, len(data) - 1))
        if first.shape != last.shape or len(data) * first.numel() > IN_MEMORY:
            return data
        pixels = torch.cat(list(pixel_batches(data.images, whole, 256, workers)))
    except InputError:
        return data  # several sizes, or one that cannot be read: the workers' way deals with both
    return Labelled(Pixels(pixels), data.labels, data.classes, data.digest)
