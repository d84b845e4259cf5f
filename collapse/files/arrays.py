"""Files of embeddings by their bytes: .npy, .npz, .pt, .safetensors, HDF5, Parquet, zarr folders; .csv, .tsv, .jsonl.

Rows are samples, (n, d).  `FILE:KEY` picks one array of a file that holds several.  All but .pt and .safetensors are
read block by block; HDF5, Parquet and zarr want a library of their own (the extras hdf5, parquet, zarr).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import containers
from collapse.files.descriptor import Descriptor, Hashed, opened
from collapse.files.hdf5 import open_hdf5
from collapse.files.npy import MAGIC, open_npy, open_npz
from collapse.files.parquet import open_parquet
from collapse.files.rows import check_shape, choose, no_key
from collapse.files.tables import ENDINGS, open_table
from collapse.files.zarrs import is_zarr, open_zarr
from collapse.files.zips import Zip


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
    about: dict[str, Any] = {"kind": "array", "path": str(source)}
    try:
        if is_zarr(path):
            with open_zarr(path, key, max_unpacked) as rows:
                yield about, rows
            return
        with opened(path) as plain:
            file = Hashed(**vars(plain))
            if kind := _kind(file):
                with _rows(file, kind, key, max_unpacked, about) as rows:
                    yield about, rows
                about["sha256"] = file.sha256()
                return
        contents = containers.read(path)
        yield {**about, "sha256": contents.sha256, "foreign": contents.foreign}, _pick(path, contents.tree, key)
    except MemoryError as error:
        raise InputError(f"{source}: wants more memory than there is ({error or 'none is left'})") from error


def _kind(file: Descriptor) -> str:
    """Which kind of array file it is by its bytes; "" for what may be a file of tensors."""
    head = file.read(0, min(file.size, 8))
    for magic, kind in ((MAGIC, "npy"), (b"\x89HDF\r\n", "hdf5"), (b"PAR1", "parquet")):
        if head.startswith(magic):
            return kind
    if file.path.suffix.lower() in ENDINGS and b"\0" not in head:
        return "text"
    return "npz" if head[:4] == b"PK\3\4" and any(name.endswith(".npy") for name in Zip(file).records) else ""


def _rows(
    file: Descriptor, kind: str, key: str | None, most: float | None, about: dict[str, Any]
) -> AbstractContextManager[Iterator[np.ndarray]]:
    if kind == "npy":
        return open_npy(file, key)
    if kind == "npz":
        return open_npz(file, key, most)
    if kind == "text":
        return open_table(file, key, about.setdefault("warnings", []))
    if kind == "hdf5":
        return open_hdf5(file, key, most)
    return open_parquet(file, key, most, about.setdefault("warnings", []))


def _pick(path: Path, tree: Any, key: str | None) -> Any:
    """The tensor of a torch or safetensors file; a file of many is likely a checkpoint, which wants images."""
    import torch

    if isinstance(tree, torch.Tensor):
        no_key(path, key)
        return _checked(str(path), tree)
    if (parts := _parts(tree)) and key is None:
        return _joined(str(path), parts)
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, torch.Tensor)} if isinstance(tree, Mapping) else {}
    nested = isinstance(tree, Mapping) and any(isinstance(value, Mapping) for value in tree.values())
    if key is None and (nested or len(tensors) > 8):
        raise InputError(
            f"{path}: looks like a checkpoint; give the images to embed too, or FILE:KEY for an array in it"
        )
    if not tensors:
        raise InputError(f"{path}: holds no tensor of embeddings (n, d), alone or by name")
    name = choose(path, list(tensors), key)
    return _checked(f"{path}: array {name!r}", tensors[name])


def _parts(tree: Any) -> list[Any]:
    """The tensors of a list of rows or of batches, or of rows by name; [] for anything else, as no encoder is that."""
    import torch

    parts = list(tree.values()) if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else []
    axes = {part.ndim for part in parts if isinstance(part, torch.Tensor)}
    whole = all(isinstance(part, torch.Tensor) and part.ndim in (1, 2) and len(part) for part in parts)
    alike = whole and len(axes) == 1 and len({part.shape[-1] for part in parts}) == 1
    rows = axes == {1} or not isinstance(tree, Mapping)
    return list(parts) if alike and rows and len(parts) > 1 and parts[0].shape[-1] > 1 else []


def _joined(where: str, parts: list[Any]) -> Any:
    """(n, d) of rows (d,) or of batches (b, d), in their order."""
    import torch

    rows = [part[None] if part.ndim == 1 else part for part in parts]
    return torch.cat([_checked(f"{where}: part {index}", part) for index, part in enumerate(rows)])


def _checked(where: str, tensor: Any) -> Any:
    """The tensor, if it is (n, d) and as large as what is stored of it."""
    import torch

    real = tensor.layout == torch.strided and not (
        tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool
    )
    check_shape(where, tuple(tensor.shape), "f" if real else "", f"{tensor.dtype} ({tensor.layout})")
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > stored:
        raise InputError(
            f"{where}: declares {size} bytes and stores {stored} (an expanded tensor); store a clone of it"
        )
    return tensor
