"""How large a part of a foreign file may be: every limit of the readers, in one place.

A limit refuses what no real file has, so that a few bytes cannot take the machine's memory or time.
"""

HEADER = 32 << 20  # bytes of a safetensors header; real ones are far below 1 MiB
JSON = 64 << 20  # bytes of an index, a config or a result
DIGITS = 400  # of an integer in JSON; float64 ends at 309
PICKLE = 256 << 20  # bytes of a pickle without its tensors
OPCODES = 10_000_000  # steps of a pickle; a network of 3,000 blocks needs 1 million
INTEGER = 64  # bytes of one integer in a pickle; the state of numpy's generators needs 16
ENTRIES = 2_000_000  # files in a zip
IMAGE_FILE = 256 << 20  # bytes of one image file in an archive
UNPACKED_RATIO, UNPACKED_FREE = 100, 64 << 20  # an array may unpack to this many times its bytes, or to this many bytes
TENSORS = 100_000  # tensors of a file; real ones have below 5,000
