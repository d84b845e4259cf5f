"""Images wherever people keep them, as one kind of thing: `open_set` gives their names, bytes, pixels and labels.

Below a folder, in a zip or a list (plain.py); in tar shards (shards.py); as bytes in a column of Parquet, Arrow or what
`datasets` saves (tables.py); in an array or in the pages of a TIFF (stacks.py).
"""

import os
from collections.abc import Callable
from pathlib import Path

from collapse import InputError
from collapse.files import npy, pictures, tars
from collapse.files.arrays import split_key
from collapse.files.arrow import is_arrow
from collapse.files.descriptor import opened
from collapse.files.imagesets.base import (
    ImageSet,
    Picture,
    by_bytes,
    ending_of,
    hidden,
    line_of,
    may_be_image,
    name_of,
)
from collapse.files.imagesets.plain import Folder, Listed, Zipped
from collapse.files.imagesets.shards import Shards
from collapse.files.imagesets.stacks import Pages, Stack
from collapse.files.imagesets.tables import Table

__all__ = ["ImageSet", "Picture", "by_bytes", "hidden", "is_part", "line_of", "may_be_image", "name_of", "open_set",
           "parts_of", "wanted"]  # fmt: skip

WHAT = (
    "a folder of images, a zip of one, a .txt list, tar shards, Parquet, Arrow, .npy, .npz or a TIFF of several pages"
)
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")
TABLES = (".parquet", ".arrow")


def open_set(source: Path) -> ImageSet:
    """The images at a place: FILE, FILE:KEY, a folder, or FILE.zip/some/folder.

    Of a folder without images, its tar shards or its tables are read, all of one kind, by their names.
    Raises InputError: there is no such place, or it cannot be read; there may be no image in it.
    """
    archive = next((p for p in (source, *source.parents) if p.suffix.lower() == ".zip" and os.path.isfile(p)), None)
    if archive is not None:
        return Zipped(archive, source.relative_to(archive).as_posix())
    path, key = split_key(source)
    if os.path.isdir(path):
        return _of_folder(path, key)
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such folder or zip; give {WHAT}")
    if path.suffix.lower() == ".txt":
        return Listed(path)
    return _of_file(path, key)


def _of_file(path: Path, key: str | None) -> ImageSet:
    with opened(path) as file:
        head = file.read(0, min(file.size, 512))
    if head[:6] == npy.MAGIC or (head[:4] == b"PK\3\4" and path.suffix.lower() == ".npz"):
        return Stack(path, key)
    if head[:4] == b"PAR1" or is_arrow(head):
        return Table([path], key)
    if tars.is_tar(head):
        return Shards([path])
    if pictures.kind_of(head) == "TIFF":
        return Pages(path)
    if head.startswith(PACKED):
        raise InputError(f"{path}: is compressed; unpack it first, as by gunzip, since images are read in any order")
    raise InputError(f"{path}: is not a folder or a zip; give {WHAT}")


def _of_folder(path: Path, key: str | None) -> ImageSet:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise InputError(f"{path}: holds the splits {', '.join(splits)}; give one, as {path / splits[0]}")
    images: ImageSet = Folder(path)
    if not images.names:
        for endings, kind in _KINDS:
            names = [name for name in images.left_out if ending_of(name) in endings]
            if names:
                left = [name for name in images.left_out if name not in names and not name.endswith(".json")]
                images = kind([path / name for name in names], key)
                images.left_out += left
                break
    return images


_KINDS: tuple[tuple[tuple[str, ...], Callable[..., ImageSet]], ...] = (
    ((".tar",), lambda paths, key: Shards(paths)),
    ((".parquet",), Table),
    ((".arrow",), Table),
)


def wanted(name: str) -> bool:
    """Whether a file of this name in a folder may be read as images, or as what holds them."""
    return may_be_image(name) or ending_of(name) in (".npy", ".tar", *TABLES)


def is_part(name: str, split: str) -> bool:
    """Whether a shard or a table of this name belongs to a split of a data set: train-00000-of-00002.parquet."""
    return name.startswith(split) and ending_of(name) in (".tar", *TABLES)


def parts_of(folder: Path, split: str) -> ImageSet | None:
    """The shards or tables of a split in a folder, or in its folder data, as on a hub; None if there are none.

    Raises InputError: the split is there in several kinds.
    """
    for place in (folder, folder / "data"):
        names = sorted(name for name in os.listdir(place) if is_part(name, split)) if os.path.isdir(place) else []
        kinds = {ending_of(name) for name in names}
        if len(kinds) > 1:
            raise InputError(f"{place}: the part {split} is there as {' and as '.join(sorted(kinds))}; keep one")
        if names:
            paths = [place / name for name in names]
            return Shards(paths) if kinds == {".tar"} else Table(paths)
    return None
