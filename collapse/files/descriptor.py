"""A file opened once: every byte that a reader sees comes through one descriptor, from the first look to the last."""

import hashlib
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collapse import InputError

CHUNK = 1 << 20  # bytes read at a time for a digest


@contextmanager
def opened(path: str | os.PathLike) -> Iterator["Descriptor"]:
    """Open a file for reading; it must be the same, of the same size, when the block ends.

    Raises InputError: no such file, a folder, not a regular file, empty, not readable, or changed while being read.
    """
    source = Descriptor.of(Path(path))
    try:
        yield source
        source.unchanged()
    finally:
        source.close()


@dataclass
class Descriptor:
    """A regular file, or the `size` bytes of it from `start` on; reads move no position, so forks may share it."""

    path: Path
    number: int
    size: int
    start: int = 0
    state: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, path: Path) -> "Descriptor":
        """Open `path`; the caller closes. Raises InputError as `opened` does."""
        try:
            if path.is_dir():
                raise InputError(f"{path}: is a folder, not a file")
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            os.close(number)
            raise InputError(f"{path}: is {'empty' if stat.S_ISREG(status.st_mode) else 'not a regular file'}")
        return cls(path, number, status.st_size, 0, _state(status))

    @classmethod
    def kept(cls, path: Path) -> "Descriptor":
        """Open `path`; it closes when nobody holds it any more. Raises InputError as `opened` does."""
        source = cls.of(path)
        weakref.finalize(source, os.close, source.number)
        return source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "number": -1}  # another process opens the file anew, when it reads

    def _again(self) -> None:
        source = Descriptor.kept(self.path)
        if source.state != self.state:
            raise InputError(f"{self.path}: is another file than at the start; begin again")
        self.number = os.dup(source.number)
        weakref.finalize(self, os.close, self.number)

    def close(self) -> None:
        """Let the file go."""
        os.close(self.number)

    def window(self, start: int, size: int) -> "Descriptor":
        """A part of it as a file of its own, on the same descriptor. Raises InputError: it ends behind the file."""
        self._within(start, size)
        return Descriptor(self.path, self.number, size, self.start + start, self.state)

    def _within(self, start: int, size: int) -> None:
        if not 0 <= start <= start + size <= self.size:
            raise InputError(f"{self.path}: truncated: {start + size} bytes are wanted and there are {self.size}")

    def read(self, start: int, size: int) -> bytes:
        """Exactly `size` bytes from `start` on. Raises InputError: there are fewer."""
        target = bytearray(max(0, min(size, self.size)))
        self.into(target, start, size)
        return bytes(target)

    def into(self, target: Any, start: int, size: int | None = None) -> None:
        """Fill a writable buffer with the bytes from `start` on. Raises InputError: there are fewer."""
        view = memoryview(target).cast("B")
        self._within(start, len(view) if size is None else size)
        if self.number < 0:
            self._again()
        done = 0
        while done < len(view):
            got = os.preadv(self.number, [view[done : done + (1 << 30)]], self.start + start + done)
            if not got:
                raise InputError(f"{self.path}: changed while being read; wait until it is written")
            done += got

    def chunks(self, start: int, size: int, step: int = CHUNK) -> Iterator[bytes]:
        """The bytes from `start` to `start + size` in pieces."""
        for place in range(start, start + size, step):
            yield self.read(place, min(step, start + size - place))

    def sha256(self) -> str:
        """Hex digest of the bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks(0, self.size):
            digest.update(chunk)
        return digest.hexdigest()

    def unchanged(self) -> None:
        """Raise InputError if the file behind the descriptor was written to since it was opened."""
        if _state(os.fstat(self.number)) != self.state:
            raise InputError(f"{self.path}: changed while being read; wait until it is written")


@dataclass
class Hashed(Descriptor):
    """A file whose digest is taken from the pieces of it that `chunks` gives, so that no byte is read twice for it."""

    digest: Any = field(default_factory=hashlib.sha256, repr=False)
    hashed: int = 0

    def chunks(self, start: int, size: int, step: int = CHUNK) -> Iterator[bytes]:
        """As of any `Descriptor`; what lies before `start` goes into the digest first."""
        self._until(start)
        place = start
        for piece in super().chunks(start, size, step):
            if place == self.hashed:
                self.digest.update(piece)
                self.hashed += len(piece)
            place += len(piece)
            yield piece

    def sha256(self) -> str:
        """Hex digest of all bytes of the file; those that `chunks` has not given are read now."""
        self._until(self.size)
        return self.digest.hexdigest()

    def _until(self, place: int) -> None:
        while self.hashed < place:
            piece = self.read(self.hashed, min(CHUNK, place - self.hashed))
            self.digest.update(piece)
            self.hashed += len(piece)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
