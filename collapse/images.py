"""Images for a model, from any place that holds them, in a fixed order; decoded and resized by Pillow in workers.

The order is that of the relative paths' bytes, so a result is reproducible.  Pixels travel as uint8 and are normalised
on the model's device.  As in the pipelines of torchvision with which these networks were evaluated, images are
converted to RGB by Pillow (palette, grey and CMYK; alpha is dropped, an animation gives its first frame) and EXIF
rotation is not applied.  Floats, more than 8 bits and other numbers of channels travel as float32 in 0..1.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from collapse import InputError
from collapse.files import limits, pictures, tiffs
from collapse.files.imagesets import ImageSet, Picture, open_set
from collapse.files.imagesets.plain import Listed
from collapse.files.pictures import UnreadableImage

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

    def __call__(self, image: Picture) -> Tensor:
        """One image as the network takes it: (c, h, w) float32, c as many as the means, 3 without any."""
        return self.normalize(self.pixels(image)[None])[0]

    def pixels(self, image: Picture, most: int = limits.PIXELS) -> Tensor:
        """Resized and cropped: (3, h, w) uint8; of an array (h, w, c) in 0..1, (c, h, w) float32 in 0..1.

        Raises InputError: resizing or padding makes over `most` pixels; other channels than `mean` has.
        """
        from torchvision.transforms import functional as F

        if not isinstance(image, Image.Image):
            self._check(image.shape[1::-1], most)
            planes = [F.pil_to_tensor(self._sized(Image.fromarray(plane)))[0] for plane in self._channels(image)]
            if len(planes) == 1:
                planes *= 3 if self.mean is None else len(self.mean)
            return torch.stack(planes).clamp_(0, 1)
        self._check(image.size, most)
        wanted = 3 if self.mean is None else len(self.mean)
        if wanted not in (1, 3) and wanted != len(image.getbands()):
            raise InputError(f"an image of {len(image.getbands())} channels, where mean= has {wanted}")
        image = rgb(image) if wanted == 3 else image.convert("L") if wanted == 1 else image
        return F.pil_to_tensor(self._sized(image))

    def _sized(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import functional as F

        if self.resize is not None:
            image = F.resize(image, [self.resize], INTERPOLATIONS[self.interpolation])
        return image if self.crop is None else F.center_crop(image, [self.crop])

    def _channels(self, values: NDArray) -> NDArray:
        """(c, h, w) contiguous of an image (h, w, c): those that are wanted, or one of grey, which stands for three."""
        have, wanted = values.shape[2], None if self.mean is None else len(self.mean)
        if have == 4 and wanted in (None, 3):
            values = values[..., :3]
        elif (wanted is None and have == 2) or (wanted not in (None, have) and (have, wanted) != (1, 3)):
            raise InputError(
                f"an image of {have} channels, where mean= has {wanted or 3}; give mean= and std= of {have}"
            )
        return np.ascontiguousarray(values.transpose(2, 0, 1), np.float32)

    def _check(self, size: Sequence[int], most: int) -> None:
        long, short = max(size), min(size)
        made = max(self.resize * int(self.resize * long / short) if self.resize else 0, (self.crop or 0) ** 2)
        if made > most:
            raise InputError(
                f"an image of {size[0]} x {size[1]} becomes {made} pixels, over {most}; give a larger max_pixels="
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """(n, c, h, w) uint8, or float in 0..1 -> float32, on the pixels' device."""
        return self.standardise(pixels if pixels.is_floating_point() else pixels.float() / 255)

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / std of x (n, c, h, w) in 0..1. Raises InputError: other channels than `mean` has."""
        if self.mean is None or self.std is None:
            return x
        if x.ndim > 2 and len(self.mean) not in (1, x.shape[-3]):
            raise InputError(f"images of {x.shape[-3]} channels, where mean= has {len(self.mean)}; give mean= and std=")
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


Depth = tuple[float, float]


class Images:
    """The images at a place (`collapse.files.imagesets.open_set`), in a fixed order.

    names: the images.  left_out: files that are no images by their names, folders that cannot be read.
    max_pixels: an image of more, height times width, is not decoded.
    labels: (n,) numbers of classes where the place itself has them, as tar shards and tables do; else None.
    pixel_range: the values that are black and white in images of floats and of more than 8 bits. None: from their type,
    and of floats, and of integers that need fewer bits than they have, from up to 16 of them, with a warning.
    found: the set, where it was opened already.

    Raises InputError: there is no such place, no image in it, or values from which no range follows.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        max_pixels: int = limits.PIXELS,
        pixel_range: Depth | None = None,
        found: ImageSet | None = None,
    ) -> None:
        self.source, self.max_pixels = Path(source), max_pixels
        self.set = open_set(self.source) if found is None else found
        if not self.set.names:
            what = "is no list of images, one a line" if isinstance(self.set, Listed) else "holds no image"
            raise InputError(f"{self.source}: {what} ({' '.join(sorted(pictures.ENDINGS))})")
        self.indices = np.arange(len(self.set.names))
        self.left_out, self.notes = self.set.left_out, [*self.set.notes]
        self.pixel_range = pixel_range
        self.kind: np.dtype | None = None  # of deep images, where their range is not given
        self._note_pages()
        if pixel_range is None:
            self._probe()

    @property
    def names(self) -> list[str]:
        """The names of the images."""
        return [self.set.names[index] for index in self.indices.tolist()]

    @property
    def labels(self) -> NDArray | None:
        """(n,) int64, or None."""
        return None if self.set.labels is None else self.set.labels[self.indices]

    def below(self, folder: str) -> "Images":
        """Those in a folder of a zip. Raises InputError: there are none."""
        found = self.some([k for k, name in enumerate(self.names) if name.startswith(f"{folder}/")])
        found.source = self.source / folder
        found.left_out = [name for name in self.left_out if name.startswith(f"{folder}/")]
        if not len(found):
            raise InputError(f"{found.source}: holds no image")
        return found

    def some(self, indices: Any) -> "Images":
        """Those at `indices`, in that order."""
        found = copy(self)
        found.indices = self.indices[np.asarray(indices, int)]
        return found

    @property
    def warnings(self) -> list[str]:
        """How many files were left out, in words, and which range of pixels was guessed."""
        count = len(self.left_out)
        left = [f"{count} files are no images by their names, first {self.left_out[0]!r}; left out"] if count else []
        return [*left, *self.notes]

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, index: int) -> str:
        """Where image `index` is, for a reader."""
        return self.set.path(int(self.indices[index]))

    def open(self, index: int) -> Picture:
        """Image `index`: Pillow's, or (h, w, c) float32 in 0..1 where that has other channels or more than 8 bits.

        Raises UnreadableImage if it cannot be read, InputError for values beyond a range that was guessed.
        """
        found = self.set.decode(int(self.indices[index]), self.max_pixels)
        return found if isinstance(found, Image.Image) else self._scaled(found, index)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; raises UnreadableImage if it cannot be read, or is far too large."""
        return self.set.bytes_of(int(self.indices[index]), self.max_pixels)

    def mark(self, index: int) -> tuple[int, bytes]:
        """(bytes, checksum) of the file of image `index`, as a zip declares them; on a disk without the checksum.

        0 bytes if there is no such file.
        """
        return self.set.mark(int(self.indices[index]))

    def _scaled(self, values: NDArray, index: int) -> NDArray:
        """(h, w, c) float32 in 0..1 of deep pixels. Raises InputError where their range is not known for sure."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UnreadableImage(self.path(index), "it holds NaN or infinity")
        if values.dtype == np.uint8:
            return values.astype(np.float32) / 255
        low, high = self.pixel_range or _full(values.dtype)
        if self.kind is not None:
            least, most = float(values.min()), float(values.max())
            what = f"{pictures.printable(self.path(index))}: {values.dtype} from {least:g} to {most:g}"
            if values.dtype != self.kind:
                raise InputError(f"{what} among images of {self.kind}; give pixel_range=, or images of one kind")
            if least < low or most > high:
                raise InputError(f"{what}, where others lie in {low:g}..{high:g}; give pixel_range= for all")
        found = np.empty(values.shape, np.float32)
        step = max(1, (1 << 20) // max(1, values[:1].size))
        for start in range(0, len(values), step):  # in float64, a piece of the image at a time
            part = values[start : start + step].astype(np.float64)
            found[start : start + step] = np.clip((part - low) / (high - low), 0, 1)
        return found

    def _some(self) -> list[int]:
        """The places of some images, from the first to the last."""
        return np.unique(np.linspace(0, len(self) - 1, limits.PROBED).astype(int)).tolist()

    def _note_pages(self) -> None:
        """Say so if some of them are TIFFs of several pages."""
        paged = [index for index in self._some() if self._several(index)]
        if paged:
            self.notes.append(
                f"{pictures.printable(self.path(paged[0]))} holds several pages, of which the first is taken "
                f"({len(paged)} of {len(self._some())} images looked at); give a TIFF alone for all its pages"
            )

    def _probe(self) -> None:
        """Find the kind and the range of deep images from some of them."""
        found: list[tuple[np.dtype, float, float]] = []
        for index in self._some():
            if not self.set.names[index].lower().endswith(SHALLOW):
                found += self._extent(index)
        self.kind = found[0][0] if found else np.dtype(np.uint8)
        if not found:
            return
        least, most = min(low for _, low, _ in found), max(high for _, _, high in found)
        self.pixel_range = _range_of(str(self.source), self.kind, least, most)
        if self.pixel_range != _full(self.kind) or self.kind.kind == "f":
            self.notes.append(
                f"pixels of {self.kind} that reach {most:g} in {len(found)} images are read as "
                f"{self.pixel_range[0]:g}..{self.pixel_range[1]:g}; pixel_range= says otherwise"
            )

    def _extent(self, index: int) -> list[tuple[np.dtype, float, float]]:
        """[(type, least, largest value)] of an image of deep pixels; [] for any other."""
        try:
            values = self.set.decode(index, self.max_pixels)
        except InputError:
            return []
        if isinstance(values, Image.Image) or values.dtype == np.uint8:
            return []
        whole = values.dtype.kind != "f" or np.isfinite(values).all()
        return [(values.dtype, float(values.min()), float(values.max()))] if whole else []

    def _several(self, index: int) -> bool:
        """Whether an image is a TIFF of several pages."""
        try:
            return self.set.names[index].lower().endswith((".tif", ".tiff")) and tiffs.several(self.read(index))
        except InputError:
            return False


SHALLOW = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif")  # endings of at most 8 bits


def _full(kind: np.dtype) -> Depth:
    """The whole range of a type; of floats 0..1."""
    return (0.0, 1.0) if kind.kind == "f" else (0.0, float(np.iinfo(kind).max))


def _range_of(where: str, kind: np.dtype, least: float, most: float) -> Depth:
    """The range that pixels from `least` to `most` are likely to have. Raises InputError: none is."""
    if kind.kind == "f" and least >= 0 and most <= 1:
        return 0.0, 1.0
    likely = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if 2**bits > most]
    if least < 0 or not likely:
        raise InputError(
            f"{where}: pixels of {kind} from {least:g} to {most:g}; give pixel_range=, which values are black and white"
        )
    return (0.0, likely[0]) if most else _full(kind)


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels of any shape as uint8; floats in 0..1 are rounded."""
    return (pixels * 255).round_().to(torch.uint8) if pixels.is_floating_point() else pixels


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
    """A batch: images (b, c, h, w), None if they differ in size or if none could be read, and the others.

    read, unreadable: the places in the batch of those that could be read, and of those that could not.
    """

    pixels: Tensor | None
    read: list[int]
    unreadable: dict[int, InputError]


def _collate(items: list[Tensor | InputError]) -> Decoded:
    pixels = {place: item for place, item in enumerate(items) if isinstance(item, Tensor)}
    unreadable = {place: item for place, item in enumerate(items) if isinstance(item, InputError)}
    if len({item.dtype for item in pixels.values()}) > 1:
        pixels = {place: item if item.is_floating_point() else item.float() / 255 for place, item in pixels.items()}
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
        traceback.clear_frames(error.__traceback__)  # they would keep the processes as long as the error is kept
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
    """Batches of images in order, (b, c, h, w) as `Preprocessing.pixels` gives them, decoded by `workers` processes.

    images: `Images`, or anything else with a length, `open`, `path` and `max_pixels`.
    skipped: gets {"path", "why"} of each image that cannot be read, which then is left out; None for an error.

    Raises InputError: an image that cannot be read, none that can, images of several sizes, a worker that was killed.
    """
    skipped, strict, some = ([] if skipped is None else skipped), skipped is None, False
    for batch in decoded(images, preprocessing, batch_size, workers, limit):
        pixels = readable(batch, skipped, strict)
        if pixels is not None:
            some = True
            yield pixels
    if not some:
        refuse_unreadable(images, skipped)


def readable(batch: Decoded, skipped: Skipped, strict: bool) -> Tensor | None:
    """The pixels of a batch, (b, c, h, w), None if no image of it can be read; those that cannot go to `skipped`.

    Raises InputError: an image that cannot be read, if `strict`; images of several sizes.
    """
    for error in batch.unreadable.values():
        if strict or not isinstance(error, UnreadableImage):
            raise error
        skipped.append({"path": error.path, "why": error.why})
    if batch.pixels is None and batch.read:
        raise InputError("images differ in size; give resize= and crop=")
    return batch.pixels


def refuse_unreadable(images: Any, skipped: Skipped) -> None:
    """Raise InputError if some were skipped, of images none of which could be read."""
    if skipped:
        where, first = f"{images.source}: " if isinstance(images, Images) else "", skipped[0]
        raise InputError(
            f"{where}none of its images can be read, first {pictures.printable(first['path'])} ({first['why']})"
        )
