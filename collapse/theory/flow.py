"""The gradient flow of any number of linear layers (paper lemma 3), for any gradient of their product.

Notation:  W = W_L .. W_1 the product, G = dL/dW its gradient;  dW_l/dt = -(W_L .. W_l+1)^T G (W_l-1 .. W_1)^T.
W_l+1^T W_l+1 - W_l W_l^T is conserved, whatever G does over time.
The gradient comes from lemma 2 (-W X), population.py, meanfield.py or a sample (simulate.sample_gradient).
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.integrate import solve_ivp

from collapse.theory.arrays import Floats


def matrix_flow(
    t: Floats,
    weights: Sequence[Floats],
    gradient: Callable[[Floats], Floats],
    rtol: float = 1e-4,
    method: str = "RK23",
    masks: Sequence[Floats | None] | None = None,
) -> list[Floats]:
    """The gradient flow dW_l/dt = -(W_L .. W_l+1)^T G (W_l-1 .. W_1)^T of any number of layers (paper lemma 3).

    Args:
        t: (T,) times, ascending, the first of them the start.
        weights: L initial layers; W_1 (h, d) acts first, W_L (m, h) last.
        gradient: the product W (m, d) -> G = dL/dW (m, d).
        rtol: error of a step, relative to the largest entries of the layers.
        method: of scipy.integrate.solve_ivp.
        masks: for each layer None or an array of 0 and 1 that says which of its entries train.

    Returns:
        L arrays (T, rows, columns) float64.
    """
    kept = masks or [None] * len(weights)
    shapes = [W.shape for W in weights]
    ends = np.cumsum([W.size for W in weights])

    def layers(flat: Floats) -> list[Floats]:
        parts = zip(np.split(flat, ends[:-1], axis=-1), shapes, strict=True)
        matrices: list[Floats] = [part.reshape(*part.shape[:-1], *shape) for part, shape in parts]
        return matrices

    def rate(_: float, flat: Floats) -> Floats:
        velocity = _velocity(layers(flat), gradient)
        return np.concatenate(
            [(v if mask is None else v * mask).ravel() for v, mask in zip(velocity, kept, strict=True)]
        )

    start = np.concatenate([W.ravel() for W in weights])
    flow = solve_ivp(rate, (t[0], t[-1]), start, method, t_eval=t, rtol=rtol, atol=rtol * np.abs(start).max())
    return layers(flow.y.T)


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
