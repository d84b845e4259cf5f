"""Arrays of zarr folders, versions 2 and 3.

zarr never sees the folder, but a store in memory: the description of one array, made anew from the parts that are
known, and the bytes of the chunks that are read next. Their codecs are checked first, and the size they unpack to.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import opened
from collapse.files.npy import real_dtype
from collapse.files.packed import unpacked_size
from collapse.files.rows import check_memory, check_shape, check_unpacked, choose, library, no_key, reading

PACKERS = ("gzip", "zlib", "zstd", "blosc", "lz4")  # zlib and lz4 in version 2 alone
CODECS = ("bytes", "transpose", "sharding_indexed", "crc32c", "gzip", "zstd", "blosc")
FIELDS = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    "attributes", "storage_transformers", "dimension_names",
}  # fmt: skip
ABSENT = 2**64 - 1  # where a shard says that a chunk is, which it does not have


def is_zarr(path: Path) -> bool:
    """Whether it is a folder of zarr."""
    return any(os.path.isfile(path / name) for name in ("zarr.json", ".zarray", ".zgroup"))


@contextmanager
def open_zarr(path: Path, key: str | None, most: float | None) -> Iterator[Iterator[np.ndarray]]:
    """Rows (b, d) of an array, in blocks.

    Raises InputError: zarr is not installed or older than 3.1, no such array, a codec that is not known, links, chunks
    that are missing, what unpacks to too much (most: in GiB), damaged.
    """
    zarr = library(path, "zarr", "zarr")
    if tuple(int(part) for part in re.findall(r"\d+", zarr.__version__)[:2]) < (3, 1):
        raise InputError(f"{path}: wants zarr 3.1 or later, and {zarr.__version__} is installed; pip install -U zarr")
    arrays = _arrays(path)
    if "." in arrays:
        no_key(path, key)
    name = "." if "." in arrays else choose(path, list(arrays), key)
    with reading(path, "zarr"):
        array = (
            _version2(path / name, arrays[name]) if "chunks" in arrays[name] else _version3(path / name, arrays[name])
        )
    yield array.blocks(zarr, array.check(most))


def _json(path: Path) -> Any:
    if path.is_symlink():
        raise InputError(f"{path}: is a link; copy what it leads to into the folder")
    with opened(path) as file, reading(path, "zarr"):
        if file.size > limits.JSON:
            raise InputError(f"{path}: {file.size} bytes, at most {limits.JSON} are read; refused")
        return json.loads(file.read(0, file.size))


def _arrays(root: Path) -> dict[str, Any]:
    """The descriptions of all arrays by their names below `root`, which is "." for `root` itself."""
    arrays: dict[str, Any] = {}
    waiting, seen = [root], 0
    while waiting:
        folder, seen = waiting.pop(), seen + 1
        if seen > limits.NODES:
            raise InputError(f"{root}: over {limits.NODES} folders; refused")
        node = next((_json(folder / name) for name in ("zarr.json", ".zarray") if (folder / name).exists()), None)
        if isinstance(node, Mapping) and (node.get("node_type") == "array" or "chunks" in node):
            arrays[folder.relative_to(root).as_posix()] = node
        else:
            with os.scandir(folder) as inside:
                waiting += [Path(entry.path) for entry in inside if entry.is_dir(follow_symlinks=False)]
    return arrays


@dataclass(frozen=True)
class Shard:
    """How chunks lie in a larger one: their shape, their codecs of bytes by name, and how their index is stored."""

    chunks: tuple[int, int]
    chain: list[str]
    at_end: bool
    summed: bool


@dataclass(frozen=True)
class Array:
    """An array (n, d) in a folder: the description that zarr gets, and what is checked before zarr gets any bytes.

    chunks: rows and columns of a chunk; prefix, separator: of the names of their files; chain: their codecs of bytes.
    """

    folder: Path
    file: str
    node: dict[str, Any]
    shape: tuple[int, int]
    chunks: tuple[int, int]
    dtype: np.dtype
    prefix: str
    separator: str
    chain: list[str]
    shard: Shard | None = None

    @property
    def _grid(self) -> tuple[int, int]:
        return math.ceil(self.shape[0] / self.chunks[0]), math.ceil(self.shape[1] / self.chunks[1])

    def _path(self, row: int, column: int) -> Path:
        return self.folder / f"{self.prefix}{row}{self.separator}{column}"

    def check(self, most: float | None) -> int:
        """How many rows of chunks are read at a time. Raises InputError as `open_zarr` does."""
        where, (rows, columns), stored = str(self.folder), self._grid, 0
        declared = self.shape[0] * self.shape[1] * self.dtype.itemsize
        for path in (self._path(row, column) for row in range(rows) for column in range(columns)):
            stored += self._stored(path, f"declares {declared} bytes and stores {stored} before it")
        if self._path(rows, 0).exists() or self._path(0, columns).exists():
            raise InputError(f"{where}: has chunks beyond its shape {self.shape}; is {self.file} damaged?")
        check_unpacked(where, declared, stored, most)
        band = self.chunks[0] * columns * self.chunks[1] * self.dtype.itemsize
        check_memory(where, 3 * band, f"unpacking {self.chunks[0]} rows, which are stored together,")
        return max(1, limits.BLOCK // band)

    def _stored(self, path: Path, sizes: str) -> int:
        try:
            status = os.lstat(path)
        except OSError as error:
            raise InputError(
                f"{path}: this chunk is missing (the array {sizes}); copy the folder anew or, if zeros were meant, "
                "write them (zarr's write_empty_chunks)"
            ) from error
        inside = path.relative_to(self.folder).parents
        if not stat.S_ISREG(status.st_mode) or any((self.folder / place).is_symlink() for place in list(inside)[:-1]):
            raise InputError(f"{path}: is a link, or no file; copy the folder with what its links lead to (cp -rL)")
        return status.st_size

    def blocks(self, zarr: Any, step: int) -> Iterator[np.ndarray]:
        """The rows (b, d) of `step` rows of chunks at a time. Raises InputError: a chunk is damaged."""
        from zarr.buffer.cpu import Buffer

        store = {self.file: Buffer.from_bytes(json.dumps(self.node).encode())}
        with reading(self.folder, "zarr"):
            array = zarr.open_array(zarr.storage.MemoryStore(store), mode="r")
        rows, columns = self._grid
        for first in range(0, rows, step):
            name = "{}.{}" if self.file == ".zarray" else "c/{}/{}"
            band = {name.format(row, column): (row, column)
                    for row in range(first, min(first + step, rows)) for column in range(columns)}  # fmt: skip
            store.update((name, Buffer.from_bytes(self._chunk(*place))) for name, place in band.items())
            with reading(self.folder, "zarr"):
                block = array[first * self.chunks[0] : (first + step) * self.chunks[0]]
            yield block
            for name in band:
                del store[name]

    def _chunk(self, row: int, column: int) -> bytes:
        """The bytes of a chunk's file. Raises InputError: they do not unpack to the size of a chunk."""
        path = self._path(row, column)
        size = self.chunks[0] * self.chunks[1] * self.dtype.itemsize
        with opened(path) as file:
            if file.size > 2 * size + limits.UNPACKED_FREE:
                raise InputError(f"{path}: {file.size} bytes for a chunk of {size}; refused")
            data = file.read(0, file.size)
        if self.shard is None:
            _check_size(path, data, self.chain, size)
        else:
            self._check_shard(path, data, self.shard, row, column)
        return data

    def _check_shard(self, path: Path, data: bytes, shard: Shard, row: int, column: int) -> None:
        """Every chunk in it that has a part of the array is there, inside, and unpacks to its size."""
        rows, columns = self.chunks[0] // shard.chunks[0], self.chunks[1] // shard.chunks[1]
        length = 16 * rows * columns
        start = len(data) - length - 4 * shard.summed if shard.at_end else 0
        if start < 0 or start + length > len(data):
            raise InputError(f"{path}: truncated: the index of its chunks takes {length} bytes")
        index = np.frombuffer(data, "<u8", 2 * rows * columns, start).reshape(rows, columns, 2)
        size = shard.chunks[0] * shard.chunks[1] * self.dtype.itemsize
        for i, j in np.ndindex(rows, columns):
            place, packed = (int(value) for value in index[i, j])
            top, left = row * self.chunks[0] + i * shard.chunks[0], column * self.chunks[1] + j * shard.chunks[1]
            if top >= self.shape[0] or left >= self.shape[1]:
                continue
            if place == ABSENT or place + packed > len(data):
                raise InputError(f"{path}: its chunk {i}, {j} is missing; copy the folder anew, or write its zeros too")
            _check_size(path, data[place : place + packed], shard.chain, size)


def _check_size(path: Path, data: bytes, chain: Sequence[str], size: int) -> None:
    """Raise InputError unless the codecs `chain`, the last of which was applied last, unpack `data` to `size` bytes."""
    for place in reversed(range(len(chain))):
        if chain[place] != "crc32c":
            inner = size + 4 * chain[:place].count("crc32c")
            if unpacked_size(chain[place], data, inner) != inner:
                raise InputError(f"{path}: damaged: does not unpack to the {inner} bytes of its chunk; copy it anew")
            return
        data = data[:-4]
    if len(data) != size:
        raise InputError(f"{path}: truncated or damaged: {len(data)} bytes where its chunk has {size}; copy it anew")


def _pair(values: Any) -> tuple[int, int]:
    """Two numbers of at least 1, of a shape or of chunks."""
    if not isinstance(values, list) or len(values) != 2 or any(type(v) is not int or v < 1 for v in values):
        raise ValueError(f"{str(values)[:40]} are not two numbers above 0")
    return values[0], values[1]


def _separator(fields: Mapping[str, Any], usual: str) -> str:
    separator = fields.get("separator", fields.get("dimension_separator", usual))
    if separator not in (".", "/"):
        raise ValueError(f"separator {separator!r}")
    return separator


def _version2(folder: Path, node: Mapping[str, Any]) -> Array:
    compressor, filters = node["compressor"], node["filters"] or []
    for codec, known in [(codec, ("shuffle",)) for codec in filters] + ([(compressor, PACKERS)] if compressor else []):
        if codec["id"] not in known:
            raise InputError(f"{folder}: packed by {codec['id']!r}; store it with one of {', '.join(known)}")
    dtype = real_dtype(node["dtype"], str(folder))
    check_shape(str(folder), node["shape"], dtype.kind, dtype)
    kept = {name: node[name] for name in ("zarr_format", "shape", "chunks", "dtype", "compressor", "filters", "order")}
    return Array(
        folder, ".zarray", {**kept, "fill_value": 0, "dimension_separator": "."}, _pair(node["shape"]),
        _pair(node["chunks"]), dtype, "", _separator(node, "."), [compressor["id"]] if compressor else [],
    )  # fmt: skip


def _version3(folder: Path, node: Mapping[str, Any]) -> Array:
    grid, keys, codecs = node["chunk_grid"], node["chunk_key_encoding"], _known(folder, node["codecs"])
    other = node.keys() - FIELDS or node.get("storage_transformers")
    if other or grid["name"] != "regular" or keys["name"] not in ("default", "v2"):
        raise InputError(f"{folder}: extensions, a grid or names of chunks that are not known; store it as zarr does")
    if not re.fullmatch("u?int(8|16|32|64)|float(16|32|64)", str(node["data_type"])):
        raise InputError(f"{folder}: dtype {str(node['data_type'])[:40]} is not real numbers; store floats")
    dtype = np.dtype(node["data_type"])
    check_shape(str(folder), node["shape"], dtype.kind, dtype)
    chunks = _pair(grid["configuration"]["chunk_shape"])
    old = keys["name"] == "v2"
    separator = _separator(keys.get("configuration") or {}, "." if old else "/")
    description = {
        "zarr_format": 3, "node_type": "array", "shape": node["shape"], "data_type": node["data_type"],
        "chunk_grid": grid, "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0, "codecs": codecs, "attributes": {},
    }  # fmt: skip
    names = [codec["name"] for codec in codecs]
    shard = _shard(folder, codecs[0]["configuration"], chunks) if names == ["sharding_indexed"] else None
    return Array(
        folder, "zarr.json", description, _pair(node["shape"]), chunks, dtype, "" if old else f"c{separator}",
        separator, _packing(folder, names), shard,
    )  # fmt: skip


def _known(folder: Path, codecs: Any) -> list[dict[str, Any]]:
    """The codecs of version 3, each as a mapping. Raises InputError for one that is not known."""
    mappings = [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]
    for codec in mappings:
        if codec["name"] not in CODECS:
            raise InputError(f"{folder}: wants the codec {codec['name']!r}; store it with one of {', '.join(CODECS)}")
    return mappings


def _packing(folder: Path, names: Sequence[str]) -> list[str]:
    """The codecs of bytes among those of a chunk, of which one may pack."""
    chain = [name for name in names if name not in ("bytes", "transpose", "sharding_indexed")]
    if len(chain) - chain.count("crc32c") > 1 or ("sharding_indexed" in names and len(names) > 1):
        raise InputError(f"{folder}: packed more than once ({', '.join(names)}); store it packed once")
    return chain


def _shard(folder: Path, fields: Mapping[str, Any], chunks: tuple[int, int]) -> Shard:
    inner = _pair(fields["chunk_shape"])
    names = [codec["name"] for codec in _known(folder, fields["codecs"])]
    index = [codec["name"] for codec in _known(folder, fields["index_codecs"])]
    if "sharding_indexed" in names or index not in (["bytes"], ["bytes", "crc32c"]):
        raise InputError(f"{folder}: shards within shards, or a packed index, are not read; store it as zarr does")
    if chunks[0] % inner[0] or chunks[1] % inner[1] or fields["index_codecs"][0]["configuration"]["endian"] != "little":
        raise ValueError("a shard is no multiple of its chunks, or its index is big-endian")
    return Shard(inner, _packing(folder, names), fields.get("index_location", "end") == "end", len(index) > 1)
