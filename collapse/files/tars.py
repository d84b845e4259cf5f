"""Tar archives by an index of names and places: nothing is unpacked, and no file outlasts what its headers say.

ustar, GNU's long names and pax's paths and sizes are understood; sparse members and compressed archives are not.
"""

import re
from typing import NamedTuple

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor

BLOCK = 512
_FILES, _EMPTY = b"07\0", b"123456"  # types of members: plain files; links, devices and folders, which hold no bytes
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes lie."""

    name: str
    start: int
    size: int


def is_tar(head: bytes) -> bool:
    """Whether a file begins as a tar that is not compressed: the checksum of its first header is right."""
    block = head[:BLOCK]
    total = _octal(block[148:156]) if len(block) == BLOCK else None
    return total is not None and total == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def members(source: Descriptor) -> tuple[list[Member], list[str]]:
    """(the files of an archive in order, the names of links, which are not followed).

    Raises InputError: compressed, damaged (a checksum, a size), truncated, a sparse file, two files of one name, over
    `limits.ENTRIES` entries.
    """
    files: dict[str, Member] = {}
    links: list[str] = []
    said: dict[str, str] = {}  # what a header said of the next member, by pax's names
    place = 0
    for _ in range(limits.ENTRIES):
        block = source.read(place, BLOCK)
        if block == bytes(BLOCK):
            return list(files.values()), links
        name, size, kind = _header(source, block, place)
        start, place = place + BLOCK, place + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            said |= _extension(source, kind, start, size)
            continue
        if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in said):
            raise InputError(f"{source.path}: {name!r} is stored sparse; make the tar anew without --sparse")
        name = said.get("path", name)
        if "size" in said and kind not in _EMPTY:
            size = _decimal(source, said["size"])
            place = start + -(-size // BLOCK) * BLOCK
        if name in files:
            raise InputError(f"{source.path}: two files are called {name!r}; refused, make the tar anew")
        if kind in _FILES and not name.endswith("/"):
            files[name] = Member(name, start, size)
        elif kind in b"12":
            links.append(name)
        said = {}
    raise InputError(f"{source.path}: over {limits.ENTRIES} entries; refused")


def _header(source: Descriptor, block: bytes, place: int) -> tuple[str, int, bytes]:
    """(name, bytes, type) of the member whose header is `block`."""
    total = _octal(block[148:156])
    if total is None or total != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        what = f"damaged at byte {place}; fetch the file again" if place else "a damaged or compressed tar, or none"
        raise InputError(f"{source.path}: {what}")
    kind, field = block[156:157], block[124:136]
    # GNU writes sizes of 8 GiB and more in base 256, whose first byte is 255 for a negative number.
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None:
        raise InputError(f"{source.path}: a member at byte {place} without a size of bytes; fetch the file again")
    prefix = block[345:500] if block[257:263] == b"ustar\0" else b""
    name = b"/".join(part.partition(b"\0")[0] for part in (prefix, block[:100]) if part[:1] != b"\0" and part)
    return _text(name), 0 if kind in _EMPTY else size, kind


def _octal(field: bytes) -> int | None:
    digits = field.strip(b"\0 ")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _decimal(source: Descriptor, text: str) -> int:
    if not re.fullmatch("[0-9]{1,19}", text):
        raise InputError(f"{source.path}: a member's size is {text[:40]!r}; fetch the file again")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _extension(source: Descriptor, kind: bytes, start: int, size: int) -> dict[str, str]:
    """What a header of long names or of pax says of the next member."""
    if size > limits.TAR_HEADER:
        raise InputError(f"{source.path}: a header of {size} bytes, at most {limits.TAR_HEADER} are read; refused")
    data = source.read(start, size)
    if kind in (_LONG_NAME, _LONG_LINK):
        return {"path": _text(data.partition(b"\0")[0])} if kind == _LONG_NAME else {}
    said, place = {}, 0
    while place < len(data):  # LENGTH KEY=VALUE\n
        match = _PAX_LENGTH.match(data, place)
        length = int(match[1]) if match else 0
        key, equals, value = data[place : place + length].partition(b"=")
        if not match or not equals or not value.endswith(b"\n") or place + length > len(data):
            raise InputError(f"{source.path}: a damaged pax header at byte {start}; fetch the file again")
        said[_text(key[len(match[0]) :])] = _text(value[:-1])
        place += length
    # A global header is about all members: no name or size of one, but whether they are sparse.
    return said if kind == _PAX else {key: said[key] for key in said if key.startswith("GNU.sparse")}
