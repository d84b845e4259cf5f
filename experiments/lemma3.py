"""Lemma 3: the flow of several layers, against automatic differentiation, and what it conserves.

    python experiments/lemma3.py                  # 3 s on one core

Layers of widths 12-10-8-6 on a fixed sample of 96 rows, dot-product loss at temperature 0.5, float64: the exact
gradient flow of the sample.  Printed: the velocity of each layer against automatic differentiation.  Drawn: along the
flow the difference W_l+1^T W_l+1 - W_l W_l^T stays, while the layers themselves move; what it drifts by is the solver's
error, and falls with its tolerance.

Writes lemma3.npz: residual (3,) of each layer; t (T,); for each of two tolerances the drift of the conserved matrices
and the movement of the layers over time, (2, T) each, relative to the start.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance
from collapse.theory import infonce, matrix_flow, sample_gradient

WIDTHS, ROWS, TAU = (12, 10, 8, 6), 96, 0.5
TOLERANCES = (1e-4, 1e-8)


def setting(seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Two views (96, 12) and three layers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, WIDTHS[0]))
    pair = x + 0.3 * rng.standard_normal((2, *x.shape))
    layers = [0.5 * rng.standard_normal((b, a)) / a**0.5 for a, b in pairwise(WIDTHS)]
    return pair[0], pair[1], layers


def residuals(x: np.ndarray, x_prime: np.ndarray, layers: list[np.ndarray]) -> np.ndarray:
    """Velocity of each layer by a short step of the flow, against the gradient by automatic differentiation."""
    weights = [torch.tensor(W, requires_grad=True) for W in layers]
    product = weights[2] @ weights[1] @ weights[0]
    loss = infonce(torch.tensor(x) @ product.T, torch.tensor(x_prime) @ product.T, "dot", TAU) / ROWS
    exact = [-gradient.numpy() for gradient in torch.autograd.grad(loss, weights)]
    G = sample_gradient(x, x_prime, "dot", TAU)(product.detach().numpy())
    W1, W2, W3 = layers
    closed = [-(W3 @ W2).T @ G, -W3.T @ G @ W1.T, -G @ (W2 @ W1).T]
    return np.array([np.abs(a - b).max() / np.abs(a).max() for a, b in zip(exact, closed, strict=True)])


def conserved(layers: list[np.ndarray]) -> np.ndarray:
    """The conserved matrices of all neighbours over time, flattened: (T, ...)."""
    pairs = pairwise(layers)
    return np.concatenate([(W.mT @ W - V @ V.mT).reshape(len(V), -1) for V, W in pairs], axis=1)


def relative(path: np.ndarray) -> np.ndarray:
    return np.linalg.norm(path - path[0], axis=1) / np.linalg.norm(path[0])


def simulate(seed: int = 0, horizon: float = 20.0) -> tuple[Meta, Arrays]:
    """Residuals at the start; drift and movement along the flow."""
    x, x_prime, layers = setting(seed)
    t = np.concatenate([[0], np.geomspace(horizon / 1000, horizon, 40)])
    gradient = sample_gradient(x, x_prime, "dot", TAU)
    flows = [matrix_flow(t, layers, gradient, rtol, "RK45") for rtol in TOLERANCES]
    moved = [relative(np.concatenate([W.reshape(len(t), -1) for W in flow], axis=1)) for flow in flows]
    drift = [relative(conserved(flow)) for flow in flows]
    return {}, {"residual": residuals(x, x_prime, layers), "t": t, "drift": np.array(drift), "moved": np.array(moved)}


def report(meta: Meta, arrays: Arrays) -> str:
    drift = ", ".join(
        f"{row[-1]:.1e} at tolerance {tol:g}" for row, tol in zip(arrays["drift"], TOLERANCES, strict=True)
    )
    return (
        f"lemma 3 against automatic differentiation: largest relative residual {arrays['residual'].max():.1e}\n"
        f"  the layers moved by {arrays['moved'][-1, -1]:.2f} of their size, the conserved differences by {drift}"
    )


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Movement of the layers and drift of what is conserved, over time."""
    fig, ax = plots.figure()
    t = arrays["t"][1:]
    ax.loglog(t, arrays["moved"][-1, 1:], label="layers")
    for tolerance, drift in zip(TOLERANCES, arrays["drift"], strict=True):
        ax.loglog(t, drift[1:], "o", label=f"conserved, tolerance {tolerance:g}")
    ax.set(xlabel=r"time $t$ (steps $\times$ learning rate)", ylabel="relative change")
    ax.set_ylim(1e-9, 1e4)
    ax.legend(loc="upper left")
    return fig


if __name__ == "__main__":
    # Products of matrices 12 wide: some tens of roundings of 2^-53.
    main(__file__, simulate, report, draw, Tolerance(of={"residual": Tolerance(bound=1e-14)}))
