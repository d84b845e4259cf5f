"""Matrices of MATLAB up to version 7 (files of version 7.3 are HDF5): real numbers, and nothing else of a file.

The format is "MAT-File Format" (The MathWorks), level 5: elements with a type and a size, packed by zlib or not.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from collapse.files.descriptor import Descriptor
from collapse.files.rows import check_memory, check_shape, check_unpacked, choose, reading

MAGIC, HDF5 = b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file"
_MATRIX, _PACKED, _HEAD = 14, 15, 4096  # kinds of elements; bytes in which a matrix says what it is
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}


@dataclass(frozen=True)
class Matrix:
    """A matrix: where its element lies, whether that is packed, its shape, dtype, and where in it the numbers begin."""

    start: int
    size: int
    packed: bool
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


@contextmanager
def open_mat(source: Descriptor, key: str | None, most: float | None) -> Iterator[Iterator[np.ndarray]]:
    """Rows of a matrix (n, d), in blocks.

    Raises InputError: no such matrix, none of real numbers, what unpacks to too much (most: in GiB), damaged.
    """
    with reading(source.path, "MAT"):
        order = {b"IM": "<", b"MI": ">"}[source.read(126, 2)]
        matrices = dict(_matrices(source, order))
    name = choose(source.path, list(matrices), key)
    matrix, where = matrices[name], f"{source.path}: matrix {name!r}"
    check_shape(where, matrix.shape, matrix.dtype.kind, matrix.dtype)
    size = math.prod(matrix.shape) * matrix.dtype.itemsize
    check_unpacked(where, size, matrix.size, most)
    check_memory(where, 3 * size, "a matrix, which is stored by columns,")
    with reading(source.path, "MAT"):
        element = _element(source, matrix, matrix.offset + 8 + 8 * math.prod(matrix.shape))
        values = _numbers(element[matrix.offset :], order, matrix)
    yield iter([values])


def _matrices(source: Descriptor, order: str) -> Iterator[tuple[str, Matrix]]:
    """(name, matrix) of the matrices of real numbers in a file."""
    place = 128
    while place + 8 <= source.size:
        kind, size = struct.unpack(f"{order}II", source.read(place, 8))
        if kind not in (_MATRIX, _PACKED) or place + 8 + size > source.size:
            raise ValueError(f"an element of kind {kind} with {size} bytes")
        start, packed = place + 8, kind == _PACKED
        head = _element(source, Matrix(start, size, packed, (), np.dtype("u1"), 0), _HEAD)
        described = _header(head, order)
        if described is not None:
            name, shape, dtype, offset = described
            yield name, Matrix(start, size, packed, shape, dtype, offset)
        place = start + size


def _element(source: Descriptor, matrix: Matrix, most: int) -> bytes:
    """The first bytes of a matrix's element, without the eight of its own kind and size."""
    if not matrix.packed:
        return source.read(matrix.start, min(matrix.size, most))
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(source.read(matrix.start, matrix.size), most + 8)
    if len(data) < most + 8 and not unpacker.eof:
        raise ValueError("a packed element without its end")
    return data[8:]


def _header(head: bytes, order: str) -> tuple[str, tuple[int, ...], np.dtype, int] | None:
    """(name, shape, dtype, where the numbers begin) of a matrix; None for one of no real numbers."""
    parts, place = [], 0
    for _ in range(3):  # flags, dimensions, name
        kind, size, start, place = _part(head, order, place)
        parts.append((kind, head[start : start + size]))
    (word,) = struct.unpack_from(f"{order}I", parts[0][1])
    dtype, shape = _CLASSES.get(word & 0xFF), struct.unpack(f"{order}{len(parts[1][1]) // 4}i", parts[1][1])
    if dtype is None or word & 0x0A00 or min(shape, default=-1) < 0:  # of complex or logical numbers
        return None
    return parts[2][1].decode("latin-1"), shape, np.dtype(dtype), place


def _part(data: bytes, order: str, place: int) -> tuple[int, int, int, int]:
    """(kind, bytes, their place, the next part's) of a part; a small one has its bytes where its size would be."""
    word, size = struct.unpack_from(f"{order}II", data, place)
    if word >> 16:
        return word & 0xFFFF, word >> 16, place + 4, place + 8
    return word, size, place + 8, place + 8 + -(-size // 8) * 8


def _numbers(data: bytes, order: str, matrix: Matrix) -> np.ndarray:
    """(n, d), of numbers that may be stored in a smaller type."""
    kind, size, start, _ = _part(data, order, 0)
    stored = np.dtype(f"{order}{_STORED[kind]}")
    if size != math.prod(matrix.shape) * stored.itemsize or start + size > len(data):
        raise ValueError(f"{size} bytes of numbers in a matrix {matrix.shape}")
    values = np.frombuffer(data, stored, math.prod(matrix.shape), start).reshape(matrix.shape, order="F")
    return np.ascontiguousarray(values, matrix.dtype)
