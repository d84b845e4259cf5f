"""Images of many kinds from their bytes, by the parts of Pillow that are named here and no others.

The bytes say what kind an image is, not the ending of its name. How large it is, is read from its header first.
Metadata and further pages or frames, which no network sees, are taken away before Pillow looks.  What Pillow would cut
to 8 bits, or has no name for, comes as numbers instead.
"""

import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from collapse import InputError
from collapse.files import limits, tiffs

JPEG = b"\xff\xd8\xff"


class UnreadableImage(InputError):
    """An image that cannot be read: its place, and why."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{printable(self.path)}: not a readable image ({self.why})"


def printable(name: str) -> str:
    """A name as a message shows it: control characters escaped."""
    return "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in name)


class _Refused(Exception):
    """What a file claims is over a limit, or contradicts itself."""


def _open_avif(file: io.BytesIO) -> Image.Image:
    try:
        plugin = import_module("PIL.AvifImagePlugin")
    except ImportError as error:
        raise _Refused("AVIF wants Pillow 11.3 or later") from error
    return plugin.AvifImageFile(file)


class Kind(NamedTuple):
    """What an image begins with, the usual endings of its name, what opens it, and what comes before that.

    share: its decoder takes so many times the memory of others, so the limit of pixels is divided by it.
    """

    magic: re.Pattern[bytes] | None
    endings: str
    open: Callable[[io.BytesIO], Image.Image]
    prepare: Callable[[bytes, int], bytes] = lambda contents, most: contents
    share: int = 1


def kind_of(head: bytes, name: str = "") -> str | None:
    """The kind of an image that begins with `head`, 32 bytes or more; None if it is none that is read.

    TGA alone has nothing that it begins with: it is recognised by the ending of `name`.
    """
    recognised = next((kind for kind, reader in KINDS.items() if reader.magic and reader.magic.match(head)), None)
    return recognised or ("TGA" if name.lower().endswith(".tga") else None)


def decode(contents: bytes, path: str, most: int = limits.PIXELS) -> Image.Image | NDArray:
    """The image in the bytes of the file `path`, the first if there are several.

    Of 8 bits a channel it is Pillow's.  Deeper ones, and those of other numbers of channels, are (h, w, c) as stored.
    most: pixels, height times width, up to which it is decoded.
    Raises UnreadableImage: another kind of file, damaged, truncated, or too large.
    """
    kind = kind_of(contents[:32], path)
    if kind is None:
        raise UnreadableImage(path, f"empty or not {', '.join(KINDS)}" if contents else "empty")
    reader, most = KINDS[kind], most // KINDS[kind].share
    try:
        with _quietly(most), _mute() if kind == "TIFF" else nullcontext():
            numbers = _NUMBERS[kind](contents, most) if kind in _NUMBERS else None
            if numbers is not None:
                return numbers
            image = reader.open(io.BytesIO(reader.prepare(contents, most)))
            _within(image.size, most)
            _check_work(image, contents)
            image.load()
        return np.array(image)[..., None] if image.mode.startswith("I") or image.mode == "F" else image
    except Exception as error:  # decoders of damaged files fail in many ways, all the file's fault
        raise UnreadableImage(path, reason(error)) from error


def reason(error: Exception) -> str:
    """An error of somebody else's in a few words."""
    if isinstance(error, (struct.error, IndexError, KeyError, AssertionError)):
        return "truncated or damaged"
    if isinstance(error, MemoryError):
        return "out of memory"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


@contextmanager
def _quietly(most: int) -> Iterator[None]:
    """Without Pillow's warnings about metadata, and with `most` for its own limit, which is for the whole process."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _mute() -> Iterator[None]:
    """Without what libtiff itself writes to stderr about a damaged file."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _within(size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise _Refused(f"{size[0]} x {size[1]} pixels, over {most}; give a larger max_pixels=")


_SAMPLES = {2: 3, 4: 2, 6: 4}  # of a PNG's pixel, by its colour type; others have one


def _check_work(image: Image.Image, contents: bytes) -> None:
    """Refuse what takes far longer, or more memory, than its pixels.

    One jump in a packed BMP may skip 255 rows, and Pillow fills them.  Each scan of a progressive JPEG, of a few bytes,
    passes over all its pixels.  A PNG that is cut is read as black to its end; deflate packs at most 1032 to 1, and one
    of fewer bytes than that has no such pixels.
    """
    if image.format == "PNG" and contents[12:16] == b"IHDR":
        row = -(-image.width * contents[24] * _SAMPLES.get(contents[25], 1) // 8)
        if image.height * row > limits.DEFLATE * len(contents):
            raise _Refused(f"truncated: {len(contents)} bytes hold no {image.width} x {image.height} pixels")
    if image.format == "BMP" and image.tile[0][0] == "bmp_rle" and image.width > limits.RUN_WIDTH:  # type: ignore[attr-defined]
        raise _Refused(f"a packed BMP {image.width} pixels wide, over {limits.RUN_WIDTH}")
    if "progressive" in image.info and contents.count(b"\xff\xda") > limits.SCANS:
        raise _Refused(f"over {limits.SCANS} scans in a JPEG")


def _little_exif(contents: bytes, most: int) -> bytes:
    """Pillow joins the pieces of Exif in a JPEG one by one: many take time in the square of their number."""
    if len(contents) > limits.JOINED and contents.count(b"Exif\0\0") > limits.SCANS:
        raise _Refused(f"over {limits.SCANS} pieces of Exif in a JPEG")
    return contents


def _webp_canvas(contents: bytes, most: int) -> bytes:
    """Pillow allocates the canvas of a WebP as it opens it."""
    head = contents[:30]
    if head[12:16] == b"VP8X":
        size = [int.from_bytes(head[k : k + 3], "little") + 1 for k in (24, 27)]
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        size = [(bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1]
    else:
        size = [int.from_bytes(head[k : k + 2], "little") & 0x3FFF for k in (26, 28)]
    _within((size[0], size[1]), most)
    return contents


def _few_tiles(contents: bytes, most: int) -> bytes:
    """OpenJPEG allocates every tile and component that a JPEG 2000 declares as it reads the header."""
    for match in re.finditer(rb"\xff\x4f\xff\x51", contents):
        _, _, x, y, left, top, width, height, x0, y0, components = struct.unpack_from(
            ">HHIIIIIIIIH", contents, match.end()
        )
        _within((x - left, y - top), most)
        tiles = -((x0 - x) // max(1, width)) * -((y0 - y) // max(1, height))
        if not (0 <= tiles <= limits.TILES and components <= 4 and max(x, y) < 1 << 31):
            raise _Refused(f"a JPEG 2000 of {tiles} tiles and {components} components")
    return contents


def _first_frame(contents: bytes, most: int) -> bytes:
    """A GIF without the comments and other extensions before its first frame: Pillow joins them piece by piece."""
    start = 13 + (3 << (contents[10] & 7) + 1 if contents[10] & 0x80 else 0)
    place, control = start, b""
    while contents[place] != 0x2C:  # a frame
        if contents[place] == 0x3B:
            raise _Refused("a GIF without a frame")
        begin, extension = place, contents[place] == 0x21
        place += 2 if extension else 1
        while extension and contents[place]:
            place += contents[place] + 1
        place += extension
        if extension and contents[begin + 1] == 0xF9:  # it holds the transparent colour
            control = contents[begin:place]
    return contents[:start] + control + contents[place:]


# Tags that decoding needs, those of JPEG as TIFF 6.0 had it among them.
_TAGS = {**tiffs.TAGS, **dict.fromkeys((512, 513, 514, 515, 517, 518, 519, 520, 521), 64)}
_BYTES_OF_TYPE = {1: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}


def _first_page(contents: bytes, most: int) -> bytes:
    """A TIFF whose only directory has the tags that decoding needs: no metadata, which may be read without end."""
    order = "<" if contents[:2] == b"II" else ">"
    big = 43 in contents[2:4]
    pointer = struct.Struct(order + ("Q" if big else "L"))
    number, entry = (struct.Struct(order + text) for text in (("Q", "HHQ8s") if big else ("H", "HHL4s")))
    (start,) = pointer.unpack_from(contents, pointer.size)
    (count,) = number.unpack_from(contents, start)
    kept: dict[int, tuple[int, int, int, bytes]] = {}
    for k in range(min(count, 1 << 16)):
        tag, kind, values, data = entry.unpack_from(contents, start + number.size + k * entry.size)
        if tag in _TAGS and kind in _BYTES_OF_TYPE and tag not in kept:
            kept[tag] = tag, kind, values, data
            if values > _TAGS[tag]:
                raise _Refused(f"{values} values of tag {tag} in a TIFF")
    _within((_value(kept, 322, order), _value(kept, 323, order)), most)
    place = len(contents) + len(contents) % 2
    directory = number.pack(len(kept)) + b"".join(entry.pack(*kept[tag]) for tag in sorted(kept)) + bytes(pointer.size)
    head = contents[: pointer.size] + pointer.pack(place)
    return b"".join((head, memoryview(contents)[len(head) :], bytes(place - len(contents)), directory))


def _value(entries: dict[int, tuple[int, int, int, bytes]], tag: int, order: str) -> int:
    """The number of a tag; 0 if it is not there."""
    _, kind, _, data = entries.get(tag, (tag, 4, 1, bytes(4)))
    return struct.unpack_from(order + {3: "H", 16: "Q"}.get(kind, "L"), data)[0]


def _deep_png(contents: bytes, most: int) -> NDArray | None:
    """(h, w, 3) uint16 of a PNG of 16 bits in three channels and perhaps alpha; None for any other.

    Pillow takes the first byte of each number, and the second one if it is told that the order of bytes is the other.
    """
    if contents[12:16] != b"IHDR" or contents[24] != 16 or contents[25] not in (2, 6):
        return None
    halves = []
    for order in "BL":
        image = PngImageFile(io.BytesIO(contents))
        _within(image.size, most)
        (tile,) = image.tile
        image.tile = [(*tile[:3], f"{image.mode};16{order}")]  # type: ignore[list-item]
        image.load()
        halves.append(np.asarray(image)[..., :3].astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _many_bands(contents: bytes, most: int) -> NDArray | None:
    """(h, w, c) of a TIFF of several deep channels, or of another number than 3 or 4; None for any other."""
    read = partial(_bytes_of, contents)
    page = next(tiffs.pages(read, len(contents)), None)
    if page is None or not {tiffs.WIDTH, tiffs.HEIGHT, tiffs.BITS} <= page.tags.keys() or not page.beyond_pillow:
        return None
    if page.channels > limits.CHANNELS:
        raise _Refused(f"{page.channels} channels, at most {limits.CHANNELS} are read")
    _within((page.size[0] * page.channels, page.size[1]), 4 * most)
    Image.MAX_IMAGE_PIXELS = 4 * most  # put back by `_quietly`
    return tiffs.bands(page, read, len(contents), _grey)


def _bytes_of(contents: bytes, start: int, size: int) -> bytes:
    return contents[start : start + size]


def _grey(contents: bytes) -> NDArray:
    """(h, w) of a TIFF of one channel."""
    image = TiffImageFile(io.BytesIO(contents))
    image.load()
    return np.array(image)


_NUMBERS: dict[str, Callable[[bytes, int], NDArray | None]] = {"PNG": _deep_png, "TIFF": _many_bands}
KINDS = {
    "JPEG": Kind(re.compile(JPEG), ".jpg .jpeg .jpe .jfif .mpo", JpegImageFile, _little_exif),
    "PNG": Kind(re.compile(rb"\x89PNG\r\n\x1a\n"), ".png .apng", PngImageFile),
    "GIF": Kind(re.compile(rb"GIF8[79]a"), ".gif", GifImageFile, _first_frame),
    "BMP": Kind(re.compile(rb"BM"), ".bmp", BmpImageFile),
    "WebP": Kind(re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp", WebPImageFile, _webp_canvas, 4),
    "TIFF": Kind(re.compile(rb"II[*+]\0|MM\0[*+]"), ".tif .tiff", TiffImageFile, _first_page),
    "PPM": Kind(re.compile(rb"P[1-6f]\s"), ".ppm .pgm .pbm .pnm .pfm", PpmImageFile),
    "JPEG 2000": Kind(
        re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), ".jp2 .j2k .jpx .jpf .j2c .jpc",
        Jpeg2KImageFile, _few_tiles, 4,
    ),
    "AVIF": Kind(re.compile(rb"....ftyp(avi[fs]|mif1|msf1)", re.DOTALL), ".avif", _open_avif, share=2),
    "TGA": Kind(None, ".tga", TgaImageFile),
}  # fmt: skip
ENDINGS = frozenset(" ".join(kind.endings for kind in KINDS.values()).split())
