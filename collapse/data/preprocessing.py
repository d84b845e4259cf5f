"""How a network wants its images: resized and cropped by Pillow, normalised on the model's device.

As in the pipelines of torchvision with which these networks were evaluated, images are converted to RGB by Pillow
(palette, grey and CMYK; alpha is dropped, an animation gives its first frame) and EXIF rotation is not applied.
Floats, more than 8 bits and other numbers of channels travel as float32 in 0..1.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from collapse import InputError
from collapse.files import limits
from collapse.files.imagesets import Picture

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
        """Resized and cropped, Pillow's to (3, h, w) uint8; an array (h, w, c) in 0..1 to (c, h, w) float32 in 0..1.

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
