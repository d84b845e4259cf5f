"""What every place of images is, and the names that its images have."""

import json
import os
import re
from abc import ABC, abstractmethod
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from collapse import InputError
from collapse.files import limits, pictures
from collapse.files.pictures import UnreadableImage

LOOKED_AT = frozenset((*pictures.ENDINGS, ""))  # endings of the files that may be images
Picture = Image.Image | NDArray  # of 8 bits a channel as Pillow has it; any other as numbers, (h, w, c)


class ImageSet(ABC):
    """Images in a fixed order.

    names: of the images.  left_out: names of what lies there and is no image.  notes: warnings.
    labels: (n,) int64 numbers of classes, or None where the place has none.  where: for errors.
    """

    where: str = ""
    labels: NDArray | None = None

    def __init__(self) -> None:
        self.names: list[str] = []
        self.left_out: list[str] = []
        self.notes: list[str] = []

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader."""
        return f"{self.where}/{self.names[index]}"

    @abstractmethod
    def read(self, index: int, most: int) -> bytes:
        """The bytes of image `index`, at most `most`. Raises InputError: they cannot be read, or are more."""

    @abstractmethod
    def mark(self, index: int) -> tuple[int, bytes]:
        """(bytes, checksum) of image `index`; without the checksum where none is stored."""

    def decode(self, index: int, most: int) -> Picture:
        """Image `index`, of Pillow or (h, w, c) numbers.

        Raises UnreadableImage: it cannot be read, or has over `most` pixels.
        """
        return pictures.decode(self.bytes_of(index, most), self.path(index), most)

    def bytes_of(self, index: int, pixels: int) -> bytes:
        """The bytes of image `index`. Raises UnreadableImage: none, or more than that of so many pixels may have."""
        try:
            return self.read(index, limits.image_file(pixels))
        except InputError as error:
            raise UnreadableImage(self.path(index), str(error).removeprefix(f"{self.where}: ")) from error


def within(size: int, most: int) -> int:
    """`size`, the bytes of an image file. Raises InputError: it is over `most`."""
    if size > most:
        raise InputError(f"{size} bytes, over {most}; give a larger max_pixels=")
    return size


def by_bytes(name: str) -> bytes:
    """A name's own bytes, in every locale: the order of names."""
    return name.encode("utf-8", "surrogateescape")


def ending_of(name: str) -> str:
    """The ending of a name in lower case, with its dot; "" if it has none."""
    return os.path.splitext(name)[1].lower().rstrip(".")


def may_be_image(name: str) -> bool:
    """Whether a file of this name is looked at: it has the ending of an image, or none."""
    return ending_of(name) in LOOKED_AT


def hidden(name: str) -> bool:
    """Whether a part of a name hides it: a leading dot, or the folder in which macOS keeps what it knows of files."""
    if "/." not in (rooted := f"/{name}") and "/__MACOSX" not in rooted:
        return False
    return any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in name.split("/"))


def line_of(name: str) -> str:
    """The line of a list that stands for a file's name: itself, or JSON text in quotes where it would not come back.

    That is a name with a control character (as a line feed), space at its ends, or bytes that are not UTF-8.
    """
    plain = name == name.strip() and not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name)
    return name if plain and not name.startswith('"') else json.dumps(name)


def name_of(line: str) -> str:
    """The name for which a line of a list stands; no image's own name ends in a quote."""
    try:
        name: Any = json.loads(line) if line[:1] == line[-1:] == '"' else line
    except (ValueError, RecursionError):
        return line
    return name if isinstance(name, str) else line
