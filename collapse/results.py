"""Result files: JSON and npz that hold how they were made, written whole or not at all, read without unpickling."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, __version__


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python and of the packages named (those that are installed)."""
    found = {"dimensional-collapse": __version__, "python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command() -> list[str]:
    """The command that is running, without the folder of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made a folder ({error.strerror}); choose another place") from error
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); the old file is kept") from error
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise InputError if `path` exists and may not be replaced, or if there is no folder in which to write it."""
    if path.exists() and not force:
        raise InputError(f"{path}: exists and is kept; give --force to replace it, or another name")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written to" if above.is_dir() else "is not a folder"
        raise InputError(f"{path}: {above} {what}; choose another place")


def strict(value: Any) -> Any:
    """The same value in strict JSON's types: arrays as lists, NaN and infinity as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, Path) else value


def to_json(value: Any) -> str:
    """Strict JSON text, one line feed at its end."""
    return json.dumps(strict(value), allow_nan=False, indent=1) + "\n"


def save_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def provenance() -> dict[str, Any]:
    """What every result holds: command and versions. No date: the same command gives the same bytes."""
    return {"command": command(), "versions": versions("numpy", "scipy", "torch", "torchvision", "scikit-learn")}


def save_result(path: Path, meta: Mapping[str, Any], **arrays: NDArray) -> None:
    """Write named arrays and `meta` (plus command and versions) to an npz file, whole or not at all."""
    with whole(path) as partial:
        np.savez_compressed(partial, meta=np.array(to_json({"schema": 1, **provenance(), **meta})), **arrays)  # type: ignore[arg-type]


def load_result(path: Path) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Read what `save_result` wrote: (meta, arrays). Nothing is unpickled."""
    if not path.exists():
        raise InputError(f"{path}: no such result; run the experiment without --plot-only first")
    with np.load(path, allow_pickle=False) as file:
        return json.loads(file["meta"].item()), {key: file[key] for key in file.files if key != "meta"}


def r_squared(measured: NDArray, predicted: NDArray) -> float:
    """Share of the variance of ln(measured) that ln(predicted) explains, over all entries.

    Raises InputError if an entry is not positive, where the logarithm says nothing.
    """
    if not (np.all(measured > 0) and np.all(predicted > 0)):
        raise InputError("R^2 of logarithms needs positive values; drop what is zero first")
    x, y = np.log(measured), np.log(predicted)
    return float(1 - np.sum((x - y) ** 2) / np.sum((x - x.mean()) ** 2))
