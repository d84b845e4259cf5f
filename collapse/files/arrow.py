"""Tables of Arrow: .arrow and .feather files, and the streams that `datasets` keeps, message by message.

What a message declares is read here, before pyarrow unpacks anything of it.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.parquet import blocks_of, columns_of_schema
from collapse.files.rows import File, check_unpacked, library, reading

FILE, STREAM, FEATHER_1 = b"ARROW1\0\0", b"\xff\xff\xff\xff", b"FEA1"
SCHEMA, DICTIONARY, BATCH = 1, 2, 3  # kinds of messages


@dataclass(frozen=True)
class Message:
    """A message: its kind, where it begins, its bytes, its rows if it is a batch, and the bytes that it unpacks to."""

    kind: int
    start: int
    size: int
    rows: int
    unpacked: int


def is_arrow(head: bytes) -> bool:
    """Whether a file begins as a file or a stream of Arrow."""
    return head.startswith((FILE, STREAM, FEATHER_1))


def messages(source: Descriptor) -> list[Message]:
    """The messages of a file or a stream, in order; the first is the schema.

    Raises InputError: feather of version 1, damaged, truncated, over `limits.ENTRIES` messages.
    """
    place = len(FILE) if source.read(0, min(8, source.size)) == FILE else 0
    if source.read(0, 4) == FEATHER_1:
        raise InputError(f"{source.path}: feather of version 1; write it again with version=2")
    result: list[Message] = []
    with reading(source.path, "Arrow"):
        while place + 8 <= source.size and len(result) < limits.ENTRIES:
            mark, length = struct.unpack("<4si", source.read(place, 8))
            if mark != STREAM or length < 0:
                raise ValueError("no message where one should be")
            if not length:
                break
            message = _message(source, place, length)
            result.append(message)
            place += message.size
        if not result or result[0].kind != SCHEMA:
            raise ValueError("no schema at its beginning")
    return result


def _message(source: Descriptor, start: int, length: int) -> Message:
    if length > limits.JSON:
        raise ValueError(f"a header of {length} bytes")
    table = _Table(source.read(start + 8, length))
    kind, body = table.number(1, "B"), table.number(3, "q")
    place = start + 8 + length
    if body < 0 or place + body > source.size:
        raise ValueError("truncated: a batch ends behind the file")
    batch = table.table(2)
    if kind == DICTIONARY and batch is not None:
        batch = batch.table(1)
    if kind == SCHEMA or batch is None:
        return Message(kind, start, 8 + length + body, 0, 0)
    packed = batch.table(3) is not None
    sizes = [_unpacked(source, place + at, size, body - at) if packed else size for at, size in batch.pairs(2)]
    if min(sizes, default=0) < 0 or batch.number(0, "q") < 0:
        raise ValueError("a batch of negative size")
    return Message(kind, start, 8 + length + body, batch.number(0, "q"), sum(sizes))


def _unpacked(source: Descriptor, place: int, size: int, room: int) -> int:
    """Bytes that a compressed buffer declares; -1 stands for one that is stored as it is."""
    if not 8 <= size <= room:
        return 0
    declared = struct.unpack("<q", source.read(place, 8))[0]
    return size if declared == -1 else declared


class _Table:
    """A table of a flatbuffer: fields by their numbers."""

    def __init__(self, data: bytes, place: int | None = None) -> None:
        self.data, self.place = data, struct.unpack_from("<I", data)[0] if place is None else place
        self.fields = self.place - struct.unpack_from("<i", data, self.place)[0]
        self.size = struct.unpack_from("<H", data, self.fields)[0]

    def _at(self, field: int) -> int:
        slot = 4 + 2 * field
        offset = struct.unpack_from("<H", self.data, self.fields + slot)[0] if slot < self.size else 0
        return self.place + offset if offset else 0

    def number(self, field: int, letter: str) -> int:
        """A number; 0 if it is not there."""
        place = self._at(field)
        return int(struct.unpack_from(f"<{letter}", self.data, place)[0]) if place else 0

    def table(self, field: int) -> "_Table | None":
        """A table; None if it is not there."""
        place = self._at(field)
        return _Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) if place else None

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of pairs of 64-bit numbers."""
        place = self._at(field)
        if not place:
            return []
        start = place + struct.unpack_from("<I", self.data, place)[0]
        count = struct.unpack_from("<I", self.data, start)[0]
        if start + 4 + 16 * count > len(self.data):
            raise ValueError("a vector that ends behind its message")
        return list(struct.iter_unpack("<qq", self.data[start + 4 : start + 4 + 16 * count]))


@contextmanager
def open_arrow(
    source: Descriptor, key: str | None, most: float | None, notes: list[str]
) -> Iterator[Iterator[np.ndarray]]:
    """Rows (b, d) of a table, in blocks; arguments as of `parquet.open_parquet`.

    Raises InputError: as `parquet.open_parquet`.
    """
    ipc = library(source.path, "pyarrow.ipc", "parquet")
    types = library(source.path, "pyarrow.types", "parquet")
    all_messages = messages(source)
    check_unpacked(str(source.path), sum(message.unpacked for message in all_messages), source.size, most)
    with reading(source.path, "Arrow"):
        reader = ipc.open_stream(File(source.window(all_messages[0].start, source.size - all_messages[0].start)))
        columns = columns_of_schema(types, source.path, reader.schema, key, notes)
    rows = sum(message.rows for message in all_messages if message.kind == BATCH)
    yield blocks_of(source.path, types, _batches(reader, columns), rows, "Arrow")


def _batches(reader: Any, columns: list[str]) -> Iterator[Any]:
    for batch in reader:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        yield chosen
