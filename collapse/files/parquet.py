"""Arrays of Parquet tables: a column of lists or tensors, or columns of numbers that belong together by their names."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.rows import File, check_shape, check_unpacked, choose, columns_of, family_of, library, reading
from collapse.files.thrift import Reader

ROWS, GROUPS = 3, 4  # of the struct that describes a file


@contextmanager
def open_parquet(
    source: Descriptor, key: str | None, most: float | None, notes: list[str]
) -> Iterator[Iterator[np.ndarray]]:
    """Rows (b, d) of a table, in blocks; a line about columns that were left out is added to `notes`.

    key: a column of lists or tensors, or a pattern of the names of columns of numbers, as feat_*.
    Raises InputError: pyarrow is not installed, no column or nothing that says which, values missing, lists of
    different lengths, what unpacks to too much (most: in GiB), damaged.
    """
    path = source.path
    pyarrow, parquet = (library(path, name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    with reading(path, "Parquet"):
        metadata, file = footer(source), opened_table(pyarrow, parquet, source)
        columns = columns_of_schema(pyarrow.types, path, file.schema_arrow, key, notes)
        step = _checked(source, metadata, columns, most)
        batches = file.iter_batches(batch_size=step, columns=columns, use_threads=False)
    yield blocks_of(path, pyarrow.types, batches, metadata[ROWS])


def opened_table(pyarrow: Any, parquet: Any, source: Descriptor) -> Any:
    """pyarrow's view of a file, whose `footer` was read before."""
    return parquet.ParquetFile(
        pyarrow.PythonFile(File(source), "r"), buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    )


def footer(source: Descriptor) -> dict[int, Any]:
    """The description at the end, a struct of thrift. pyarrow's own view of it ends the process on some damage.

    Raises InputError: truncated, damaged or encrypted.
    """
    tail = source.read(max(0, source.size - 8), min(8, source.size))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or not 0 < length <= source.size - 12:
        raise InputError(f"{source.path}: truncated, damaged or encrypted Parquet; fetch the file again, unencrypted")
    return Reader(source.read(source.size - 8 - length, length)).struct()


def _is_number(types: Any, kind: Any) -> bool:
    return types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind)


def _is_vector(types: Any, kind: Any) -> bool:
    """Whether it is a list, or a tensor of one dimension, of numbers."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_number(types, kind.value_type)
    tensor = getattr(kind, "extension_name", "") == "arrow.fixed_shape_tensor"
    return tensor and len(kind.shape) == 1 and _is_number(types, kind.value_type)


def columns_of_schema(types: Any, path: Path, schema: Any, key: str | None, notes: list[str]) -> list[str]:
    """The names of the columns that are the embedding. Raises InputError: nothing says which, or two of one name."""
    kinds = {field.name: field.type for field in schema}
    vectors = [name for name, kind in kinds.items() if _is_vector(types, kind)]
    numbers = [name for name, kind in kinds.items() if _is_number(types, kind)]
    if len(kinds) != len(schema):
        raise InputError(f"{path}: two columns have the same name; rename one")
    family = family_of(list(kinds))
    if key in vectors or (key is None and vectors):
        return [choose(path, vectors + [f"{name.rstrip('0123456789')}*" for name in family[:1]], key)]
    return columns_of(path, kinds, numbers, key, notes)


def sizes_of(source: Descriptor, metadata: dict[int, Any], columns: list[str]) -> tuple[int, int, int]:
    """(values, bytes unpacked, bytes stored) of some columns. Raises InputError: they lie in other files."""
    chunks = [chunk for group in metadata[GROUPS] for chunk in group[1]]
    if any(chunk.get(1) for chunk in chunks):
        raise InputError(f"{source.path}: keeps its data in other files; write it as one")
    parts = [chunk[3] for chunk in chunks if chunk[3][3][0].decode() in columns]
    pages = [_pages(source, part) for part in parts]
    values, unpacked = (sum(page[i] for page in pages) for i in (0, 1))
    return values, unpacked, min(source.size, sum(part[7] for part in parts))


def _checked(source: Descriptor, metadata: dict[int, Any], columns: list[str], most: float | None) -> int:
    """How many rows are read at a time."""
    where, n = str(source.path), metadata[ROWS]
    values, unpacked, stored = sizes_of(source, metadata, columns)
    check_shape(where, (n, math.ceil(values / max(1, n))), "f", "of the table")
    check_unpacked(where, max(8 * values, unpacked), stored, most)
    return max(1, limits.BLOCK * n // (8 * values))


def _pages(source: Descriptor, part: dict[int, Any]) -> tuple[int, int]:
    """(values, bytes unpacked) that the headers of a column's pages declare."""
    place = min(filter(None, (part.get(11), part[9])))
    stop, values, unpacked = place + part[7], 0, 0
    while place < stop:
        header, length = _page(source, place)
        if header[2] < 0 or header[3] < 0:
            raise ValueError("a page of negative size")
        values += next((header[kind][1] for kind in (5, 8) if kind in header), 0)
        unpacked += header[2]
        place += length + header[3]
    return max(values, part[5]), unpacked


def _page(source: Descriptor, place: int) -> tuple[dict[int, Any], int]:
    """(header of the page at `place`, its length): mostly short, but its statistics hold values of any length."""
    for size in (1 << 10, 1 << 20):
        reader = Reader(source.read(place, min(size, source.size - place)))
        with suppress(IndexError):
            return reader.struct(), reader.place
    raise ValueError("a page without an end of its header")


def blocks_of(path: Path, types: Any, batches: Any, rows: int, kind: str = "Parquet") -> Iterator[np.ndarray]:
    """(b, d) of each batch of columns; raises InputError if they are other than `rows` rows, or no numbers."""
    while True:
        with reading(path, kind):
            batch = next(batches, None)
            block = None if batch is None else _block(path, types, batch.columns)
        if block is None:
            break
        rows -= len(block)
        yield block
    if rows:
        raise InputError(f"{path}: truncated or damaged {kind} (its pages hold other rows than it says)")


def _block(path: Path, types: Any, columns: list[Any]) -> np.ndarray:
    """(b, d) of columns of numbers, or of one column of lists or tensors."""
    columns = [getattr(column, "storage", column) for column in columns]
    lists = columns[0] if hasattr(columns[0], "value_lengths") else None
    parts = columns if lists is None else [lists.flatten()]
    if any(part.null_count for part in (*columns, *parts)):
        raise InputError(f"{path}: holds missing values; drop these rows first")
    exact = [part.cast("float64") if types.is_decimal(part.type) else part for part in parts]
    numbers = [part.to_numpy(zero_copy_only=False) for part in exact]
    if lists is None:
        return np.stack(numbers, axis=1)
    widths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
    if len(widths) > 1:
        raise InputError(f"{path}: lists of different lengths; embeddings have one width")
    if not widths.all():
        raise InputError(f"{path}: lists of no numbers; embeddings have some")
    return numbers[0].reshape(len(lists), -1)
