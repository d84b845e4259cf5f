"""What archives of labelled images hold: shards of tar, arrays of .npz, the pickles of CIFAR-10; nothing is run."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse import InputError
from collapse.files import limits, ndarrays, pictures, tars
from collapse.files.descriptor import Descriptor, opened
from collapse.files.npy import array_of
from collapse.files.pickles import unpickle
from collapse.files.pictures import UnreadableImage
from collapse.files.zips import Zip


def numbered(labels: NDArray, where: str) -> tuple[str, ...]:
    """Names of classes that are numbers from 0, of labels (n,).

    Raises InputError: a huge one, since a network has an output for each.
    """
    most = max(limits.CLASSES, len(labels))
    odd = labels[(labels < 0) | (labels >= most)]
    if len(odd):
        raise InputError(f"{where}: a class number {odd[0]}, expected 0 to {most - 1}")
    return tuple(map(str, range(int(labels.max()) + 1)))


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
    return pixels.permute(0, 3, 1, 2).contiguous(), np.minimum(y.reshape(-1), np.iinfo(np.int64).max).astype(np.int64)


def _array(archive: Zip, key: str, problem: str) -> NDArray:
    """An array of numbers in a .npz. Raises InputError, beginning with `problem`, if there is none."""
    record = archive.records.get(f"{key}.npy")
    if record is None:
        raise InputError(f"{problem} (there is no {key})")
    try:
        found = array_of(archive.read(record, limits.unpacked(record.packed)), key)
    except InputError as error:
        raise InputError(f"{problem} ({error})") from error
    if found.dtype.kind not in "biuf":
        raise InputError(f"{problem} ({key} is no numbers: {found.dtype} {found.shape})")
    return found


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


class Shards:
    """Images in tar files (WebDataset's layout), read where their headers say they lie: any order costs the same.

    files: {shard: its state when it was opened}; entries: (shard, member) of each image.
    """

    def __init__(
        self, files: dict[Path, tuple[int, ...]], entries: list[tuple[Path, tars.Member]], max_pixels: int
    ) -> None:
        self.files, self.entries, self.max_pixels = files, entries, max_pixels
        self.names = [f"{path.name}/{member.name}" for path, member in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, index: int) -> str:
        """The shard of image `index`, and its name there."""
        path, member = self.entries[index]
        return f"{path}/{member.name}"

    def mark(self, index: int) -> tuple[int, bytes]:
        """Bytes of the file of image `index`; a tar has no checksums of contents."""
        return self.entries[index][1].size, b""

    def read(self, index: int) -> bytes:
        """The file of image `index`; raises UnreadableImage if it cannot be read, or is far too large."""
        path, member = self.entries[index]
        try:
            with opened(path) as source:
                if source.state != self.files[path]:
                    raise InputError("the shard is another file than at the start; begin again")
                if member.size > limits.image_file(self.max_pixels):
                    raise InputError(f"{member.size} bytes; give a larger max_pixels=")
                return source.read(member.start, member.size)
        except InputError as error:
            raise UnreadableImage(self.path(index), str(error).removeprefix(f"{path}: ")) from error

    def open(self, index: int) -> Image.Image:
        """Image `index`, decoded; raises UnreadableImage if it cannot be."""
        return pictures.decode(self.read(index), self.path(index), self.max_pixels)


def shards(paths: list[Path], max_pixels: int) -> tuple[Shards, NDArray, list[str]]:
    """The images of some shards in order, their labels (n,) int64, and the names of what is neither.

    Raises InputError: a damaged or compressed tar, an image without a label, a label that is no class number.
    """
    files, entries, found, left = {}, [], dict[tuple[Path, str], int](), list[str]()
    for path in paths:
        with opened(path) as source:
            files[path] = source.state
            members, links = tars.members(source)
            left += [f"{path.name}/{name}" for name in links]
            for member in members:
                key, ending = os.path.splitext(member.name)
                if ending.lower() in pictures.ENDINGS:
                    entries.append((path, key, member))
                elif ending in (".cls", ".json"):
                    found[path, key] = _label(source, member)
                else:
                    left.append(f"{path.name}/{member.name}")
    missing = next((f"{path}/{member.name}" for path, key, member in entries if (path, key) not in found), None)
    if missing or not entries:
        raise InputError(f"{missing or paths[0]}: no image with a label; shards want NAME.jpg beside NAME.cls")
    labels = np.array([found[path, key] for path, key, _ in entries], np.int64)
    return Shards(files, [(path, member) for path, _, member in entries], max_pixels), labels, left


def _label(source: Descriptor, member: tars.Member) -> int:
    where = f"{source.path}/{member.name}"
    if member.size > limits.LABEL:
        raise InputError(f"{where}: a label of {member.size} bytes, at most {limits.LABEL} are read")
    try:
        value = json.loads(source.read(member.start, member.size))
        value = value["label"] if isinstance(value, dict) else value
        number = int(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: expected a class number") from error
    if isinstance(value, bool) or number != float(value) or not 0 <= number < 1 << 62:
        raise InputError(f"{where}: expected a class number from 0, got {str(value)[:40]}")
    return number
