"""Stochastic gradient descent of linear networks on the toy contrastive task, many runs as one batch of tensors.

Notation:  R runs, L layers;  x0 ~ N(0, C0) clean data, the two views x0 + e and x0 + e', e, e' ~ N(0, Ce);
z = W_L .. W_1 x, without bias;  the loss is that of the official toy scripts: cross-entropy of z . z' / tau, one
direction, averaged over the batch, which is drawn afresh at each step.  Time is learning rate x steps.
Draws and weights are float32; each run has its own generator, so a run does not depend on those beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from collapse import InputError

CHUNK = 8  # steps drawn at a time: few calls, and the draws stay in the cache


@dataclass(frozen=True)
class Descent:
    """How to descend; the defaults are the official toy scripts'."""

    lr: float = 1e-3
    steps: int = 10_000
    batch: int = 128
    temperature: float = 0.1


@dataclass(frozen=True)
class GaussianViews:
    """Two views x0 + e and x0 + e' with independent coordinates.

    clean, noise: (d,) or (R, d) standard deviations of each coordinate of x0 and of e.
    """

    clean: NDArray[np.float64]
    noise: NDArray[np.float64]

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d) float32: both views of `steps` batches for each run."""
        deviation = torch.as_tensor(np.stack([self.clean, self.noise, self.noise], axis=-2), dtype=torch.float32)
        normal = torch.empty(len(generators), steps, 3, batch, deviation.shape[-1])
        for run, generator in zip(normal, generators, strict=True):
            run.normal_(generator=generator)
        normal *= deviation.view(-1, 1, 3, 1, deviation.shape[-1])
        return normal[:, :, 1:].add_(normal[:, :, :1])


def sgd(
    weights: Sequence[NDArray], views: GaussianViews, seeds: Sequence[int], descent: Descent, at: Sequence[int]
) -> list[NDArray[np.float64]]:
    """Train R runs at once and keep their weights at chosen steps.

    Args:
        weights: L arrays (R, rows, columns), the initial layers; the first acts on the data.
        views: where the batches come from.
        seeds: R seeds, one a run.
        descent: learning rate, steps, batch and temperature.
        at: ascending steps to keep, each in [0, descent.steps].

    Returns:
        L arrays (len(at), R, rows, columns) float64.

    Raises:
        InputError: the weights are not R stacked layers that fit, or `at` is out of range.
    """
    _check(weights, seeds, descent, at)
    layers = [torch.tensor(W, dtype=torch.float32) for W in weights]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    kept = [[W.clone() for W in layers]] if at[0] == 0 else []
    wanted = set(at)
    with tqdm(total=descent.steps, desc=f"SGD of {len(seeds)} runs", unit="step", disable=None) as bar:
        for first in range(0, descent.steps, CHUNK):
            batches = views.draw(generators, min(CHUNK, descent.steps - first), descent.batch)
            for step, x in enumerate(batches.unbind(1), first + 1):
                _descend(layers, x.flatten(1, 2), descent)
                if step in wanted:
                    kept.append([W.clone() for W in layers])
            bar.update(batches.shape[1])
    return [torch.stack(layer).double().numpy() for layer in zip(*kept, strict=True)]


def _descend(layers: list[Tensor], x: Tensor, descent: Descent) -> None:
    """One step on the views x, (R, 2 batch, d), in place: backpropagation, for all runs at once."""
    inputs = [x]
    for W in layers:
        inputs.append(inputs[-1] @ W.mT)
    back = _dot_gradient(inputs[-1], descent.temperature)
    for W, h in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        gradient = back.mT @ h
        back = back @ W
        W.sub_(gradient, alpha=descent.lr)


def _dot_gradient(z: Tensor, temperature: float) -> Tensor:
    """Gradient of the mean cross-entropy of z . z' / tau with respect to both views stacked, (R, 2 batch, m)."""
    first, second = z.chunk(2, dim=1)
    error = torch.softmax(first @ second.mT / temperature, dim=2)
    error.diagonal(dim1=1, dim2=2).sub_(1)
    return torch.cat([error @ second, error.mT @ first], dim=1) / (temperature * first.shape[1])


def _check(weights: Sequence[NDArray], seeds: Sequence[int], descent: Descent, at: Sequence[int]) -> None:
    shapes = [np.shape(W) for W in weights]
    fits = all(below[-2] == above[-1] for below, above in zip(shapes[:-1], shapes[1:], strict=True))
    if not shapes or any(len(shape) != 3 or shape[0] != len(seeds) for shape in shapes) or not fits:
        raise InputError(f"weights: got shapes {shapes}, expected layers ({len(seeds)}, rows, columns) that fit")
    if not len(at) or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] > descent.steps:
        raise InputError(f"at: got {list(at)}, expected ascending steps from 0 to {descent.steps}")


def singular_values(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Singular values, descending, of all matrices of (..., m, d) at once: (..., min(m, d))."""
    return np.linalg.svd(weights, compute_uv=False)
