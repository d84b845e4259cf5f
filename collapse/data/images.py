"""Images from any place that holds them, in a fixed order.

The order is that of the relative paths' bytes, so a result is reproducible.
"""

import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from collapse import InputError
from collapse.files import limits, pictures, tiffs
from collapse.files.imagesets import ImageSet, Picture, open_set
from collapse.files.imagesets.plain import Listed
from collapse.files.pictures import UnreadableImage

Depth = tuple[float, float]


class Images:
    """The images at a place (`collapse.files.imagesets.open_set`), in a fixed order.

    names: the images.  left_out: files that are no images by their names, folders that cannot be read.
    max_pixels: an image of more, height times width, is not decoded.
    labels: (n,) numbers of classes where the place itself has them, as tar shards and tables do; else None.
    pixel_range: the values that are black and white in images of floats and of more than 8 bits. None: from their type,
    and of floats, and of integers that need fewer bits than they have, from up to 16 of them, with a warning.
    image_set: the set, where it was opened already.

    Raises InputError: there is no such place, no image in it, or values from which no range follows.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        max_pixels: int = limits.PIXELS,
        pixel_range: Depth | None = None,
        image_set: ImageSet | None = None,
    ) -> None:
        self.source, self.max_pixels = Path(source), max_pixels
        self.set = open_set(self.source) if image_set is None else image_set
        if not self.set.names:
            what = "is no list of images, one a line" if isinstance(self.set, Listed) else "holds no image"
            raise InputError(f"{self.source}: {what} ({' '.join(sorted(pictures.ENDINGS))})")
        self.indices = np.arange(len(self.set.names))
        self.left_out, self.notes = self.set.left_out, [*self.set.notes]
        self.pixel_range = pixel_range
        self.kind: np.dtype | None = None  # of deep images, where their range is not given
        self._note_pages()
        if pixel_range is None:
            self._probe()

    @property
    def names(self) -> list[str]:
        """The names of the images."""
        return [self.set.names[index] for index in self.indices.tolist()]

    @property
    def labels(self) -> NDArray | None:
        """(n,) int64, or None."""
        return None if self.set.labels is None else self.set.labels[self.indices]

    def below(self, folder: str) -> "Images":
        """Those in a folder of a zip. Raises InputError: there are none."""
        images = self.some([k for k, name in enumerate(self.names) if name.startswith(f"{folder}/")])
        images.source = self.source / folder
        images.left_out = [name for name in self.left_out if name.startswith(f"{folder}/")]
        if not len(images):
            raise InputError(f"{images.source}: holds no image")
        return images

    def some(self, indices: Any) -> "Images":
        """Those at `indices`, in that order."""
        images = copy(self)
        images.indices = self.indices[np.asarray(indices, int)]
        return images

    @property
    def warnings(self) -> list[str]:
        """How many files were left out, in words, and which range of pixels was guessed."""
        count = len(self.left_out)
        left = [f"{count} files are no images by their names, first {self.left_out[0]!r}; left out"] if count else []
        return [*left, *self.notes]

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader."""
        return self.set.path(int(self.indices[index]))

    def open(self, index: int) -> Picture:
        """Image `index`: Pillow's, or (h, w, c) float32 in 0..1 where that has other channels or more than 8 bits.

        Raises UnreadableImage if it cannot be read, InputError for values beyond a range that was guessed.
        """
        picture = self.set.decode(int(self.indices[index]), self.max_pixels)
        return picture if isinstance(picture, Image.Image) else self._scaled(picture, index)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises UnreadableImage if it cannot be read, or is far too large."""
        return self.set.bytes_of(int(self.indices[index]), self.max_pixels)

    def mark(self, index: int) -> tuple[int, bytes]:
        """(bytes, checksum) of the file of image `index`, as a zip declares them; on a disk without the checksum.

        0 bytes if there is no such file.
        """
        return self.set.mark(int(self.indices[index]))

    def _scaled(self, values: NDArray, index: int) -> NDArray:
        """(h, w, c) float32 in 0..1 of deep pixels. Raises InputError where their range is not known for sure."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UnreadableImage(self.path(index), "it holds NaN or infinity")
        if values.dtype == np.uint8:
            return values.astype(np.float32) / 255
        low, high = self.pixel_range or _full(values.dtype)
        if self.kind is not None:
            least, most = float(values.min()), float(values.max())
            what = f"{pictures.printable(self.path(index))}: {values.dtype} from {least:g} to {most:g}"
            if values.dtype != self.kind:
                raise InputError(f"{what} among images of {self.kind}; give pixel_range=, or images of one kind")
            if least < low or most > high:
                raise InputError(f"{what}, where others lie in {low:g}..{high:g}; give pixel_range= for all")
        scaled = np.empty(values.shape, np.float32)
        step = max(1, (1 << 20) // max(1, values[:1].size))
        for start in range(0, len(values), step):  # in float64, a piece of the image at a time
            part = values[start : start + step].astype(np.float64)
            scaled[start : start + step] = np.clip((part - low) / (high - low), 0, 1)
        return scaled

    def _some(self) -> list[int]:
        """The places of some images, from the first to the last."""
        return np.unique(np.linspace(0, len(self) - 1, limits.PROBED).astype(int)).tolist()

    def _note_pages(self) -> None:
        """Say so if some of them are TIFFs of several pages."""
        paged = [index for index in self._some() if self._several(index)]
        if paged:
            self.notes.append(
                f"{pictures.printable(self.path(paged[0]))} holds several pages, of which the first is taken "
                f"({len(paged)} of {len(self._some())} images looked at); give a TIFF alone for all its pages"
            )

    def _probe(self) -> None:
        """Find the kind and the range of deep images from some of them."""
        extents: list[tuple[np.dtype, float, float]] = []
        for index in self._some():
            if not self.set.names[index].lower().endswith(SHALLOW):
                extents += self._extent(index)
        self.kind = extents[0][0] if extents else np.dtype(np.uint8)
        if not extents:
            return
        least, most = min(low for _, low, _ in extents), max(high for _, _, high in extents)
        self.pixel_range = _range_of(str(self.source), self.kind, least, most)
        if self.pixel_range != _full(self.kind) or self.kind.kind == "f":
            self.notes.append(
                f"pixels of {self.kind} that reach {most:g} in {len(extents)} images are read as "
                f"{self.pixel_range[0]:g}..{self.pixel_range[1]:g}; pixel_range= says otherwise"
            )

    def _extent(self, index: int) -> list[tuple[np.dtype, float, float]]:
        """[(type, least, largest value)] of an image of deep pixels; [] for any other."""
        try:
            values = self.set.decode(index, self.max_pixels)
        except InputError:
            return []
        if isinstance(values, Image.Image) or values.dtype == np.uint8:
            return []
        finite = values.dtype.kind != "f" or np.isfinite(values).all()
        return [(values.dtype, float(values.min()), float(values.max()))] if finite else []

    def _several(self, index: int) -> bool:
        """Whether an image is a TIFF of several pages."""
        try:
            return self.set.names[index].lower().endswith((".tif", ".tiff")) and tiffs.several(self.read(index))
        except InputError:
            return False


SHALLOW = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif")  # endings of at most 8 bits


def _full(kind: np.dtype) -> Depth:
    """The whole range of a type; of floats 0..1."""
    return (0.0, 1.0) if kind.kind == "f" else (0.0, float(np.iinfo(kind).max))


def _range_of(where: str, kind: np.dtype, least: float, most: float) -> Depth:
    """The range that pixels from `least` to `most` are likely to have. Raises InputError: none is."""
    if kind.kind == "f" and least >= 0 and most <= 1:
        return 0.0, 1.0
    likely = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if 2**bits > most]
    if least < 0 or not likely:
        raise InputError(
            f"{where}: pixels of {kind} from {least:g} to {most:g}; give pixel_range=, which values are black and white"
        )
    return (0.0, likely[0]) if most else _full(kind)
