"""Images in one array: a .npy, an array of a .npz; and the pages of a TIFF."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from collapse import InputError
from collapse.files import limits, npy, tiffs
from collapse.files.descriptor import Descriptor
from collapse.files.imagesets.base import ImageSet, Picture, within
from collapse.files.pictures import UnreadableImage
from collapse.files.rows import check_memory, check_unpacked, choose, reading
from collapse.files.zips import Zip


def one(contents: bytes, most: int) -> Picture:
    """The image in the bytes of a .npy, (h, w), (h, w, c) or (c, h, w). Raises InputError: none, or over `most`."""
    header = npy.Header.parse(contents[: limits.NPY_HEADER + 12], len(contents), "its array", _check_one)
    layout = _layout(header.shape, "its array")
    _within(header.shape, layout, most)
    flat = np.frombuffer(contents, header.dtype, offset=header.offset)
    return picture(flat.reshape(header.shape, order="F" if header.fortran else "C"), layout)


def picture(values: NDArray, layout: str) -> Picture:
    """An image with the axes that `layout` names as (h, w, c); of 8 bits in one or three channels, as Pillow's."""
    values = values[..., None] if layout == "hw" else values.transpose(1, 2, 0) if layout == "chw" else values
    if values.dtype == np.uint8 and values.shape[2] in (1, 3):
        return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))
    return values


def _check_one(where: str, shape: Sequence[int], kind: str, dtype: Any) -> None:
    if kind not in "fiu" or len(shape) not in (2, 3) or not all(shape):
        raise InputError(f"{where}: {dtype} {tuple(shape)}, expected an image (h, w), (h, w, c) or (c, h, w)")


def _check_many(where: str, shape: Sequence[int], kind: str, dtype: Any) -> None:
    if kind not in "fiu" or len(shape) not in (3, 4) or not all(shape):
        raise InputError(
            f"{where}: {dtype} {tuple(shape)}, expected images (n, h, w), (n, h, w, c) or (n, c, h, w) of numbers"
        )


def _layout(shape: Sequence[int], where: str) -> str:
    """The axes of an image: "hw", "hwc" or "chw"; there are fewer channels than rows or columns, at most 64."""
    if len(shape) == 2:
        return "hw"
    first, last = shape[0], shape[2]
    if min(first, last) > limits.CHANNELS or first == last:
        raise InputError(f"{where}: shape {tuple(shape)} does not show which axis holds the channels; store (h, w, c)")
    return "hwc" if last < first else "chw"


def _within(shape: Sequence[int], layout: str, most: int) -> None:
    height, width = shape[1:] if layout == "chw" else shape[:2]
    if height * width > most:
        raise InputError(f"{width} x {height} pixels, over {most}; give a larger max_pixels=")


class Stack(ImageSet):
    """The images of an array (n, h, w), (n, h, w, c) or (n, c, h, w), in a .npy or under a key of a .npz.

    Raises InputError: damaged, no such array, or a shape that does not show which axis holds the channels.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        super().__init__()
        self.source = Descriptor.kept(path)
        self.whole: NDArray | None = None
        if self.source.read(0, min(6, self.source.size)) == npy.MAGIC:
            self.where = str(path)
            head = self.source.read(0, min(self.source.size, limits.NPY_HEADER + 12))
            self.header = npy.Header.parse(head, self.source.size, self.where, _check_many)
            if self.header.fortran:
                self._keep(self.source.read(self.header.offset, self.source.size - self.header.offset))
        else:
            self._of_archive(path, key)
        self.names = [f"{index:08d}" for index in range(self.header.shape[0])]
        self.layout = _layout(self.header.shape[1:], self.where)

    def _of_archive(self, path: Path, key: str | None) -> None:
        archive = Zip(self.source)
        keys = [name.removesuffix(".npy") for name in archive.records if name.endswith(".npy")]
        images = [name for name in keys if _holds_images(archive, name)] if key is None else keys
        key = choose(path, images or keys, key)
        self.where, record = f"{path}:{key}", archive.records[f"{key}.npy"]
        check_unpacked(self.where, record.size, record.packed, None)
        check_memory(self.where, record.size, "the array, unpacked,")
        self.header, stream = npy.parsed(archive.stream(record, limits.BLOCK), record.size, self.where, _check_many)
        self._keep(bytearray().join(stream))

    def _keep(self, numbers: bytes | bytearray) -> None:
        shape, order = self.header.shape, "F" if self.header.fortran else "C"
        self.whole = np.frombuffer(numbers, self.header.dtype).reshape(shape, order=order)  # type: ignore[call-overload]

    def path(self, index: int) -> str:
        """The array and the number in it."""
        return f"{self.where}[{self.names[index].lstrip('0') or '0'}]"

    def read(self, index: int, most: int) -> bytes:
        """The numbers of image `index`. Raises InputError: they are over `most` bytes."""
        size = within(self.header.width, most)
        if self.whole is not None:
            return self.whole[index].tobytes()
        return self.source.read(self.header.offset + index * size, size)

    def mark(self, index: int) -> tuple[int, bytes]:
        """Their bytes."""
        return self.header.width, b""

    def decode(self, index: int, most: int) -> Picture:
        """Image `index`, of Pillow where it has 8 bits a channel, else (h, w, c) numbers.

        Raises UnreadableImage: it cannot be read, or has over `most` pixels.
        """
        shape = self.header.shape[1:]
        contents = self.bytes_of(index, most)
        try:
            _within(shape, self.layout, most)
        except InputError as error:
            raise UnreadableImage(self.path(index), str(error)) from error
        return picture(np.frombuffer(contents, self.header.dtype).reshape(shape), self.layout)


def _holds_images(archive: Zip, key: str) -> bool:
    """Whether an array of a .npz has three or four axes; a damaged one is for whoever names it."""
    record = archive.records[f"{key}.npy"]
    try:
        npy.Header.parse(archive.head(record, limits.NPY_HEADER + 12), record.size, key, _check_many)
    except InputError:
        return False
    return True


class Pages(ImageSet):
    """The pages of one TIFF that have the size of its first; a reduced copy or a mask is left out."""

    def __init__(self, path: Path) -> None:
        """Raises InputError: a damaged TIFF."""
        super().__init__()
        self.where, self.source = str(path), Descriptor.kept(path)
        try:
            with reading(path, "TIFF"):
                pages = list(tiffs.pages(self.source.read, self.source.size))
        except InputError as error:
            raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        chosen = [k for k, page in enumerate(pages) if page.size == pages[0].size and not page.reduced]
        self.pages = [pages[k] for k in chosen]
        self.names = [f"page {k}" for k in chosen]
        self.left_out = [f"page {k}" for k in range(len(pages)) if k not in set(chosen)]

    def path(self, index: int) -> str:
        """The file and the page."""
        return f"{self.where}[{self.names[index]}]"

    def read(self, index: int, most: int) -> bytes:
        """A TIFF of the page alone. Raises InputError: it has over `most` bytes, or lacks what a page has."""
        return tiffs.alone(self.pages[index], self.source.read, most)

    def mark(self, index: int) -> tuple[int, bytes]:
        """Pixels of the page."""
        return math.prod(self.pages[index].size), b""
