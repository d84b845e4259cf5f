"""Images of every kind from their bytes: Pillow's pixels for those that are read, a line for the rest, and quick."""

import io
import os
import random
import struct
import subprocess
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzz_pictures import DISGUISES
from PIL import Image, ImageFile, features

from collapse.files import limits, pictures
from collapse.files.pictures import UnreadableImage, decode


def encoded(kind, mode="RGB", size=(48, 41), **how):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels).resize(size).convert(mode), io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def frames(mode="P", count=3):
    return [Image.new(mode, (48, 41), k) for k in range(count)]


SAMPLES = {
    "jpeg": lambda: encoded("JPEG"),
    "progressive jpeg": lambda: encoded("JPEG", progressive=True),
    "cmyk jpeg": lambda: encoded("JPEG", "CMYK"),
    "jpeg of several pictures": lambda: encoded("MPO", save_all=True, append_images=frames("RGB")),
    "png": lambda: encoded("PNG"),
    "grey png of 16 bits": lambda: encoded("PNG", "I;16"),
    "palette png": lambda: encoded("PNG", "P"),
    "animated png": lambda: encoded("PNG", save_all=True, append_images=frames("RGB")),
    "gif": lambda: encoded("GIF", "P", comment=b"said " * 99, transparency=3),
    "animated gif": lambda: encoded("GIF", "P", save_all=True, append_images=frames(), disposal=2, loop=0),
    "bmp": lambda: encoded("BMP"),
    "packed bmp": lambda: packed_bmp(40, 30, (b"\x28\x05\0\0" * 29) + b"\x05\x02\0\x03abc\0\0\2\1\1\x05\x07\0\1"),
    "webp": lambda: encoded("WEBP"),
    "lossless webp": lambda: encoded("WEBP", "RGBA", lossless=True),
    "animated webp": lambda: encoded("WEBP", save_all=True, append_images=frames("RGB")),
    "tiff": lambda: encoded("TIFF", tiffinfo={270: "a comment", 700: b"<xmp/>", 274: 6}),
    "tiff of pages": lambda: encoded("TIFF", "L", save_all=True, append_images=frames("L")),
    "large tiff": lambda: encoded("TIFF", big_tiff=True, compression="tiff_adobe_deflate"),
    "lzw tiff": lambda: encoded("TIFF", compression="tiff_lzw", predictor=2),
    "fax tiff": lambda: encoded("TIFF", "1", compression="group4"),
    "jpeg tiff": lambda: encoded("TIFF", "YCbCr", compression="jpeg"),
    "palette tiff": lambda: encoded("TIFF", "P", compression="packbits"),
    "float tiff": lambda: encoded("TIFF", "F"),
    "ppm": lambda: encoded("PPM"),
    "pgm": lambda: encoded("PPM", "L"),
    "pbm": lambda: encoded("PPM", "1"),
    "pfm": lambda: encoded("PPM", "F"),
    "plain ppm": lambda: b"P3 # a comment\n2 2 255\n" + b"12 200 3 " * 4,
    "jpeg 2000": lambda: encoded("JPEG2000"),
    "jpeg 2000 in tiles": lambda: encoded("JPEG2000", no_jp2=True, tile_size=(16, 16)),
    "tga": lambda: encoded("TGA"),
    "13 bands in tiles": lambda: geotiff("u2-contig-deflate-predicted-tiles-little.tif"),
    "13 bands in planes": lambda: geotiff("f4-separate-None-plain-tiles-big.tif"),
    "rgb png of 16 bits": lambda: deep_png(np.random.default_rng(0).integers(0, 4096, (9, 7, 3), np.uint16)),
    "packed tga": lambda: encoded("TGA", "RGBA", compression="tga_rle"),
}
if features.check("avif"):
    SAMPLES["avif"] = lambda: encoded("AVIF")


GEOTIFFS = Path(__file__).with_name("geotiffs.zip")  # by tifffile 2026.3.3 and imagecodecs


def geotiff(name):
    with zipfile.ZipFile(GEOTIFFS) as archive:
        return archive.read(name)


def deep_png(values):
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">2L5B", values.shape[1], values.shape[0], 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def packed_bmp(width, height, data):
    about = struct.pack("<L2l2H6L", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<L2HL", 1078 + len(data), 0, 0, 1078) + about + bytes(1024) + data


def name_of(sample):
    return "x.tga" if "tga" in sample else "x.txt"


@pytest.mark.parametrize("sample", [name for name in SAMPLES if name[:2] not in ("13", "rg")])
def test_what_is_read_is_what_pillow_reads_whatever_the_name(sample):
    data = SAMPLES[sample]()
    found = decode(data, name_of(sample))
    with Image.open(io.BytesIO(data)) as theirs:
        if isinstance(found, np.ndarray):
            assert theirs.mode in ("I", "F", "I;16", "I;16B")
            np.testing.assert_array_equal(found[..., 0], np.asarray(theirs))
        else:
            assert found.size == theirs.size
            np.testing.assert_array_equal(np.asarray(found.convert("RGB")), np.asarray(theirs.convert("RGB")))


def test_channels_that_pillow_does_not_have_are_what_tifffile_wrote():
    with zipfile.ZipFile(GEOTIFFS) as archive:
        names, values = archive.namelist(), np.load(io.BytesIO(archive.read("values.npy")))
    for name in (name for name in names if name.count("-") > 1 and "four" not in name):
        found = decode(geotiff(name), name)
        assert found.dtype == np.dtype(name[:2])
        np.testing.assert_array_equal(found, values, name)
    np.testing.assert_array_equal(decode(geotiff("four-infrared.tif"), "x"), values[..., :4])
    for name in ("four-alpha.tif", "three-deep.tif"):
        np.testing.assert_array_equal(decode(geotiff(name), name), values[..., :3])
    deep = np.random.default_rng(0).integers(0, 4096, (9, 7, 3), np.uint16)
    np.testing.assert_array_equal(decode(deep_png(deep), "x"), deep)


def test_bands_that_cannot_be_told_are_one_line():
    data = geotiff("u2-contig-deflate-predicted-tiles-little.tif")
    for old, new, message in (
        (
            struct.pack("<HHLHH", 259, 3, 1, 32946, 0),
            struct.pack("<HHLHH", 259, 3, 1, 7, 0),
            "in compression 7; store it",
        ),
        (struct.pack("<HHLHH", 317, 3, 1, 2, 0), struct.pack("<HHLHH", 317, 3, 1, 3, 0), "with predictor 3; store it"),
        (struct.pack("<HHLHH", 277, 3, 1, 13, 0), struct.pack("<HHLHH", 277, 3, 1, 65, 0), "65 channels, at most 64"),
    ):
        assert data.count(old) == 1
        with pytest.raises(UnreadableImage, match=message):
            decode(data.replace(old, new), "x.tif")


OTHERS = ("EPS", "PDF", "ICO", "ICNS", "PCX", "DDS", "SGI", "SPIDER", "XBM", "DIB", "QOI")


def test_no_other_part_of_pillow_sees_a_file_and_no_program_is_started(monkeypatch):
    Image.init()
    own = {"JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"}
    others = [encoded(kind, "1" if kind == "XBM" else "RGB") for kind in OTHERS if kind in Image.SAVE]
    seen, open_ = [], ImageFile.ImageFile.__init__
    monkeypatch.setattr(ImageFile.ImageFile, "__init__", lambda self, *a: seen.append(self.format) or open_(self, *a))
    for target, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (Image, "open")):
        monkeypatch.setattr(target, name, lambda *a, name=name, **k: seen.append(name))
    for data in (*others, *DISGUISES):
        with pytest.raises(UnreadableImage) as caught:
            decode(data, "cat.png")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("cat.png: not a readable image (")
    assert set(seen) <= own
    assert decode(SAMPLES["jpeg of several pictures"](), "x.jpg").format == "JPEG"


def chunk(kind, data):
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(width, height, *chunks):
    """A black grey PNG; of large ones the beginning."""
    data = zlib.compress(bytes(min((1 + width) * height, 1 << 20)), 9)
    head = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(screen, frame, before=b""):
    head = b"GIF89a" + struct.pack("<2H3B", *screen, 0x80, 0, 0) + bytes(6)
    return head + before + b"," + struct.pack("<4HB", 0, 0, *frame, 0) + b"\2\2\x4c\1\0;"


def tiff(size, *more, data=b"abcd"):
    """A grey TIFF of one strip; more: (tag, type, count, bytes)."""
    entries = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, size[1]), (279, 4, 1, len(data))]  # fmt: skip
    entries = [entry for entry in entries if entry[0] not in [tag for tag, *_ in more]] + list(more)
    body, directory = data, b""
    for tag, kind, count, value in sorted(entries):
        if isinstance(value, bytes):
            value, body = 8 + len(body), body + value
        directory += struct.pack("<2H2L", tag, kind, count, value)
    body += bytes(len(body) % 2)
    return b"II*\0" + struct.pack("<L", 8 + len(body)) + body + struct.pack("<H", len(entries)) + directory + bytes(4)


def resized(data, marker, place, size):
    """A JPEG whose header claims another size."""
    start = data.find(marker) + place
    return data[:start] + struct.pack(">2H", *size) + data[start + 4 :]


def scans(count):
    data = encoded("JPEG", "L", (1000, 1000), progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def webp(width, height):
    extended = (
        struct.pack("<4sL4x", b"VP8X", 10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    body = b"WEBP" + extended + encoded("WEBP")[12:]
    return b"RIFF" + struct.pack("<L", len(body)) + body


def one_colour(width, height):
    """A lossless WebP of one colour has the same bytes at any size, which is in its header."""
    data = encoded("WEBP", "1", (1, 1), lossless=True)
    bits = int.from_bytes(data[21:25], "little") >> 28 << 28 | height - 1 << 14 | width - 1
    return data[:21] + bits.to_bytes(4, "little") + data[25:]


def jpeg2000(size, tile, components=3):
    about = struct.pack(">HH8IH", 38 + 3 * components, 0, *size, 0, 0, *tile, 0, 0, components) + b"\7\1\1" * components
    data = encoded("JPEG2000", no_jp2=True)
    return b"\xff\x4f\xff\x51" + about + data[data.find(b"\xff\x52") :]


zeros = lambda: zlib.compress(bytes(20 << 20), 9)
TINY = b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)
BOMBS = {
    "text of a png": lambda: png(4, 4, *[chunk(b"zTXt", b"a\0\0" + zeros())] * 3),
    "international text": lambda: png(4, 4, *[chunk(b"iTXt", b"a\0\1\0\0\0" + zeros())] * 3),
    "a colour profile": lambda: png(4, 4, chunk(b"iCCP", b"a\0\0" + zeros())),
    "much text": lambda: png(4, 4, *[chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(bytes(1 << 20))) for k in range(70)]),
    "a large png": lambda: png(20_000, 10_000),
    "a wide png": lambda: png(2**31 - 1, 1),
    "a gif's screen": lambda: gif((65535, 65535), (2, 2)),
    "a gif's frame": lambda: gif((2, 2), (65535, 65535)),
    "a gif's frame to be cleared": lambda: gif((2, 2), (65535, 65535), b"!\xf9\4\x09\0\0\0\0"),
    "comments of a gif": lambda: gif((2, 2), (2, 2), b"!\xfe\1a\0" * 200_000),
    "a comment of a gif": lambda: gif((2, 2), (2, 2), b"x!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"),
    "a gif without an end": lambda: b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 1_000_000,
    "a webp's canvas": lambda: webp(1 << 24, 1 << 24),
    "a webp's largest canvas": lambda: webp(16383, 16383),
    "one colour in 34 bytes": lambda: one_colour(16383, 5400),
    "tags on the same bytes": lambda: tiff(
        (2, 2), *((k, 1, 1 << 21, 8) for k in range(1000, 9000)), data=bytes(1 << 21)
    ),
    "fractions": lambda: tiff((2, 2), (282, 5, 1_000_000, bytes(8_000_000))),
    "a width of many values": lambda: tiff((2, 2), (256, 5, 1_000_000, bytes(8_000_000))),
    "strips": lambda: tiff((2, 2), (273, 4, 5_000_000, bytes(20_000_000))),
    "strips as many as are read": lambda: tiff((2, 2), (273, 4, limits.TILES_OF_TIFF, bytes(2_000_000))),
    "a tile": lambda: tiff((2, 2), (259, 3, 1, 8), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8),
                           (325, 4, 1, 20_000), data=zeros()),
    "a large tiff": lambda: tiff((20_000, 10_000)),
    "a directory in itself": lambda: tiff((2, 2), (34665, 4, 1, 12), (330, 4, 1, 12)),
    "a jump in a bmp": lambda: packed_bmp(80_000_000, 1, b"\0\2\0\xff" * 100),
    "a bmp": lambda: packed_bmp(60_000, 60_000, b"\0\1"),
    "scans of a jpeg": lambda: scans(2000),
    "a large jpeg": lambda: resized(encoded("JPEG", "L"), b"\xff\xc0", 5, (65500, 65500)),
    "exif in pieces": lambda: encoded("JPEG")[:2] + TINY * 300 + encoded("JPEG")[2:],
    "tiles of a jpeg 2000": lambda: jpeg2000((4000, 4000), (4, 4)),
    "components of a jpeg 2000": lambda: jpeg2000((900, 900), (30, 30), 16384),
    "a large jpeg 2000": lambda: jpeg2000((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1)),
    "a jpeg 2000 of one tile": lambda: jpeg2000((9000, 9000), (9000, 9000)),
    "a ppm": lambda: b"P6 60000 60000 255\n",
    "a plain ppm": lambda: b"P3 9000 9000 255\n1 2 3",
    "a ppm without numbers": lambda: b"P6 " + b"9" * 5_000_000,
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(in_child, bomb):
    data = BOMBS[bomb]()

    def act():
        with suppress(UnreadableImage):
            decode(data, "x.png").convert("RGB")

    in_child(act)


@pytest.mark.parametrize("sample", SAMPLES)
def test_damage_anywhere_is_an_image_or_one_line(in_child, sample, capfd):
    data, rng = SAMPLES[sample](), random.Random(sample)

    def damaged():
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.randrange(min(len(data), rng.choice((64, 300, len(data)))))
            changed[place] = rng.choice((0, 1, 127, 128, 255, changed[place] ^ 1 << rng.randrange(8)))
        return bytes(changed) if rng.random() < 0.9 else bytes(changed[: rng.randrange(len(data))])

    def act():
        for _ in range(60):
            with suppress(UnreadableImage):
                found = decode(damaged(), name_of(sample))
                assert isinstance(found, np.ndarray) or found.convert("RGB")

    in_child(act, seconds=10)
    assert capfd.readouterr().err == ""


def test_the_limit_of_pixels_can_be_raised_beyond_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for sample in ("png", "gif", "webp", "large tiff", "jpeg 2000"):
        data = SAMPLES[sample]()
        share = next(kind.share for kind in pictures.KINDS.values() if kind.magic and kind.magic.match(data))
        assert decode(data, "x", 48 * 41 * share).size == (48, 41)
        with pytest.raises(UnreadableImage, match=r"48 x 41 pixels, over 1967; give a larger max_pixels="):
            decode(data, "x", (48 * 41 - 1) * share)
        assert Image.MAX_IMAGE_PIXELS == 100


def test_a_png_of_fewer_bytes_than_deflate_needs_is_truncated(tmp_path):
    white = io.BytesIO()
    Image.new("1", (4_000, 4_000), 1).save(white, "PNG")  # as well packed as can be
    assert decode(white.getvalue(), "white.png").size == (4_000, 4_000)
    small = io.BytesIO()
    Image.new("RGB", (11, 9)).save(small, "PNG")
    data = bytearray(small.getvalue())
    data[20:24] = (6_930_697).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableImage, match="bytes hold no 11 x 6930697 pixels"):
        decode(bytes(data), "cut.png")
