"""Augmented views of batched images, each image its own draw.

No generator has a state: every draw is a hash of (seed, epoch, image, view), so a view does not depend on the batch it
is in, on the number of workers, or on what was drawn before, and a resumed run draws what the unbroken one would have.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def _mix(x: Any) -> Any:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every bit of x changes half of the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, epoch: int, images: NDArray, view: int, count: int) -> Tensor:
    """(n, count) float32 in [0, 1): the draws of view `view` of `images`, (n,) indices in the data set, in `epoch`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) * golden + np.uint64(epoch))
        key = _mix(key + np.uint64(view) * golden)
        rows = _mix(key + np.asarray(images, np.uint64) * golden)
        bits = _mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


@dataclass(frozen=True)
class Augmentation:
    """Random crop, rotation, brightness and contrast; all ranges uniform.

    scale: share of the image's area that is kept; ratio: largest aspect ratio of the crop (log-uniform up to it and
    its inverse); degrees: largest rotation; flip: probability of a left-right flip; brightness, contrast: largest
    relative change.
    """

    scale: tuple[float, float] = (0.3, 1.0)
    ratio: float = 4 / 3
    degrees: float = 0.0
    flip: float = 0.5
    brightness: float = 0.4
    contrast: float = 0.4

    DRAWS = 8

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """(n, c, h, w) float in 0..1 and u (n, DRAWS) in [0, 1) -> views of the same shape, in 0..1."""
        x = F.grid_sample(
            images,
            F.affine_grid(self._crop(u.to(images.device)), list(images.shape), align_corners=False),
            padding_mode="reflection",
            align_corners=False,
        )
        gain = 1 + self.brightness * (2 * u[:, 6] - 1)
        slope = 1 + self.contrast * (2 * u[:, 7] - 1)
        gain, slope = (a.to(x).view(-1, 1, 1, 1) for a in (gain, slope))
        x = x * gain
        mean = x.mean((1, 2, 3), keepdim=True)
        return ((x - mean) * slope + mean).clamp(0, 1)

    def _crop(self, u: Tensor) -> Tensor:
        """(n, 2, 3) maps from a view's coordinates, in -1..1, to the image's."""
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 0]
        stretch = torch.exp(0.5 * math.log(self.ratio) * (2 * u[:, 1] - 1))
        width, height = ((area.sqrt() * f).clamp(max=1) for f in (stretch, 1 / stretch))
        x, y = (1 - width) * (2 * u[:, 2] - 1), (1 - height) * (2 * u[:, 3] - 1)
        mirror = torch.where(u[:, 5] < self.flip, -1.0, 1.0)
        angle = math.radians(self.degrees) * (2 * u[:, 4] - 1)
        cos, sin = angle.cos(), angle.sin()
        rows = [mirror * width * cos, -height * sin, x, mirror * width * sin, height * cos, y]
        return torch.stack(rows, 1).view(-1, 2, 3)
