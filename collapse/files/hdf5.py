"""Arrays of HDF5 files.

A file names the filters that unpack it, and HDF5 looks for programs of these names and loads them: here it may not.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor
from collapse.files.rows import File, check_memory, check_shape, check_unpacked, choose, library, reading

# The numbers of filters that HDF5 and h5py bring along; any other is a plugin.
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 6: "scaleoffset", 32000: "lzf"}


@contextmanager
def open_hdf5(
    source: Descriptor, key: str | None, most: float | None, columns: bool = False
) -> Iterator[Iterator[np.ndarray]]:
    """Rows of a dataset, in blocks. Links are not followed: they may lead to other files.

    columns: MATLAB's, which stores a matrix (n, d) as (d, n).

    Raises InputError: h5py is not installed, no such dataset, data in other files, a filter that is a plugin, parts
    that were never written, what unpacks to too much (most: in GiB), damaged.
    """
    h5py, path = library(source.path, "h5py", "hdf5"), source.path
    with _no_plugins(h5py.h5pl):
        with reading(path, "HDF5"):
            file = h5py.File(File(source), "r")
        try:
            with reading(path, "HDF5"):
                datasets = _datasets(h5py, file, path)
                datasets = {name: data for name, data in datasets.items() if not (columns and name.startswith("#"))}
                name = choose(path, list(datasets), key)
                where, data = f"{path}: dataset {name!r}", datasets[name]
                step = _checked(h5py, data, where, source.size, most)
                if columns:
                    check_memory(where, 2 * data.nbytes, "a matrix of MATLAB, which is stored by columns,")
            blocks = _blocks(path, data, step)
            yield iter([np.ascontiguousarray(np.concatenate(list(blocks)).T)]) if columns else blocks
        finally:
            file.close()


@contextmanager
def _no_plugins(places: Any) -> Iterator[None]:
    """Take away the folders in which HDF5 looks for filters that it lacks; groups may want them too."""
    kept = [places.get(index) for index in range(places.size())]
    for _ in kept:
        places.remove(0)
    try:
        yield
    finally:
        for place in kept:
            places.append(place)


def _datasets(h5py: Any, file: Any, path: Path) -> dict[str, Any]:
    datasets: dict[str, Any] = {}
    seen = 0

    def visit(name: str, item: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > limits.NODES:
            raise InputError(f"{path}: over {limits.NODES} groups and datasets; refused")
        if isinstance(item, h5py.Dataset):
            datasets[name] = item

    file.visititems(visit)
    return datasets


def _checked(h5py: Any, data: Any, where: str, size: int, most: float | None) -> int:
    """How many rows are read at a time. `size`: bytes of the file."""
    if data.is_virtual or data.external:  # before anything that opens these files
        raise InputError(f"{where}: keeps its data in other files; copy it into this one")
    made = data.id.get_create_plist()
    filters = [made.get_filter(index) for index in range(made.get_nfilters())]
    for number, _, _, name in filters:
        if number not in FILTERS:
            raise InputError(
                f"{where}: wants the plugin {name.decode(errors='replace')!r} (filter {number}); "
                f"store it without, or with one of {', '.join(FILTERS.values())}"
            )
    check_shape(where, data.shape or (), data.dtype.kind, data.dtype)
    if not data.id.get_type().equal(h5py.h5t.py_create(data.dtype, logical=True)):
        raise InputError(f"{where}: numbers of a kind that numpy does not have, or damaged; store float32")
    n, width = data.shape[0], data.shape[1] * data.dtype.itemsize
    together = min(n, data.chunks[0]) if data.chunks else 1
    if data.chunks:
        stored = _check_chunks(data, where, [bool(flags & 1) for _, flags, _, _ in filters])
    elif (stored := data.id.get_storage_size()) != n * width:
        raise InputError(f"{where}: declares {n * width} bytes and has {stored}; is the file whole?")
    check_unpacked(where, n * width, min(stored, size), most)
    step = math.ceil(max(1, limits.BLOCK // width) / together) * together
    check_memory(where, 2 * min(step, n) * width, f"unpacking {together} rows, which are stored together,")
    return step


def _check_chunks(data: Any, where: str, optional: list[bool]) -> int:
    """Bytes that the chunks take. Raises InputError: one is missing, or did not pass a filter that it must."""
    if any(most is not None and size > most for size, most in zip(data.chunks, data.maxshape, strict=True)):
        raise InputError(f"{where}: damaged: chunks of {data.chunks} in a shape {data.shape}; fetch the file again")
    chunks: dict[tuple[int, ...], Any] = {}
    data.id.chunk_iter(lambda chunk: chunks.update({chunk.chunk_offset: chunk}))
    stored = sum(chunk.size for chunk in chunks.values())
    for place in _places(data, 0, data.shape[0]):
        if place not in chunks:
            raise InputError(
                f"{where}: declares {data.nbytes} bytes and has {stored}: the chunk at {place} was never written; "
                "is the file whole?"
            )
        mask = chunks[place].filter_mask
        if mask >> len(optional) or any(mask >> bit & 1 and not may for bit, may in enumerate(optional)):
            raise InputError(f"{where}: the chunk at {place} is damaged; fetch the file again")
    return stored


def _places(data: Any, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where the chunks of some rows begin."""
    rows, columns = data.chunks
    return ((i, j) for i in range(start, min(stop, data.shape[0]), rows) for j in range(0, data.shape[1], columns))


def _blocks(path: Path, data: Any, step: int) -> Iterator[np.ndarray]:
    for start in range(0, data.shape[0], step):
        with reading(path, "HDF5"):
            for place in _places(data, start, start + step) if data.chunks else ():
                data.id.read_direct_chunk(place)  # fails where reading would give zeros: a damaged index of chunks
            block = data[start : start + step]
        yield block
