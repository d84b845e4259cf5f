"""Arrays of Parquet tables: a column of lists or tensors, or columns of numbers that belong together by their names."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.rows import File, check_shape, check_unpacked, choose, library, listed, reading


@contextmanager
def open_parquet(
    source: Descriptor, key: str | None, most: float | None, notes: list[str]
) -> Iterator[Iterator[np.ndarray]]:
    """Rows of a table, in blocks; a line about columns that were left out is added to `notes`.

    key: a column of lists or tensors, or a pattern of the names of columns of numbers, as feat_*.
    Raises InputError: pyarrow is not installed, no column or nothing that says which, values missing, lists of
    different lengths, what unpacks to too much (most: in GiB), damaged.
    """
    path = source.path
    pyarrow, parquet = (library(path, name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    with reading(path, "Parquet"):
        file = parquet.ParquetFile(
            pyarrow.PythonFile(File(source), "r"), buffer_size=1 << 20, pre_buffer=False,
            page_checksum_verification=True, thrift_string_size_limit=limits.THRIFT,
            thrift_container_size_limit=limits.THRIFT,
        )  # fmt: skip
        columns = _columns(pyarrow.types, path, file.schema_arrow, key, notes)
        step = _checked(source, file, columns, most)
        batches = file.iter_batches(batch_size=step, columns=columns, use_threads=False)
    yield _blocks(path, pyarrow.types, batches, file.metadata.num_rows)


def _is_number(types: Any, kind: Any) -> bool:
    return types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind)


def _is_vector(types: Any, kind: Any) -> bool:
    """Whether it is a list, or a tensor of one dimension, of numbers."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_number(types, kind.value_type)
    return getattr(kind, "extension_name", "") == "arrow.fixed_shape_tensor" and len(kind.shape) == 1


def _columns(types: Any, path: Path, schema: Any, key: str | None, notes: list[str]) -> list[str]:
    """The names of the columns that are the embedding."""
    kinds = {field.name: field.type for field in schema}
    vectors = [name for name, kind in kinds.items() if _is_vector(types, kind)]
    numbers = [name for name, kind in kinds.items() if _is_number(types, kind)]
    if len(kinds) != len(schema):
        raise InputError(f"{path}: two columns have the same name; rename one")
    if key in vectors or (key is None and vectors):
        return [choose(path, vectors, key)]
    if not numbers:
        raise InputError(f"{path}: holds no column of numbers or of lists of them, but {listed(list(kinds))}")
    if key is not None:
        chosen = [name for name in kinds if fnmatchcase(name, key)]
    else:
        chosen = list(kinds) if len(kinds) == 1 else _family(list(kinds))
        if left := [name for name in kinds if name not in chosen]:
            notes.append(f"columns left out beside {chosen[:1] + chosen[-1:]}: {listed(left)}")
    if not chosen:
        raise InputError(
            f"{path}: nothing says which of the columns {listed(list(kinds))} are the embedding"
            f"{'' if key is None else f', and {key!r} names none'}; pick them by a pattern, as {path}:'feat_*'"
        )
    for name in chosen:
        if name not in numbers:
            raise InputError(f"{path}: column {name!r} is {kinds[name]}, not numbers; pick others by {path}:PATTERN")
    return chosen


def _family(names: list[str]) -> list[str]:
    """The names of one prefix with a running number, if there is one such prefix alone."""
    families: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)([0-9]{1,9})", name, re.DOTALL):
            families.setdefault(match[1], []).append((int(match[2]), name))
    several = [family for family in families.values() if len(family) > 1]
    return [name for _, name in sorted(several[0])] if len(several) == 1 else []


def _checked(source: Descriptor, file: Any, columns: list[str], most: float | None) -> int:
    """How many rows are read at a time."""
    about, where = file.metadata, str(source.path)
    of_them = tuple(f"{name}." for name in columns)
    leaves = [i for i in range(about.num_columns) if f"{file.schema.column(i).path}.".startswith(of_them)]
    parts = [about.row_group(group).column(leaf) for group in range(about.num_row_groups) for leaf in leaves]
    values, n = sum(part.num_values for part in parts), about.num_rows
    check_shape(where, (n, math.ceil(values / max(1, n))), "f", "of the table")
    stored = min(source.size, sum(part.total_compressed_size for part in parts))
    check_unpacked(where, max(8 * values, sum(part.total_uncompressed_size for part in parts)), stored, most)
    return max(1, limits.BLOCK * n // (8 * values))


def _blocks(path: Path, types: Any, batches: Any, rows: int) -> Iterator[np.ndarray]:
    while True:
        with reading(path, "Parquet"):
            batch = next(batches, None)
            block = None if batch is None else _block(path, types, batch.columns)
        if block is None:
            break
        rows -= len(block)
        yield block
    if rows:
        raise InputError(f"{path}: truncated or damaged Parquet (its pages hold other rows than it says)")


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
    return numbers[0].reshape(len(lists), -1)
