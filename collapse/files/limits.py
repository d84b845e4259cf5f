"""How large a part of a foreign file may be: every limit of the readers, in one place.

A limit refuses what no real file has, so that a few bytes cannot take the machine's memory or time.
"""

import os
import resource
from contextlib import suppress
from pathlib import Path

HEADER = 32 << 20  # bytes of a safetensors header; real ones are far below 1 MiB
JSON = 64 << 20  # bytes of an index, a config or a result
DIGITS = 400  # of an integer in JSON; float64 ends at 309
PICKLE = 256 << 20  # bytes of a pickle without its tensors
UNPACKED_PICKLE = 8 << 30  # bytes of a pickle of arrays, which hold the numbers
OPCODES = 3_000_000  # steps of a pickle, 2 s; a network of 3,000 blocks needs 1 million
INTEGER = 64  # bytes of one integer in a pickle; the state of numpy's generators needs 16
ENTRIES = 2_000_000  # files in a zip
IMAGE_FILE = 256 << 20  # bytes of one image file; in proportion more with a larger --max-pixels
LIST = 1 << 30  # bytes of a list of images
TAR_HEADER = 1 << 20  # bytes of a header of long names in a tar
UNPACKED_RATIO, UNPACKED_FREE = 100, 64 << 20  # an array may unpack to this many times its bytes, or to this many bytes
TENSORS = 40_000  # tensors of a file; real ones have below 5,000
PARTS, KEY = 300_000, 2_000  # mappings within a checkpoint, 2 s; characters of a key in it
NPY_HEADER = 10_000  # bytes of the header of a .npy, as numpy has it
COLUMNS = 1 << 24  # of an array
LINE = 16 << 20  # bytes of a line of a table of text
TEXTS = 2 << 30  # bytes of a file of texts, which are kept in memory
SOUND_FILE, SAMPLES = 1 << 30, 1 << 27  # bytes of a sound; its samples, 46 minutes at 48 kHz
PATTERN = 4_000  # characters of a pattern in a tokenizer.json; published ones have below 300
NODES = 100_000  # groups and arrays in an HDF5 file or a zarr folder
BLOCK = 16 << 20  # bytes of rows that are read at a time
THRIFT = 4_000_000  # values in the description of a Parquet file, which is at its end

# Images. What decoding takes grows with the pixels, 4 to 16 bytes each, whatever the bytes of the file.
PIXELS = 89_478_485  # height times width of an image, decoded or resized, without --max-pixels; Pillow's own limit too
DEFLATE = 1032  # bytes that a byte of deflate unpacks to at most, by its format
SCANS = 100  # passes over a progressive JPEG, pieces of its Exif; real ones have about ten
JOINED = 8 << 20  # bytes of a JPEG up to which its Exif may be in any number of pieces
RUN_WIDTH = 1 << 16  # pixels of a row in a packed BMP
TILES, TILES_OF_TIFF = 16_384, 500_000  # of a JPEG 2000; strips or tiles of a TIFF
PAGES, CHANNELS = 65_536, 64  # of a TIFF; of any image, satellites' have 13
PROBED = 16  # images that are looked at for the range of deep pixels

CLASSES = 32_768  # classes that numbers may name, of fewer images; a network has an output for each
LABEL = 1 << 16  # bytes of a label in a tar
DIGESTED, SAMPLED = 1 << 30, 1024  # bytes of a set whose contents are digested whole; of more, so many files are


def memory() -> int:
    """Bytes of memory that this process may still take: of the machine, of its control group, of `ulimit -v`."""
    page = os.sysconf("SC_PAGE_SIZE")
    room = [page * os.sysconf("SC_PHYS_PAGES")]
    for file, word in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        with suppress(OSError, ValueError, StopIteration):
            line = next(line for line in Path(file).read_text().splitlines() if line.startswith(word))
            room.append(int(line.removeprefix(word).removesuffix("kB")) * (1024 if word else 1))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        with suppress(OSError):
            most -= int(Path("/proc/self/statm").read_text().split()[0]) * page
        room.append(max(0, most))
    return min(room)


def image_file(pixels: int) -> int:
    """Bytes that the file of an image of at most `pixels` may have."""
    return max(IMAGE_FILE, IMAGE_FILE * pixels // PIXELS)


def unpacked(packed: int) -> int:
    """Bytes that `packed` ones may unpack to."""
    return max(UNPACKED_FREE, UNPACKED_RATIO * packed)
