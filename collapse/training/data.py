"""Labelled images for training and probes: folders and zips of classes, tar shards, arrays, CIFAR-10, the digits.

Every source is `len(images)` and `images.open(index)`, in a fixed order; files have `images.read(index)` too, their
bytes.  Batches for training are in loader.py.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse import InputError
from collapse.files import limits
from collapse.files.pictures import UnreadableImage
from collapse.images import Images, Preprocessing, by_bytes, decoded, pixel_batches
from collapse.training import readers

IN_MEMORY = 2 << 30  # bytes of decoded pixels up to which a set is kept as one tensor
TRIES = 10  # images in a row, of which one must be readable


class Source(Protocol):
    """Images in a fixed order; those of more than `max_pixels` pixels cannot be read."""

    max_pixels: int

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image `index`; raises UnreadableImage if it cannot be read."""

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader."""


class Files(Source, Protocol):
    """Images that are files, with names."""

    names: list[str]

    def read(self, index: int) -> bytes:
        """The file of image `index`; raises UnreadableImage if it cannot be read."""

    def mark(self, index: int) -> tuple[int, bytes]:
        """(bytes, checksum) of the file of image `index`; without the checksum where none is stored."""


class Pixels:
    """Images in one tensor (n, 3, h, w) uint8.

    stands: (n,) which image each is: itself, or the one that stands for it since it cannot be read.
    unreadable: {index: what was wrong}.
    """

    max_pixels = limits.PIXELS

    def __init__(self, pixels: Tensor, stands: NDArray | None = None, unreadable: dict[int, str] | None = None) -> None:
        self.pixels, self.unreadable = pixels, unreadable or {}
        self.stands = np.arange(len(pixels)) if stands is None else stands

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        """Image `index`."""
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())

    def path(self, index: int) -> str:
        """Its number."""
        return f"image {index}"


class Subset:
    """Some images of a source."""

    def __init__(self, images: Source, indices: NDArray) -> None:
        self.images, self.indices, self.max_pixels = images, indices, images.max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        """Image `index` of the chosen ones."""
        return self.images.open(int(self.indices[index]))

    def path(self, index: int) -> str:
        """Where image `index` of the chosen ones is."""
        return self.images.path(int(self.indices[index]))


def open_next(images: Source, index: int) -> tuple[int, Image.Image, list[str]]:
    """The first image from `index` on that can be read, of ten: its index, itself, what was wrong with the others.

    Raises InputError: none can be read.
    """
    unreadable: list[str] = []
    for candidate in range(index, index + TRIES):
        try:
            return candidate % len(images), images.open(candidate % len(images)), unreadable
        except UnreadableImage as error:
            unreadable.append(str(error))
    raise InputError(f"ten images in a row cannot be read, the last: {unreadable[-1]}")


class Tolerant:
    """A source in which an image that cannot be read is the next that can."""

    def __init__(self, images: Source) -> None:
        self.images, self.max_pixels = images, images.max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """Image `index`, or the next that can be read."""
        return open_next(self.images, index)[1]

    def path(self, index: int) -> str:
        """Where image `index` is."""
        return self.images.path(index)


class Identity:
    """What tells one set from another, worked out when it is asked for.

    names_digest: of names and labels, as version 1 of a RUN keeps it.
    digest: of names, labels, sizes and contents. The contents are the checksums of a zip; or the bytes of all files up
    to `limits.DIGESTED` together, about a second a GiB, and of more those of `limits.SAMPLED` files.
    For a set in memory both are of pixels and labels.
    """

    def __init__(self, images: Source, labels: NDArray) -> None:
        self.images, self.labels = images, labels

    @cached_property
    def names_digest(self) -> str:
        """Hex sha256."""
        if isinstance(self.images, Pixels):
            return hashlib.sha256(self.images.pixels.contiguous().numpy().tobytes() + self.labels.tobytes()).hexdigest()
        names: list[str] = self.images.names  # type: ignore[attr-defined]
        text = "\n".join(f"{name} {label}" for name, label in zip(names, self.labels.tolist(), strict=True))
        return hashlib.sha256(by_bytes(text)).hexdigest()

    @cached_property
    def digest(self) -> str:
        """Hex sha256."""
        return self.names_digest if isinstance(self.images, Pixels) else self._of_files(self.images)  # type: ignore[arg-type]

    def _of_files(self, files: Files) -> str:
        marks = [files.mark(index) for index in range(len(files))]
        all_of_them = sum(size for size, _ in marks) <= limits.DIGESTED
        step = 1 if all_of_them else math.ceil(len(files) / limits.SAMPLED)
        digest = hashlib.sha256(by_bytes(f"{self.names_digest} {files.max_pixels}"))
        for index, (size, checksum) in enumerate(marks):
            digest.update(size.to_bytes(8, "little") + checksum)
            if not checksum and index % step == 0:
                digest.update(_contents(files, index))
        return digest.hexdigest()


def _contents(files: Files, index: int) -> bytes:
    """A digest of one file; nothing if it cannot be read."""
    try:
        return hashlib.sha256(files.read(index)).digest()
    except UnreadableImage:
        return b""


class Chosen:
    """What tells a part of a set from others."""

    def __init__(self, whole: "Identity | Chosen", indices: NDArray) -> None:
        self.whole, self.indices = whole, indices

    @property
    def names_digest(self) -> str:
        """That of the whole set, as version 1 of a RUN keeps it."""
        return self.whole.names_digest

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the whole set's and the indices."""
        return hashlib.sha256(self.whole.digest.encode() + np.asarray(self.indices, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Labelled:
    """A set: images, labels (n,) int64, the classes' names, what identifies it, and what was left out, in words."""

    images: Source
    labels: NDArray
    classes: tuple[str, ...]
    identity: Identity | Chosen
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of names, labels and contents, see `Identity`; reads files when it is first asked for."""
        return self.identity.digest

    @property
    def names_digest(self) -> str:
        """Of names and labels alone: the digest of version 1 of a RUN."""
        return self.identity.names_digest

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: NDArray) -> "Labelled":
        """The images at `indices`, in that order."""
        chosen, images = indices, self.images
        if isinstance(images, Pixels):
            chosen = images.stands[indices]
            images = Pixels(images.pixels[chosen])
        else:
            images = Subset(images, indices)
        return Labelled(images, self.labels[chosen], self.classes, Chosen(self.identity, indices), self.warnings)

    def batches(self, preprocess: Preprocessing, batch_size: int, workers: int) -> Iterator[Tensor]:
        """All images in order as a network's evaluation sees them, (b, 3, h, w) uint8."""
        if isinstance(self.images, Pixels) and preprocess.keeps(self.images.pixels.shape[-2:]):
            return iter(self.images.pixels.split(batch_size))
        return pixel_batches(self.images, preprocess, batch_size, workers)


def open_data(source: str | os.PathLike, split: str, max_pixels: int = limits.PIXELS) -> Labelled:
    """The "train" or "val" part of a data set.

    source: a folder with train/CLASS/* and val/CLASS/*, or a zip of one; a folder with train*.tar and val*.tar shards
    of NAME.jpg and NAME.cls; a .npz of x_train, y_train, x_test, y_test, (n, h, w[, 3]) uint8 and (n,) integers;
    cifar10:FOLDER as torchvision stores it; or sklearn:digits (1,197 and 600 of them, at random but fixed).
    max_pixels: an image of more, height times width, is not decoded.

    Raises InputError: no such thing, an empty class, labels that do not fit.
    """
    text = os.fspath(source)
    if text == "sklearn:digits":
        return _digits(split)
    if text.startswith("cifar10:"):
        return of_arrays(*readers.cifar10(Path(text.partition(":")[2]), split))
    path = Path(text)
    if path.suffix == ".npz" and os.path.isfile(path):
        keys = ("x_train", "y_train") if split == "train" else ("x_test", "y_test")
        pixels, labels = readers.npz(path, keys)
        return of_arrays(pixels, labels, readers.numbered(labels, f"{path}: {keys[1]}"))
    shards = sorted(path.glob(f"{split}*.tar")) if os.path.isdir(path) else []
    return _shards(shards, max_pixels) if shards else _classes(path, split, max_pixels)


def of_arrays(pixels: Tensor, labels: NDArray, classes: Iterable[str] | None = None) -> Labelled:
    """A set of images in memory, (n, 3, h, w) uint8, and their labels. Raises InputError: impossible class numbers."""
    labels = np.asarray(labels, np.int64)
    names = tuple(classes) if classes is not None else readers.numbered(labels, "labels")
    return Labelled(Pixels(pixels), labels, names, Identity(Pixels(pixels), labels))


def _classes(path: Path, split: str, max_pixels: int) -> Labelled:
    """One folder a class, in a folder or a zip, whose own top folder may be left out."""
    images, inside = _part(path, split, max_pixels)
    places = [name.split("/")[inside:] for name in images.names]
    names = sorted({place[0] for place in places if len(place) > 1}, key=by_bytes)
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
    return Labelled(images, labels, tuple(names), Identity(images, labels), tuple(images.warnings))


def _part(path: Path, split: str, max_pixels: int) -> tuple[Images, int]:
    """The images of a split, and in how many folders of their names the classes lie.

    They are below path/split, or below path/TOP/split in a zip that was made of a folder TOP.
    """
    if path.suffix.lower() != ".zip" or not os.path.isfile(path):
        if os.path.isdir(path) and not os.path.isdir(path / split):
            raise InputError(f"{path}: has no folder {split}; data= wants train/CLASS/* and val/CLASS/*")
        return Images(path / split, max_pixels), 0
    images = Images(path, max_pixels)
    parts = next((parts for parts in (n.split("/") for n in images.names) if split in parts[:2]), None)
    if parts is None:
        raise InputError(f"{path}: has no folder {split}; data= wants train/CLASS/* and val/CLASS/*")
    folders = parts[: parts.index(split) + 1]
    return images.below("/".join(folders)), len(folders)


def _digits(split: str) -> Labelled:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    chosen = order[:1197] if split == "train" else order[1197:]
    pixels = torch.from_numpy(np.rint(data.images[chosen] * 255 / 16).astype(np.uint8))
    return of_arrays(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target[chosen])


def _shards(paths: list[Path], max_pixels: int) -> Labelled:
    images, labels, left = readers.shards(paths, max_pixels)
    warnings = [f"{len(left)} members of the shards are no images, first {left[0]!r}; left out"] if left else []
    classes = readers.numbered(labels, f"{paths[0]} and others")
    return Labelled(images, labels, classes, Identity(images, labels), tuple(warnings))


def same_classes(train: Labelled, val: Labelled, source: str) -> None:
    """Raise InputError unless both parts have the same classes."""
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        where = "train" if odd[0] in train.classes else "val"
        raise InputError(f"{source}: class {odd[0]!r} is in {where} alone ({len(odd)} such classes)")


def to_memory(data: Labelled, workers: int) -> Labelled:
    """The same set in one tensor, if all images that can be read are of one size, and small together; else as it is.

    The next image that can be read stands for one that cannot, label and all, as where workers read them: whether
    images are kept in memory, where they are cropped otherwise, must not hang on one that was lost since.
    Raises InputError: ten images in a row cannot be read.
    """
    if isinstance(data.images, Pixels):
        return data
    pixels: Tensor | None = None
    unreadable: dict[int, InputError] = {}
    for start, batch in enumerate(decoded(data.images, Preprocessing(None, None), 256, workers)):
        unreadable |= {256 * start + place: error for place, error in batch.unreadable.items()}
        if not batch.read:
            continue
        if batch.pixels is None or len(data) * batch.pixels[0].numel() > IN_MEMORY:
            return data  # the workers' way deals with several sizes
        if pixels is None:
            pixels = torch.empty(len(data), *batch.pixels.shape[1:], dtype=torch.uint8)
        if pixels.shape[1:] != batch.pixels.shape[1:]:
            return data
        pixels[torch.tensor(batch.read) + 256 * start] = batch.pixels
    if pixels is None:
        return data
    stands = np.array([_stand(index, unreadable, len(data)) for index in range(len(data))])
    for index in unreadable:
        pixels[index] = pixels[stands[index]]
    return replace(data, images=Pixels(pixels, stands, {index: str(error) for index, error in unreadable.items()}))


def _stand(index: int, unreadable: dict[int, InputError], n: int) -> int:
    """The first image from `index` on that was read, of ten."""
    found = next((k % n for k in range(index, index + TRIES) if k % n not in unreadable), None)
    if found is None:
        raise InputError(f"ten images in a row cannot be read, the last: {unreadable[(index + TRIES - 1) % n]}")
    return found
