"""Sounds for a network: samples at its rate, or the spectrogram that its feature extractor makes of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError


@dataclass(frozen=True)
class Waves:
    """How a network wants its sounds; what `Preprocessing` is to images.

    extractor: transformers' feature extractor.  rate: samples a second.  longest: samples that are read, 0 for all.
    shortest: samples that a sound must have.  hop: samples a step of the spectrogram, whose number of steps that are of
    the sound itself goes along in a last column; 0 for none.
    """

    extractor: Any = field(repr=False)
    rate: int
    longest: int = 0
    shortest: int = 1
    hop: int = 0

    takes = "sounds"

    def __call__(self, samples: NDArray) -> Tensor:
        """One sound (t,) float32 at the network's rate as it takes it, without the axis of a batch.

        Raises InputError: fewer than `shortest` samples.
        """
        if len(samples) < self.shortest:
            least = f"the network takes {self.shortest} or more"
            raise InputError(f"{len(samples)} samples at {self.rate} a second; {least}")
        samples = samples[: self.longest] if self.longest else samples
        made = self.extractor(np.ascontiguousarray(samples), sampling_rate=self.rate, return_tensors="np")
        name = "input_values" if "input_values" in made else "input_features"
        features = torch.from_numpy(np.asarray(made[name][0], dtype=np.float32))
        if not self.hop:
            return features
        steps = torch.full((*features.shape[:-1], 1), float(-(-len(samples) // self.hop)))
        return torch.cat([features, steps], -1)

    def normalize(self, features: Tensor) -> Tensor:
        """The features, of any shape, as they are."""
        return features

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {"sampling_rate": self.rate, "longest": self.longest or None, "extractor": type(self.extractor).__name__}
