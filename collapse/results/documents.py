"""Result files: JSON and npz that hold how they were made, written whole or not at all, read without unpickling.

Each document has a schema, `collapse.NAME/VERSION`; a reader refuses a later version by its name (docs/results.md).
"""

import html
import json
import math
import os
import re
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, __version__
from collapse.files import limits
from collapse.files.descriptor import opened
from collapse.files.npy import array_of
from collapse.files.zips import Zip
from collapse.results.outputs import atomic_write, spare

EXPERIMENT = "collapse.experiment/1"
LARGEST = 1e304  # of a number in a document: its product with a dimension is finite, its square never taken


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python and of the packages named (those that are installed)."""
    installed = {"dimensional-collapse": __version__, "python": sys.version.split()[0]}
    for name in packages:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def command() -> list[str]:
    """The command that is running, without the folder of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def strict(value: Any) -> Any:
    """The same value in strict JSON's types: arrays as lists, NaN and infinity as null, paths as text.

    Text is Unicode: bytes of a file's name that are not UTF-8 become `\\udcNN`, six characters.
    """
    if isinstance(value, Mapping):
        return {strict(str(key)): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return strict(os.fspath(value))
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def to_json(value: Any) -> str:
    """Strict JSON text, one line feed at its end."""
    return json.dumps(strict(value), allow_nan=False, indent=1) + "\n"


def printable(text: str) -> str:
    """The same text with every control character but tab and line feed, and every surrogate, as an escape."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of strict JSON in UTF-8. Raises InputError, beginning with `where`, for anything else."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number of JSON")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= limits.DIGITS else refuse(f"an integer of {len(digits)} digits")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return members

    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, parse_constant=refuse, parse_int=integer, object_pairs_hook=unique)
    except RecursionError as error:
        raise InputError(f"{where}: not readable as JSON (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{where}: not readable as JSON ({error})") from error


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises InputError: no such file, over `limits.JSON` bytes, or not strict JSON."""
    with opened(path) as source:
        if source.size > limits.JSON:
            raise InputError(f"{path}: {source.size} bytes of JSON; at most {limits.JSON} are read")
        return parse_json(source.read(0, source.size), path)


def require_schema(document: Any, known: str, where: object) -> dict[str, Any]:
    """The document itself, if it is an object of schema `known`. Raises InputError: of another, or a later version."""
    if not isinstance(document, dict):
        raise InputError(f"{where}: holds a JSON {type(document).__name__}, expected an object of schema {known}")
    schema = document.get("schema")
    if schema == known:
        return document
    kind, _, number = schema.rpartition("/") if isinstance(schema, str) else ("", "", "")
    name, _, latest = known.rpartition("/")
    if kind == name and number.isdecimal() and int(number[: limits.DIGITS]) > int(latest):
        raise InputError(
            f"{where}: schema {str(schema)[:60]} is of a later version than this one, {__version__}, which reads up to "
            f"{known}; update with pip install -U dimensional-collapse"
        )
    raise InputError(f"{where}: schema {str(schema)[:60]!r}, expected {known}")


KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def value_of(document: Mapping[str, Any], key: str, where: str, *kinds: type) -> Any:
    """The value of a key, which must be of one of these types of JSON.

    Raises InputError: no such key, or a value of another type.
    """
    if key not in document:
        raise InputError(f"{where}: has no {key}")
    value = document[key]
    if type(value) not in kinds:
        raise InputError(
            f"{where}: {key} is {KINDS[type(value)]}, expected {' or '.join(KINDS[kind] for kind in kinds)}"
        )
    return value


def integer_of(document: Mapping[str, Any], key: str, least: int, where: str) -> int:
    """A whole number of at least `least` that fits 64 bits. Raises InputError: it is none."""
    value = value_of(document, key, where, int)
    if not least <= value < 1 << 63:
        raise InputError(f"{where}: {key} is {str(value)[:40]}, expected at least {least}")
    return int(value)


def number_of(document: Mapping[str, Any], key: str, where: str, below: float = math.inf) -> float:
    """A finite number, not negative, below `below`. Raises InputError: it is none."""
    value = value_of(document, key, where, int, float)
    if not 0 <= value < below or value > LARGEST:
        raise InputError(
            f"{where}: {key} is {str(value)[:40]}, expected a number from 0" + f" to {below:g}" * (below < 2)
        )
    return float(value)


def number_or_nan(document: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number, a whole one as it is; NaN for null. Raises InputError: it is neither."""
    value = value_of(document, key, where, int, float, type(None))
    if value is not None and not abs(value) <= LARGEST:
        raise InputError(f"{where}: {key} is {str(value)[:40]}, expected a finite number")
    return math.nan if value is None else value


def numbers_of(document: Mapping[str, Any], key: str, where: str, count: int | None = None) -> NDArray:
    """A list of finite numbers, descending, not negative, as float64 (n,).

    Raises InputError: they are not, or not `count` of them.
    """
    entries = list_of(document, key, where, int, float)
    if not entries or len(entries) != (count or len(entries)):
        raise InputError(
            f"{where}: {key} holds {len(entries)} numbers, expected {count or 'some'}; it is cut or edited"
        )
    odd = next((index for index, value in enumerate(entries) if not 0 <= value <= LARGEST), None)
    if odd is not None:
        raise InputError(f"{where}: {key}[{odd}] is {str(entries[odd])[:40]}, expected a finite number from 0")
    values = np.array(entries, np.float64)
    if (rising := np.flatnonzero(np.diff(values) > 0)).size:
        raise InputError(f"{where}: {key}[{rising[0] + 1}] is larger than the one before; expected descending values")
    return values


def list_of(document: Mapping[str, Any], key: str, where: str, *kinds: type) -> list[Any]:
    """A list of values of one of these types of JSON. Raises InputError: it is none."""
    entries: list[Any] = value_of(document, key, where, list)
    for index, value in enumerate(entries):
        if type(value) not in kinds:
            raise InputError(f"{where}: {key}[{index}] is {KINDS[type(value)]}, expected {KINDS[kinds[0]]}")
    return entries


def save_text(path: Path, text: str) -> str:
    """Write `text` to `path`, whole or not at all; returns it. Raises InputError: it cannot be written."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return text


def provenance() -> dict[str, Any]:
    """What every result holds: command and versions. No date: the same command gives the same bytes."""
    return {"command": command(), "versions": versions("numpy", "scipy", "torch", "torchvision", "scikit-learn")}


def save_result(path: Path, meta: Mapping[str, Any], **arrays: NDArray) -> None:
    """Write arrays of any shapes, by name, and `meta` (plus schema, command and versions) to an npz file.

    The file is written whole or not at all.  Raises InputError: it cannot be written.
    """
    with atomic_write(path) as partial:
        write_npz(partial, meta, **arrays)


def write_npz(path: Path, meta: Mapping[str, Any], **arrays: NDArray) -> None:
    """Write what `save_result` does, arrays of any shapes, straight to `path`, the temporary one of a set of files."""
    text = np.array(to_json({"schema": EXPERIMENT, **provenance(), **meta}))
    with open(path, "wb") as file:
        np.savez_compressed(file, meta=text, **arrays)  # type: ignore[arg-type]


def load_result(path: str | os.PathLike, schema: str = EXPERIMENT) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Read what `save_result` wrote: (meta, arrays of any shapes by name). Nothing is unpickled.

    Raises InputError: no such file, damaged, or not of `schema`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such result; run the experiment without --plot-only first")
    arrays = read_npz(path)
    meta = parse_json(str(arrays.pop("meta", "null")), f"{path}: meta")
    if schema == EXPERIMENT and isinstance(meta, dict) and meta.get("schema") == 1:
        meta["schema"] = EXPERIMENT  # as the first results were written
    return require_schema(meta, schema, path), arrays


def read_npz(path: Path) -> dict[str, NDArray]:
    """The arrays of an .npz file by name, of any shapes.

    Raises InputError: damaged, Python objects, or much larger than the file.
    """
    with opened(path) as source:
        most = max(limits.UNPACKED_FREE, limits.UNPACKED_RATIO * source.size)
        archive = Zip(source)
        return {
            name.removesuffix(".npy"): array_of(
                archive.read(record, most), f"{path}: array {name.removesuffix('.npy')}"
            )
            for name, record in archive.records.items()
        }


def describes(file: Path) -> str | None:
    """The sha256 by which the JSON beside a file, written with such a file, names it; None if there is none."""
    beside = file.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        named: dict[str, Any] = load_json(beside)["files"]
        return next(str(entry["sha256"]) for name, entry in named.items() if name.endswith(file.suffix))
    except (InputError, LookupError, TypeError, AttributeError, StopIteration):
        return None  # any other JSON


def stale(path: str, sha256: str | None) -> list[str]:
    """A warning if the JSON beside a file of this sha256 names another. path: FILE or FILE:KEY, as commands take."""
    file = next((Path(text) for text in (path, path.rpartition(":")[0]) if text and os.path.isfile(text)), None)
    named = describes(file) if file else None
    if file is None or named is None or sha256 is None or named == sha256:
        return []
    beside = file.with_suffix(".json").name
    return [f"{beside} beside it describes another {file.name} (sha256 {named[:12]}, not {sha256[:12]})"]


ROWS = 14  # of a table on a screen
NOTES = 4  # warnings on a screen
SCREEN = 79


class Result(ABC):
    """A result: strict JSON in a file, equal by what it says, a sentence and a table where it is shown.

    A subclass gives `to_dict`, `sentence` and `table`, and reads its own document in `_of`.

    Examples:
        >>> import collapse
        >>> s = collapse.spectrum([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
        >>> s.save("s.json")
        >>> collapse.Spectrum.load("s.json") == s, s.to_dict()["schema"]
        (True, 'collapse.spectrum/1')
    """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The document, with values that may still be NaN."""

    @abstractmethod
    def sentence(self) -> str:
        """The main numbers in a sentence or two."""

    def table(self) -> list[tuple[str, ...]]:
        """The heads, then a row each; every cell is text."""
        return []

    def notes(self) -> list[str]:
        """What a reader should know before using the numbers."""
        return []

    def inputs(self) -> list[str]:
        """The paths that it was measured from."""
        return []

    @classmethod
    @abstractmethod
    def _of(cls, document: Any, where: str) -> Any: ...

    def to_json(self) -> str:
        """Strict JSON text of `to_dict`."""
        return to_json(self.to_dict())

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_json` to a file, whole or not at all.

        Raises InputError: it cannot be written, or is a file that the result was measured from.
        """
        for text in self.inputs():
            spare(text, Path(path))
        save_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Any:
        """Read what `save` wrote. Raises InputError: no such file, or no document of this kind."""
        return cls._of(load_json(Path(path)), str(path))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return strict(self.to_dict()) == strict(other.to_dict())

    def __repr__(self) -> str:
        lines = textwrap.wrap(f"{type(self).__name__}: {self.sentence()}", SCREEN)
        rows = cut(self.table())
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        gap = "  " if sum(sizes) + 2 * len(sizes) <= SCREEN else " "
        for row in rows:
            lines.append(gap + gap.join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])]).rstrip())
        for note in _first(self.notes()):
            lines += textwrap.wrap(f"warning: {note}", SCREEN, subsequent_indent="    ", max_lines=2)
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{type(self).__name__}</b>: {_escaped(self.sentence())}</p>"]
        rows = ""
        for index, row in enumerate(cut(self.table())):
            kind = "td" if index else "th"
            rows += f"<tr>{''.join(f'<{kind}>{_escaped(cell)}</{kind}>' for cell in row)}</tr>"
        parts += [f"<table>{rows}</table>"] if rows else []
        return "".join([*parts, *(f"<p>Warning: {_escaped(note)}</p>" for note in _first(self.notes()))])


def cut(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows of a table that a screen takes: the heads, and the first and last where there are many."""
    if len(rows) <= ROWS:
        return list(rows)
    gap = (f"... {len(rows) - ROWS + 1} more", *[""] * (len(rows[0]) - 1))
    return [*rows[: ROWS // 2], gap, *rows[-(ROWS - ROWS // 2 - 1) :]]


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _first(notes: list[str]) -> list[str]:
    more = [f"... and {len(notes) - NOTES} more, in the document"] if len(notes) > NOTES else []
    return [*notes[:NOTES], *more]
