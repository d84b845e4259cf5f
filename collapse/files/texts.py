"""Texts from a file: `.txt`, one a line; `.jsonl`, a field of each line; `.csv` and `.tsv`, a column.

FILE:NAME names the field or column.  Texts are UTF-8.  Blank ones are left out, and their lines are told.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor, opened
from collapse.files.tables import lines

ENDINGS = (".txt", ".jsonl", ".csv", ".tsv")
USUAL = ("text", "sentence")


@dataclass
class Texts:
    """texts: of a file, in order; lines: where each ends in it, from 1; blank: the lines without a text."""

    path: Path
    texts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)


def place_of(source: str | os.PathLike) -> tuple[Path, str | None]:
    """(file, field or column) of FILE or FILE:NAME."""
    text = os.fspath(source)
    file, colon, name = text.rpartition(":")
    if colon and name and not os.path.exists(text) and Path(file).suffix.lower() in ENDINGS:
        return Path(file), name
    return Path(text), None


def read(source: str | os.PathLike, limit: int | None = None) -> Texts:
    """The texts of a file, the first `limit` of them.

    Raises InputError: no such file, an ending of no such file, no such field or column, none at all, no UTF-8.
    """
    path, key = place_of(source)
    ends = path.suffix.lower()
    if path.is_dir() or ends not in ENDINGS:
        raise InputError(f"{path}: is no file of texts; give {', '.join(ENDINGS)}, as texts.txt or reviews.csv:review")
    if ends == ".txt" and key is not None:
        raise InputError(f"{path}: holds one text a line, and no {key[:80]!r}")
    texts = Texts(path)
    with opened(path) as file:
        if file.size > limits.TEXTS:
            raise InputError(f"{path}: {file.size} bytes of text, at most {limits.TEXTS} are read; give a part of it")
        for number, text in _KINDS[ends](file, key):
            if text.strip():
                texts.texts.append(text)
                texts.lines.append(number)
            else:
                texts.blank.append(number)
            if limit is not None and len(texts.texts) >= limit:
                break
    if not texts.texts:
        raise InputError(f"{path}: holds no text")
    return texts


def read_lists(source: str | os.PathLike) -> list[list[str]]:
    """The lists of texts of a file of JSON lines. Raises InputError: no such file, a line that is no such list."""
    path, lists = Path(source), list[list[str]]()
    with opened(path) as file:
        if file.size > limits.TEXTS:
            raise InputError(f"{path}: {file.size} bytes of text, at most {limits.TEXTS} are read; give a part of it")
        for number, value in _values(file):
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise InputError(f'{path}: line {number}: {_kind(value)}, expected a list, as ["one view", "another"]')
            lists.append(value)
    return lists


def _plain(file: Descriptor, key: str | None) -> Iterator[tuple[int, str]]:
    yield from enumerate(lines(file), 1)


def _objects(file: Descriptor, key: str | None) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of JSON: a string each, or an object with the field."""
    path = file.path
    for number, value in _values(file):
        if isinstance(value, dict):
            key = key if key is not None else _chosen(path, [k for k, v in value.items() if isinstance(v, str)])
            if key not in value:
                raise InputError(f"{path}: line {number}: has no field {key[:80]!r}; there are {list(value)[:8]}")
            value = value[key]
        elif key is not None:
            raise InputError(f"{path}: line {number}: is no object with a field {key[:80]!r}")
        if not isinstance(value, str):
            raise InputError(
                f"{path}: line {number}: {_kind(value)} where a text is wanted; name its field, FILE:FIELD"
            )
        yield number, value


def _values(file: Descriptor) -> Iterator[tuple[int, Any]]:
    """(number, value) of the lines of JSON that are not blank."""
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file.path}: line {number}: is no JSON") from error


def _kind(value: Any) -> str:
    return f"a JSON {type(value).__name__}"


def _columns(file: Descriptor, key: str | None) -> Iterator[tuple[int, str]]:
    """(number of the line, text) of a column of a table, whose first line names the columns."""
    path, delimiter = file.path, "\t" if file.path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(lines(file), delimiter=delimiter, strict=True)
    try:
        names = next((row for row in reader if row), [])
        key = key if key is not None else _chosen(path, names)
        if names.count(key) != 1:
            many = "several columns" if key in names else "no column"
            raise InputError(f"{path}: has {many} {key[:80]!r}; its first line is {names[:8]}")
        place = names.index(key)
        for row in reader:
            if row and len(row) != len(names):
                raise InputError(f"{path}: line {reader.line_num}: {len(row)} fields, where the first has {len(names)}")
            if row:
                yield reader.line_num, row[place]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error


def _chosen(path: Path, names: list[str]) -> str:
    """The field or column that holds the texts, where nobody says."""
    candidates = [name for name in USUAL if name in names] or names
    if len(candidates) != 1:
        listed = f"{names[:8]}" if names else "none that holds a text"
        raise InputError(f"{path}: which holds the texts? name it, as {path.name}:NAME; there are {listed}")
    return candidates[0]


_KINDS = {".txt": _plain, ".jsonl": _objects, ".csv": _columns, ".tsv": _columns}
