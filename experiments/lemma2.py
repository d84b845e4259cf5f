"""Lemma 2: dL/dW = -W X, X = Sigma0 - Sigma1, in closed form against automatic differentiation.

    python experiments/lemma2.py                  # 2 s on one core

One linear layer 8 x 16 on n = 64 rows, float64, for weights from 1e-3 to 1e2; rounding grows with the logits.  Beside
the residual, what lemma 2 is for: the eigenvalues of X.  With noise of standard deviation 3 on half of the coordinates
X has negative eigenvalues, the paper's condition for collapse by strong augmentation; with noise 0.1 it has none.

Writes lemma2.npz: scales (S,), residual (S,), noises (2,), eigenvalues (2, 16) of X / n at W of entries 0.1.
"""

from typing import Any

import numpy as np
import torch

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance
from collapse.theory import gram_difference, infonce

ROWS, DIM, OUT = 64, 16, 8


def views(noise: float, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (64, 16): noise on the last half of the coordinates."""
    x = rng.standard_normal((ROWS, DIM))
    added = noise * rng.standard_normal((2, ROWS, DIM)) * (np.arange(DIM) >= DIM // 2)
    pair = torch.tensor(x + added).unbind()
    return pair[0], pair[1]


def residual(scale: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    x, x_prime = views(0.5, rng)
    W = torch.tensor(scale * rng.standard_normal((OUT, DIM)), requires_grad=True)
    (exact,) = torch.autograd.grad(infonce(x @ W.T, x_prime @ W.T), W)
    closed = -W.detach() @ gram_difference(x, x_prime, W.detach())
    return float((exact - closed).abs().max() / exact.abs().max())


def simulate(seed: int = 0) -> tuple[Meta, Arrays]:
    """Residuals over scales, and the eigenvalues of X for weak and strong augmentation."""
    scales, noises = np.logspace(-3, 2, 11), np.array([0.1, 3.0])
    rng = np.random.default_rng(seed)
    W = 0.1 * rng.standard_normal((OUT, DIM))
    X = [gram_difference(*views(noise, rng), torch.tensor(W)).numpy() / ROWS for noise in noises]
    measured = np.array([residual(scale, seed) for scale in scales])
    return {}, {"scales": scales, "residual": measured, "noises": noises, "eigenvalues": np.linalg.eigvalsh(X)[:, ::-1]}


def report(meta: Meta, arrays: Arrays) -> str:
    negative = (arrays["eigenvalues"] < 0).sum(1)
    return (
        f"lemma 2 against automatic differentiation: largest relative residual {arrays['residual'].max():.1e}\n"
        + "\n".join(
            f"  noise {noise:g}: {count} of {DIM} eigenvalues of X are negative"
            for noise, count in zip(arrays["noises"], negative, strict=True)
        )
    )


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: the residual. Right: the eigenvalues of X."""
    fig, (left, right) = plots.figure(plots.TEXT, 2.3, columns=2)
    left.loglog(arrays["scales"], arrays["residual"], "o")
    left.axhline(np.finfo(np.float64).eps, color="0.3")
    left.annotate("$2^{-52}$", (arrays["scales"][-1], np.finfo(np.float64).eps), xytext=(-4, 3), fontsize=7,
                  textcoords="offset points", ha="right")  # fmt: skip
    left.set(xlabel="scale of $W$", ylabel="relative residual of $dL/dW = -WX$")
    for marker, noise, values in zip("os", arrays["noises"], arrays["eigenvalues"], strict=True):
        right.plot(np.arange(1, DIM + 1), values, marker + "-", label=f"noise {noise:g} on half")
    right.axhline(0, color="0.3", linewidth=0.6)
    right.set(xlabel="index of the eigenvalue", ylabel="eigenvalue of $X / n$")
    right.legend()
    return fig


if __name__ == "__main__":
    # 2^-52 times logits of some thousands.
    main(__file__, simulate, report, draw, Tolerance(of={"residual": Tolerance(bound=1e-12)}))
