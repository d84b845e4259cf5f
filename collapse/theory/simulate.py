"""Stochastic gradient descent of small networks on the toy contrastive task, many runs as one batch of tensors.

Notation:  R runs, L layers;  x, x_prime the two views of a batch, drawn afresh at each step;  z = W_L .. W_1 x without
bias, linear or with a ReLU after each layer but the last.  Losses and optimisers are those of descent.py; time is
learning rate x steps.
Draws and weights are float32; each run has its own generator, so a run does not depend on those beside it.

A projector is a further layer.  `masks` says which entries train: zeros fix an orthogonal or low-rank layer, an
identity leaves a diagonal one; a residual block r = h + W h is the layer 1 + W, which has the same gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from collapse import InputError
from collapse.errors import warn
from collapse.metrics.spectral import float64
from collapse.theory.arrays import Floats, check_choice
from collapse.theory.descent import GRADIENTS, Descent, Optimizer, dot_product_gradient

DRAWN = 64  # batches drawn at a time, over all runs: few calls, and the draws stay in the cache


class Views(Protocol):
    """Where batches come from."""

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d) float32: both views of `steps` batches for each of R generators."""


def _normals(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    normal = torch.empty(len(generators), *shape)
    for run, generator in zip(normal, generators, strict=True):
        run.normal_(generator=generator)
    return normal


@dataclass(frozen=True)
class GaussianViews:
    """Two views x0 + e and x0 + e' of clean Gaussian data with additive Gaussian noise.

    clean, noise: standard deviations of the coordinates of x0 and of e, (d,) or (R, d), where these are independent;
    or square roots A of any covariances A A^T, (d, d) or (R, d, d), given together as matrices.

    Examples:
        >>> import torch
        >>> views = GaussianViews(clean=[1.0, 0.1], noise=[0.0, 0.0])
        >>> x, x_prime = views.draw([torch.Generator().manual_seed(0)], steps=1, batch=3)[0, 0]
        >>> tuple(x.shape), torch.equal(x, x_prime)
        ((3, 2), True)
    """

    clean: NDArray[np.float64]
    noise: NDArray[np.float64]
    matrices: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "clean", float64(self.clean))
        object.__setattr__(self, "noise", float64(self.noise))

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d) float32."""
        if self.matrices:
            return self._draw_correlated(generators, steps, batch)
        # Two normals, not three: given x, x' is Gaussian about c0 / c x with variance ce (2 c0 + ce) / c.
        c0, ce = np.square(self.clean), np.square(self.noise)
        c = np.maximum(c0 + ce, np.finfo(float).tiny)
        factors = np.stack([np.sqrt(c), c0 / c, np.sqrt(ce * (2 * c0 + ce) / c)], axis=-2)
        root, slope, rest = torch.as_tensor(factors).float().view(-1, 1, 3, 1, factors.shape[-1]).unbind(2)
        views = _normals(generators, steps, 2, batch, factors.shape[-1])
        x, x_prime = views.unbind(2)
        x *= root
        torch.addcmul(x * slope, x_prime, rest, out=x_prime)
        return views

    def _draw_correlated(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        roots = torch.as_tensor(np.stack([self.clean, self.noise, self.noise], axis=-3)).float()
        normal = _normals(generators, steps, 3, batch, roots.shape[-1]) @ roots.mT.view(-1, 1, *roots.shape[-3:])
        return normal[:, :, 1:] + normal[:, :, :1]


@dataclass(frozen=True)
class MaskedViews:
    """Two views of Gaussian data, each coordinate set to zero with a probability, independently in each view.

    clean: standard deviations of the coordinates, (d,) or (R, d).
    missing: probabilities, (d,) or (R, d).  About its mean (1 - missing) x0 a view is noise of covariance
    missing (1 - missing) clean^2: to second moments, masking is additive noise on shrunken data.

    Examples:
        >>> import torch
        >>> views = MaskedViews(clean=[1.0, 1.0], missing=[0.0, 1.0])
        >>> views.draw([torch.Generator().manual_seed(0)], steps=1, batch=3)[..., 1].abs().max().item()
        0.0
    """

    clean: NDArray[np.float64]
    missing: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "clean", float64(self.clean))
        object.__setattr__(self, "missing", float64(self.missing))

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d) float32."""
        clean, missing = (torch.as_tensor(a, dtype=torch.float32) for a in (self.clean, self.missing))
        d = clean.shape[-1]
        x = _normals(generators, steps, 1, batch, d) * clean.view(-1, 1, 1, 1, d)
        uniform = torch.empty(len(generators), steps, 2, batch, d)
        for run, generator in zip(uniform, generators, strict=True):
            run.uniform_(generator=generator)
        return x * (uniform >= missing.view(-1, 1, 1, 1, d))


@dataclass(frozen=True)
class BiasedViews:
    """Views with a last coordinate that is always 1: the last column of a layer of d + 1 columns is its bias.

    Examples:
        >>> import torch
        >>> views = BiasedViews(GaussianViews(clean=[1.0], noise=[0.1]))
        >>> views.draw([torch.Generator().manual_seed(0)], steps=1, batch=2)[0, 0, 0, :, 1].tolist()
        [1.0, 1.0]
    """

    views: Views

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d + 1) float32."""
        return torch.nn.functional.pad(self.views.draw(generators, steps, batch), (0, 1), value=1.0)


def sgd(
    weights: Sequence[NDArray],
    views: Views,
    seeds: Sequence[int],
    descent: Descent,
    at: Sequence[int],
    masks: Sequence[NDArray | None] | None = None,
) -> list[NDArray[np.float64]]:
    """Train R runs at once and keep their weights at chosen steps.

    Args:
        weights: L arrays (R, rows, columns), the initial layers; the first acts on the data.
        views: where the batches come from.
        seeds: R seeds, one a run.
        descent: learning rate, steps, batch, loss and activation.
        at: ascending steps to keep, each in [0, descent.steps].
        masks: for each layer None (all trains) or an array that its gradient is multiplied with, as (rows, columns)
            or (R, rows, columns) of 0 and 1.

    Returns:
        L arrays (len(at), R, rows, columns) float64.

    Raises:
        InputError: the weights are not R stacked layers that fit, `at` is out of range, or a name is unknown.
        CollapseWarning: a run diverged; its weights are NaN or infinite.

    Examples:
        >>> views = GaussianViews(clean=[1.0, 1.0], noise=[0.1, 1.0])
        >>> descent = Descent(lr=0.01, steps=200, batch=32)
        >>> (W,) = sgd([0.1 * np.eye(2)[None]], views, seeds=[0], descent=descent, at=[0, 200])
        >>> W.shape, singular_values(W[1, 0]).round(1).tolist()  # about sqrt(tau c0) / c
        ((2, 1, 2, 2), [0.3, 0.2])
    """
    weights = [float64(W) for W in weights]
    _check(weights, seeds, descent, at)
    trainable = [
        None if mask is None else torch.as_tensor(float64(mask)).float() for mask in masks or [None] * len(weights)
    ]
    layers = [torch.tensor(W, dtype=torch.float32) for W in weights]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    kept = [[W.clone() for W in layers]] if at[0] == 0 else []
    wanted, optimizer = set(at), Optimizer(descent, layers)
    gradients = _linear_gradients if descent.activation == "linear" else _relu_gradients
    for step, x in batches(views, generators, descent):
        optimizer.step(layers, gradients(layers, x, descent), trainable)
        if step in wanted:
            kept.append([W.clone() for W in layers])
    result = [torch.stack(layer).double().numpy() for layer in zip(*kept, strict=True)]
    warn_divergence(result, at)
    return result


def warn_divergence(weights: Sequence[NDArray], at: Sequence[int]) -> None:
    """A CollapseWarning if some of the weights (len(at), R, rows, columns) are NaN or infinite: from which step on.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as notes:
        ...     warnings.simplefilter("always")
        ...     warn_divergence([np.array([1.0, np.inf]).reshape(2, 1, 1, 1)], at=[0, 10])
        >>> str(notes[0].message)
        'the weights of 1 of 1 runs are not finite at step 10; give a smaller lr='
    """
    lost = ~np.all([np.isfinite(layer).all((-2, -1)) for layer in weights], axis=0)
    if lost.any():
        first = int(lost.any(1).argmax())
        warn([f"the weights of {lost[-1].sum()} of {lost.shape[1]} runs are not finite at step {at[first]}; "
              "give a smaller lr="])  # fmt: skip


def batches(views: Views, generators: Sequence[torch.Generator], descent: Descent) -> Iterator[tuple[int, Tensor]]:
    """(step, both views stacked (R, 2 batch, d)) for the steps 1 .. descent.steps, drawn some steps at a time.

    Examples:
        >>> import torch
        >>> views = GaussianViews(clean=[1.0, 1.0], noise=[0.1, 0.1])
        >>> drawn = batches(views, [torch.Generator().manual_seed(0)], Descent(steps=2, batch=4))
        >>> [(step, tuple(x.shape)) for step, x in drawn]
        [(1, (1, 8, 2)), (2, (1, 8, 2))]
    """
    chunk = max(1, DRAWN // len(generators))
    with tqdm(total=descent.steps, desc=f"SGD of {len(generators)} runs", unit="step", disable=None) as bar:
        for first in range(0, descent.steps, chunk):
            drawn = views.draw(generators, min(chunk, descent.steps - first), descent.batch)
            yield from enumerate(drawn.flatten(2, 3).unbind(1), first + 1)
            bar.update(drawn.shape[1])


def _relu_gradients(layers: list[Tensor], x: Tensor, descent: Descent) -> list[Tensor]:
    """Backpropagation."""
    inputs = [x]
    for W in layers[:-1]:
        inputs.append((inputs[-1] @ W.mT).relu_())
    back = GRADIENTS[descent.similarity](inputs[-1] @ layers[-1].mT, descent)
    gradients: list[Tensor] = []
    for W, h in zip(reversed(layers), reversed(inputs), strict=True):
        gradients.insert(0, back.mT @ h)
        back = (back @ W) * (h > 0)
    return gradients


def _linear_gradients(layers: list[Tensor], x: Tensor, descent: Descent) -> list[Tensor]:
    """The chain rule through the product of the layers: only small matrices but for its own gradient."""
    below = [layers[0]]  # W_1, W_2 W_1, ...
    for W in layers[1:]:
        below.append(W @ below[-1])
    if descent.similarity == "dot":
        back = dot_product_gradient(below[-1], x, descent.temperature)
    else:
        back = GRADIENTS[descent.similarity](x @ below[-1].mT, descent).mT @ x
    gradients = [back] * len(layers)
    for depth in range(len(layers) - 1, 0, -1):
        gradients[depth], back = back @ below[depth - 1].mT, layers[depth].mT @ back
    gradients[0] = back
    return gradients


def sample_gradient(
    x: NDArray, x_prime: NDArray, similarity: str = "dot", temperature: float = 0.1
) -> Callable[[NDArray], NDArray]:
    """W -> dL/dW of the mean loss over one fixed sample, in float64: for `matrix_flow`, the exact flow of a sample.

    x, x_prime: (n, d) the two views.  Costs O(n^2) an evaluation.

    Raises InputError: the similarity is unknown, or the views differ in shape.

    Examples:
        >>> gradient = sample_gradient(np.eye(2), np.eye(2), temperature=1.0)
        >>> gradient(np.eye(2)).round(3).tolist()
        [[-0.269, 0.269], [0.269, -0.269]]
    """
    check_choice("similarity", similarity, tuple(GRADIENTS))
    x, x_prime = float64(x), float64(x_prime)
    if x.ndim != 2 or x.shape != x_prime.shape:
        raise InputError(f"x, x_prime: got shapes {x.shape} and {x_prime.shape}, expected the same (n, d)")
    views = torch.as_tensor(np.concatenate([x, x_prime]))
    descent = Descent(temperature=temperature, similarity=similarity)

    def gradient(W: NDArray) -> NDArray:
        z = views @ torch.as_tensor(float64(W)).T
        return (GRADIENTS[similarity](z[None], descent)[0].T @ views).numpy()

    return gradient


def _check(weights: Sequence[NDArray], seeds: Sequence[int], descent: Descent, at: Sequence[int]) -> None:
    check_choice("similarity", descent.similarity, tuple(GRADIENTS))
    check_choice("activation", descent.activation, ("linear", "relu"))
    shapes = [np.shape(W) for W in weights]
    fits = all(below[-2] == above[-1] for below, above in pairwise(shapes))
    if not shapes or any(len(shape) != 3 or shape[0] != len(seeds) for shape in shapes) or not fits:
        raise InputError(f"weights: got shapes {shapes}, expected layers ({len(seeds)}, rows, columns) that fit")
    if not len(at) or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] > descent.steps:
        raise InputError(f"at: got {list(at)}, expected ascending steps from 0 to {descent.steps}")


def singular_values(weights: Floats) -> NDArray[np.float64]:
    """Singular values, descending, of all matrices of (..., m, d) at once: (..., min(m, d)).

    Raises InputError: fewer than two axes.

    Examples:
        >>> singular_values([[3.0, 0.0], [0.0, -4.0]]).tolist()
        [4.0, 3.0]
    """
    matrices = float64(weights)
    if matrices.ndim < 2:
        raise InputError(f"weights: got shape {matrices.shape}, expected (..., m, d)")
    return np.linalg.svd(matrices, compute_uv=False)
