"""Images for a model: a folder, zip or list, any depth, in a fixed order; decoded and resized by Pillow in workers.

The order is that of the relative paths' bytes, so a result is reproducible.  Pixels travel as uint8 and are normalised
on the model's device.  As in the pipelines of torchvision with which these networks were evaluated, images are
converted to RGB by Pillow (palette, grey and CMYK; alpha is dropped, an animation gives its first frame) and EXIF
rotation is not applied.  16-bit grey, which that would clip to white, is scaled to 8 bits first.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from collapse import InputError
from collapse.files import limits, pictures
from collapse.files.descriptor import Descriptor, opened
from collapse.files.pictures import UnreadableImage
from collapse.files.zips import Zip

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` px (antialiased), centre crop of `crop` px, then (x / 255 - mean) / std per channel.

    resize or crop None leaves that step out; mean None leaves values in 0..1.
    """

    resize: int | None = 256
    crop: int | None = 224
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """One image as the network takes it: (3, h, w) float32."""
        return self.normalize(self.pixels(image)[None])[0]

    def pixels(self, image: Image.Image, most: int = limits.PIXELS) -> Tensor:
        """Resized and cropped, (3, h, w) uint8. Raises InputError: resizing or padding makes over `most` pixels."""
        from torchvision.transforms import functional as F

        self._check(image.size, most)
        image = rgb(image)
        if self.resize is not None:
            image = F.resize(image, [self.resize], INTERPOLATIONS[self.interpolation])
        if self.crop is not None:
            image = F.center_crop(image, [self.crop])
        return F.pil_to_tensor(image)

    def _check(self, size: tuple[int, int], most: int) -> None:
        long, short = max(size), min(size)
        made = max(self.resize * int(self.resize * long / short) if self.resize else 0, (self.crop or 0) ** 2)
        if made > most:
            raise InputError(
                f"an image of {size[0]} x {size[1]} becomes {made} pixels, over {most}; give a larger max_pixels="
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) uint8, or float in 0..1 -> float32, on the pixels' device."""
        return self.standardise(pixels if pixels.is_floating_point() else pixels.float() / 255)

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std of x (n, 3, h, w) in 0..1."""
        if self.mean is None or self.std is None:
            return x
        # A tensor made on the device would wait for it.
        mean, std = (torch.tensor(a).view(-1, 1, 1).to(x.device, non_blocking=True) for a in (self.mean, self.std))
        return (x - mean) / std

    def keeps(self, size: Sequence[int]) -> bool:
        """Whether images of (height, width) `size` go through resize and crop unchanged."""
        sides = {self.resize, self.crop} - {None}
        return not sides or (size[0] == size[1] and sides == {size[0]})

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 16-bit grey scaled to 8 bits first."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def line_of(name: str) -> str:
    """The line of a list that stands for a file's name: itself, or JSON text in quotes where it would not come back.

    That is a name with a control character (as a line feed), space at its ends, or bytes that are not UTF-8.
    """
    plain = name == name.strip() and not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name)
    return name if plain and not name.startswith('"') else json.dumps(name)


def name_of(line: str) -> str:
    """The name for which a line of a list stands; no image's own name ends in a quote."""
    try:
        name = json.loads(line) if line[:1] == line[-1:] == '"' else line
    except (ValueError, RecursionError):
        return line
    return name if isinstance(name, str) else line


class Images:
    """The images below a folder, in a zip, below a folder in a zip (FILE.zip/some/folder), or in a list.

    A list is a .txt file of one path a line, relative to its own folder, in that order; in quotes it is JSON text, for
    names with line feeds (`line_of`). Folders that links lead to are looked into once. A file counts by the ending of
    its name; one without an ending, if it begins as an image does.

    names: the images, in order.  left_out: files that are no images by their names, folders that cannot be read.
    max_pixels: an image of more, height times width, is not decoded.

    Raises InputError if there is no such place, or no image in it.
    """

    def __init__(self, source: str | os.PathLike, max_pixels: int = limits.PIXELS) -> None:
        self.source, self.max_pixels = Path(source), max_pixels
        parts = (self.source, *self.source.parents)
        self.archive = next((p for p in parts if p.suffix.lower() == ".zip" and os.path.isfile(p)), None)
        self.listed = self.source.suffix == ".txt" and os.path.isfile(self.source)
        self.left_out: list[str] = []
        if self.archive is not None:
            self._zip = Zip(Descriptor.kept(self.archive))
        elif not os.path.isdir(self.source) and not self.listed:
            problem = "is not a folder or a zip" if os.path.exists(self.source) else "no such folder or zip"
            raise InputError(f"{self.source}: {problem}; give a folder of images, a zip of one, or a .txt list")
        self.names = self._listed() if self.listed else sorted(self._chosen(), key=by_bytes)
        self.left_out.sort(key=by_bytes)
        if not self.names:
            what = "is no list of images, one a line" if self.listed else "holds no image"
            raise InputError(f"{self.source}: {what} ({' '.join(sorted(pictures.ENDINGS))})")

    def _chosen(self) -> Iterator[str]:
        for name in self._below() if self.archive is None else self._inside(self.archive):
            if any(_hidden(part) for part in name.split("/")):
                continue
            if may_be_image(name) and (_ending(name) or pictures.kind_of(self._head(name))):
                yield name
            else:
                self.left_out.append(name)

    def _below(self) -> Iterator[str]:
        seen = set()
        for folder, inner, names in os.walk(self.source, onerror=self._closed, followlinks=True):
            inner.sort()  # of two links to one folder the first counts
            try:
                about = os.stat(folder)
            except OSError as error:
                self._closed(error)
                continue
            if (about.st_dev, about.st_ino) in seen:
                inner.clear()  # a link led here again
                continue
            seen.add((about.st_dev, about.st_ino))
            start = os.path.relpath(folder, self.source)
            yield from names if start == "." else (f"{start}/{name}" for name in names)

    def _closed(self, error: OSError) -> None:
        self.left_out.append(os.path.relpath(error.filename, self.source))

    def _inside(self, archive: Path) -> Iterator[str]:
        inside = self.source.relative_to(archive).as_posix()
        return (n for n in self._zip.records if inside == "." or n.startswith(f"{inside}/"))

    def _listed(self) -> list[str]:
        with opened(self.source) as file:
            if file.size > limits.LIST:
                raise InputError(f"{self.source}: a list of {file.size} bytes, at most {limits.LIST} are read")
            lines = [line.strip() for line in file.read(0, file.size).split(b"\n")]
        names = [name_of(os.fsdecode(line)) for line in lines if line]
        listed = all(may_be_image(name) and (_ending(name) or os.path.isfile(self._place(name))) for name in names)
        return names if listed else []

    def _head(self, name: str) -> bytes:
        """The first bytes of a file; none if it cannot be read."""
        try:
            if self.archive is not None:
                return self._zip.head(self._zip.records[name], 32)
            with opened(self._place(name)) as file:
                return file.read(0, min(32, file.size))
        except InputError:
            return b""

    def below(self, folder: str) -> "Images":
        """Those in a folder of a zip. Raises InputError: there are none."""
        found = copy(self)
        found.source = self.source / folder
        found.names = [name for name in self.names if name.startswith(f"{folder}/")]
        found.left_out = [name for name in self.left_out if name.startswith(f"{folder}/")]
        if not found.names:
            raise InputError(f"{found.source}: holds no image")
        return found

    def some(self, indices: Sequence[int]) -> "Images":
        """Those at `indices`, in that order."""
        found = copy(self)
        found.names = [self.names[index] for index in indices]
        return found

    @property
    def warnings(self) -> list[str]:
        """How many files were left out, in words."""
        count = len(self.left_out)
        return [f"{count} files are no images by their names, first {self.left_out[0]!r}; left out"] if count else []

    def __len__(self) -> int:
        return len(self.names)

    def _place(self, name: str) -> Path:
        return (self.source.parent if self.listed else self.source) / name

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader; what a zip calls its records are names, never places on the disk."""
        name = self.names[index]
        return str(self._place(name)) if self.archive is None else f"{self.archive}/{name}"

    def open(self, index: int) -> Image.Image:
        """Image `index`, decoded; raises UnreadableImage if it cannot be."""
        return pictures.decode(self.read(index), self.path(index), self.max_pixels)

    def read(self, index: int) -> bytes:
        """The file of image `index`; raises UnreadableImage if it cannot be read, or is far too large."""
        name, most = self.names[index], limits.image_file(self.max_pixels)
        place = self.archive or self._place(name)
        try:
            if self.archive is not None:
                record = self._zip.records[name]
                return self._zip.read(record, min(most, limits.unpacked(record.packed)))
            with opened(place) as file:
                if file.size > most:
                    raise InputError(f"{file.size} bytes, over {most}; give a larger max_pixels=")
                return file.read(0, file.size)
        except InputError as error:
            raise UnreadableImage(self.path(index), str(error).removeprefix(f"{place}: ")) from error

    def mark(self, index: int) -> tuple[int, bytes]:
        """(bytes, checksum) of the file of image `index`, as a zip declares them; on a disk without the checksum.

        0 bytes if there is no such file.
        """
        if self.archive is not None:
            record = self._zip.records[self.names[index]]
            return record.size, record.crc.to_bytes(4, "little")
        try:
            return os.stat(self._place(self.names[index])).st_size, b""
        except OSError:
            return 0, b""


def by_bytes(name: str) -> bytes:
    """A name's own bytes, in every locale: the order of names."""
    return name.encode("utf-8", "surrogateescape")


def may_be_image(name: str) -> bool:
    """Whether a file of this name is looked at: it has the ending of an image, or none."""
    return _ending(name) in (*pictures.ENDINGS, "")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower().rstrip(".")


def _hidden(part: str) -> bool:
    return part.startswith((".", "__MACOSX")) and part not in (".", "..")


class _Pixels(Dataset):
    """What a worker does: image -> uint8 tensor, or why not."""

    def __init__(self, images: Any, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            image = self.images.open(index)
        except InputError as error:
            return error
        try:
            return self.preprocessing.pixels(image, self.images.max_pixels)
        except InputError as error:
            return UnreadableImage(self.images.path(index), str(error))


class Decoded(NamedTuple):
    """A batch: images (b, 3, h, w) uint8, None if they differ in size or if none could be read, and the others.

    read, unreadable: the places in the batch of those that could be read, and of those that could not.
    """

    pixels: Tensor | None
    read: list[int]
    unreadable: dict[int, InputError]


def _collate(items: list[Tensor | InputError]) -> Decoded:
    pixels = {place: item for place, item in enumerate(items) if isinstance(item, Tensor)}
    unreadable = {place: item for place, item in enumerate(items) if isinstance(item, InputError)}
    alike = len({item.shape for item in pixels.values()}) == 1
    batch = torch.stack(list(pixels.values())) if alike else None
    if batch is not None and get_worker_info() is not None:
        batch.share_memory_()  # else a batch for which there is no shared memory is lost, and waited for for ever
    return Decoded(batch, list(pixels), unreadable)


def _quiet(worker: int) -> None:
    """No traceback from a worker: an interrupt reaches the parent, a lost image is part of the batches."""
    sys.excepthook = lambda *_: None


def decoded(
    images: Any, preprocessing: Preprocessing, batch_size: int, workers: int, limit: int | None = None
) -> Iterator[Decoded]:
    """Batches of images in order; arguments as of `pixel_batches`. Raises InputError: a worker was killed."""
    indices = range(len(images))[:limit]
    loader = DataLoader(
        _Pixels(images, preprocessing),
        batch_size=batch_size,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),  # so that copies to the device wait for nothing
        worker_init_fn=_quiet,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"{images.path(0)} and others: a decoding process was killed, or had no memory to share; "
            "give fewer workers=, or 0"
        ) from error


Skipped = list[dict[str, str]]


def pixel_batches(
    images: Any,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Tensor]:
    """Batches of images in order, (b, 3, h, w) uint8, decoded by `workers` processes (0: in this one).

    images: `Images`, or anything else with a length, `open`, `path` and `max_pixels`.
    skipped: gets {"path", "why"} of each image that cannot be read, which then is left out; None for an error.

    Raises InputError: an image that cannot be read, none that can, images of several sizes, a worker that was killed.
    """
    lost: list[UnreadableImage] = []
    some = False
    for batch in decoded(images, preprocessing, batch_size, workers, limit):
        for error in batch.unreadable.values():
            if skipped is None or not isinstance(error, UnreadableImage):
                raise error
            skipped.append({"path": error.path, "why": error.why})
            lost.append(error)
        if batch.pixels is not None:
            some = True
            yield batch.pixels
        elif batch.read:
            raise InputError("images differ in size; give resize= and crop=")
    if lost and not some:
        where = f"{images.source}: " if isinstance(images, Images) else ""
        raise InputError(
            f"{where}none of its images can be read, first {pictures.printable(lost[0].path)} ({lost[0].why})"
        )
