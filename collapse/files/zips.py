"""Zip archives, read by their one directory: what a record is, where it lies, and its bytes with length and checksum.

An archive that two readers may understand differently is refused: two directories, two records of one name, a record
whose own header says something else than the directory.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import CHUNK, Descriptor

STORED, DEFLATED = 0, 8
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s4B4HL2L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1 | 0x40 | 0x2000, 0x800


@dataclass(frozen=True)
class Record:
    """One file of an archive, by the directory: its name, packing, CRC-32, bytes packed and unpacked, and its place."""

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    header: int


class Zip:
    """The archive in a `Descriptor`, whole or a window of one; `records` is by name, in the order of the directory.

    Folders, whose names end in a slash, are left out.
    Raises InputError: not a zip, truncated, several disks, two directories, two records of one name, over
    `limits.ENTRIES` records, records that overlap.
    """

    def __init__(self, source: Descriptor) -> None:
        self.source = source
        count, size, start = self._end()
        if count > limits.ENTRIES:
            raise self._wrong(f"{count} entries, at most {limits.ENTRIES} are read; refused")
        self.records = self._directory(source.read(start, size), count, start)

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self.source.path}: {what}")

    def _end(self) -> tuple[int, int, int]:
        """(records, bytes of the directory, its place); the directory must end where the end record begins."""
        source = self.source
        tail = source.read(source.size - min(source.size, 65557), min(source.size, 65557))
        place = tail.rfind(b"PK\5\6")
        if place < 0 or len(tail) - place < _END.size:
            raise self._wrong("a truncated zip, without its directory; fetch the file again")
        _, disk, first, here, count, size, start, comment = _END.unpack_from(tail, place)
        if len(tail) - place - _END.size != comment:
            raise self._wrong("a damaged zip: bytes follow its end; fetch the file again")
        stop = source.size - len(tail) + place
        if stop >= _LOCATOR64.size:
            sign, disk64, where, disks = _LOCATOR64.unpack(source.read(stop - _LOCATOR64.size, _LOCATOR64.size))
            if sign == b"PK\6\7":
                short = (here, count, size, start)
                sign, length, _, _, disk, first, *long = _END64.unpack(source.read(where, _END64.size))
                if sign != b"PK\6\6" or where + length + 12 != stop - _LOCATOR64.size or disk64 or disks > 1:
                    raise self._wrong("a damaged zip: its 64-bit end record is not where it should be")
                largest = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
                if any(a not in (b, most) for a, b, most in zip(short, long, largest, strict=True)):
                    raise self._wrong("a damaged zip, or one with two directories; refused, make it anew")
                (here, count, size, start), stop = long, where
        if disk or first or here != count:
            raise self._wrong("a zip of several disks; join it first")
        if start + size != stop:
            raise self._wrong("a damaged zip, or one with two directories; refused, make it anew")
        return count, size, start

    def _directory(self, data: bytes, count: int, stop: int) -> dict[str, Record]:
        records: dict[str, Record] = {}
        place, folders = 0, 0
        for _ in range(count):
            if len(data) - place < _CENTRAL.size or data[place : place + 4] != b"PK\1\2":
                raise self._wrong("a damaged zip directory; fetch the file again")
            (_, _, _, _, _, flags, method, _, _, crc, packed, size, long, extra, comment, _, _, _, header) = (
                _CENTRAL.unpack_from(data, place)
            )  # fmt: skip
            place += _CENTRAL.size
            raw, more = data[place : place + long], data[place + long : place + long + extra]
            place += long + extra + comment
            if place > len(data):
                raise self._wrong("a damaged zip directory; fetch the file again")
            if 0xFFFFFFFF in (size, packed, header):
                size, packed, header = self._long(more, size, packed, header)
            name = self._name(raw, flags)
            if name.endswith("/") and not size:
                folders += 1
                continue
            if name in records:
                raise self._wrong(f"two records are called {name!r}; refused, make the zip anew")
            records[name] = Record(name, method, bool(flags & _ENCRYPTED), crc, packed, size, header)
        if place != len(data):
            raise self._wrong("a damaged zip directory: bytes follow it; fetch the file again")
        self._apart(records, stop)
        return records

    def _long(self, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
        """The 64-bit values of those that do not fit 32 bits."""
        place = 0
        while place + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, place)
            if kind == 1:
                values = iter(struct.unpack_from(f"<{length // 8}Q", extra[: place + 4 + length], place + 4))
                try:
                    return tuple(next(values) if v == 0xFFFFFFFF else v for v in (size, packed, header))  # type: ignore[return-value]
                except (StopIteration, RuntimeError):
                    break
            place += 4 + length
        raise self._wrong("a damaged zip directory: a size of 64 bits is missing")

    def _name(self, raw: bytes, flags: int) -> str:
        try:
            return raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError as error:
            raise self._wrong(f"a name in the zip, {raw[:40]!r}, is not UTF-8; make the zip anew") from error

    def _apart(self, records: dict[str, Record], stop: int) -> None:
        """Records may not share bytes: a few could unpack to any size."""
        end = 0
        for record in sorted(records.values(), key=lambda r: r.header):
            if record.header < end:
                raise self._wrong(f"record {record.name!r} shares bytes with another; refused")
            end = record.header + _LOCAL.size + record.packed
        if end > stop:
            raise self._wrong("a truncated zip: a record ends behind the directory; fetch the file again")

    def place(self, record: Record) -> int:
        """Where the packed bytes of a record begin. Raises InputError: its own header differs from the directory."""
        head = self.source.read(record.header, _LOCAL.size + len(record.name))  # both lie before the directory's end
        sign, _, flags, method, _, _, _, _, _, long, extra = _LOCAL.unpack_from(head)
        start = record.header + _LOCAL.size + long + extra
        raw = head[_LOCAL.size :] if long == len(record.name) else self.source.read(record.header + _LOCAL.size, long)
        name = self._name(raw, flags)
        if sign != b"PK\3\4" or name != record.name or method != record.method:
            raise self._wrong(f"record {record.name!r} is damaged (its header differs); fetch the file again")
        if record.encrypted or flags & _ENCRYPTED:
            raise self._wrong(f"record {record.name!r} is encrypted; unpack the zip with its password first")
        if method not in (STORED, DEFLATED):
            raise self._wrong(f"record {record.name!r} is packed by method {method}; repack the zip with deflate")
        if method == STORED and record.packed != record.size:
            raise self._wrong(f"record {record.name!r} is damaged (two sizes); fetch the file again")
        self.source._within(start, record.packed)
        return start

    def read(self, record: Record, most: int) -> bytes:
        """The bytes of a record, unpacked. Raises InputError: over `most`, damaged, encrypted, packed otherwise."""
        if record.size > most:
            raise self._wrong(
                f"record {record.name!r} unpacks to {record.size} bytes, at most {most} are read; refused"
            )
        start = self.place(record)
        if record.method == DEFLATED:
            data = self._inflate(record, self.source.read(start, record.packed))
        else:
            data = self.source.read(start, record.size)
        if len(data) != record.size or zlib.crc32(data) != record.crc:
            raise self._wrong(f"record {record.name!r} is damaged (checksum); fetch the file again")
        return data

    def stream(self, record: Record, step: int = CHUNK) -> Iterator[bytes]:
        """The bytes of a record, unpacked, in pieces of at most `step`; what `read` checks is checked at the end."""
        pieces = self.source.chunks(self.place(record), record.packed, step)
        done, crc = 0, 0
        for piece in self._inflated(record, pieces, step) if record.method == DEFLATED else pieces:
            done, crc = done + len(piece), zlib.crc32(piece, crc)
            if done > record.size:
                raise self._wrong(f"record {record.name!r} does not have the size that it declares; refused")
            yield piece
        if done != record.size or crc != record.crc:
            raise self._wrong(f"record {record.name!r} is damaged (checksum); fetch the file again")

    def _inflated(self, record: Record, pieces: Iterator[bytes], step: int) -> Iterator[bytes]:
        unpacker = zlib.decompressobj(-15)
        try:
            for piece in pieces:
                while piece:
                    yield unpacker.decompress(piece, step)
                    piece = unpacker.unconsumed_tail
            while piece := unpacker.decompress(b"", step):
                yield piece
        except zlib.error as error:
            raise self._wrong(f"record {record.name!r} is damaged ({error}); fetch the file again") from error

    def head(self, record: Record, size: int) -> bytes:
        """The first `size` bytes of a record, unverified, or all if it is shorter. Raises InputError as `read` does."""
        packed = self.source.read(self.place(record), min(record.packed, size + 1024))
        try:
            return packed[:size] if record.method == STORED else zlib.decompressobj(-15).decompress(packed, size)
        except zlib.error as error:
            raise self._wrong(f"record {record.name!r} is damaged ({error}); fetch the file again") from error

    def _inflate(self, record: Record, packed: bytes) -> bytes:
        unpacker = zlib.decompressobj(-15)
        try:
            data = unpacker.decompress(packed, record.size + 1)
        except zlib.error as error:
            raise self._wrong(f"record {record.name!r} is damaged ({error}); fetch the file again") from error
        if len(data) != record.size or (not unpacker.eof and unpacker.decompress(unpacker.unconsumed_tail, 1)):
            raise self._wrong(f"record {record.name!r} does not have the size that it declares; refused")
        return data

    def into(self, target: bytearray | memoryview, record: Record) -> None:
        """Fill a buffer of `record.size` bytes with a stored record, its checksum verified."""
        start = self.place(record)
        if record.method != STORED or len(target) != record.size:
            raise self._wrong(f"record {record.name!r} is compressed, which a torch file never is; refused")
        self.source.into(target, start)
        if zlib.crc32(target) != record.crc:
            raise self._wrong(f"record {record.name!r} is damaged (checksum); fetch the file again")
