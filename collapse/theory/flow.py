"""The gradient flow of any number of linear layers (paper lemma 3), for any gradient of their product.

Notation:  W = W_L .. W_1 the product, G = dL/dW its gradient;  dW_l/dt = -(W_L .. W_l+1)^T G (W_l-1 .. W_1)^T.
W_l+1^T W_l+1 - W_l W_l^T is conserved, whatever G does over time.
The gradient comes from lemma 2 (-W X), population.py, meanfield.py or a sample (simulate.sample_gradient).
With weight decay gamma the velocity is dW_l/dt - gamma W_l and the conserved difference decays as exp(-2 gamma t).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp

from collapse import InputError
from collapse.metrics.spectral import float64
from collapse.theory.arrays import Array, Floats, check_positive, check_shapes, check_times, same_kind


def matrix_flow(
    t: Floats,
    weights: Sequence[Floats],
    gradient: Callable[[Floats], Floats],
    rtol: float = 1e-4,
    method: str = "RK23",
    masks: Sequence[Floats | None] | None = None,
    weight_decay: float = 0.0,
) -> list[Floats]:
    """The gradient flow dW_l/dt = -(W_L .. W_l+1)^T G (W_l-1 .. W_1)^T of any number of layers (paper lemma 3).

    Args:
        t: (T,) times, ascending, the first of them the start.
        weights: L initial layers; W_1 (h, d) acts first, W_L (m, h) last.
        gradient: the product W (m, d) -> G = dL/dW (m, d).
        rtol: error of a step, relative to the largest entries of the layers.
        method: of scipy.integrate.solve_ivp.
        masks: for each layer None or an array of 0 and 1, of its shape, that says which of its entries train.
        weight_decay: gamma >= 0.

    Returns:
        L arrays (T, rows, columns) float64.

    Raises:
        InputError: times do not ascend, or the layers do not fit one another, or the masks the layers.

    Examples:
        >>> first, second = matrix_flow([0, 1, 3], [np.eye(2), 0.1 * np.eye(2)], gradient=lambda W: W - np.eye(2))
        >>> (second @ first)[:, 0, 0].round(2).tolist()  # to where the gradient is 0
        [0.1, 0.78, 1.0]
        >>> (second[2].T @ second[2] - first[2] @ first[2].T)[0, 0].round(2).tolist()  # conserved: 0.1^2 - 1^2
        -0.99
    """
    t, weights = float64(t), [float64(W) for W in weights]
    kept = [None if mask is None else float64(mask) for mask in masks or [None] * len(weights)]
    shapes = [W.shape for W in weights]
    check_times(t)
    _check_layers(shapes, [None if mask is None else mask.shape for mask in kept])
    ends = np.cumsum([W.size for W in weights])

    def layers(flat: Floats) -> list[Floats]:
        parts = zip(np.split(flat, ends[:-1], axis=-1), shapes, strict=True)
        matrices: list[Floats] = [part.reshape(*part.shape[:-1], *shape) for part, shape in parts]
        return matrices

    def rate(_: float, flat: Floats) -> Floats:
        Ws = layers(flat)
        velocity = [v - weight_decay * W for v, W in zip(_velocity(Ws, gradient), Ws, strict=True)]
        return np.concatenate(
            [(v if mask is None else v * mask).ravel() for v, mask in zip(velocity, kept, strict=True)]
        )

    start = np.concatenate([W.ravel() for W in weights])
    flow = solve_ivp(rate, (t[0], t[-1]), start, method, t_eval=t, rtol=rtol, atol=rtol * np.abs(start).max())
    return layers(flow.y.T)


def _check_layers(shapes: list[tuple[int, ...]], masks: list[tuple[int, ...] | None]) -> None:
    fits = all(len(shape) == 2 for shape in shapes) and all(a[0] == b[1] for a, b in pairwise(shapes))
    if not shapes or not fits:
        raise InputError(f"weights: got shapes {shapes}, expected layers (rows, columns) that fit")
    if len(masks) != len(shapes) or any(mask not in (None, shape) for mask, shape in zip(masks, shapes, strict=True)):
        raise InputError(f"masks: got shapes {masks}, expected None or the layer's for each of {shapes}")


def _velocity(layers: list[Floats], gradient: Callable[[Floats], Floats]) -> list[Floats]:
    """Minus the gradient of the loss with respect to each layer."""
    before: list[Floats] = [np.eye(layers[0].shape[1])]
    for W in layers:
        before.append(W @ before[-1])
    back = -gradient(before[-1])
    velocity: list[Floats] = []
    for W, product in zip(reversed(layers), reversed(before[:-1]), strict=True):
        velocity.append(back @ product.T)
        back = W.T @ back
    return velocity[::-1]


def aligned_flow(
    t: Floats,
    sigma: Floats,
    mode_gradient: Callable[[Floats], Floats],
    weight_decay: float = 0.0,
    inertia: float = 0.0,
) -> Floats:
    """Singular values over time of L aligned layers, d sigma_l / dt = v_l = -2 w^2 / sigma_l dL/dm - gamma sigma_l.

    w = sigma_1 .. sigma_L is the product and m = w^2.  Momentum makes it mu d2 sigma_l / dt2 + d sigma_l / dt = v_l,
    from rest; Descent.clock and Descent.inertia give t and mu (and say when SGD is at rest).

    Args:
        t: (T,) times, ascending, the first of them the start.
        sigma: (L, K) initial singular values of each layer, > 0.
        mode_gradient: m (K,) -> dL/dm (K,): MeanField.mode_gradient, or that of an infinite batch.
        weight_decay: gamma >= 0.
        inertia: mu >= 0, a time; 0 is plain descent.

    Returns:
        (T, L, K) float64; the solver's own error in ln sigma is about 1e-4.

    Raises:
        InputError: times do not ascend, or sigma is not (L, K) above zero.

    Examples:
        >>> sigma = aligned_flow([0, 1, 3], [[1.0], [0.1]], mode_gradient=lambda m: (m - m**0.5) / (2 * m))
        >>> sigma.prod(1).round(2).tolist()
        [[0.1], [0.78], [1.0]]
    """
    t, sigma = float64(t), float64(sigma)
    check_times(t)
    if sigma.ndim != 2 or not (sigma > 0).all():
        raise InputError(f"sigma: got shape {sigma.shape}, expected (L, K) singular values above zero")

    def velocity(log_sigma: Floats) -> Floats:
        """v_l / sigma_l."""
        log_w = log_sigma.sum(0)
        return -2 * np.exp(2 * (log_w - log_sigma)) * mode_gradient(np.exp(2 * log_w)) - weight_decay

    def rate(_: float, state: Floats) -> Floats:
        log_sigma, *moving = state.reshape(-1, *sigma.shape)
        if not moving:
            return velocity(log_sigma).ravel()
        speed = moving[0]
        return np.concatenate([speed, (velocity(log_sigma) - speed) / inertia - speed**2], axis=None)

    start = np.stack([np.log(sigma), np.zeros_like(sigma)] if inertia else [np.log(sigma)])
    flow = solve_ivp(rate, (t[0], t[-1]), start.ravel(), "LSODA", t_eval=t, rtol=1e-4, atol=1e-5)
    return np.exp(flow.y.T[:, : sigma.size]).reshape(-1, *sigma.shape)


@same_kind
def momentum_rate(rate: Array, lr: float, momentum: float) -> Array:
    """Growth a step, d ln w / d step, of a mode that the flow lets grow at `rate`, under SGD with momentum; exact.

    W_n+1 = W_n + beta (W_n - W_n-1) + lr rate W_n grows by the larger root r of r^2 - (1 + beta + lr rate) r + beta.
    To first order ln r = lr rate / (1 - beta): momentum is a clock that runs 1 / (1 - beta) times faster.

    Args:
        rate: (...) growth rates of the flow, 2 c0 / tau - gamma for a small mode of the dot-product loss.
        lr: learning rate > 0.
        momentum: beta in [0, 1).

    Returns:
        (...) float64.

    Raises:
        InputError: the learning rate is not positive, momentum is not in [0, 1), or a rate lies so far below zero that
            the mode oscillates, lr rate <= -(1 - sqrt(beta))^2.

    Examples:
        >>> momentum_rate([0.1, 1], lr=0.01, momentum=0).round(5).tolist()  # ln(1 + lr rate)
        [0.001, 0.00995]
        >>> momentum_rate([0.1, 1], lr=0.01, momentum=0.9).round(5).tolist()
        [0.0092, 0.06265]
    """
    check_positive("lr", lr)
    if not 0 <= momentum < 1:
        raise InputError(f"momentum: got {momentum}, expected a number in [0, 1)")
    step = lr * rate
    # In d = r - 1, whose digits a small step would take from r: d^2 + (1 - beta - step) d - step = 0.
    b = 1 - momentum - step
    if (step <= -((1 - momentum**0.5) ** 2)).any():
        raise InputError("rate: falls so fast that the mode oscillates; lower lr")
    root = torch.sqrt(b**2 + 4 * step)
    return torch.log1p(torch.where(b > 0, 2 * step / (b + root), (root - b) / 2))


@same_kind
def lars_time(t: Array, weights: Array, gradients: Array, trust: float) -> Array:
    """The time that LARS takes to where plain descent is at time t: the integral of |g| / (eta |W|) dt.

    LARS steps along the gradient by eta |W| whatever its length.  One layer therefore takes the path of plain descent
    by another clock, and so do layers of equal norms and gradients.  What shrinks all gradients alike, such as the
    1 - pi of a finite batch, leaves this clock alone.

    Args:
        t: (T,) times of plain descent, ascending.
        weights: (T,) norms of the layer.
        gradients: (T,) norms of its gradient as the optimiser sees it, which the noise of SGD lengthens: the harmonic
            mean over batches.
        trust: eta > 0.

    Returns:
        (T,) float64, from 0.

    Raises:
        InputError: shapes do not fit, or the trust is not positive.

    Examples:
        >>> lars_time([0, 1, 2], weights=[1, 1, 1], gradients=[0.1, 0.1, 0.1], trust=0.01).round(6).tolist()
        [0.0, 10.0, 20.0]
    """
    check_shapes(t=(t, ("T",)), weights=(weights, ("T",)), gradients=(gradients, ("T",)))
    check_positive("trust", trust)
    passed = torch.cumulative_trapezoid(gradients / (trust * weights), t)
    return torch.cat([torch.zeros_like(t[:1]), passed])
