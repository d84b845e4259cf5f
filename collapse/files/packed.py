"""How much packed bytes unpack to, found without unpacking them into memory: a kilobyte can declare a terabyte."""

import struct
import zlib
from collections.abc import Callable

ZSTD_BLOCK = 1 << 17  # bytes that a compressed block of zstd unpacks to, at most


def unpacked_size(codec: str, data: bytes, expected: int) -> int:
    """Bytes that `data`, packed by gzip, zlib, zstd, blosc or lz4 as numcodecs has them, unpacks to; -1: damaged.

    Where only an upper bound is known, and it is near `expected`, this is returned.
    """
    try:
        return _SIZES[codec](data, expected)
    except (struct.error, IndexError):
        return -1


def _deflated(data: bytes, expected: int) -> int:
    unpacker, size = zlib.decompressobj(47), 0  # 47: of gzip or zlib, as its header says
    try:
        while not unpacker.eof and data and size <= expected:
            size += len(unpacker.decompress(data, 1 << 20))
            data = unpacker.unconsumed_tail
    except zlib.error:
        return -1
    return size if unpacker.eof and not unpacker.unused_data else -1


def _blosc(data: bytes, expected: int) -> int:
    size, _, packed = struct.unpack_from("<3I", data, 4)
    return size if packed == len(data) else -1


def _lz4(data: bytes, expected: int) -> int:
    return struct.unpack_from("<I", data)[0]


def _zstd(data: bytes, expected: int) -> int:
    """RFC 8878: a frame has its size in its header; without one, the sizes of its blocks bound it."""
    magic, head = struct.unpack_from("<IB", data)
    if magic != 0xFD2FB528:
        return -1
    single, kind = head >> 5 & 1, head >> 6
    place = 5 + (not single) + (0, 1, 2, 4)[head & 3]
    length = (single, 2, 4, 8)[kind]
    if length:
        return int.from_bytes(data[place : place + length], "little") + 256 * (length == 2)
    most = _blocks(data, place)
    return expected if most < 2 * expected + ZSTD_BLOCK else -1


def _blocks(data: bytes, place: int) -> int:
    """An upper bound of what the blocks of a zstd frame unpack to."""
    most, last = 0, False
    while not last:
        word = data[place] | data[place + 1] << 8 | data[place + 2] << 16
        last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
        most += size if kind < 2 else ZSTD_BLOCK
        place += 3 + (1 if kind == 1 else size)
    return most


_SIZES: dict[str, Callable[[bytes, int], int]] = {
    "gzip": _deflated,
    "zlib": _deflated,
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
