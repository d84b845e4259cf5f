"""What a command reads is never written over: every input against every output, before any work."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from collapse import InputError
from collapse.results import describes
from collapse.results.outputs import given, require_place, same

# Names by which readers of checkpoints look into a folder; of a folder of zarr everything is read.
CHECKPOINT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".tar", ".distcp", ".index.json", "config.json",
              "args.json", ".metadata", "latest", ".npy", ".npz", ".h5", ".hdf5", ".parquet", ".arrow", ".feather",
              ".mat", ".pkl", ".pickle", ".p", ".csv", ".tsv", ".jsonl")  # fmt: skip
ZARR = ("zarr.json", ".zarray", ".zgroup")
# What lies beside a checkpoint file and is read with it; and the rest of the training run to which an encoder belongs.
BESIDE = ("config.json", "preprocessor_config.json", "open_clip_config.json", "args.json")
RUN = ("config.json", "metrics.jsonl", "spectra.npz", "resume.pt", "resume.prev.pt", "encoder.safetensors",
       "spectrum.png")  # fmt: skip

# A place that is read, and whether writing a path would change what is read there.
Input = tuple[Path, Callable[[Path], bool]]


def protect(inputs: Iterable[Input], outputs: Mapping[str, Path | None], force: bool) -> None:
    """Refuse, before any work, an output that has no place, is read by the command, or exists and may not be replaced.

    inputs: of `sources`, `images_of`, `data_of` and `recipe`.  outputs: what each is -> its path, None if not wanted.

    Raises InputError: as said, or two outputs are one file.
    """
    written = {name: path for name, path in outputs.items() if path is not None}
    for path in written.values():
        require_place(path)
    spare_all(inputs, written)
    for path in written.values():
        if os.path.lexists(path) and not force:
            raise InputError(f"{path}: exists and is kept; give --force to replace it, or another name")


def spare_all(inputs: Iterable[Input], written: Mapping[str, Path]) -> None:
    """Raise InputError if an output is read, or two outputs are one file."""
    names, read = list(written), list(inputs)
    for index, name in enumerate(names):
        path = written[name]
        twin = next((other for other in names[:index] if same(written[other], path)), None)
        if twin is not None:
            raise InputError(f"{path}: {twin} and {name} are one file; name two")
        place = next((place for place, changes in read if changes(path)), None)
        if place is not None:
            part = "" if same(place, path) else f", or part of it: {place} is read"
            raise InputError(f"{path}: is the input{part}; give another name")


def sources(*texts: str) -> Iterator[Input]:
    """Checkpoints, arrays and results, as FILE, FILE:KEY or a folder, and what belongs to them beside them."""
    for text in texts:
        for place in given(text):
            if place.is_dir():
                yield _folder(place, _checkpoint(place))
            else:
                yield from map(_file, filter(os.path.lexists, [place, *_beside(place)]))


def recipe(text: str | None) -> Iterator[Input]:
    """A JSON file of settings, where a name may stand instead."""
    yield from map(_file, filter(os.path.isfile, given(text or "")))


def _beside(place: Path) -> list[Path]:
    """Where something may lie that belongs to the file of a source."""
    if place.suffix == ".json":
        return [place.with_suffix(".npz")]
    if place.suffix in (".npy", ".npz"):
        return [place.with_suffix(".json")] if describes(place) else []
    run = place.name.startswith("encoder") and place.with_name("config.json").exists()
    return [place.with_name(name) for name in (RUN if run else BESIDE)]


def images_of(text: str | None) -> Iterator[Input]:
    """A folder of images or sounds, a zip, a list and the images that it names, or a file of texts."""
    for place in given(text or ""):
        from collapse.files.imagesets import open_set, wanted
        from collapse.files.sounds import may_be_sound

        if place.is_dir():
            yield _folder(place, lambda name: wanted(name) or may_be_sound(name))
            continue
        yield _file(place)
        if place.suffix == ".txt":
            with suppress(InputError):  # texts, or no list at all, which its reader says
                yield _listed(place, open_set(place).names)


def data_of(text: str) -> Iterator[Input]:
    """A set of training images: its folders train and val, its shards, or its one file."""
    folder = Path(text.removeprefix("cifar10:"))
    if not folder.is_dir():
        yield from images_of(text)
    elif text.startswith("cifar10:"):
        yield _folder(folder, lambda name: True)
    elif (folder / "train").is_dir():
        yield from (entry for split in ("train", "val", "test") for entry in images_of(str(folder / split)))
    else:
        yield from images_of(text)


def _file(place: Path) -> Input:
    return place, lambda path: same(path, place)


def _listed(place: Path, names: Iterable[str]) -> Input:
    """The images of a list; a name that leads to no file yet is nobody's."""
    images = [place.parent / name for name in names]
    return place, lambda path: path.exists() and any(image.exists() and path.samefile(image) for image in images)


def _checkpoint(folder: Path) -> Callable[[str], bool]:
    if any((folder / name).exists() for name in ZARR):
        return lambda name: True
    return lambda name: name.endswith(CHECKPOINT)


def _folder(folder: Path, wanted: Callable[[str], bool]) -> Input:
    """A folder of which the names `wanted` are read, at any depth; also through links from it to elsewhere."""

    def changes(path: Path) -> bool:
        if wanted(path.name) and Path(os.path.realpath(folder)) in Path(os.path.realpath(path.parent), "x").parents:
            return True
        if not path.exists():
            return False
        status = path.stat()
        return any(os.path.samestat(status, os.stat(file)) for file in _below(folder, wanted, status.st_ino))

    return folder, changes


def _below(folder: Path, wanted: Callable[[str], bool], number: int) -> Iterator[str]:
    """Files below a folder that are read and are links, or have this number in their file system."""
    seen = set()
    for place, inner, _ in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()  # a link led here again
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            some = [e for e in entries if wanted(e.name) and (e.is_symlink() or e.inode() == number)]
        yield from (entry.path for entry in some if os.path.isfile(entry.path))
