"""Embeddings as text: .csv and .tsv tables of columns of numbers, .jsonl lines with a list of numbers each.

Text has no mark at its beginning, so these are known by the ends of their names.  A table's first line is all names or
all numbers; anything between is refused, since a lost row or an id among the numbers is seen by nobody.
"""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.arguments import is_number
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.rows import choose, columns_of, no_key

ENDINGS = (".csv", ".tsv", ".jsonl")


@contextmanager
def open_table(source: Descriptor, key: str | None, notes: list[str]) -> Iterator[Iterator[np.ndarray]]:
    """Rows (b, d) float64 of a table of text, in blocks; a line about columns that were left out is added to `notes`.

    key: a pattern of the names of columns, as feat_*; of JSON lines the place of the list, as response.embedding.
    Raises InputError: no numbers, nothing that says which, a field that is none, lines of different lengths, no UTF-8.
    """
    ends = source.path.suffix.lower()
    rows = _lists(source, key) if ends == ".jsonl" else _fields(source, key, "\t" if ends == ".tsv" else ",", notes)
    yield _blocks(source.path, rows)


def _blocks(path: Path, rows: Iterator[tuple[int, list[Any]]]) -> Iterator[np.ndarray]:
    """(b, d) float64 of about limits.BLOCK bytes."""
    waiting, width = list[list[float]](), 0
    for number, row in rows:
        width = width or len(row)
        if len(row) != width or not 0 < width <= limits.COLUMNS:
            raise InputError(f"{path}: line {number}: {len(row)} numbers, where the first has {width}")
        waiting.append(row)
        if len(waiting) * width * 8 >= limits.BLOCK:
            yield np.array(waiting)
            waiting = []
    if waiting:
        yield np.array(waiting)
    if not width:
        raise InputError(f"{path}: holds no row of numbers")


def lines(source: Descriptor) -> Iterator[str]:
    """Lines of UTF-8, of at most limits.LINE bytes. Raises InputError: a longer one, or no UTF-8."""
    rest, place = b"", 0
    while place < source.size or rest:
        part = source.read(place, min(1 << 20, source.size - place)) if place < source.size else b""
        place += len(part)
        *complete, rest = (rest + part).split(b"\n")
        if not part:
            complete, rest = [rest], b""
        if max(map(len, (*complete, rest))) > limits.LINE:
            raise InputError(f"{source.path}: a line of over {limits.LINE} bytes; refused")
        for line in complete:
            try:
                yield line.decode("utf-8-sig" if place == len(part) else "utf-8").rstrip("\r")
            except UnicodeDecodeError as error:
                raise InputError(f"{source.path}: is no text in UTF-8; store it as .npy") from error


def _fields(source: Descriptor, key: str | None, delimiter: str, notes: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """(number of the line, its numbers) of a table."""
    path, reader = source.path, csv.reader(lines(source), delimiter=delimiter)
    try:
        first = next((row for row in reader if row), [])
        named = [not is_number(field) for field in first]
        if any(named) and not all(named):
            raise InputError(f"{path}: the first line is neither all names nor all numbers; put names first")
        second = next((row for row in reader if row), []) if any(named) else first
        if any(named):
            numbers = [first[place] for place, field in enumerate(second[: len(first)]) if is_number(field)]
            chosen = columns_of(path, dict.fromkeys(first, "text"), numbers, key, notes)
            places = [first.index(name) for name in chosen]
        else:
            no_key(path, key)
            places = list(range(len(first)))
        if second:
            yield reader.line_num, _numbers(path, reader.line_num, second, places, len(first))
        for row in reader:
            if row:
                yield reader.line_num, _numbers(path, reader.line_num, row, places, len(first))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error


def _numbers(path: Path, number: int, row: list[str], places: list[int], width: int) -> list[float]:
    if len(row) != width:
        raise InputError(f"{path}: line {number}: {len(row)} fields, where the first line has {width}")
    try:
        return [float(row[place]) for place in places]
    except ValueError as error:
        bad = next(row[place] for place in places if not is_number(row[place]))
        raise InputError(f"{path}: line {number}: {bad[:40]!r} is no number") from error


def _lists(source: Descriptor, key: str | None) -> Iterator[tuple[int, list[Any]]]:
    """(number of the line, its list) of JSON lines; the list lies at one place in all of them."""
    path, place = source.path, key
    for number, line in enumerate(lines(source), 1):
        if not line.strip():
            continue
        try:
            lists = dict(_vectors(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: is no JSON") from error
        if place is None:
            if not lists:
                raise InputError(f"{path}: line {number}: holds no list of numbers")
            place = choose(path, list(lists), None)
        if place not in lists:
            raise InputError(f"{path}: line {number}: has no list of numbers at {place!r}; there are {list(lists)[:5]}")
        yield number, lists[place]


def _float(number: float) -> float:
    """A number of JSON; one that float64 does not hold is infinite, which is refused with its row."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _vectors(value: Any, at: str = "") -> Iterator[tuple[str, list[float]]]:
    """(dotted place, list) of the lists of numbers in a line."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _vectors(part, f"{at}.{name}" if at else name)
    elif isinstance(value, list):
        if value and all(type(part) in (int, float) for part in value):
            yield at or "list", [_float(part) for part in value]
        elif len(value) == 1:
            yield from _vectors(value[0], at)
