"""Files of embeddings: .npy (memory-mapped), .npz, .pt and .safetensors, recognised by their bytes.

Rows are samples, (n, d).  `FILE:KEY` picks one array of a file that holds several.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError, containers

# A file that holds several arrays and one of these takes that one: what other programs call their embeddings.
USUAL_KEYS = ("embeddings", "features", "representations", "z")


def split_key(source: Path) -> tuple[Path, str | None]:
    """(file, key) of FILE:KEY; the key is None without one."""
    text = str(source)
    file, colon, key = text.rpartition(":")
    if colon and not source.exists() and Path(file).exists():
        return Path(file), key
    return source, None


def open_array(source: Path) -> tuple[dict[str, Any], Any]:
    """(provenance, array or tensor (n, d)) of FILE or FILE:KEY. The array of a .npy file stays on disk.

    Raises InputError: no such file, not an array, several arrays and no key, truncated, or a dtype of objects.
    """
    path, key = split_key(source)
    containers.require_file(path)
    with open(path, "rb") as file:
        head = file.read(6)
    about = {"kind": "array", "path": str(source), "sha256": containers.sha256(path)}
    if head == b"\x93NUMPY":
        return about, _open_npy(path)
    if head.startswith(b"PK\x03\x04") and _is_npz(path):
        return about, _open_npz(path, key)
    contents = containers.read(path)
    return {**about, "foreign": contents.foreign}, _pick(path, contents.tree, key)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: truncated or damaged ({error}); fetch the file again") from error


def _open_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, SyntaxError) as error:
        reason = "it holds Python objects" if "object" in str(error).lower() else "truncated or damaged"
        raise InputError(f"{path}: cannot be read as a numpy array: {reason}") from error


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
