"""Arrays of numpy, .npy and .npz: their headers are read by this file, their rows in a stream."""

import ast
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.rows import check_memory, check_shape, check_unpacked, choose, no_key
from collapse.files.zips import Zip

MAGIC = b"\x93NUMPY"
Rows = Iterator[np.ndarray]


@dataclass(frozen=True)
class Header:
    """The beginning of a .npy: shape, dtype, whether it is in Fortran's order, and the place of the first number."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the whole .npy."""
        return self.offset + self.shape[0] * self.width

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @classmethod
    def parse(cls, data: bytes, size: int, where: str, check: Callable[..., None] = check_shape) -> "Header":
        """The header at the beginning of `data`, of a .npy of `size` bytes.

        check: as `check_shape`, refuses other shapes than are wanted, and those without an axis.
        Raises InputError: not a header, not such an array, or another number of bytes than it says.
        """
        shape, fortran, descr, stop = _fields(data, where)
        dtype = real_dtype(descr, where)
        check(where, shape, dtype.kind, dtype)
        header = cls(shape, dtype, fortran, stop)
        if header.size > size:
            raise InputError(f"{where}: truncated: shape {shape} takes {header.size} bytes and there are {size}")
        if header.size < size:
            raise InputError(f"{where}: {size - header.size} bytes follow the array; a .npy holds one, join them first")
        return header


def array_of(data: bytes, where: str) -> NDArray:
    """The array in the bytes of a whole .npy: numbers, truth values or text, of any shape.

    Raises InputError: not a header, another number of bytes than it says, Python objects, or another dtype.
    """
    shape, fortran, descr, stop = _fields(data, where)
    if "O" in str(descr):
        raise InputError(f"{where}: it holds Python objects, which are never read")
    if not isinstance(descr, str) or not re.fullmatch("[<>|=]?(b1|f[248]|[iu][1248]|U[1-9][0-9]{0,8})", descr):
        raise InputError(f"{where}: dtype {str(descr)[:40]} is neither real numbers nor text")
    dtype = np.dtype(descr)
    if math.prod(shape) * dtype.itemsize != len(data) - stop:
        raise InputError(f"{where}: damaged: shape {shape} of {dtype} does not take {len(data) - stop} bytes")
    return np.ndarray(shape, dtype, bytearray(data), stop, order="F" if fortran else "C")


def _fields(data: bytes, where: str) -> tuple[tuple[int, ...], bool, Any, int]:
    """(shape, whether columns lie together, numpy's text of the dtype, place of the first number) of a .npy."""
    start = 10 if data[6:8] == b"\1\0" else 12
    stop = start + int.from_bytes(data[8:start], "little")
    text = data[start:stop].decode("latin1")
    if data[:6] != MAGIC or data[6:8] not in (b"\1\0", b"\2\0", b"\3\0") or stop > len(data):
        raise InputError(f"{where}: truncated or damaged: it does not begin as a .npy; fetch the file again")
    fields = _literal(text)
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise InputError(f"{where}: truncated or damaged (its header is {text[:60]!r}); fetch the file again")
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or any(type(s) is not int or s < 0 for s in shape) or type(fortran) is not bool:
        raise InputError(f"{where}: damaged (its header is {text[:60]!r}); fetch the file again")
    return shape, fortran, fields["descr"], stop


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def real_dtype(descr: Any, where: str) -> np.dtype:
    """The dtype that numpy's text of it names. Raises InputError: not real numbers, or Python objects."""
    if isinstance(descr, str) and re.fullmatch("[<>|=]?(f[248]|f1[26]|[iu][1248])", descr):
        try:
            return np.dtype(descr)
        except TypeError:  # long doubles are of another size here
            pass
    if "O" in str(descr):
        raise InputError(f"{where}: it holds Python objects, which are never read; store floats")
    raise InputError(f"{where}: dtype {str(descr)[:40]} is not real numbers; store floats")


@contextmanager
def open_npy(source: Descriptor, key: str | None, single: bool = False) -> Iterator[Rows]:
    """Rows (b, d) of a .npy file, in blocks; single: one vector is one row.

    Raises InputError as `Header.parse` does, and for a key.
    """
    no_key(source.path, key)
    head, check = source.read(0, min(source.size, limits.NPY_HEADER + 12)), _check_single if single else check_rows
    header = as_rows(Header.parse(head, source.size, str(source.path), check))
    if header.fortran:
        yield _from_columns(source, header)
    else:
        step = max(limits.BLOCK, header.width)
        yield _from_stream(source.chunks(header.offset, source.size - header.offset, step), header)


def check_rows(where: str, shape: Sequence[int], kind: str, dtype: Any) -> None:
    """Raise InputError as `check_shape` does, for all but rows (n, d), or (n, d, 1, 1): maps of one position."""
    check_shape(where, _cut(shape), kind, dtype)


def _check_single(where: str, shape: Sequence[int], kind: str, dtype: Any) -> None:
    check_rows(where, (1, *shape) if len(shape) == 1 else shape, kind, dtype)


def _cut(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def as_rows(header: Header) -> Header:
    """The header of the same numbers as (n, d)."""
    return replace(header, shape=(1, *header.shape) if len(header.shape) == 1 else _cut(header.shape))


@contextmanager
def open_npz(source: Descriptor, key: str | None, most: float | None) -> Iterator[Rows]:
    """Rows (b, d) of one array of a .npz archive, in blocks; the checksum is verified to the end, whatever is read.

    Raises InputError as `Header.parse`, `Zip` and `choose` do, and for what unpacks to too much (most: in GiB).
    """
    archive = Zip(source)
    keys = [name.removesuffix(".npy") for name in archive.records if name.endswith(".npy")]
    key = choose(source.path, keys, key)
    record, where = archive.records[f"{key}.npy"], f"{source.path}: array {key!r}"
    check_unpacked(where, record.size, record.packed, most)
    pieces = archive.stream(record, limits.BLOCK)
    header, stream = parsed(pieces, record.size, where, check_rows)
    header = as_rows(header)
    if header.fortran:
        check_memory(where, 2 * record.size, "an array in Fortran's order, unpacked,")
        flat = np.frombuffer(bytearray().join(stream), header.dtype)
        yield iter([flat.reshape(header.shape, order="F")])
    else:
        yield _from_stream(stream, header)
    for _ in pieces:
        pass


def parsed(
    pieces: Iterator[bytes], size: int, where: str, check: Callable[..., None] = check_shape
) -> tuple[Header, Iterator[bytes]]:
    """(header, the bytes of the numbers) of a .npy of `size` bytes that comes in pieces. Raises as `Header.parse`."""
    head = bytearray()
    while len(head) <= limits.NPY_HEADER + 12 and (piece := next(pieces, None)) is not None:
        head += piece
    header = Header.parse(bytes(head[: limits.NPY_HEADER + 12]), size, where, check)
    return header, chain([bytes(head[header.offset :])], pieces)


def _from_stream(pieces: Iterator[bytes], header: Header) -> Rows:
    """Rows of an array in C's order, of which `pieces` are all bytes."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        stop = len(rest) // header.width * header.width
        if stop:
            yield np.frombuffer(rest[:stop], header.dtype).reshape(-1, header.shape[1])
            rest = rest[stop:]


def _from_columns(source: Descriptor, header: Header) -> Rows:
    """Rows of an array in Fortran's order, gathered from its columns."""
    (n, d), item = header.shape, header.dtype.itemsize
    step = max(1, 4 * limits.BLOCK // header.width)
    for start in range(0, n, step):
        block = np.empty((d, min(step, n - start) * item), np.uint8)
        for column, target in enumerate(block):
            source.into(target, header.offset + (column * n + start) * item)
        yield block.view(header.dtype).T
