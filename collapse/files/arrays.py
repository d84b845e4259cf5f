"""Files of embeddings by their bytes: numpy's, torch's, HDF5, Parquet, Arrow, zarr, MATLAB's, pickles, tables of text.

Rows are samples, (n, d).  `FILE:KEY` picks one array of a file that holds several.  A folder of such files is one
array, file after file.  All but .pt, .safetensors, .mat and pickles are read block by block; HDF5, Parquet, Arrow and
zarr want a library of their own (the extras hdf5, parquet, zarr).
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.files import containers, mat, trees
from collapse.files.arrow import is_arrow, open_arrow
from collapse.files.descriptor import Descriptor, Hashed, opened
from collapse.files.hdf5 import open_hdf5
from collapse.files.npy import MAGIC, open_npy, open_npz
from collapse.files.parquet import open_parquet
from collapse.files.rows import blocks
from collapse.files.tables import ENDINGS, open_table
from collapse.files.zarrs import is_zarr, open_zarr
from collapse.files.zips import Zip

LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PICKLES = (".pkl", ".pickle", ".p")
# Endings of the files that a folder of parts may hold.
PARTS = (".npy", ".npz", ".pt", ".pth", ".safetensors", ".h5", ".hdf5", ".parquet", ".arrow", ".feather", ".mat",
         *PICKLES, *ENDINGS)  # fmt: skip
KINDS = ".npy, .npz, .pt, .safetensors, .h5, .parquet, .arrow, .feather, zarr, .mat, .pkl, .csv, .tsv or .jsonl"
CONFIGS = ("config.json", "args.json", ".metadata", "latest", "preprocessor_config.json", "open_clip_config.json")


def split_key(source: Path) -> tuple[Path, str | None]:
    """(file, key) of FILE:KEY; the key is None without one."""
    file, colon, key = str(source).rpartition(":")
    if colon and not os.path.exists(source) and os.path.exists(file):
        return Path(file), key
    return source, None


def is_array(source: Path) -> bool:
    """Whether it begins as a file of arrays, and not as a checkpoint may."""
    path, key = split_key(source)
    if key is not None or not os.path.isfile(path):
        return key is not None or is_zarr(path)
    with opened(path) as file:
        return _kind(file) != ""


@contextmanager
def open_array(source: Path, max_unpacked: float | None = None) -> Iterator[tuple[dict[str, Any], Any]]:
    """(provenance, rows) of FILE or FILE:KEY; rows: a tensor (n, d), or an iterator of blocks (b, d), numpy arrays.

    The digest is taken from the bytes as they are read; it is in the provenance when the block ends.
    max_unpacked: GiB that a packed array may have although its file is far smaller.

    Raises InputError: no such file, not an array, several arrays and no key, truncated or damaged, a dtype of objects,
    far more than is stored, more than the memory there is, or changed while being read.
    """
    path, key = split_key(source)
    entry: dict[str, Any] = {"kind": "array", "path": str(source)}
    try:
        if is_zarr(path):
            with open_zarr(path, key, max_unpacked) as rows:
                yield entry, rows
            return
        if os.path.isdir(path):
            with _of_folder(path, key, max_unpacked, entry) as rows:
                yield entry, rows
            return
        with _file(path, key, max_unpacked, entry) as rows:
            yield entry, rows
    except MemoryError as error:
        raise InputError(f"{source}: wants more memory than there is ({error or 'none is left'})") from error


@contextmanager
def _file(
    path: Path, key: str | None, most: float | None, entry: dict[str, Any], single: bool = False
) -> Iterator[Any]:
    """Rows of one file; what is known of it goes to `about`.  single: one vector is one row."""
    with opened(path) as plain:
        file = Hashed(**vars(plain))
        if kind := _kind(file):
            with _rows(file, kind, key, most, entry, single) as rows:
                yield rows
            entry["sha256"] = file.sha256()
            return
    try:
        contents = containers.read(path)
    except InputError as error:
        hint = f"; arrays are read from {KINDS}" if "is not a checkpoint" in str(error) else ""
        raise InputError(f"{error}{hint}") from error
    entry |= {"sha256": contents.sha256, "foreign": contents.foreign}
    yield trees.pick(path, contents.tree, key, single)


@contextmanager
def _of_folder(folder: Path, key: str | None, most: float | None, entry: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """Rows of the files of a folder, one after another. Raises InputError: not of one kind, of several widths."""
    names, digests = _parts_of(folder), dict[str, str]()
    entry["warnings"] = [f"{len(names)} files of {folder} are read as one array, {names[0]} to {names[-1]}"]
    yield _one_by_one(folder, names, key, most, digests)
    digest = hashlib.sha256()
    for name in names:
        if name not in digests:  # nobody wanted its rows
            with opened(folder / name) as file:
                digests[name] = file.sha256()
        digest.update(f"{name} {digests[name]}\n".encode("utf-8", "surrogateescape"))
    entry["sha256"] = digest.hexdigest()


def _one_by_one(
    folder: Path, names: list[str], key: str | None, most: float | None, digests: dict[str, str]
) -> Iterator[Any]:
    width = 0
    for name in names:
        known: dict[str, Any] = {}
        with _file(folder / name, key, most, known, single=True) as rows:
            for block in blocks(rows):
                if width and block.shape[1] != width:
                    raise InputError(f"{folder / name}: {block.shape[1]} dimensions, where {names[0]} has {width}")
                width = block.shape[1]
                yield block
        digests[name] = known["sha256"]


def _parts_of(folder: Path) -> list[str]:
    """The names of the files in a folder that hold parts of one array, by their numbers."""
    entries = [name for name in os.listdir(folder) if not name.startswith(".")]
    config = next((name for name in CONFIGS if name in entries), None)
    names = [name for name in entries if os.path.splitext(name)[1].lower() in PARTS]
    if config or not names:
        what = f"holds {config}: a checkpoint, give the images to embed too" if config else "holds no file of an array"
        raise InputError(f"{folder}: is a folder and {what}; arrays are read from {KINDS}")
    endings = sorted({os.path.splitext(name)[1].lower() for name in names})
    series = [name for name in names if re.search("[0-9]", name)]
    stems = {re.sub("[0-9]+", "#", name) for name in series}
    several = sorted(stem for stem in stems if sum(re.sub("[0-9]+", "#", name) == stem for name in series) > 1)
    if len(endings) > 1 or len(several) > 1:
        kinds = endings if len(endings) > 1 else several
        raise InputError(f"{folder}: holds {' and '.join(kinds[:4])}; put what belongs together in a folder of its own")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in _pieces(name)])


def _pieces(name: str) -> list[str]:
    """A name cut into text, digits, text, ...: its numbers count as numbers."""
    return re.split("([0-9]{1,18})", name)


def _kind(file: Descriptor) -> str:
    """Which kind of array file it is by its bytes; "" for what may be a file of tensors."""
    head, ending = file.read(0, min(file.size, 32)), file.path.suffix.lower()
    marks = ((MAGIC, "npy"), (b"\x89HDF\r\n", "hdf5"), (mat.HDF5, "matlab"), (b"PAR1", "parquet"), (mat.MAGIC, "mat"))
    for magic, kind in marks:
        if head.startswith(magic):
            return kind
    if is_arrow(head):
        return "arrow"
    if ending in PICKLES and not head.startswith((b"PK\3\4", LEGACY_TORCH)):
        return "pickle"
    if ending in ENDINGS and b"\0" not in head[:8]:
        return "text"
    return "npz" if head[:4] == b"PK\3\4" and any(name.endswith(".npy") for name in Zip(file).records) else ""


def _rows(
    file: Descriptor, kind: str, key: str | None, most: float | None, entry: dict[str, Any], single: bool
) -> AbstractContextManager[Any]:
    if kind == "npy":
        return open_npy(file, key, single)
    if kind == "npz":
        return open_npz(file, key, most)
    if kind == "pickle":
        return _pickled(file, key, entry, single)
    if kind == "mat":
        return mat.open_mat(file, key, most)
    if kind in ("hdf5", "matlab"):
        return open_hdf5(file, key, most, kind == "matlab")
    notes = entry.setdefault("warnings", [])
    if kind == "text":
        return open_table(file, key, notes)
    return (open_arrow if kind == "arrow" else open_parquet)(file, key, most, notes)


@contextmanager
def _pickled(file: Descriptor, key: str | None, entry: dict[str, Any], single: bool) -> Iterator[Any]:
    tree, foreign = trees.read_pickle(file)
    entry["foreign"] = sorted(foreign)
    yield trees.pick(file.path, tree, key, single)
