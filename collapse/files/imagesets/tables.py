"""Images as bytes in a column of a table: Parquet, Arrow, and the folders that `datasets` saves.

A column of images holds bytes, or structs of bytes and a path, as `datasets` writes them.  The path is a name and is
never opened.  One part of a table is unpacked at a time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files import arrow, parquet
from collapse.files.descriptor import Descriptor
from collapse.files.imagesets.base import ImageSet, within
from collapse.files.rows import File, check_memory, check_unpacked, choose, library, listed, reading

LABELS = ("label", "labels", "cls", "fine_label")
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "content", "bytes", "pixel_values")


@dataclass(frozen=True)
class Part:
    """Rows that are unpacked together: their table, where it is in it, the number of rows, and the bytes they take."""

    table: Descriptor
    place: int
    rows: int
    unpacked: int


class Table(ImageSet):
    """The images of a column, in the order of the tables and their rows.

    key: the column; None for the only one of images, or the only one of a usual name.
    Raises InputError: pyarrow is not installed, no such column, what unpacks to too much, damaged.
    """

    def __init__(self, paths: Sequence[Path], key: str | None = None) -> None:
        super().__init__()
        self.where = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self.sources = [Descriptor.kept(path) for path in paths]
        self._kept: tuple[int, Any, Any] = (-1, None, None)
        self.parts: list[Part] = []
        self.columns: list[str] = []
        labels: list[NDArray] = []
        for source in self.sources:
            with reading(source.path, "table"):
                schema = self._schema(source)
                columns = self._columns(source.path, schema, key)
            if self.columns and columns != self.columns:
                raise InputError(f"{source.path}: has other columns than {paths[0]}; name one as {self.where}:KEY")
            self.columns = columns
            self.parts += self._parts(source, labels)
        self.ends = np.cumsum([part.rows for part in self.parts], dtype=np.int64)
        count = int(self.ends[-1]) if len(self.ends) else 0
        self.names = [f"{index:08d}" for index in range(count)]
        if len(self.columns) == 2:
            self.labels = np.concatenate(labels) if labels else np.empty(0, np.int64)

    def _schema(self, source: Descriptor) -> Any:
        if _is_parquet(source):
            return self._parquet(source).schema_arrow
        ipc = library(source.path, "pyarrow.ipc", "parquet")
        first = arrow.messages(source)[0]
        return ipc.read_schema(ipc.read_message(File(source.window(first.start, first.size))))

    def _parquet(self, source: Descriptor) -> Any:
        pyarrow, tables = (library(source.path, name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
        return parquet.opened_table(pyarrow, tables, source)

    def _columns(self, path: Path, schema: Any, key: str | None) -> list[str]:
        """[the column of images, and that of labels if there is one]."""
        types = library(path, "pyarrow.types", "parquet")
        kinds = {field.name: field.type for field in schema}
        images = [name for name, kind in kinds.items() if _holds_bytes(types, kind)]
        if not images:
            raise InputError(f"{path}: holds no column of images as bytes, but {listed(list(kinds))}")
        usual = [name for name in images if name.lower() in IMAGES]
        name = usual[0] if key is None and len(usual) == 1 else choose(path, images, key)
        numbers = [label for label in LABELS if label in kinds and types.is_integer(kinds[label])]
        return [name, *numbers[:1]]

    def _parts(self, source: Descriptor, labels: list[NDArray]) -> list[Part]:
        if _is_parquet(source):
            return self._groups(source, labels)
        messages = arrow.messages(source)
        if any(message.kind == arrow.DICTIONARY for message in messages):
            raise InputError(f"{source.path}: has columns by dictionaries; store it without, or as Parquet")
        check_unpacked(str(source.path), sum(m.unpacked for m in messages), source.size, None)
        parts = [Part(source, m.start, m.rows, m.unpacked) for m in messages if m.kind == arrow.BATCH]
        for part in parts if len(self.columns) == 2 else ():
            labels.append(_numbers(source.path, self._unpack(part)[1], part.rows))
        return parts

    def _groups(self, source: Descriptor, labels: list[NDArray]) -> list[Part]:
        with reading(source.path, "Parquet"):
            metadata, file = parquet.footer(source), self._parquet(source)
            _, unpacked, stored = parquet.sizes_of(source, metadata, self.columns)
            check_unpacked(str(source.path), unpacked, stored, None)
            rows = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            if len(self.columns) == 2:
                column = file.read(columns=self.columns[1:], use_threads=False).column(0)
                labels.append(_numbers(source.path, column, sum(rows)))
        return [Part(source, k, n, unpacked * n // max(1, sum(rows))) for k, n in enumerate(rows)]

    def _unpack(self, part: Part) -> list[Any]:
        """The columns of a part."""
        path = part.table.path
        check_memory(str(path), 2 * part.unpacked, f"unpacking {part.rows} images, which are stored together,")
        with reading(path, "table"):
            if _is_parquet(part.table):
                table = self._parquet(part.table).read_row_group(part.place, columns=self.columns, use_threads=False)
                columns = [table.column(name).combine_chunks() for name in self.columns]
            else:
                ipc = library(path, "pyarrow.ipc", "parquet")
                rest = part.table.window(part.place, part.table.size - part.place)
                batch = ipc.read_record_batch(ipc.read_message(File(rest)), self._schema(part.table))
                batch = batch.select(self.columns)
                batch.validate(full=True)
                columns = batch.columns
            if len(columns[0]) != part.rows:
                raise ValueError("other rows than it says")
        return columns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": (-1, None, None)}

    def path(self, index: int) -> str:
        """The table, and the number of the row among all."""
        return f"{self._part(index).table.path}[{index}]"

    def _part(self, index: int) -> Part:
        return self.parts[int(np.searchsorted(self.ends, index, side="right"))]

    def read(self, index: int, most: int) -> bytes:
        """The bytes in row `index`. Raises InputError: missing, or more than `most`."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        if self._kept[:2] != (number, os.getpid()):
            self._kept = (number, os.getpid(), _bytes_of(self._unpack(self.parts[number])[0]))
        value = self._kept[2][index - int(self.ends[number]) + self.parts[number].rows]
        if not value.is_valid:
            raise InputError("no bytes in this row; what its path names is not opened")
        return bytes(value.as_buffer()[: within(value.as_buffer().size, most)])

    def mark(self, index: int) -> tuple[int, bytes]:
        """The mean size of the rows of its part, since a table has no sizes of single ones."""
        part = self._part(index)
        return part.unpacked // max(1, part.rows), b""


def _is_parquet(source: Descriptor) -> bool:
    return source.read(0, min(4, source.size)) == b"PAR1"


def _holds_bytes(types: Any, kind: Any) -> bool:
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(types, kind.field(place).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _bytes_of(column: Any) -> Any:
    """The bytes of a column of images."""
    return column.field("bytes") if hasattr(column, "field") else column


def _numbers(path: Path, column: Any, rows: int) -> NDArray:
    """(n,) int64 of a column of labels; -1, as `datasets` has it, where there is none."""
    values = column.fill_null(-1).to_numpy(zero_copy_only=False) if column.null_count else column.to_numpy()
    if len(values) != rows:
        raise InputError(f"{path}: truncated or damaged (its labels have other rows than it says); fetch it again")
    return np.asarray(values, np.int64)
