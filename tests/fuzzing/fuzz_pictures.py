"""Edits of image files: fields of their headers and chunks, with the checksums mended."""

import struct
import zlib
from random import Random

SIZES = (0, 1, 2, 255, 256, 5000, 30_000, 60_000, 65_535, 65_536, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1)

# Files of other kinds that Pillow or another reader might know; each under the name that the file had.
DISGUISES = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(executed) (w) file closefile showpage\n",
    b"\xc5\xd0\xd3\xc6" + struct.pack("<2L", 32, 64) + bytes(20) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    b"8BPS\0\1" + bytes(6) + struct.pack(">H2L2H", 3, 9, 11, 8, 3) + bytes(80),
    b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<2L", 100, 22) + bytes(100), b"\xd7\xcd\xc6\x9a" + bytes(60),
    b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60), b"SIMPLE  =                    T" + b" " * 2850,
    b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60), b"\0\0\0\x1cftypavif" + bytes(60), b"DDS \x7c\0\0\0" + bytes(124),
    b"qoif" + struct.pack(">2L2B", 60_000, 60_000, 4, 0) + bytes(8), b"\x59\xa6\x6a\x95" + bytes(60),
    b"\x01\xda\1\1\0\3\0\x0b\0\x09\0\3" + bytes(600), b"\x0a\5\1\x08\0\0\0\0\x0a\0\x08\0" + bytes(120),
    b"/* XPM */\nstatic char * a[] = {\n\"1 1 1 1\",\n\"a c #000000\",\n\"a\"};\n",
    b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};\n",
    b"Image type: L\r\nFile size (no of images): 1\r\nName: a\r\n" + bytes(512) + b"\x1a", b"\x12\xaf" + bytes(126),
    b"BLP2" + bytes(160), b"FTEX" + bytes(60), b"icns\0\0\0\x20" + bytes(40), b"MThd" + bytes(20),
    b"\x76\x2f\x31\x01" + bytes(60), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x7fELF" + bytes(60),
    b"MZ" + bytes(62), b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"\x1f\x8b\x08" + bytes(20), b"BZh9" + bytes(20), b"\xfd7zXZ\0" + bytes(20), b"\x28\xb5\x2f\xfd" + bytes(20),
    b"Rar!\x1a\7\0" + bytes(20), b"GGUF\3\0\0\0" + bytes(20), b"\x80\x04cos\nsystem\nX\x05\0\0\0touch\x85R.", b"",
    b"\0", b"\0" * 600,
)  # fmt: skip


def _chunks(data: bytes) -> list[list[bytes]]:
    """[kind, content] of each chunk of a PNG."""
    found, place = [], 8
    while place + 12 <= len(data):
        length = struct.unpack_from(">L", data, place)[0]
        found.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += 12 + length
    return found


def png(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A chunk changed, added, lost or moved; lengths and checksums are right again, four times in five."""
    chunks, kind = _chunks(data), rng.randrange(6)
    if not chunks:
        return data[::-1], "png: none"
    if kind <= 1:
        chunk = chunks[0]
        names = ("width", "height", "depth", "colour", "compression", "filter", "interlace")
        values = list(struct.unpack(">2L5B", chunk[1][:13].ljust(13, b"\0")))
        field = rng.randrange(7)
        values[field] = rng.choice(SIZES) if field < 2 else rng.choice((0, 1, 2, 3, 4, 6, 7, 8, 16, 32, 255))
        chunk[1], note = struct.pack(">2L5B", *values), f"{names[field]} {values[field]}"
        if rng.random() < 0.3:  # and the pixels to it
            rows = min(values[1], 1000) * (min(values[0], 60_000) * 3 + 1)
            chunks[1:-1] = [[b"IDAT", zlib.compress(bytes(min(rows, 50 << 20)), 1)]]
    elif kind == 2:
        extra = rng.choice((b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"zTXt", b"iTXt", b"tEXt",
                            b"IHDR", b"IEND", b"gAMA", b"pHYs", b"sRGB", b"cHRM", b"aaaa", b"\0\0\0\0"))  # fmt: skip
        content = rng.choice((b"", bytes(rng.randrange(300)), b"a\0\0" + zlib.compress(bytes(1 << 22)), b"\xff" * 26))
        chunks.insert(rng.randrange(len(chunks) + 1), [extra, content])
        note = f"{extra!r} of {len(content)} bytes"
    elif kind == 3:
        del chunks[rng.randrange(len(chunks))]
        note = "a chunk lost"
    elif kind == 4:
        rng.shuffle(chunks)
        note = "chunks in another order"
    else:
        chunk = rng.choice(chunks)
        place = rng.randrange(len(chunk[1]) + 1)
        chunk[1] = chunk[1][:place] + rng.randbytes(rng.randrange(1, 5)) + chunk[1][place + rng.randrange(5) :]
        note = f"within {chunk[0]!r}"
    broken = rng.randrange(len(chunks) or 1) if rng.random() < 0.2 else -1
    out = data[:8]
    for index, (name, content) in enumerate(chunks):
        length = rng.choice(SIZES) if index == broken else len(content)
        out += struct.pack(">L", length) + name + content + struct.pack(">L", zlib.crc32(name + content))
    return out, f"png: {note}"


SHORTS = (0, 1, 2, 3, 5, 6, 7, 8, 16, 32773, 34925, 50000, 65535)
SEGMENTS = (
    b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0", b"ICC_PROFILE\0\1\1" + bytes(99),
    b"MPF\0II*\0" + bytes(40), bytes(60_000),
)  # fmt: skip
TAGS = (
    254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 324, 330, 338, 339, 347, 34665, 34853, 65535,
)  # fmt: skip


def jpeg(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A field of a segment changed, or a segment added, lost or doubled."""
    places, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        places.append(place)
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    places.append(place)  # the scan
    chosen = rng.choice(places)
    end = chosen + 2 + struct.unpack_from(">H", data.ljust(chosen + 4, b"\0"), chosen + 2)[0]
    frames = [p for p in places if data[p + 1 : p + 2] in (b"\xc0", b"\xc1", b"\xc2")]
    kind = rng.randrange(6)
    if kind <= 1 and frames:
        offset, kind_of = rng.choice(((5, ">H"), (7, ">H"), (4, "B"), (9, "B"), (11, "B")))
        small = rng.choice((0, 1, 3, 4, 17, 0x22, 0x44, 255))
        value = struct.pack(kind_of, small if kind_of == "B" else rng.choice(SIZES) & 65535)
        place = frames[0] + offset
        return data[:place] + value + data[place + len(value) :], f"jpeg: frame byte {offset}"
    if kind == 2:
        return data[: chosen + 2] + struct.pack(">H", rng.choice(SIZES) & 65535) + data[chosen + 4 :], "jpeg: a length"
    if kind == 3:
        content = rng.choice((*SEGMENTS, b"Adobe\0d\0\0\0\0" + bytes([rng.randrange(4)])))
        code = rng.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0xDC, 0xDD, 0xDB, 0xC4))
        added = b"\xff" + bytes([code]) + struct.pack(">H", len(content) + 2) + content
        return data[:chosen] + added + data[chosen:], "jpeg: a segment more"
    if kind == 4:
        return data[:chosen] + data[end:], "jpeg: a segment lost"
    return data[:end] + data[chosen:], "jpeg: a segment twice"


def tiff(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A tag, kind, count or value of an entry of the first directory, or where the next directory is."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "L", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    place = start + 2 + 12 * rng.randrange(max(count, 1))
    changed = bytearray(data.ljust(place + 16, b"\0"))
    field = rng.randrange(6)
    if field == 0:
        struct.pack_into(order + "H", changed, place, rng.choice(TAGS))
    elif field == 1:
        struct.pack_into(order + "H", changed, place + 2, rng.randrange(20))
    elif field == 2:
        struct.pack_into(order + "L", changed, place + 4, rng.choice(SIZES))
    elif field == 3:
        struct.pack_into(order + "L", changed, place + 8, rng.choice((*SIZES, start, 8)))
    elif field == 4:  # 16 bits, as most values are
        struct.pack_into(order + "H", changed, place + 8, rng.choice(SHORTS))
    else:
        after = min(start + 2 + 12 * count, len(changed) - 4)
        struct.pack_into(order + "L", changed, after, rng.choice((start, 0, 8, *SIZES)))
    return bytes(changed), f"tiff: entry {(place - start - 2) // 12}, field {field}"


def header(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A number among the first bytes (GIF, WebP, BMP), or among the first words of a PPM."""
    if data[:1] == b"P":
        words = data[:30].split(maxsplit=4)
        place = rng.randrange(1, 4)
        words[place] = rng.choice((b"0", b"-1", b"1e5", b"99999", b"65536", b"9" * 400, b"#", b"1 1", b"\xff"))
        return b"\n".join(words) + data[30:], f"header: word {place}"
    width = rng.choice((1, 2, 4))
    place = rng.randrange(0, 60 - width)
    value = (rng.choice((-1, 1)) * rng.choice(SIZES) & (1 << 8 * width) - 1).to_bytes(width, "little")
    return data[:place] + value + data[place + width :], f"header: bytes {place} to {place + width}"
