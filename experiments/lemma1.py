"""Lemma 1: the gradient of InfoNCE in the embeddings, in closed form against automatic differentiation.

    python experiments/lemma1.py                  # 2 s on one core

Random views of n = 64 rows in 16 dimensions, float64, at embedding scales from 1e-3 (all negatives weigh the same) to
10 (the nearest takes all), centred on the origin and 1e3 away from it.  The residual is the largest difference over
the largest entry of the gradient; the line is what rounding allows: 2^-52 times the size of the rows over that of
their differences, and times the logits.

Writes lemma1.npz: scales (S,), distances (D,), residual (D, S), rounding (D, S).
"""

from typing import Any

import numpy as np
import torch

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance
from collapse.theory import infonce, infonce_gradients

EPS = np.finfo(np.float64).eps


def views(scale: float, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (64, 16): near one another, `scale` wide, `distance` from the origin."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 16))
    pair = (scale * torch.tensor(x + rng.standard_normal((2, 64, 16))) + distance).unbind()
    return pair[0], pair[1]


def residual(scale: float, distance: float, seed: int) -> float:
    z, z_prime = (view.requires_grad_() for view in views(scale, distance, seed))
    exact = torch.autograd.grad(infonce(z, z_prime), (z, z_prime))
    closed = infonce_gradients(z.detach(), z_prime.detach())
    differences = [float((a - b).abs().max()) for a, b in zip(exact, closed, strict=True)]
    return max(differences) / max(float(gradient.abs().max()) for gradient in exact)


def simulate(seed: int = 0) -> tuple[Meta, Arrays]:
    """Residuals over scales and distances."""
    scales, distances = np.logspace(-3, 1, 9), np.array([0.0, 1e3])
    measured = np.array([[residual(scale, distance, seed) for scale in scales] for distance in distances])
    # Of the rows' differences, and of logits of size |z_i - z_j|^2 / 2, about 16 scale^2, in an exponential.
    allowed = EPS * (1 + distances[:, None] / scales + 16 * scales**2)
    return {}, {"scales": scales, "distances": distances, "residual": measured, "rounding": allowed}


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [
        f"  {distance:g} from the origin: largest relative residual {row.max():.1e}"
        for distance, row in zip(arrays["distances"], arrays["residual"], strict=True)
    ]
    return "\n".join(["lemma 1 against automatic differentiation, float64", *lines])


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Residual against embedding scale, with the rounding that float64 allows."""
    fig, ax = plots.figure()
    for distance, row, allowed in zip(arrays["distances"], arrays["residual"], arrays["rounding"], strict=True):
        (line,) = ax.loglog(arrays["scales"], allowed, label=f"rounding, {distance:g} away")
        ax.loglog(arrays["scales"], row, "o", color=line.get_color(), label="residual")
    ax.set(xlabel="scale of the embeddings", ylabel="relative residual")
    ax.legend()
    return fig


if __name__ == "__main__":
    # What rounding allows where the logits are the largest: 2^-52 (1 + 16 scale^2).
    main(__file__, simulate, report, draw, Tolerance(of={"residual": Tolerance(bound=4e-13)}))
