"""What archives of labelled images hold: arrays of .npz, the pickles of CIFAR-10; nothing is run."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError
from collapse.files import limits, ndarrays
from collapse.files.descriptor import opened
from collapse.files.npy import array_of
from collapse.files.pickles import unpickle
from collapse.files.zips import Zip

# What the arrays of a .npz are called: by Keras, by MedMNIST.
KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (("x_test", "y_test"), ("val_images", "val_labels"), ("test_images", "test_labels")),
}


def numbered(labels: NDArray, where: str) -> tuple[str, ...]:
    """Names of classes that are numbers from 0, of labels (n,).

    Raises InputError: a huge one, since a network has an output for each.
    """
    most = max(limits.CLASSES, len(labels))
    odd = labels[(labels < 0) | (labels >= most)]
    if len(odd):
        raise InputError(f"{where}: a class number {odd[0]}, expected 0 to {most - 1}")
    return tuple(map(str, range(int(labels.max()) + 1)))


def keys_of(path: Path, split: str) -> tuple[str, str] | None:
    """The names of images and labels of a part in a .npz; None if it has none. Raises InputError: damaged."""
    with opened(path) as source:
        records = Zip(source).records
    return next((keys for keys in KEYS[split] if all(f"{key}.npy" in records for key in keys)), None)


def npz(path: Path, keys: tuple[str, str]) -> tuple[Tensor, NDArray]:
    """Images (n, 3, h, w) uint8, and labels (n,) int64, of two arrays in a .npz.

    Raises InputError: no such arrays, other types or shapes, or far more bytes than the file has.
    """
    with opened(path) as source:
        archive = Zip(source)
        x, y = (_array(archive, key, f"{path}: cannot read {keys[0]} and {keys[1]}") for key in keys)
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3) or x.size == 0:
        raise InputError(f"{path}: {keys[0]} is {x.dtype} {x.shape}, expected uint8 (n, h, w) or (n, h, w, 3)")
    if y.dtype.kind not in "iu" or y.size != len(x) or len(y) != len(x) or y.min() < 0:
        raise InputError(f"{path}: {keys[1]} is {y.dtype} {y.shape}, expected {len(x)} class numbers from 0")
    pixels = torch.from_numpy(x)[..., None].expand(*x.shape[:3], 3) if x.ndim == 3 else torch.from_numpy(x)
    return pixels.permute(0, 3, 1, 2).contiguous(), _signed(y.reshape(-1))


def _signed(labels: NDArray) -> NDArray:
    """Whole numbers as int64; what that does not hold is its largest."""
    if labels.dtype == np.uint64:
        labels = np.minimum(labels, np.uint64(np.iinfo(np.int64).max))
    return labels.astype(np.int64)


def _array(archive: Zip, key: str, problem: str) -> NDArray:
    """An array of numbers in a .npz. Raises InputError, beginning with `problem`, if there is none."""
    record = archive.records.get(f"{key}.npy")
    if record is None:
        raise InputError(f"{problem} (there is no {key})")
    try:
        array = array_of(archive.read(record, limits.unpacked(record.packed)), key)
    except InputError as error:
        raise InputError(f"{problem} ({error})") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{problem} ({key} is no numbers: {array.dtype} {array.shape})")
    return array


def cifar10(folder: Path, split: str) -> tuple[Tensor, NDArray, list[str]]:
    """Images (n, 3, 32, 32) uint8, labels (n,) and the classes' names of CIFAR-10 as torchvision stores it.

    Its pickles are read as data, and only those that torchvision knows. Raises InputError: they are not there.
    """
    from torchvision.datasets import CIFAR10

    listed = CIFAR10.train_list if split == "train" else CIFAR10.test_list
    parts = [_cifar_file(folder / CIFAR10.base_folder / name, md5) for name, md5 in listed]
    classes = _cifar_file(folder / CIFAR10.base_folder / CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    rows = np.concatenate([part["data"].array for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.array([label for part in parts for label in part["labels"]])
    return torch.from_numpy(rows), labels, classes[CIFAR10.meta["key"]]


def _cifar_file(path: Path, md5: str) -> dict[str, Any]:
    try:
        with opened(path) as source:
            contents = source.read(0, source.size)
    except InputError as error:
        raise InputError(f"{path.parent.parent}: holds no CIFAR-10 as torchvision stores it ({error})") from error
    if hashlib.md5(contents, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{path}: is not the file of CIFAR-10 that torchvision knows; fetch it again")
    return unpickle(io.BytesIO(contents), len(contents), ndarrays.names(), {}, set())
