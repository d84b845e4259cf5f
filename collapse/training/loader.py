"""Batches for training: whole images of a set in memory, or crops by workers.

Which images make step k is a function of (seed, k), and what is drawn for an image of (seed, epoch, image, view):
neither the workers nor their number, nor where a run was interrupted, can change a batch.
"""

import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse import InputError
from collapse.data.batches import as_bytes
from collapse.data.labelled import Labelled
from collapse.data.preprocessing import Preprocessing, rgb
from collapse.data.sources import Pixels, open_next
from collapse.moved import renamed
from collapse.recipes.views import Augmentation, to_device, uniforms

AHEAD = 2 << 30  # bytes of crops that workers may have ready


def order(seed: int, epoch: int, n: int) -> NDArray:
    """(n,) the order of the images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass(frozen=True)
class BatchOrder:
    """Which images each step takes: `batch_size` of n a step over all processes, of which this one takes a part."""

    n: int
    batch_size: int
    epochs: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def per_epoch(self) -> int:
        """Steps an epoch; the last incomplete batch is left out."""
        return self.n // self.batch_size

    def batches(self, first: int) -> Iterator[tuple[int, NDArray]]:
        """(epoch, this process's images (b,)) of each step from `first` on to the last epoch's end."""
        per_process = self.batch_size // self.world
        for epoch in range(first // self.per_epoch, self.epochs):
            images = order(self.seed, epoch, self.n)
            for step in range(first % self.per_epoch if epoch == first // self.per_epoch else 0, self.per_epoch):
                start = step * self.batch_size + self.rank * per_process
                yield epoch, images[start : start + per_process]


@dataclass
class Batch:
    """images: (b,) indices, of those that were read; unreadable: messages of those that could not be.

    pixels: (b, 3, h, w) whole, or (b, views, 3, s, s) cropped, uint8.
    """

    epoch: int
    images: NDArray
    pixels: Tensor
    unreadable: list[str]


class Unreadable:
    """Reports on stderr, once each, the images of a set of n that could not be read."""

    def __init__(self, n: int) -> None:
        self.limit, self.seen = max(10, n // 100), set[str]()

    def note(self, messages: Iterable[str]) -> None:
        """Report what is new; raises InputError if they are more than ten and more than one in a hundred."""
        for text in sorted(set(messages) - self.seen):
            self.seen.add(text)
            print(f"warning: {text}; another image is taken instead", file=sys.stderr)
            if len(self.seen) > self.limit:
                raise InputError(f"{len(self.seen)} images cannot be read, the last: {text}")


class _Views(Dataset):
    """What a worker does: decode once, crop every view; (index, crops, what could not be read), or the error's text."""

    def __init__(self, data: Labelled, augmentations: tuple[Augmentation, ...], seed: int) -> None:
        self.images, self.augmentations, self.seed = data.images, augmentations, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, list[str]] | str:
        epoch, index = key
        try:
            index, image, unreadable = open_next(self.images, index)
            pixels = _pixels(image)
        except InputError as error:
            return str(error)
        return index, _crops(pixels, self.augmentations, self.seed, epoch, index), unreadable


def _crops(pixels: Tensor, augmentations: tuple[Augmentation, ...], seed: int, epoch: int, index: int) -> Tensor:
    """(views, 3, s, s) uint8: every view's crop of an image (3, h, w), on its device."""
    draws = [uniforms(seed, epoch, np.array([index]), view, a.DRAWS)[0] for view, a in enumerate(augmentations)]
    return torch.stack([a.crop_one(pixels, u) for a, u in zip(augmentations, draws, strict=True)])


def _pixels(image: Any) -> Tensor:
    """(3, h, w) uint8; raises InputError for other channels."""
    if isinstance(image, np.ndarray):
        if image.shape[2] not in (1, 3, 4):
            raise InputError(f"images of {image.shape[2]} channels; training takes grey ones and those of three")
        return as_bytes(Preprocessing(None, None).pixels(image))
    return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)


def _collate(items: list[tuple[int, Tensor, list[str]] | str]) -> tuple[NDArray, Any, list[str]] | str:
    readable = [item for item in items if not isinstance(item, str)]
    if len(readable) < len(items):
        return next(item for item in items if isinstance(item, str))
    indices, pixels, unreadable = zip(*readable, strict=True)
    return np.array(indices), torch.stack(pixels), [text for texts in unreadable for text in texts]


class _Sampler:
    """The keys of each batch, made as they are needed."""

    def __init__(self, keys: Iterable[list[tuple[int, int]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)


def batches(
    data: Labelled,
    plan: BatchOrder,
    augmentations: tuple[Augmentation, ...],
    first: int,
    workers: int,
    device: str = "cpu",
) -> Iterator[Batch]:
    """This process's batches from step `first` on.

    Raises InputError: ten images in a row cannot be read, or a worker died.
    """
    if isinstance(data.images, Pixels):
        pixels = data.images.pixels.to(device)
        for epoch, chosen in plan.batches(first):
            images = data.images.stands[chosen]
            unreadable = [data.images.unreadable[i] for i in chosen.tolist() if i in data.images.unreadable]
            yield Batch(epoch, images, pixels[to_device(torch.from_numpy(images), device)], unreadable)
        return
    size = max(a.size or 0 for a in augmentations)
    waiting = AHEAD // max(1, workers * plan.batch_size // plan.world * len(augmentations) * 3 * size**2)
    keys = ([(epoch, int(i)) for i in images] for epoch, images in plan.batches(first))
    loader: DataLoader = DataLoader(
        _Views(data, augmentations, plan.seed),
        batch_sampler=_Sampler(keys),
        num_workers=workers,
        prefetch_factor=min(4, max(1, waiting)) if workers else None,
        pin_memory=device.startswith("cuda"),
        collate_fn=_collate,
    )
    epochs = (epoch for epoch, _ in plan.batches(first))
    try:
        for epoch, item in zip(epochs, loader, strict=True):
            if isinstance(item, str):
                raise InputError(item)
            images, pixels, unreadable = item
            yield Batch(epoch, images, pixels, unreadable)
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep the processes as long as the error is kept
        raise InputError(f"a loader process died ({str(error)[:150]}); try workers=0 or a larger /dev/shm") from error


__getattr__ = renamed(__name__)
