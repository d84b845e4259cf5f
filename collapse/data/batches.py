"""Batches of images in order, decoded by workers; pixels travel as uint8."""

import sys
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from collapse import InputError
from collapse.data.images import Images
from collapse.data.preprocessing import Preprocessing
from collapse.files import pictures
from collapse.files.pictures import UnreadableImage


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels of any shape as uint8; floats in 0..1 are rounded."""
    return (pixels * 255).round_().to(torch.uint8) if pixels.is_floating_point() else pixels


class _Pixels(Dataset):
    """What a worker does: image -> uint8 tensor, or why not."""

    def __init__(self, images: Any, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            image = self.images.open(index)
        except InputError as error:
            return error
        try:
            return self.preprocessing.pixels(image, self.images.max_pixels)
        except InputError as error:
            return UnreadableImage(self.images.path(index), str(error))


class Decoded(NamedTuple):
    """A batch: images (b, c, h, w), None if they differ in size or if none could be read, and the others.

    read, unreadable: the places in the batch of those that could be read, and of those that could not.
    """

    pixels: Tensor | None
    read: list[int]
    unreadable: dict[int, InputError]


def _collate(items: list[Tensor | InputError]) -> Decoded:
    pixels = {place: item for place, item in enumerate(items) if isinstance(item, Tensor)}
    unreadable = {place: item for place, item in enumerate(items) if isinstance(item, InputError)}
    if len({item.dtype for item in pixels.values()}) > 1:
        pixels = {place: item if item.is_floating_point() else item.float() / 255 for place, item in pixels.items()}
    alike = len({item.shape for item in pixels.values()}) == 1
    batch = torch.stack(list(pixels.values())) if alike else None
    if batch is not None and get_worker_info() is not None:
        batch.share_memory_()  # else a batch for which there is no shared memory is lost, and waited for for ever
    return Decoded(batch, list(pixels), unreadable)


def _quiet(worker: int) -> None:
    """No traceback from a worker: an interrupt reaches the parent, a lost image is part of the batches."""
    sys.excepthook = lambda *_: None


def decoded(
    images: Any, preprocessing: Preprocessing, batch_size: int, workers: int, limit: int | None = None
) -> Iterator[Decoded]:
    """Batches of images in order; arguments as of `pixel_batches`. Raises InputError: a worker was killed."""
    indices = range(len(images))[:limit]
    loader = DataLoader(
        _Pixels(images, preprocessing),
        batch_size=batch_size,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),  # so that copies to the device wait for nothing
        worker_init_fn=_quiet,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep the processes as long as the error is kept
        raise InputError(
            f"{images.path(0)} and others: a decoding process was killed, or had no memory to share; "
            "give fewer workers=, or 0"
        ) from error


Skipped = list[dict[str, str]]


def pixel_batches(
    images: Any,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Tensor]:
    """Batches of images in order, (b, c, h, w) as `Preprocessing.pixels` gives them, decoded by `workers` processes.

    images: `Images`, or anything else with a length, `open`, `path` and `max_pixels`.
    skipped: gets {"path", "why"} of each image that cannot be read, which then is left out; None for an error.

    Raises InputError: an image that cannot be read, none that can, images of several sizes, a worker that was killed.
    """
    skipped, strict, some = ([] if skipped is None else skipped), skipped is None, False
    for batch in decoded(images, preprocessing, batch_size, workers, limit):
        pixels = readable(batch, skipped, strict)
        if pixels is not None:
            some = True
            yield pixels
    if not some:
        refuse_unreadable(images, skipped)


def readable(batch: Decoded, skipped: Skipped, strict: bool) -> Tensor | None:
    """The pixels of a batch, (b, c, h, w), None if no image of it can be read; those that cannot go to `skipped`.

    Raises InputError: an image that cannot be read, if `strict`; images of several sizes.
    """
    for error in batch.unreadable.values():
        if strict or not isinstance(error, UnreadableImage):
            raise error
        skipped.append({"path": error.path, "why": error.why})
    if batch.pixels is None and batch.read:
        raise InputError("images differ in size; give resize= and crop=")
    return batch.pixels


def refuse_unreadable(images: Any, skipped: Skipped) -> None:
    """Raise InputError if some were skipped, of images none of which could be read."""
    if skipped:
        where, first = f"{images.source}: " if isinstance(images, Images) else "", skipped[0]
        raise InputError(
            f"{where}none of its images can be read, first {pictures.printable(first['path'])} ({first['why']})"
        )
