"""Images for training and probes: what `collapse.data.images.Images` reads, arrays, CIFAR-10, the digits; with labels.

Every source is `len(images)` and `images.open(index)`, in a fixed order.  Batches for training are in
`collapse.training.loader`.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError
from collapse.data import archives
from collapse.data.batches import as_bytes, decoded, pixel_batches
from collapse.data.images import Images
from collapse.data.preprocessing import Preprocessing
from collapse.data.sources import TRIES, Chosen, Identity, Pixels, Source, Subset
from collapse.files import limits
from collapse.files.imagesets import by_bytes, hidden, parts_of

IN_MEMORY = 2 << 30  # bytes of decoded pixels up to which a set is kept as one tensor


@dataclass(frozen=True)
class Labelled:
    """A set: images, labels (n,) int64, the classes' names, what identifies it, and what was left out, in words.

    Without labels there are no classes, and the numbers are 0.
    """

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
        """The images at `indices`, (n,), in that order."""
        chosen, images = indices, self.images
        if isinstance(images, Pixels):
            chosen = images.stands[indices]
            images = Pixels(images.pixels[chosen])
        elif isinstance(images, Images):
            images = images.some(indices)
        else:
            images = Subset(images, indices)
        return Labelled(images, self.labels[chosen], self.classes, Chosen(self.identity, indices), self.warnings)

    def unlabelled(self) -> "Labelled":
        """The same images without labels."""
        if not self.classes:
            return self
        labels = np.zeros(len(self), np.int64)
        identity = Identity(self.images, labels) if isinstance(self.identity, Identity) else self.identity
        return replace(self, labels=labels, classes=(), identity=identity)

    def batches(self, preprocess: Preprocessing, batch_size: int, workers: int) -> Iterator[Tensor]:
        """All images in order as a network's evaluation sees them, (b, 3, h, w) uint8."""
        if isinstance(self.images, Pixels) and preprocess.keeps(self.images.pixels.shape[-2:]):
            return iter(self.images.pixels.split(batch_size))
        return pixel_batches(self.images, preprocess, batch_size, workers)


Depth = tuple[float, float] | None
HELD = ("val", "valid", "validation", "test")  # what the held-out part may be called; the first that is there counts
UNLABELLED = "the images have no labels: no online classifier is trained and no neighbours are counted"


def open_data(
    source: str | os.PathLike, split: str, max_pixels: int = limits.PIXELS, pixel_range: Depth = None
) -> Labelled:
    """The "train" or "val" part of a data set with labels.

    source: a folder with train/CLASS/* and val/CLASS/*, or a zip of one; a folder with train*.tar and val*.tar shards
    of NAME.jpg and NAME.cls, or train*.parquet and val*.parquet with a column label, or what `datasets` saves; a .npz
    of x_train, y_train, x_test, y_test, or MedMNIST's names, (n, h, w[, 3]) uint8 and (n,) integers; cifar10:FOLDER as
    torchvision stores it; or sklearn:digits (1,197 and 600 of them, at random but fixed).
    "val" may be called as in `HELD`.
    max_pixels, pixel_range: as of `Images`.

    Raises InputError: no such thing, no labels, an empty class, labels that do not fit.
    """
    data = _part(os.fspath(source), split, max_pixels, pixel_range, True)
    if not data.classes:
        raise InputError(
            f"{data.images.path(0)}: lies in no class; {split} wants one folder a class, or labels in shards or tables"
        )
    return data


def open_parts(
    source: str | os.PathLike, max_pixels: int = limits.PIXELS, pixel_range: Depth = None,
    holdout: float | None = None, labels: bool = True,
) -> tuple[Labelled, Labelled | None]:  # fmt: skip
    """(training part, held-out part or None) of a data set, which needs neither parts nor labels.

    holdout: of a set without a held-out part, this share of its images, at random but fixed, is held out for the
    measurements; None is a tenth, 0 none.  labels: False takes folders for no classes.

    Raises InputError: as `open_data` does; holdout of a set that has such a part.
    """
    text = os.fspath(source)
    how = (max_pixels, pixel_range, labels)
    if _has(text, ("train",)):
        train = _part(text, "train", *how)
        val = _part(text, "val", *how) if _has(text, HELD) else None
    else:
        train, val = _labelled(Images(text, max_pixels, pixel_range), 0, "the set", labels), None
    if val is not None:
        if holdout is not None:
            raise InputError(f"{text}: has a held-out part already; leave out holdout=")
    elif holdout != 0:
        train, val = _held(train, 0.1 if holdout is None else holdout, text, holdout is None)
    if not (labels and train.classes and (val is None or val.classes)):
        notes = () if UNLABELLED in train.warnings else (UNLABELLED,)
        train = replace(train.unlabelled(), warnings=(*train.warnings, *notes))
        val = val and val.unlabelled()
    elif val is not None:
        same_classes(train, val, text)
    return train, val


def _held(data: Labelled, share: float, where: str, said: bool) -> tuple[Labelled, Labelled]:
    """A set as what is trained on and a share of it that is not."""
    count = max(2, round(share * len(data)))  # a covariance needs two
    if count >= len(data):
        raise InputError(f"{where}: {len(data)} images, of which {count} are held out; give a smaller holdout=, or 0")
    order = np.random.default_rng(0).permutation(len(data))
    note = f"{where}: has no held-out part: {count} of {len(data)} images are held out; holdout= says otherwise"
    data = replace(data, warnings=(*data.warnings, *([note] if said else [])))
    return data.subset(np.sort(order[count:])), data.subset(np.sort(order[:count]))


def _has(text: str, names: tuple[str, ...]) -> bool:
    """Whether a set has a part of one of these names."""
    path = Path(text)
    if text == "sklearn:digits" or text.startswith("cifar10:"):
        return True
    if os.path.isdir(path):
        return any(os.path.isdir(path / name) or parts_of(path, name) is not None for name in names)
    if path.suffix == ".npz" and os.path.isfile(path):
        return archives.keys_of(path, "train" if "train" in names else "val") is not None
    return path.suffix.lower() == ".zip" and os.path.isfile(path) and _inside(Images(path), names) is not None


def _part(text: str, split: str, max_pixels: int, pixel_range: Depth, labels: bool) -> Labelled:
    if text == "sklearn:digits":
        return _digits(split)
    if text.startswith("cifar10:"):
        return of_arrays(*archives.cifar10(Path(text.partition(":")[2]), split))
    path = Path(text)
    if path.suffix == ".npz" and os.path.isfile(path):
        keys = archives.keys_of(path, split) or archives.KEYS[split][0]
        pixels, numbers = archives.npz(path, keys)
        return of_arrays(pixels, numbers, archives.numbered(numbers, f"{path}: {keys[1]}"))
    names = ("train",) if split == "train" else HELD
    images, inside = _images_of(path, names, max_pixels, pixel_range)
    return _labelled(images, inside, split, labels)


def of_arrays(pixels: Tensor, labels: NDArray, classes: Iterable[str] | None = None) -> Labelled:
    """A set of images in memory, (n, 3, h, w) uint8, and their labels, (n,) whole numbers.

    Raises InputError: impossible class numbers.
    """
    labels = np.asarray(labels, np.int64)
    names = tuple(classes) if classes is not None else archives.numbered(labels, "labels")
    return Labelled(Pixels(pixels), labels, names, Identity(Pixels(pixels), labels))


def _images_of(path: Path, names: tuple[str, ...], max_pixels: int, pixel_range: Depth) -> tuple[Images, int]:
    """The images of the first part of these names, and in how many folders of their names the classes lie.

    They are in shards or tables NAME*, below path/NAME, or below path/TOP/NAME in a zip of a folder TOP.
    """
    if path.suffix.lower() == ".zip" and os.path.isfile(path):
        images = Images(path, max_pixels, pixel_range)
        folders = _inside(images, names)
        if folders is not None:
            return images.below("/".join(folders)), len(folders)
    for name in names:
        parts = parts_of(path, name)
        if parts is not None:
            return Images(path, max_pixels, pixel_range, parts), -1
        if os.path.isdir(path / name):
            return Images(path / name, max_pixels, pixel_range), 0
    if os.path.exists(path):
        raise InputError(f"{path}: has no folder {names[0]}; data= wants train/CLASS/* and val/CLASS/*")
    return Images(path / names[0], max_pixels, pixel_range), 0


def _inside(images: Images, names: tuple[str, ...]) -> list[str] | None:
    """The folders in a zip down to the first part of these names; None if there is none."""
    places = [name.split("/") for name in images.names]
    for name in names:
        match = next((place for place in places if name in place[:2][: len(place) - 1]), None)
        if match is not None:
            return match[: match.index(name) + 1]
    return None


def _labelled(images: Images, inside: int, split: str, labels: bool) -> Labelled:
    """Images with the labels that they have: of their shard or table, or one folder a class."""
    notes, none = tuple(images.warnings), np.zeros(len(images), np.int64)
    label_numbers = images.labels if labels else None
    if label_numbers is not None and (label_numbers >= 0).all():
        classes = archives.numbered(label_numbers, f"{images.path(0)} and others")
        return Labelled(images, label_numbers, classes, Identity(images, label_numbers), notes)
    places = [name.split("/")[inside:] for name in images.names]
    loose = [place[-1] for place in places if len(place) == 1]
    if inside < 0 or not labels or len(loose) == len(places):
        return Labelled(images, none, (), Identity(images, none), notes)
    if loose:
        raise InputError(
            f"{images.source / loose[0]}: lies in no class; {split} wants one folder a class, or labels=False"
        )
    names = sorted({place[0] for place in places}, key=by_bytes)
    if os.path.isdir(images.source):
        empty = sorted(d.name for d in images.source.iterdir() if d.is_dir() and d.name not in names)
        empty = [name for name in empty if not hidden(name)]
        if empty:
            raise InputError(f"{images.source / empty[0]}: a class without images; fill the folder or remove it")
    number = {name: index for index, name in enumerate(names)}
    numbers = np.array([number[place[0]] for place in places], np.int64)
    return Labelled(images, numbers, tuple(names), Identity(images, numbers), notes)


def _digits(split: str) -> Labelled:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    chosen = order[:1197] if split == "train" else order[1197:]
    pixels = torch.from_numpy(np.rint(data.images[chosen] * 255 / 16).astype(np.uint8))
    return of_arrays(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target[chosen])


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
        pixels[torch.tensor(batch.read) + 256 * start] = as_bytes(batch.pixels)
    if pixels is None:
        return data
    stands = np.array([_stand(index, unreadable, len(data)) for index in range(len(data))])
    for index in unreadable:
        pixels[index] = pixels[stands[index]]
    return replace(data, images=Pixels(pixels, stands, {index: str(error) for index, error in unreadable.items()}))


def _stand(index: int, unreadable: dict[int, InputError], n: int) -> int:
    """The first image from `index` on that was read, of ten."""
    readable = next((k % n for k in range(index, index + TRIES) if k % n not in unreadable), None)
    if readable is None:
        raise InputError(f"ten images in a row cannot be read, the last: {unreadable[(index + TRIES - 1) % n]}")
    return readable
