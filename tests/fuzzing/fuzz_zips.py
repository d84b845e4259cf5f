"""Edits of zip archives: directories and headers that lie, two of what there should be one of, odd records."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

Inner = Callable[[bytes, str, Random], tuple[bytes, str]]
LOCAL, CENTRAL, END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s4B4HL2L5H2L"), struct.Struct("<4s4H2LH")
NAMES = (
    b"../up", b"/absolute", b"C:\\a", b"a\nb", b"\xff\xfe", b"", b"a" * 300, b"\x00", b"folder/", b".hidden",
    b"constants.pkl", b"archive/constants.pkl", b"data.pkl", b"a/version", b"byteorder", b"a.npy", b"x.png",
)  # fmt: skip
METHODS = (0, 1, 8, 9, 12, 14, 93, 95, 99, 65535)


@dataclass
class Entry:
    """A record: what its own header says, what the directory says of it, and its packed bytes."""

    name: bytes
    data: bytes  # unpacked
    method: int = 0
    packed: bytes | None = None  # as it lies in the file, if not what `method` makes of `data`
    local: dict[str, int | bytes] = field(default_factory=dict)  # fields of its own header that differ
    central: dict[str, int | bytes] = field(default_factory=dict)  # and of the directory's
    extra: bytes = b""

    def bytes(self) -> bytes:
        """As it is stored."""
        if self.packed is not None:
            return self.packed
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        return packer.compress(self.data) + packer.flush() if self.method == 8 else self.data

    def fields(self, changes: dict) -> dict:
        """What a header says."""
        sizes = {"crc": zlib.crc32(self.data), "packed": len(self.bytes()), "size": len(self.data)}
        true = {"version": 20, "flags": 0, "method": self.method, **sizes, "name": self.name, "extra": self.extra}
        return {**true, **changes}


def parse(data: bytes) -> list[Entry]:
    """The records of a sound archive, whose extra fields are left out."""
    count, _, place = END.unpack_from(data, data.rfind(b"PK\5\6"))[4:7]
    entries = []
    for _ in range(count):
        found = CENTRAL.unpack_from(data, place)
        method, size, packed, name, header = found[6], found[11], found[10], found[12], found[18]
        start = place + CENTRAL.size
        place = start + name + found[13] + found[14]
        begin = header + LOCAL.size + sum(LOCAL.unpack_from(data, header)[9:11])
        raw = data[begin : begin + packed]
        unpacked = zlib.decompress(raw, -15) if method == 8 else raw
        assert len(unpacked) == size
        entries.append(Entry(data[start : start + name], unpacked, method))
    return entries


def _header(sign: bytes, about: dict, place: int | None = None) -> bytes:
    name, extra = about["name"], about["extra"]
    clipped = [about[key] & 0xFFFFFFFF for key in ("crc", "packed", "size")]
    if place is None:
        return LOCAL.pack(sign, about["version"] & 65535, about["flags"], about["method"], 0, 0x21, *clipped,
                          len(name), len(extra)) + name + extra  # fmt: skip
    fixed = (sign, 20, 3, about["version"] & 255, 0, about["flags"], about["method"], 0, 0x21)
    rest = (len(name), len(extra), 0, about.get("disk", 0), 0, 0o644 << 16, place & 0xFFFFFFFF)
    return CENTRAL.pack(*fixed, *clipped, *rest) + name + extra


def build(entries: list[Entry], end: dict | None = None, align: bool = False, between: bytes = b"") -> bytes:
    """The archive of these records; `end`: what the end record says otherwise; `between`: before the directory."""
    out, places = bytearray(), []
    for entry in entries:
        about = entry.fields(entry.local)
        if align:  # as torch does: each record begins at a multiple of 64
            gap = -(len(out) + LOCAL.size + len(about["name"]) + 4) % 64
            about["extra"] = b"FB" + struct.pack("<H", gap) + b"Z" * gap
        places.append(entry.central.get("place", len(out)))
        out += _header(b"PK\3\4", about) + entry.bytes()
    out += between
    start = len(out)
    for entry, place in zip(entries, places, strict=True):
        out += _header(b"PK\1\2", entry.fields(entry.central), place)
    count, size = len(entries), len(out) - start
    true = {"disk": 0, "first": 0, "here": count, "count": count, "size": size, "start": start, "comment": 0}
    about = {**true, **(end or {})}
    widths = (65535,) * 4 + (0xFFFFFFFF,) * 2 + (65535,)
    return bytes(out) + END.pack(
        b"PK\5\6", *(value & width for value, width in zip(about.values(), widths, strict=True))
    )


def zip64(data: bytes, rng: Random) -> bytes:
    """The same archive with end records of 64 bits, one of whose values may be wrong."""
    place = data.rfind(b"PK\5\6")
    _, _, _, here, count, size, start, _ = END.unpack_from(data, place)
    values = [44, 45, 45, 0, 0, here, count, size, start]
    where = place
    if rng.random() < 0.7:
        values[rng.choice((0, 3, 4, 5, 6, 7, 8))] = rng.choice((0, 1, 2**31, 2**32 - 1)) + rng.choice((0, 1))
    if rng.random() < 0.3:
        where = rng.choice((0, 2**63, len(data), place - 1))
    widths = (2**64 - 1, 65535, 65535, 2**32 - 1, 2**32 - 1, *[2**64 - 1] * 4)
    clipped = (value & width for value, width in zip(values, widths, strict=True))
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", *clipped)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, where, rng.choice((0, 1, 1, 1, 2)))
    end = END.pack(b"PK\5\6", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:place] + record + locator + (end if rng.random() < 0.7 else data[place:])


def _lie(entry: Entry, rng: Random, integers: tuple[int, ...]) -> str:
    """Another value in one header, or in both."""
    name = rng.choice(("version", "flags", "method", "crc", "packed", "size", "name", "extra", "place", "disk"))
    value: int | bytes = rng.choice(integers) & 0xFFFFFFFF
    if name == "name":
        value = rng.choice(NAMES)
    elif name == "extra":
        long = b"\1\0\x08\0" + struct.pack("<Q", rng.choice(integers))
        value = rng.choice((long, b"\1\0\xff\xff", b"up\5\0\1abcd", b"x"))
    elif name == "method":
        value = rng.choice(METHODS)
    elif name == "flags":
        value = rng.choice((1, 8, 0x20, 0x40, 0x800, 0x2000, 0xFFFF))
    elif name in ("version", "disk"):
        value = value & 65535
    elif name in ("packed", "size") and rng.random() < 0.5:
        value = max(0, len(entry.data) + rng.choice((-1, 1, -100, 100)))
    where = rng.choice(("local", "central", "both"))
    for sign, header in (("local", entry.local), ("central", entry.central)):
        if where in (sign, "both") and (name != "place" or sign == "central"):
            header[name] = value
    return f"{where} {name} of {entry.name!r:.40} is {value!r:.40}"


def _two(entries: list[Entry], inner: Inner, rng: Random, align: bool) -> tuple[bytes, str]:
    """Two archives in one: which of the directories is meant depends on the reader."""
    chosen = rng.randrange(len(entries))
    data, note = inner(entries[chosen].data, entries[chosen].name.decode("latin-1"), rng)
    other = [*entries]
    other[chosen] = replace(entries[chosen], data=data)
    first, second = (
        build(part, align=align) for part in ((entries, other) if rng.random() < 0.5 else (other, entries))
    )
    way = rng.randrange(3)
    if way == 0 or len(second) > 65535:
        return first + second, f"two archives, {note}"
    end = first.rfind(b"PK\5\6")
    size, start = END.unpack_from(first, end)[5:7]
    directory = first[start : start + size]
    if way == 1:  # the end record points at the first, the second lies before it
        return first[:start] + directory + directory + first[end:], "the directory twice"
    ending = first[end : end + 20] + struct.pack("<H", len(second)) + second
    return first[:end] + ending, f"an archive in the comment, {note}"


def edit(data: bytes, rng: Random, inner: Inner, integers: tuple[int, ...]) -> tuple[bytes, str]:
    """The archive with one thing wrong, and what: half the time in what a record holds, its checksum mended."""
    try:
        entries = parse(data)
    except Exception:  # an archive that was edited before
        return data[: rng.randrange(len(data))], "zip cut"
    if not entries:
        return data, "empty zip"
    align = b"FB" in data[:80]
    chosen = rng.choice(entries)
    kind = rng.randrange(16)
    if kind < 8:
        wanted = [e for e in entries if e.name.endswith((b"data.pkl", b".npy", b".png"))] if rng.random() < 0.7 else []
        chosen = rng.choice(wanted or entries)
        chosen.data, note = inner(chosen.data, chosen.name.decode("latin-1"), rng)
        return build(entries, align=align), f"{chosen.name!r}: {note}"
    if kind == 8:
        name = rng.choice(("disk", "first", "here", "count", "size", "start", "comment"))
        return build(entries, {name: rng.choice(integers)}, align), f"end record: {name}"
    if kind == 9:
        return _two(entries, inner, rng, align)
    if kind == 10:
        entries.insert(rng.randrange(len(entries) + 1), replace(chosen, data=rng.choice((chosen.data, b"other"))))
        return build(entries, align=align), f"{chosen.name!r} twice"
    if kind == 11:
        return zip64(build(entries, align=align), rng), "zip64"
    if kind == 12:
        chosen.method = 8 - chosen.method if chosen.method in (0, 8) else 0
        chosen.data = rng.choice((chosen.data, b"", bytes(rng.choice((1 << 16, 1 << 22, 1 << 26)))))
        return build(entries, align=align), f"{chosen.name!r} packed by {chosen.method}, {len(chosen.data)} bytes"
    if kind == 13:
        chosen.name = rng.choice((*NAMES, chosen.name.upper(), rng.choice(entries).name, b"data/" + chosen.name))
        return build(entries, align=align), f"a record called {chosen.name!r}"
    if kind == 14:
        way = rng.randrange(4)
        if way == 0:
            entries.remove(chosen)
        elif way == 1:
            rng.shuffle(entries)
        junk = b"junk" * rng.randrange(1, 9)
        made = build(entries, align=align, between=junk if way == 2 else b"")
        return (junk + made if way == 3 else made), ("a record missing", "another order", "junk inside", "junk before")[
            way
        ]
    return _lied(entries, rng, integers, align)


def _lied(entries: list[Entry], rng: Random, integers: tuple[int, ...], align: bool) -> tuple[bytes, str]:
    notes = [_lie(rng.choice(entries), rng, integers) for _ in range(rng.choice((1, 1, 2)))]
    return build(entries, align=align), ", ".join(notes)
