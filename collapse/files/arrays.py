"""Files of embeddings, recognised by their bytes: .npy, .npz, .pt, .safetensors, HDF5, Parquet, and zarr folders.

Rows are samples, (n, d).  `FILE:KEY` picks one array of a file that holds several.  .npy, HDF5, Parquet and zarr are
read block by block; the last three want a library of their own (the extras hdf5, parquet, zarr).
"""

import zipfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import containers
from collapse.files.descriptor import opened

# A file that holds several arrays and one of these takes that one: what other programs call their embeddings.
USUAL_KEYS = ("embeddings", "features", "representations", "z")


def split_key(source: Path) -> tuple[Path, str | None]:
    """(file, key) of FILE:KEY; the key is None without one."""
    text = str(source)
    file, colon, key = text.rpartition(":")
    if colon and not source.exists() and Path(file).exists():
        return Path(file), key
    return source, None


def is_array(source: Path) -> bool:
    """Whether it begins as a file of arrays, and not as a checkpoint may."""
    path, key = split_key(source)
    if key or path.is_dir() or not path.is_file():
        return bool(key) or (path / "zarr.json").exists() or (path / ".zarray").exists()
    with open(path, "rb") as file:
        head = file.read(8)
    return head.startswith((b"\x93NUMPY", b"\x89HDF", b"PAR1")) or (head.startswith(b"PK\x03\x04") and _is_npz(path))


def open_array(source: Path) -> tuple[dict[str, Any], Any]:
    """(provenance, array or tensor (n, d)) of FILE or FILE:KEY. The array of a .npy file stays on disk.

    Raises InputError: no such file, not an array, several arrays and no key, truncated, or a dtype of objects.
    """
    path, key = split_key(source)
    if path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        return {"kind": "array", "path": str(source)}, _open_zarr(path, key)
    with opened(path) as file:
        head = file.read(0, min(6, file.size))
        about = {"kind": "array", "path": str(source), "sha256": file.sha256()}
    if head == b"\x93NUMPY":
        return about, _open_npy(path)
    if head.startswith(b"PK\x03\x04") and _is_npz(path):
        return about, _open_npz(path, key)
    if head == b"\x89HDF\r\n":
        return about, _open_hdf5(path, key)
    if head[:4] == b"PAR1":
        return about, _open_parquet(path, key)
    contents = containers.read(path)
    return {**about, "foreign": contents.foreign}, _pick(path, contents.tree, key)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: truncated or damaged ({error}); fetch the file again") from error


class _Rows:
    """Rows of a .npy file, read slice by slice: a file that shrinks under a memory map would kill the process."""

    def __init__(self, path: Path, mapped: np.memmap) -> None:
        self.path, self.shape, self.dtype, self.ndim = path, mapped.shape, mapped.dtype, mapped.ndim
        self.offset, self.state = mapped.offset, self._state()

    def _state(self) -> tuple[int, int]:
        about = self.path.stat()
        return about.st_size, about.st_mtime_ns

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.shape[1]
        with open(self.path, "rb") as file:
            file.seek(self.offset + start * width * self.dtype.itemsize)
            flat = np.fromfile(file, self.dtype, (stop - start) * width)
        if len(flat) != (stop - start) * width or self._state() != self.state:
            raise InputError(f"{self.path}: changed while being read; wait until it is written")
        return flat.reshape(-1, width)


def _open_npy(path: Path) -> Any:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, SyntaxError) as error:
        reason = "it holds Python objects" if "object" in str(error).lower() else "truncated or damaged"
        raise InputError(f"{path}: cannot be read as a numpy array: {reason}") from error
    return _Rows(path, mapped) if mapped.flags.c_contiguous and mapped.ndim == 2 else mapped


def _open_npz(path: Path, key: str | None) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    try:
        with np.load(path, allow_pickle=False) as file:
            key = _choose(path, file.files, key)
            if sizes[key] > max(4 << 30, 20 * path.stat().st_size):
                raise InputError(f"{path}: array {key} declares {sizes[key]} bytes, over 20 times the file; refused")
            return file[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a numpy archive: {error}") from error


def _library(path: Path, module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{path}: wants {module}; pip install 'dimensional-collapse[{extra}]'") from error


def _open_hdf5(path: Path, key: str | None) -> Any:
    """A dataset of an HDF5 file, on disk. Links are not followed: they may lead to other files."""
    h5py = _library(path, "h5py", "hdf5")
    try:
        file = h5py.File(path, "r")
        found: dict[str, Any] = {}
        file.visititems(lambda name, item: found.update({name: item} if isinstance(item, h5py.Dataset) else {}))
        data = found[_choose(path, [name for name, item in found.items() if item.ndim == 2 or name == key], key)]
        if data.is_virtual or data.external:
            raise InputError(f"{path}: dataset {data.name} keeps its data in other files; copy it into this one")
        return data
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: truncated or damaged HDF5 ({str(error)[:100]})") from error


def _open_zarr(path: Path, key: str | None) -> Any:
    zarr = _library(path, "zarr", "zarr")
    try:
        node = zarr.open(path, mode="r")
        if isinstance(node, zarr.Group):
            node = node[_choose(path, [name for name, _ in node.arrays()], key)]
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: a damaged zarr folder ({str(error)[:100]})") from error
    if node.dtype.kind not in "fiu":
        raise InputError(f"{path}: dtype {node.dtype} is not real numbers")
    return node


def _open_parquet(path: Path, key: str | None) -> Iterator[np.ndarray]:
    """Batches of rows of a column of lists or, where there is none, of all columns of numbers."""
    pyarrow, parquet = (_library(path, name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        file = parquet.ParquetFile(path)
        kinds = {field.name: field.type for field in file.schema_arrow}
        lists = [name for name, kind in kinds.items() if pyarrow.types.is_list(kind)
                 or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)]  # fmt: skip
        numbers = [
            name for name, kind in kinds.items() if pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)
        ]
        columns = [_choose(path, lists, key)] if lists or key else numbers
        if not columns:
            raise InputError(f"{path}: holds no column of numbers or of lists of them")
        return _parquet_rows(path, file.iter_batches(batch_size=4096, columns=columns), bool(lists))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: truncated or damaged Parquet ({str(error)[:100]})") from error


def _parquet_rows(path: Path, batches: Any, lists: bool) -> Iterator[np.ndarray]:
    try:
        for batch in batches:
            if any(column.null_count for column in batch.columns):
                raise InputError(f"{path}: holds missing values; drop these rows first")
            if not lists:
                yield np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
                continue
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            width, rest = divmod(len(flat), len(batch))
            if rest or set(batch.column(0).value_lengths().to_pylist()) != {width}:
                raise InputError(f"{path}: lists of different lengths; embeddings have one width")
            yield flat.reshape(len(batch), width)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: truncated or damaged Parquet ({str(error)[:100]})") from error


def _choose(path: Path, keys: list[str], key: str | None) -> str:
    listed = ", ".join(sorted(keys)[:8]) + (", ..." if len(keys) > 8 else "")
    if key is not None:
        if key not in keys:
            raise InputError(f"{path}: no array {key!r}; it holds {listed}")
        return key
    usual = [name for name in USUAL_KEYS if name in keys]
    if len(keys) != 1 and len(usual) != 1:
        raise InputError(f"{path}: holds {len(keys)} arrays ({listed}); name one as {path}:KEY")
    return usual[0] if usual else keys[0]


def _pick(path: Path, tree: Any, key: str | None) -> Any:
    """The tensor of a torch or safetensors file; a file of many is likely a checkpoint, which wants images."""
    import torch

    if isinstance(tree, torch.Tensor):
        return tree
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, torch.Tensor)} if isinstance(tree, Mapping) else {}
    nested = isinstance(tree, Mapping) and any(isinstance(value, Mapping) for value in tree.values())
    if key is None and (nested or len(tensors) > 8):
        raise InputError(
            f"{path}: looks like a checkpoint; give the images to embed too, or FILE:KEY for an array in it"
        )
    if not tensors:
        raise InputError(f"{path}: holds no tensor of embeddings")
    return tensors[_choose(path, list(tensors), key)]
