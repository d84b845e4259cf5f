"""Images for a model: a folder or a zip, any depth, in a fixed order; decoded and resized by Pillow in workers.

The order is that of the relative paths' bytes, so a result is reproducible.  Pixels travel as uint8 and are normalised
on the model's device.  Images are converted to RGB (palette, grey, CMYK, alpha dropped); EXIF rotation is not applied,
as in the pipelines of torchvision with which these networks were evaluated.
"""

import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
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

        image = image.convert("RGB")
        if self.resize is not None:
            image = F.resize(image, [self.resize], INTERPOLATIONS[self.interpolation])
        if self.crop is not None:
            image = F.center_crop(image, [self.crop])
        return F.pil_to_tensor(image)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) uint8 -> float32, on the pixels' device."""
        return self.standardise(pixels.float() / 255)

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std of x (n, 3, h, w) in 0..1."""
        if self.mean is None or self.std is None:
            return x
        mean, std = (torch.tensor(a, device=x.device).view(-1, 1, 1) for a in (self.mean, self.std))
        return (x - mean) / std

    def keeps(self, size: Sequence[int]) -> bool:
        """Whether images of (height, width) `size` go through resize and crop unchanged."""
        sides = {self.resize, self.crop} - {None}
        return not sides or (size[0] == size[1] and sides == {size[0]})

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


class Images:
    """The images below a folder, in a zip, or below a folder in a zip (FILE.zip/some/folder).

    Raises InputError if there is no such place, or no image in it.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = Path(source)
        archive = next((p for p in (self.source, *self.source.parents) if p.suffix == ".zip" and p.is_file()), None)
        self.archive, self._open_archive, self._opened_by = archive, None, 0
        if archive is None and not self.source.is_dir():
            problem = "is not a folder or a zip" if self.source.exists() else "no such folder or zip"
            raise InputError(f"{self.source}: {problem}; give a folder of images, or a zip of one")
        self.names = self._names()
        if not self.names:
            kinds = " ".join(sorted(SUFFIXES))
            raise InputError(f"{self.source}: holds no image ({kinds})")

    def _names(self) -> list[str]:
        if self.archive is None:
            found = [
                os.path.relpath(os.path.join(folder, name), self.source)
                for folder, _, names in os.walk(self.source)
                for name in names
            ]
        else:
            inside = self.source.relative_to(self.archive).as_posix()
            try:
                with zipfile.ZipFile(self.archive) as archive:
                    found = [name for name in archive.namelist() if inside == "." or name.startswith(f"{inside}/")]
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{self.archive}: a damaged zip ({error})") from error
        visible = (n for n in found if not any(part.startswith((".", "__MACOSX")) for part in Path(n).parts))
        return sorted((n for n in visible if Path(n).suffix.lower() in SUFFIXES), key=os.fsencode)

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
            path = self.source / name
            if not path.is_file():
                raise OSError("not a regular file")
            return path.read_bytes()
        if self._opened_by != os.getpid():  # once a process: a forked one would share the file's position
            self._open_archive, self._opened_by = zipfile.ZipFile(self.archive), os.getpid()  # type: ignore[assignment]
        return self._open_archive.read(name)  # type: ignore[attr-defined]


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = re.sub(r" ?<.*? object at .*?>", "", str(error)).partition("\n")[0] or type(error).__name__
    return InputError(f"{path}: not a readable image ({reason[:120]})")


class _Pixels(Dataset):
    """What a worker does: image -> uint8 tensor, or the text of the error, which then is raised in one place."""

    def __init__(self, images: Any, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.preprocessing.pixels(self.images.open(index))
        except InputError as error:
            return str(error)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    errors = [item for item in items if isinstance(item, str)]
    if errors:
        return errors[0]
    if len({item.shape for item in items}) > 1:  # type: ignore[union-attr]
        return "images differ in size; give --resize and --crop"
    return torch.stack(items)  # type: ignore[arg-type]


def pixel_batches(
    images: Any, preprocessing: Preprocessing, batch_size: int = 64, workers: int = 0, limit: int | None = None
) -> Iterator[Tensor]:
    """Batches of images in order, (b, 3, h, w) uint8, decoded by `workers` processes (0: in this one).

    images: `Images`, or anything else with a length and `open`.

    Raises InputError at the first image that cannot be read.
    """
    dataset = _Pixels(images, preprocessing)
    indices = range(len(images))[:limit]
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_stack,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch
