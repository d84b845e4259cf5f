"""Clips for a network: several frames of one size, each prepared as an image is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """How a network wants its clips. images: the `Preprocessing` of each frame.  frames: how many a clip has."""

    images: Any
    frames: int

    takes = "clips"

    @property
    def mean(self) -> tuple[float, ...] | None:
        """What is taken off each channel."""
        mean: tuple[float, ...] | None = self.images.mean
        return mean

    def chosen(self, count: int) -> list[int]:
        """Which of `count` frames are taken: the first, the last, and evenly between."""
        return [int(place) for place in np.linspace(0, count - 1, self.frames).round()]

    def __call__(self, frames: list[Any], most: int) -> Tensor:
        """Decoded frames -> (frames, 3, h, w) uint8. Raises InputError: over `most` pixels."""
        return torch.stack([self.images.pixels(frame, most) for frame in frames])

    def normalize(self, clips: Tensor) -> Tensor:
        """(n, frames, 3, h, w) uint8, or float in 0..1 -> float32."""
        return self.images.normalize(clips)

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {**self.images.as_dict(), "frames": self.frames}
