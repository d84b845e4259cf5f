"""Image files: below a folder, in a zip, or named by a list."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from collapse import InputError
from collapse.files import limits, pictures
from collapse.files.descriptor import Descriptor, opened
from collapse.files.imagesets import stacks
from collapse.files.imagesets.base import (
    LOOKED_AT,
    ImageSet,
    Picture,
    by_bytes,
    ending_of,
    hidden,
    may_be_image,
    name_of,
    within,
)
from collapse.files.npy import MAGIC
from collapse.files.pictures import UnreadableImage
from collapse.files.zips import Zip

HEAD = 32  # bytes by which a file without an ending is known


class _Files(ImageSet):
    """Files of images. Arrays of numpy are images where nothing else is: beside images they may be anything."""

    @abstractmethod
    def head(self, name: str) -> bytes:
        """The first bytes of a file. Raises InputError: it cannot be read."""

    def _sort(self, names: Iterable[str]) -> None:
        """Tell images from what is left out."""
        arrays: list[str] = []
        for name in names:
            if hidden(name):
                continue
            ending = ending_of(name)
            if ending in LOOKED_AT and (ending or pictures.kind_of(self._head(name))):
                self.names.append(name)
            else:
                (arrays if ending == ".npy" else self.left_out).append(name)
        if self.names:
            self.left_out += arrays
        else:
            self.names = arrays
        self.names.sort(key=by_bytes)
        self.left_out.sort(key=by_bytes)

    def _head(self, name: str) -> bytes:
        try:
            return self.head(name)
        except InputError:
            return b""

    def decode(self, index: int, most: int) -> Picture:
        """As of any set; a .npy is one image."""
        if ending_of(self.names[index]) != ".npy":
            return super().decode(index, most)
        contents = self.bytes_of(index, most)
        try:
            return stacks.one(contents, most)
        except InputError as error:
            raise UnreadableImage(self.path(index), str(error)) from error


class Folder(_Files):
    """The images below a folder, at any depth. Folders that links lead to are looked into once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.where = folder, str(folder)
        self._sort(self._below())

    def _below(self) -> Iterator[str]:
        seen = set()
        for folder, inner, names in os.walk(self.folder, onerror=self._closed, followlinks=True):
            inner.sort()  # of two links to one folder the first counts
            try:
                status = os.stat(folder)
            except OSError as error:
                self._closed(error)
                continue
            if (status.st_dev, status.st_ino) in seen:
                inner.clear()  # a link led here again
                continue
            seen.add((status.st_dev, status.st_ino))
            start = os.path.relpath(folder, self.folder)
            yield from names if start == "." else (f"{start}/{name}" for name in names)

    def _closed(self, error: OSError) -> None:
        self.left_out.append(os.path.relpath(error.filename, self.folder))

    def path(self, index: int) -> str:
        """Its place on the disk."""
        return str(self.folder / self.names[index])

    def head(self, name: str) -> bytes:
        """The first bytes of a file. Raises InputError: it cannot be read."""
        with opened(self.folder / name) as file:
            return file.read(0, min(HEAD, file.size))

    def read(self, index: int, most: int) -> bytes:
        """As of any set. Raises InputError: it cannot be read, or is larger than `most`."""
        place = self.folder / self.names[index]
        try:
            with opened(place) as file:
                return file.read(0, within(file.size, most))
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{place}: ")) from error

    def mark(self, index: int) -> tuple[int, bytes]:
        """Its bytes on the disk; 0 if there is no such file."""
        try:
            return os.stat(self.folder / self.names[index]).st_size, b""
        except OSError:
            return 0, b""


class Listed(Folder):
    """The images that a .txt file names, one path a line, relative to its own folder, in that order.

    A line in quotes is JSON text, for names with line feeds (`line_of`).
    """

    def __init__(self, file: Path) -> None:
        """Raises InputError: a list that cannot be read, or is larger than any."""
        ImageSet.__init__(self)
        self.folder, self.where = file.parent, str(file)
        with opened(file) as source:
            if source.size > limits.LIST:
                raise InputError(f"{file}: a list of {source.size} bytes, at most {limits.LIST} are read")
            lines = [line.strip() for line in source.read(0, source.size).split(b"\n")]
        names = [name_of(os.fsdecode(line)) for line in lines if line]
        if all(self._image(name) for name in names):
            self.names = names

    def _image(self, name: str) -> bool:
        usual = may_be_image(name) or ending_of(name) == ".npy"
        return usual and (ending_of(name) != "" or os.path.isfile(self.folder / name))


class Zipped(_Files):
    """The images in a zip, or in one folder of it; what it calls its records are names, never places on the disk."""

    def __init__(self, archive: Path, inside: str = ".") -> None:
        super().__init__()
        self.where, self.archive = str(archive), Zip(Descriptor.kept(archive))
        self._sort(n for n in self.archive.records if inside == "." or n.startswith(f"{inside}/"))

    def head(self, name: str) -> bytes:
        """The first bytes of a record. Raises InputError: it cannot be read."""
        return self.archive.head(self.archive.records[name], HEAD)

    def read(self, index: int, most: int) -> bytes:
        """As of any set."""
        record = self.archive.records[self.names[index]]
        return self.archive.read(record, min(most, limits.unpacked(record.packed)))

    def mark(self, index: int) -> tuple[int, bytes]:
        """What the zip declares."""
        record = self.archive.records[self.names[index]]
        return record.size, record.crc.to_bytes(4, "little")


def is_npy(head: bytes) -> bool:
    """Whether a file begins as an array of numpy."""
    return head.startswith(MAGIC)
