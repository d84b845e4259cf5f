"""Embeddings in what a torch file or a pickle holds: a tensor, one by name, lists of rows or batches, rows by name.

A pickle without torch is read by the machine in pickles.py, and gives arrays, numbers and plain containers.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits, ndarrays
from collapse.files.descriptor import Descriptor
from collapse.files.pickles import Stub, unpickle
from collapse.files.rows import check_shape, choose, listed, no_key


def read_pickle(source: Descriptor) -> tuple[Any, set[str]]:
    """(tree, names of others) of a pickle of arrays. Raises InputError: damaged, too large."""
    if source.size > limits.UNPACKED_PICKLE:
        raise InputError(f"{source.path}: a pickle of {source.size} bytes, at most {limits.UNPACKED_PICKLE} are read")
    foreign: set[str] = set()
    try:
        tree = unpickle(io.BytesIO(source.read(0, source.size)), source.size, ndarrays.names(), {}, foreign)
        return _with_arrays(tree, 0), foreign
    except InputError as error:
        raise InputError(f"{source.path}: {error}") from error


def _with_arrays(value: Any, depth: int) -> Any:
    """The tree with tensors where a pickle has arrays, and lists of numbers as they are."""
    import torch

    if depth > 9:
        raise InputError("a pickle of containers within containers; refused")
    if isinstance(value, ndarrays.Pickled):
        if value.array is None:
            raise InputError("an array without numbers; refused")
        array = value.array
        kind = np.dtype("i8") if array.dtype.kind == "u" and array.itemsize < 8 else array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, kind)) if array.dtype.kind in "fiu" else Stub(str(array.dtype))
    if isinstance(value, Mapping):
        return {key: _with_arrays(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_arrays(item, depth + 1) for item in value]
    return value


def pick(path: Path, tree: Any, key: str | None, single: bool = False) -> Any:
    """The tensor (n, d) of a tree; a file of many is likely a checkpoint, which wants images.

    key: a name, or names with dots between.  single: one vector is one row.
    Raises InputError: there is none, or nothing says which.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        no_key(path, key)
        return _checked(str(path), tree, single)
    if key is None and (parts := _parts(tree)):
        return _joined(str(path), parts)
    named = dict(enumerate(tree)) if isinstance(tree, (list, tuple)) and len(tree) <= 8 else tree
    tensors = _tensors(named) if isinstance(named, Mapping) else {}
    if key is None:
        top = {name: value for name, value in tensors.items() if "." not in name}
        nested = len(top) < len(tensors) and not (single and len(tensors) == 1)
        if nested or len(tensors) > 8:
            raise InputError(
                f"{path}: looks like a checkpoint; give the images to embed too, or FILE:KEY for an array in it, "
                f"as {path}:{next(iter(tensors))}"
            )
        tensors = _beside_labels(tensors)
    if tensors and key is None and isinstance(tree, (list, tuple)) and next(iter(tensors.values())).shape[-1:] == (1,):
        raise InputError(
            f"{path}: a list of {tuple(next(iter(tensors.values())).shape)}; store the array (n, d) itself"
        )
    if not tensors:
        what = f"a {type(tree).__name__}" + (f" of {listed([*map(str, tree)])}" if isinstance(tree, Mapping) else "")
        raise InputError(f"{path}: holds no tensor of embeddings (n, d), alone or by name, but {what}")
    name = choose(path, list(tensors), key)
    return _checked(f"{path}: array {name!r}", tensors[name], single)


def _beside_labels(tensors: dict[str, Any]) -> dict[str, Any]:
    """The one array of rows, if all others are whole numbers: labels, ids, counts."""
    real = {name: value for name, value in tensors.items() if value.is_floating_point()}
    return real if len(real) == 1 and next(iter(real.values())).ndim == 2 else tensors


def _tensors(tree: Mapping[Any, Any], above: str = "", depth: int = 0) -> dict[str, Any]:
    """The tensors of mappings in mappings, and lists of numbers as tensors, by names with dots between."""
    import torch

    tensors: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and depth < 9:
            tensors |= _tensors(value, f"{name}.", depth + 1)
        elif (rows := _rows_of(value)) is not None:
            tensors[name] = rows
    return tensors


def _rows_of(value: Any) -> Any:
    """The tensor of a list of lists of numbers; None for anything else."""
    import torch

    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(row, (list, tuple)) for row in value):
        return None
    width = len(value[0])
    if not width or any(len(row) != width or not all(type(x) in (int, float) for x in row) for row in value):
        return None
    return torch.tensor(value, dtype=torch.float64)


def _parts(tree: Any) -> list[Any]:
    """The tensors of a list of rows or of batches, or of rows by name; [] for anything else, as no encoder is that."""
    import torch

    if (rows := _rows_of(tree)) is not None:
        return [rows]
    parts = list(tree.values()) if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else []
    if isinstance(tree, Mapping) and (rows := _rows_of(parts)) is not None and len(parts) > 1:
        return [rows]
    axes = {part.ndim for part in parts if isinstance(part, torch.Tensor)}
    of_tensors = all(isinstance(part, torch.Tensor) and part.ndim in (1, 2) and len(part) for part in parts)
    alike = of_tensors and len(axes) == 1 and len({part.shape[-1] for part in parts}) == 1
    rows = axes == {1} or not isinstance(tree, Mapping)
    return list(parts) if alike and rows and len(parts) > 1 and parts[0].shape[-1] > 1 else []


def _joined(where: str, parts: list[Any]) -> Any:
    """(n, d) of rows (d,) or of batches (b, d), in their order."""
    import torch

    rows = [part[None] if part.ndim == 1 else part for part in parts]
    return torch.cat([_checked(f"{where}: part {index}", part) for index, part in enumerate(rows)])


def _checked(where: str, tensor: Any, single: bool = False) -> Any:
    """The tensor, if it is (n, d) and as large as what is stored of it."""
    import torch

    while tensor.ndim > 2 and tensor.shape[-1] == 1:  # a map of one position
        tensor = tensor[..., 0]
    tensor = tensor[None] if single and tensor.ndim == 1 else tensor
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
