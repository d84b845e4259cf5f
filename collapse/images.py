"""Images for a model: a folder, zip or list, any depth, in a fixed order; decoded and resized by Pillow in workers.

The order is that of the relative paths' bytes, so a result is reproducible.  Pixels travel as uint8 and are normalised
on the model's device.  As in the pipelines of torchvision with which these networks were evaluated, images are
converted to RGB by Pillow (palette, grey and CMYK; alpha is dropped, an animation gives its first frame) and EXIF
rotation is not applied.  16-bit grey, which that would clip to white, is scaled to 8 bits first.
"""

import io
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from collapse import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST_FILE = 256 << 20  # bytes of one image file in a zip; pixels are limited by Pillow, to 89 million
ENTRIES = 2_000_000
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

    def pixels(self, image: Image.Image) -> Tensor:
        """Resized and cropped, (3, h, w) uint8."""
        from torchvision.transforms import functional as F

        image = rgb(image)
        if self.resize is not None:
            image = F.resize(image, [self.resize], INTERPOLATIONS[self.interpolation])
        if self.crop is not None:
            image = F.center_crop(image, [self.crop])
        return F.pil_to_tensor(image)

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
    return image.convert("RGB")


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
    except ValueError:
        return line
    return name if isinstance(name, str) else line


class Images:
    """The images below a folder, in a zip, below a folder in a zip (FILE.zip/some/folder), or in a list.

    A list is a .txt file of one path a line, relative to its own folder, in that order; in quotes it is JSON text, for
    names with line feeds (`line_of`). Folders that links lead to are
    looked into once.
    Raises InputError if there is no such place, or no image in it.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = Path(source)
        archive = next((p for p in (self.source, *self.source.parents) if p.suffix == ".zip" and p.is_file()), None)
        self.archive, self._open_archive, self._opened_by = archive, None, 0
        self.listed = self.source.suffix == ".txt" and self.source.is_file()
        if archive is None and not self.source.is_dir() and not self.listed:
            problem = "is not a folder or a zip" if self.source.exists() else "no such folder or zip"
            raise InputError(f"{self.source}: {problem}; give a folder of images, a zip of one, or a .txt list")
        self.names = self._names()
        if not self.names:
            kinds = " ".join(sorted(SUFFIXES))
            what = "is no list of images, one a line" if self.listed else "holds no image"
            raise InputError(f"{self.source}: {what} ({kinds})")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_archive": None, "_opened_by": 0}  # for workers that are not forked

    def _names(self) -> list[str]:
        if self.listed:
            return self._listed()
        found = list(self._below() if self.archive is None else self._inside())
        visible = (n for n in found if not any(part.startswith((".", "__MACOSX")) for part in Path(n).parts))
        return sorted((n for n in visible if Path(n).suffix.lower() in SUFFIXES), key=os.fsencode)

    def _listed(self) -> list[str]:
        try:
            lines = os.fsdecode(self.source.read_bytes()).split("\n")
        except OSError as error:
            raise InputError(f"{self.source}: cannot be read ({error.strerror})") from error
        names = [name_of(line.strip()) for line in lines if line.strip()]
        return names if all(Path(name).suffix.lower() in SUFFIXES for name in names) else []

    def _below(self) -> Iterator[str]:
        seen = set()
        for folder, inner, names in os.walk(self.source, followlinks=True):
            inner.sort()  # of two links to one folder the first counts
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                inner.clear()  # a link led here again
                continue
            seen.add((about.st_dev, about.st_ino))
            yield from (os.path.relpath(os.path.join(folder, name), self.source) for name in names)

    def _inside(self) -> Iterator[str]:
        assert self.archive is not None
        inside = self.source.relative_to(self.archive).as_posix()
        try:
            with zipfile.ZipFile(self.archive) as archive:
                if len(archive.infolist()) > ENTRIES:
                    raise InputError(f"{self.archive}: over {ENTRIES} entries; refused")
                yield from (n for n in archive.namelist() if inside == "." or n.startswith(f"{inside}/"))
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{self.archive}: a damaged zip ({error})") from error

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        """Image `index`, decoded; raises InputError if it cannot be."""
        return self.decode(self.read(index), self.source / self.names[index])

    def read(self, index: int) -> bytes:
        """The file of image `index`; raises InputError if it cannot be read."""
        name = self.names[index]
        try:
            return self._bytes(name)
        except Exception as error:  # a missing file, or a damaged record of a zip
            raise _unreadable(self.source / name, error) from error

    @staticmethod
    def decode(contents: bytes, path: Path) -> Image.Image:
        """The image in the bytes of file `path`; raises InputError if there is none."""
        try:
            with warnings.catch_warnings():
                # Pillow only warns of a decompression bomb.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(contents))
                image.load()
            return image
        except Exception as error:  # decoders of damaged files fail in many ways, all the file's fault
            raise _unreadable(path, error) from error

    def _bytes(self, name: str) -> bytes:
        if self.archive is None:
            path = (self.source.parent if self.listed else self.source) / name
            if not path.is_file():  # a pipe would wait for ever
                raise OSError("not a regular file" if path.exists() else "no such file")
            return path.read_bytes()
        if self._opened_by != os.getpid():  # once a process: a forked one would share the file's position
            self._open_archive, self._opened_by = zipfile.ZipFile(self.archive), os.getpid()  # type: ignore[assignment]
        with self._open_archive.open(name) as file:  # type: ignore[attr-defined]
            contents = file.read(LARGEST_FILE + 1)  # the size that a zip declares may be a lie
        if len(contents) > LARGEST_FILE:
            raise OSError(f"unpacks to over {LARGEST_FILE >> 20} MiB")
        return contents


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = re.sub(r" ?<.*? object at .*?>", "", str(error)).partition("\n")[0] or type(error).__name__
    return InputError(f"{path}: not a readable image ({reason[:120]})")


class _Pixels(Dataset):
    """What a worker does: image -> uint8 tensor, or (path, why not)."""

    def __init__(self, images: Any, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        try:
            return self.preprocessing.pixels(self.images.open(index))
        except InputError as error:
            path, _, reason = str(error).partition(": not a readable image ")
            return path, reason.strip("()")


Skipped = list[dict[str, str]]


def _stack(items: list[Tensor | tuple[str, str]]) -> tuple[Tensor | None, list[tuple[str, str]]]:
    """(batch, unreadable images); the batch is None if the others differ in size, or if there is none."""
    pixels = [item for item in items if isinstance(item, Tensor)]
    alike = len({item.shape for item in pixels}) == 1
    batch = torch.stack(pixels) if alike else None
    if batch is not None and get_worker_info() is not None:
        batch.share_memory_()  # else a batch for which there is no shared memory is lost, and waited for for ever
    return batch, [item for item in items if isinstance(item, tuple)]


def _quiet(worker: int) -> None:
    """A worker whose reader was interrupted has nothing to say; errors of its work travel with the batches."""
    sys.excepthook = lambda *_: None


def pixel_batches(
    images: Any,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Tensor]:
    """Batches of images in order, (b, 3, h, w) uint8, decoded by `workers` processes (0: in this one).

    images: `Images`, or anything else with a length and `open`.
    skipped: gets {"path", "why"} of each image that cannot be read, which then is left out; None for an error.

    Raises InputError: an image that cannot be read, images of different sizes, a worker that was killed.
    """
    indices = range(len(images))[:limit]
    loader = DataLoader(
        _Pixels(images, preprocessing),
        batch_size=batch_size,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),  # so that copies to the device wait for nothing
        worker_init_fn=_quiet,
    )
    try:
        for index, (pixels, unreadable) in enumerate(loader):
            for path, why in unreadable:
                if skipped is None:
                    raise InputError(f"{path}: not a readable image ({why})")
                skipped.append({"path": path, "why": why})
            if pixels is not None:
                yield pixels
            elif len(unreadable) < len(indices[index * batch_size : (index + 1) * batch_size]):
                raise InputError("images differ in size; give --resize and --crop")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"{images.source}: a decoding process was killed, or had no memory to share; give fewer --workers, or 0"
        ) from error
