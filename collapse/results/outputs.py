"""Writing files: whole or not at all, and what a killed writer left is cleared away.

A file is written under a hidden name in the folder of its own, `.collapse-TARGET-HOST-PID-RANDOM` and its ending, which
nobody can guess or plant, and then renamed.  The next write to the same target removes the leftovers of processes of
this machine that are no more, and nothing else.
"""

import hashlib
import os
import re
import secrets
import shlex
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files.descriptor import opened
from collapse.moved import renamed

LEFTOVER = re.compile(r"\.collapse-(?P<target>[0-9a-f]{12})-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{16}(\..*)?")
_LONGEST = 16  # bytes of an ending that a hidden name keeps, since some writers choose the format by it
_writing: set[str] = set()  # hidden names that this process is writing to


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not.

    Raises InputError: no such folder, `path` is not a file, or the disk does not take it; the old file is kept.
    """
    try:
        require_place(path)
        clear(path)
        partial = _hidden(path)
        try:
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            _writing.discard(partial.name)
            partial.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the old file is kept" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def require_place(path: Path) -> None:
    """Raise InputError unless `path` can be written or replaced: a name in a folder, or a regular file.

    Nothing in /dev, /proc and /sys is: /dev/stdout, a link, may lead to a regular file.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give the name of a file to write")
        if re.match(r"/(dev|proc|sys)/(?!shm/)", f"{path.parent.resolve()}/"):
            raise InputError(f"{path}: is the system's, not a regular file; give another name")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: is not a regular file, which alone is replaced; give another name")
        if not path.parent.exists():
            raise InputError(
                f"{path}: there is no folder {path.parent}; make it: mkdir -p {shlex.quote(str(path.parent))}"
            )
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            what = "cannot be written to" if path.parent.is_dir() else "is not a folder"
            raise InputError(f"{path}: {path.parent} {what}; choose another place")
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another name") from error


def given(text: str) -> list[Path]:
    """The files that exist of those which an input as a command takes it may name.

    FILE, FILE:KEY, a folder, FILE.zip/some/folder.
    """
    ends = [index for index, character in enumerate(text) if character == ":"]
    places = [Path(text[:end]) for end in (*ends, len(text)) if text[:end]]
    return [file for place in places for file in (place, *place.parents) if file == place or os.path.isfile(file)
            if os.path.lexists(file)]  # fmt: skip


def same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, by whatever name, symbolic or hard link; neither needs to exist."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and one.samefile(other)


def spare(text: str, *written: Path) -> None:
    """Raise InputError if a path to be written is a file that the input `text` names."""
    for path in written:
        if any(same(path, read) for read in given(text)):
            raise InputError(f"{path}: is the input; give another name")


def _hidden(path: Path) -> Path:
    """A new, empty file beside `path` that only this process knows."""
    ending = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST else ""
    name = f".collapse-{_target(path)}-{_host()}-{os.getpid()}-{secrets.token_hex(8)}{ending}"
    made = os.open(path.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    os.close(made)
    _writing.add(name)
    return path.with_name(name)


def _target(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]


def _host() -> str:
    """This machine and, where the system tells, its set of process numbers (a container has its own)."""
    numbers = ""
    with suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{os.uname().nodename} {numbers}".encode()).hexdigest()[:8]


def clear(path: Path) -> None:
    """Remove what writers of `path` left that were killed on this machine."""
    target, host = _target(path), _host()
    with os.scandir(path.parent) as entries:
        for entry in entries:
            match = LEFTOVER.fullmatch(entry.name)
            if match and (match["target"], match["host"]) == (target, host) and _left(entry, int(match["pid"])):
                with suppress(OSError):
                    os.unlink(entry.path)


def _left(entry: os.DirEntry, writer: int) -> bool:
    """Whether a hidden file of this user has no process that writes to it."""
    if not entry.is_file(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
        return False
    if writer == os.getpid():
        return entry.name not in _writing
    try:
        os.kill(writer, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def digest(path: Path) -> dict[str, Any]:
    """{"sha256", "size"} of a file, by which the JSON beside it names it."""
    with opened(path) as source:
        return {"sha256": source.sha256(), "size": source.size}


class NpyWriter:
    """A .npy file of float32 rows, (n, d), written batch by batch; `shape` is that of the rows so far."""

    HEADER = 128  # bytes: room for any number of rows, filled in at the end

    def __init__(self, path: Path) -> None:
        self.shape = (0, 0)
        self._file = open(path, "wb")  # noqa: SIM115  (closed by the block)
        self._file.write(b" " * self.HEADER)

    def __enter__(self) -> "NpyWriter":
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append rows (b, d)."""
        self.shape = (self.shape[0] + len(rows), rows.shape[1])
        self._file.write(np.ascontiguousarray(rows, np.float32).tobytes())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._file:
            if kind is not None:
                return
            text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {self.shape}, }}"
            self._file.seek(0)
            self._file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", self.HEADER - 10))
            self._file.write(text.ljust(self.HEADER - 11).encode() + b"\n")


__getattr__ = renamed(__name__)
