"""Images in a fixed order, in memory or in files, and what tells one set of them from another."""

import hashlib
import math
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse import InputError
from collapse.data.images import Images
from collapse.files import limits
from collapse.files.imagesets import Picture, by_bytes
from collapse.files.pictures import UnreadableImage

TRIES = 10  # images in a row, of which one must be readable


class Source(Protocol):
    """Images in a fixed order; those of more than `max_pixels` pixels cannot be read."""

    max_pixels: int

    def __len__(self) -> int: ...

    def open(self, index: int) -> Picture:
        """Image `index`, of Pillow or (h, w, c). Raises UnreadableImage: it cannot be read."""

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader."""


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
    """Some images of a source, indices (n,); with `tolerant`, one that cannot be read is the next that can."""

    def __init__(self, images: Source, indices: NDArray, tolerant: bool = False) -> None:
        self.images, self.indices, self.tolerant, self.max_pixels = images, indices, tolerant, images.max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Picture:
        """Image `index` of the chosen ones, of Pillow or (h, w, c).

        Raises UnreadableImage: it cannot be read.  Raises InputError: nor, with `tolerant`, can the nine behind it.
        """
        place = int(self.indices[index])
        return open_next(self.images, place)[1] if self.tolerant else self.images.open(place)

    def path(self, index: int) -> str:
        """Where image `index` of the chosen ones is."""
        return self.images.path(int(self.indices[index]))


def open_next(images: Source, index: int) -> tuple[int, Picture, list[str]]:
    """The first image from `index` on that can be read, of ten: its index, itself, what was wrong with the others.

    The image is one of Pillow, or (h, w, c) numbers.

    Raises InputError: none can be read.
    """
    unreadable: list[str] = []
    for candidate in range(index, index + TRIES):
        try:
            return candidate % len(images), images.open(candidate % len(images)), unreadable
        except UnreadableImage as error:
            unreadable.append(str(error))
    raise InputError(f"ten images in a row cannot be read, the last: {unreadable[-1]}")


class Identity:
    """What tells one set from another, worked out when it is asked for.

    names_digest: of names and labels, as version 1 of a RUN keeps it.
    digest: of names, labels, sizes and contents. The contents are the checksums of a zip; or the bytes of all files up
    to `limits.DIGESTED` together, about a second a GiB, and of more those of `limits.SAMPLED` files.
    For a set in memory both are of pixels and labels.  labels: (n,) int64.
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

    def _of_files(self, files: Images) -> str:
        marks = [files.mark(index) for index in range(len(files))]
        all_of_them = sum(size for size, _ in marks) <= limits.DIGESTED
        step = 1 if all_of_them else math.ceil(len(files) / limits.SAMPLED)
        black_white = f" {files.pixel_range}" if files.pixel_range else ""
        digest = hashlib.sha256(by_bytes(f"{self.names_digest} {files.max_pixels}{black_white}"))
        for index, (size, checksum) in enumerate(marks):
            digest.update(size.to_bytes(8, "little") + checksum)
            if not checksum and index % step == 0:
                digest.update(_contents(files, index))
        return digest.hexdigest()


def _contents(files: Images, index: int) -> bytes:
    """A digest of one file; nothing if it cannot be read."""
    try:
        return hashlib.sha256(files.read(index)).digest()
    except UnreadableImage:
        return b""


class Chosen:
    """What tells a part of a set, the images at indices (n,), from others."""

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
