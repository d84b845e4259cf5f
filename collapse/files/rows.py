"""What all files of embeddings share: which array is taken, what shape it may have, and how large it may be."""

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor

# A file that holds several arrays and one of these takes that one: what other programs call their embeddings.
USUAL_KEYS = (
    "embeddings", "embedding", "features", "feature", "feats", "representations", "representation", "emb", "z"
)  # fmt: skip
BLOCK = 1 << 22  # entries of a float64 block: 32 MiB

# What is no embedding, however it is shaped, unless it is asked for by its name.
OTHER_KEYS = ("coords", "coord", "coordinates", "label", "labels", "target", "targets", "y", "id", "ids", "idx",
              "index", "indices", "mask", "masks", "__index_level_0__")  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """The first eight names, for a message."""
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "") or "none"


def choose(path: Path, keys: Sequence[str], key: str | None) -> str:
    """The array asked for or, without a key, the only one or the only one of a usual name.

    Raises InputError: there is none of that name, or several and nothing says which.
    """
    if key is not None:
        if key not in keys:
            raise InputError(f"{path}: no array {key!r}; it holds {listed(keys)}")
        return key
    if not keys:
        raise InputError(f"{path}: holds no array")
    usual = [name for name in keys if name.rpartition("/")[2] in USUAL_KEYS]
    if len(keys) == 1 and keys[0].rpartition("/")[2].lower() in OTHER_KEYS:
        raise InputError(
            f"{path}: holds only {keys[0]!r}, which is no embedding by its name; if it is, {path}:{keys[0]}"
        )
    if len(keys) != 1 and len(usual) != 1:
        raise InputError(f"{path}: holds {len(keys)} arrays ({listed(keys)}); name one as {path}:KEY")
    return usual[0] if usual else keys[0]


def no_key(path: Path, key: str | None) -> None:
    """Raise InputError for a key to a file that holds one array without a name."""
    if key is not None:
        raise InputError(f"{path}: holds one array, which has no name; leave out :{key}")


def check_shape(where: str, shape: Sequence[int], kind: str, dtype: Any) -> None:
    """Raise InputError unless it is (n, d) real numbers, of a width that is read; kind: numpy's letter of the dtype."""
    if kind not in ("f", "i", "u"):
        raise InputError(f"{where}: dtype {dtype} is not real numbers; store floats")
    if len(shape) != 2:
        raise InputError(f"{where}: shape {tuple(shape)}, expected (n, d); pool or flatten the rest first")
    if not shape[0] or not shape[1]:
        raise InputError(
            f"{where}: shape {tuple(shape)} holds no {'columns' if shape[0] else 'rows'}; look at what wrote it"
        )
    if shape[1] > limits.COLUMNS:
        raise InputError(f"{where}: {shape[1]} columns, at most {limits.COLUMNS} are read; refused")


def check_unpacked(where: str, declared: int, stored: int, most: float | None) -> None:
    """Raise InputError if it unpacks to far more than is stored; most: GiB that are allowed all the same."""
    if declared > max(limits.UNPACKED_FREE, limits.UNPACKED_RATIO * stored, (most or 0) * 2**30):
        raise InputError(
            f"{where}: declares {declared} bytes and stores {stored}, over {limits.UNPACKED_RATIO} times less; "
            f"if that is meant, allow it by max_unpacked={math.ceil(declared / 2**30)}"
        )


def check_memory(where: str, needed: int, what: str, hint: str = "") -> None:
    """Raise InputError if there is less memory than `what` takes; hint: what to do, after a semicolon."""
    available = limits.memory()
    if needed > available:
        raise InputError(f"{where}: {what} takes {_gib(needed)} of memory and there are {_gib(available)}{hint}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def library(path: Path, module: str, extra: str) -> Any:
    """A module that an extra of this package installs. Raises InputError: not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{path}: wants {module}; pip install 'dimensional-collapse[{extra}]'") from error


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Errors of somebody else's reader as one line: a file from anybody can make it fail in any way.

    Raises InputError: any error but InputError and those of the machine.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:160] or type(error).__name__
        if "alloc" in text:
            raise MemoryError(text) from error
        raise InputError(f"{path}: truncated or damaged {kind} ({text}); fetch the file again") from error


class File(io.RawIOBase):
    """A `Descriptor` as the file object that other readers take."""

    def __init__(self, source: Descriptor) -> None:
        self.source, self.place = source, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        self.place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.source.size}[whence])
        return self.place

    def tell(self) -> int:
        """As of any file."""
        return self.place

    def readinto(self, target: Any) -> int:
        """As of any file."""
        view = memoryview(target).cast("B")
        view = view[: max(0, self.source.size - self.place)]
        self.source.into(view, self.place)
        self.place += len(view)
        return len(view)


def columns_of(
    path: Path, kinds: Mapping[str, Any], numbers: list[str], key: str | None, notes: list[str]
) -> list[str]:
    """The names of the columns of a table that are the embedding; what is left out is added to `notes`.

    kinds: name -> what it holds, of all columns; numbers: those of numbers; key: a pattern of their names.
    Raises InputError: no numbers, or nothing that says which of them.
    """
    if not numbers:
        raise InputError(f"{path}: holds no column of numbers or of lists of them, but {listed(list(kinds))}")
    if key is not None:
        chosen = [name for name in kinds if fnmatchcase(name, key)]
    else:
        alone = len(kinds) == 1 and next(iter(kinds)).lower() not in OTHER_KEYS
        chosen = list(kinds) if alone else family_of(list(kinds))
        if chosen and (left := [name for name in kinds if name not in chosen]):
            notes.append(f"the {len(chosen)} columns {chosen[0]} to {chosen[-1]} are read, and not {listed(left)}")
    if not chosen:
        raise InputError(
            f"{path}: nothing says which of the columns {listed(list(kinds))} are the embedding"
            f"{'' if key is None else f', and {key!r} names none'}; pick them by a pattern, as {path}:'feat_*'"
        )
    for name in chosen:
        if name not in numbers:
            raise InputError(f"{path}: column {name!r} is {kinds[name]}, not numbers; pick others by {path}:PATTERN")
    return chosen


def family_of(names: list[str]) -> list[str]:
    """The names of one prefix with a number that runs without a gap, if there is one such prefix alone."""
    families: dict[str, dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)([0-9]{1,9})", name, re.DOTALL):
            families.setdefault(match[1], {})[int(match[2])] = name
    several = [family for family in families.values() if len(family) > 1]
    if len(several) != 1 or max(several[0]) - min(several[0]) >= len(several[0]):
        return []
    return [several[0][number] for number in sorted(several[0])]


def is_tensor(z: Any) -> bool:
    """Whether z is torch's, without importing torch."""
    return type(z).__module__.partition(".")[0] == "torch"


def blocks(z: Any, limit: int | None = None) -> Iterator[Any]:
    """Row blocks of about 32 MiB in float64 of an array, memmap, tensor or stored dataset (n, d); `limit` rows at most.

    An iterable of (b, d) batches gives these.

    Raises InputError: an array that is not (n, d).
    """
    if not hasattr(z, "ndim"):
        for batch in z:
            batch = batch if limit is None else batch[:limit]
            limit = limit if limit is None else limit - len(batch)
            yield batch
            if limit == 0:
                return
        return
    if z.ndim != 2:
        raise InputError(f"embeddings: got shape {tuple(z.shape)}, expected (n, d); pool or flatten the rest first")
    step, stop = max(1, BLOCK // max(1, z.shape[1])), z.shape[0] if limit is None else min(limit, z.shape[0])
    for start in range(0, stop, step):
        yield z[start : min(start + step, stop)]


def reservoir(batches: Iterable[Any], size: int, seed: int) -> tuple[Any, int]:
    """(rows, n): `size` rows at random of all n that pass, in their order, as one batch (Vitter's algorithm R).

    Raises InputError: no row.
    """
    rng, kept, n = np.random.default_rng(seed), list[tuple[int, Any]](), 0
    for batch in batches:
        for row in batch:
            place = len(kept) if n < size else int(rng.integers(n + 1))
            if place < size:
                kept[place : place + 1] = [(n, row.clone() if is_tensor(row) else np.array(row))]
            n += 1
    if not kept:
        raise InputError("embeddings: no rows to draw from")
    rows = [row for _, row in sorted(kept, key=lambda pair: pair[0])]
    if not is_tensor(rows[0]):
        return np.stack(rows), n
    import torch

    return torch.stack(rows), n
