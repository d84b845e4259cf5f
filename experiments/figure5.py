"""Figure 5, alignment of two linear layers after training: with a loss that has an optimum, the anti-identity.

    python experiments/figure5.py                 # simulate, predict, save, draw: 25 s on one core
    python experiments/figure5.py --plot-only     # redraw from the saved result

A = |V2^T U1| of two 16 x 16 layers, both sorted by singular values.  Theorem 2 (theorem2.py) has A tend to the identity
as long as the layers grow under a fixed X.  The loss of the toy scripts has an optimum, and there growth stops: with
isotropic data W2 W1 becomes sqrt(m) times an orthogonal matrix, so sigma1 sigma2 is one constant for all modes, and
what W1 stretches most W2 stretches least.  K = W2^T W2 - W1 W1^T is conserved and fixes both layers' Gram matrices
(theory.balanced_grams): their singular values are predicted from the start and m, the mean square of the product's.
What SGD leaves off the antidiagonal are pairs of nearly equal singular values, which its noise mixes.
Settings: gentle, singular values exp(-0.1 k), learning rate 0.002, times 10 and 50, all modes alive; and the paper's
initialisation, exp(-0.35 k), learning rate 0.01, time 100, where some modes stay dead and the noise of SGD moves K:
there the block of the living modes only leans to its antidiagonal.
Clean data N(0, I), noise of standard deviation 0.001, batch 128, temperature 0.1, random singular vectors, two seeds.

Writes figure5.npz: t (3,), the times 0, 10, 50; A_gentle (3, 2, 16, 16) over times and seeds, A_paper (2, 2, 16, 16)
at times 0 and 100, A_flow (3, 16, 16) by the mean field's flow from the first seed's start; sigma_gentle and
predicted_gentle (3, 2, 2, 16), singular values over times, seeds and layers; and for each setting, over times and
seeds, m, alive (variances above 1e-2 of the largest), K_drift, and for the gentle one gram_error, the relative errors
of K and of W1 W1^T.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    alignment,
    balanced_grams,
    matrix_flow,
    sgd,
    singular_values,
)

DIM = 16
NOISE = 1e-3


def start(seed: int, decay: float) -> list[NDArray]:
    """Two layers with singular values exp(-decay k) in random bases."""
    rng, sigma = np.random.default_rng(seed), np.exp(-decay * np.arange(DIM))
    bases = [np.linalg.svd(rng.random((DIM, DIM))) for _ in range(2)]
    return [U * sigma @ Vh for U, _, Vh in bases]


def train(decay: float, seeds: list[int], descent: Descent, at: list[int]) -> NDArray:
    """(times, seeds, layers, 16, 16) by SGD."""
    runs = [np.array(layer) for layer in zip(*(start(seed, decay) for seed in seeds), strict=True)]
    return np.stack(sgd(runs, GaussianViews(np.ones(DIM), np.full(DIM, NOISE)), seeds, descent, at), axis=2)


def imbalance(layers: NDArray) -> NDArray:
    """K = W2^T W2 - W1 W1^T of (layers, 16, 16)."""
    W1, W2 = layers
    return W2.T @ W2 - W1 @ W1.T


def relative(a: NDArray, b: NDArray) -> NDArray:
    """Error of matrices (..., 16, 16), in Frobenius norm."""
    return np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


def over(function: Callable[[NDArray], NDArray], trained: NDArray) -> NDArray:
    """`function` of (layers, 16, 16) at all times and seeds."""
    return np.array([[function(layers) for layers in runs] for runs in trained])


def compare(trained: NDArray) -> Arrays:
    """What the conserved K of the start predicts at each later time and for each seed."""
    variances = over(lambda layers: singular_values(layers[1] @ layers[0]) ** 2, trained)
    m = variances.mean(-1)
    K = over(imbalance, trained)
    grams = np.array([[balanced_grams(K[0, i], m[t, i]) for i in range(m.shape[1])] for t in range(len(m))])
    W1 = trained[:, :, 0]
    return {
        "A": over(lambda layers: alignment(*layers), trained),
        "sigma": singular_values(trained),
        "predicted": np.sqrt(np.linalg.eigvalsh(grams)[..., ::-1]),
        "m": m,
        "alive": (variances > 1e-2 * variances[..., :1]).sum(-1),
        "K_drift": relative(K, K[:1]),
        "gram_error": relative(W1 @ W1.swapaxes(-1, -2), grams[:, :, 0]),
    }


def simulate(seed: int = 7, lr: float = 0.002, paper_lr: float = 0.01) -> tuple[Meta, Arrays]:
    """Two seeds, `seed` and the next, in both settings; the mean field's flow of the first for comparison."""
    seeds, times = [seed, seed + 1], np.array([0.0, 10.0, 50.0])
    at = [round(t / lr) for t in times]
    gentle = compare(train(0.1, seeds, Descent(lr, at[-1]), at))
    paper_steps = round(100 / paper_lr)
    paper = compare(train(0.35, seeds, Descent(paper_lr, paper_steps), [0, paper_steps]))
    field = MeanField(np.eye(DIM), NOISE**2 * np.eye(DIM))
    flow = matrix_flow(times, start(seed, 0.1), field.isotropic_gradient)
    arrays = {f"{name}_gentle": array for name, array in gentle.items()}
    arrays |= {f"{name}_paper": paper[name] for name in ("A", "m", "K_drift", "alive")}
    arrays |= {"t": times, "A_flow": np.array([alignment(*pair) for pair in zip(*flow, strict=True)])}
    r2 = r_squared(gentle["sigma"][1:], gentle["predicted"][1:])
    return {"r2": r2, "noise": NOISE}, arrays


def diagonals(A: NDArray) -> tuple[float, float]:
    """Mean of the antidiagonal and of the diagonal."""
    return float(A[::-1].diagonal().mean()), float(A.diagonal().mean())


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [f"R^2 of ln singular values of both layers, from the conserved K, times 10 and 50: {meta['r2']:.4f}"]
    row = "  {:<7} t = {:>3.0f}   antidiagonal {:.3f}, diagonal {:.3f}   {}"
    for j, t in enumerate(arrays["t"]):
        for i, A in enumerate(arrays["A_gentle"][j]):
            drift, error = arrays["K_drift_gentle"][j, i], arrays["gram_error_gentle"][j, i]
            says = f"K moved by {drift:.1%}, W1 W1^T off by {error:.1%}" if j else "start"
            lines.append(row.format("gentle", t, *diagonals(A), says))
    lines.append(row.format("flow", arrays["t"][-1], *diagonals(arrays["A_flow"][-1]), "without the noise of SGD"))
    for A, alive, drift in zip(*(arrays[f"{name}_paper"][-1] for name in ("A", "alive", "K_drift")), strict=True):
        says = f"the {alive} living modes alone; K moved by {drift:.0%}"
        lines.append(row.format("paper's", 100, *diagonals(A[:alive, :alive]), says))
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """The alignment matrix: start, trained, predicted by the flow, and the paper's setting."""
    fig, axes = plots.figure(plots.TEXT, 2.1, columns=4)
    panels = {
        "start": arrays["A_gentle"][0, 0],
        "trained, all modes alive": arrays["A_gentle"][-1, 0],
        "flow of the mean field": arrays["A_flow"][-1],
        "trained, some modes dead": arrays["A_paper"][-1, 0],
    }
    for (name, A), ax in zip(panels.items(), axes, strict=True):
        image = ax.imshow(A, cmap="viridis", vmin=0, vmax=1)
        ax.set(xlabel="left vectors of $W_1$", xticks=[], yticks=[])
        ax.set_title(name, fontsize="small")
    axes[0].set_ylabel("right vectors of $W_2$")
    fig.colorbar(image, ax=axes, shrink=0.8, label=r"$|V_2^\top U_1|$")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
