"""TIFFs beyond Pillow's 8-bit colour: the pages of a file, and images of any number of channels.

A page is copied into a TIFF of its own, with the tags that decoding needs and no others.  Of several channels it is
written down as one wide grey image, which libtiff unpacks whatever the compression; what that leaves undone, the
differences of a predictor, is undone here.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files import limits

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, SIZES = 256, 257, 258, 259, 262, 273, 277, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_OFFSETS, TILE_SIZES, EXTRA, FORMAT = 284, 317, 322, 324, 325, 338, 339
REDUCED = 254
PLAIN = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions that see bytes, not channels
# Tags that decoding needs, with how many values each may have; a strip or tile has one offset and one size.
TAGS = {
    **dict.fromkeys((REDUCED, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, 266, 274, SAMPLES, 278, PLANAR), 64),
    **dict.fromkeys((292, 293, PREDICTOR, TILE_WIDTH, 323, EXTRA, FORMAT, 529, 530, 531, 532), 64),
    **dict.fromkeys((OFFSETS, SIZES, TILE_OFFSETS, TILE_SIZES), limits.TILES_OF_TIFF),
    **dict.fromkeys((320, 347), 3 << 16),  # colours, tables of JPEG
}
_LETTERS = {1: "B", 3: "H", 4: "L", 5: "Q", 7: "B", 16: "Q"}  # of types of values; 5 is a fraction
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Page:
    """A page of a TIFF: {tag: (type, values)}, and the order of bytes ("<" or ">")."""

    order: str
    tags: dict[int, tuple[int, tuple[int, ...]]]

    def value(self, tag: int, default: int = 1) -> int:
        """The first value of a tag; `default` where it is absent or holds none."""
        values = self.tags[tag][1] if tag in self.tags else ()
        return values[0] if values else default

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.value(WIDTH, 0), self.value(HEIGHT, 0)

    @property
    def reduced(self) -> bool:
        """Whether it is a smaller copy of another, or a mask."""
        return bool(self.value(REDUCED, 0) & 5)

    @property
    def channels(self) -> int:
        """Samples a pixel."""
        return self.value(SAMPLES)

    @property
    def alpha(self) -> bool:
        """Whether the last channel is how opaque a pixel is."""
        return self.channels == self._colours + 1 and self.value(EXTRA, 0) in (1, 2)

    @property
    def beyond_pillow(self) -> bool:
        """Whether Pillow would lose digits of it, or has no name for its channels."""
        grey_or_rgb = self.value(PHOTOMETRIC, 1) in (0, 1, 2)
        deep = self.channels > 1 and max(self.tags[BITS][1]) > 8
        return grey_or_rgb and (deep or (self.channels != self._colours and not self.alpha))

    @property
    def _colours(self) -> int:
        return {2: 3, 5: 4, 6: 3, 8: 3}.get(self.value(PHOTOMETRIC, 1), 1)


def pages(read: Read, size: int) -> Iterator[Page]:
    """The pages of a TIFF of `size` bytes, of which `read(start, size)` gives any.

    Raises InputError: damaged, over `limits.PAGES` pages, more values of a tag than an image has.
    """
    head = read(0, 16)
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    pointer = struct.Struct(order + ("Q" if big else "L"))
    number, entry = (struct.Struct(order + text) for text in (("Q", "HHQ8s") if big else ("H", "HHL4s")))
    (start,) = pointer.unpack_from(head, pointer.size)
    seen: set[int] = set()
    while start:
        if start in seen or len(seen) >= limits.PAGES:
            raise InputError(f"a damaged TIFF, or over {limits.PAGES} pages; refused")
        seen.add(start)
        (count,) = number.unpack(read(start, number.size))
        if count > 1 << 12:
            raise InputError(f"{count} tags in a page of a TIFF; refused")
        table = read(start + number.size, count * entry.size + pointer.size)
        tags: dict[int, tuple[int, tuple[int, ...]]] = {}
        for k in range(count):
            tag, kind, values, data = entry.unpack_from(table, k * entry.size)
            if tag in TAGS and kind in _LETTERS and tag not in tags:
                if values > TAGS[tag]:
                    raise InputError(f"{values} values of tag {tag} in a TIFF")
                form = struct.Struct(f"{order}{values}{_LETTERS[kind]}")
                (place,) = pointer.unpack_from(data)
                tags[tag] = kind, form.unpack_from(data if form.size <= len(data) else read(place, form.size))
        yield Page(order, tags)
        (start,) = pointer.unpack_from(table, count * entry.size)


def several(contents: bytes) -> bool:
    """Whether a TIFF holds further pages of the size of its first, reduced copies and masks aside."""
    all_pages = pages(lambda start, size: contents[start : start + size], len(contents))
    try:
        first = next(all_pages, None)
        return first is not None and any(page.size == first.size and not page.reduced for page in all_pages)
    except (InputError, KeyError, struct.error):
        return False


def alone(page: Page, read: Read, most: int) -> bytes:
    """A TIFF of this page alone. Raises InputError: it has over `most` bytes, or lacks what a page has."""
    strips, sizes = (OFFSETS, SIZES) if OFFSETS in page.tags else (TILE_OFFSETS, TILE_SIZES)
    if not {WIDTH, HEIGHT, strips, sizes} <= page.tags.keys():
        raise InputError("a damaged TIFF: no strips or tiles")
    starts, lengths = page.tags[strips][1], page.tags[sizes][1]
    if len(starts) != len(lengths) or sum(lengths) > min(most, 1 << 31):
        raise InputError(f"{sum(lengths)} bytes of strips, over {most}; give a larger max_pixels=")
    data = [read(start, length) for start, length in zip(starts, lengths, strict=True)]
    return _written(page, strips, data)


def _written(page: Page, strips: int, data: list[bytes]) -> bytes:
    """The bytes of a classic TIFF; the strips come last."""
    order, kept = page.order, {tag: value for tag, value in page.tags.items() if tag != REDUCED}
    kept[strips] = 4, (0,) * len(data)
    kept[strips + (6 if strips == OFFSETS else 1)] = 4, tuple(map(len, data))
    kept = {tag: (4 if kind in (5, 16) else kind, values) for tag, (kind, values) in kept.items()}
    start = 8 + 2 + 12 * len(kept) + 4
    sizes = {tag: struct.calcsize(f"{order}{len(values)}{_LETTERS[kind]}") for tag, (kind, values) in kept.items()}
    place = start + sum(size + size % 2 for size in sizes.values() if size > 4)
    starts = []
    for part in data:
        starts.append(place)
        place += len(part)
    kept[strips] = 4, tuple(starts)
    table, more = struct.pack(f"{order}H", len(kept)), b""
    for tag in sorted(kept):
        kind, values = kept[tag]
        packed = struct.pack(f"{order}{len(values)}{_LETTERS[kind]}", *values)
        inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}L", start + len(more))
        table += struct.pack(f"{order}HHL", tag, kind, len(values)) + inline
        more += packed + b"\0" * (len(packed) % 2) if len(packed) > 4 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, 8)
    return b"".join((head, table, bytes(4), more, *data))


def bands(page: Page, read: Read, most: int, grey: Callable[[bytes], NDArray]) -> NDArray:
    """(h, w, c) of a page of several channels.

    most: bytes; grey: unpacks a TIFF of one 8-bit channel to (h, w).
    Raises InputError: channels of several kinds, or of none that numpy has; a predictor that is not known; damaged.
    """
    count, kind, across = page.channels, _kind(page), page.value(TILE_WIDTH, 0)
    apart, predictor = page.value(PLANAR) == 2, page.value(PREDICTOR)
    if predictor not in (1, 2, 3) or (predictor == 3) > (kind.kind == "f"):
        raise InputError(f"a TIFF of {count} channels with predictor {predictor}; store it without")
    if page.value(COMPRESSION) not in PLAIN:
        raise InputError(f"a TIFF of {count} channels in compression {page.value(COMPRESSION)}; store it with deflate")
    width = math.ceil(page.size[0] / across) * across if across else page.size[0]
    step = 1 if apart else count
    wide = {WIDTH: width, **({TILE_WIDTH: across} if across else {})}
    tags = {tag: value for tag, value in page.tags.items() if tag not in (EXTRA, PREDICTOR, FORMAT)}
    tags |= {tag: (3, (value,)) for tag, value in ((SAMPLES, 1), (BITS, 8), (PHOTOMETRIC, 1), (PLANAR, 1))}
    tags |= {tag: (4, (value * step * kind.itemsize,)) for tag, value in wide.items()}
    parts = _apart(tags, count) if apart else iter([tags])
    channels = [
        _undone(grey(alone(Page(page.order, part), read, most)), kind, predictor, across, step) for part in parts
    ]
    return np.concatenate(channels, axis=2)[:, : page.size[0], : count - page.alpha]


def _kind(page: Page) -> np.dtype:
    """The dtype of the channels."""
    bits, formats = (page.tags.get(tag, (3, (1,)))[1] for tag in (BITS, FORMAT))
    letter = {1: "u", 2: "i", 3: "f"}.get(formats[0], "")
    if len(set(bits)) > 1 or len(set(formats)) > 1 or bits[0] not in (8, 16, 32, 64) or letter + str(bits[0]) == "f8":
        raise InputError(f"a TIFF with channels of {bits} bits of the kinds {formats}; store them alike, as float32")
    if not letter:
        raise InputError("a TIFF whose channels are no real numbers; store float32")
    return np.dtype(f"{page.order}{letter}{bits[0] // 8}")


def _apart(
    tags: dict[int, tuple[int, tuple[int, ...]]], count: int
) -> Iterator[dict[int, tuple[int, tuple[int, ...]]]]:
    """The tags of each channel, whose strips or tiles follow those of the one before."""
    stored = [tag for tag in (OFFSETS, SIZES, TILE_OFFSETS, TILE_SIZES) if tag in tags]
    for channel in range(count):
        channel_tags = {}
        for tag in stored:
            each = len(tags[tag][1]) // count
            channel_tags[tag] = tags[tag][0], tags[tag][1][channel * each : (channel + 1) * each]
        yield {**tags, **channel_tags}


def _undone(octets: NDArray, kind: np.dtype, predictor: int, across: int, channels: int) -> NDArray:
    """(h, w, channels) of the bytes of rows, with the differences along each tile's rows summed up."""
    height, size = len(octets), kind.itemsize
    width = octets.shape[1] // (channels * size)
    across = across or width
    tiles = octets.reshape(height, width // across, across * size * channels)
    if predictor == 3:  # the first bytes of all numbers of a row, then the second ones, as differences
        planes = np.cumsum(tiles.reshape(height, -1, across * size, channels), axis=2, dtype=np.uint8)
        octets = planes.reshape(height, -1, size, across * channels).swapaxes(2, 3)
        kind = kind.newbyteorder(">")
    flat = np.ascontiguousarray(octets).reshape(-1).view(kind).astype(kind.newbyteorder("="))
    values = flat.reshape(height, width // across, across, channels)
    if predictor == 2:
        values = np.cumsum(values, axis=2, dtype=values.dtype)
    return values.reshape(height, width, channels)
