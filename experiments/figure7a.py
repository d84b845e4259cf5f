"""Figure 7a, deeper linear networks collapse more: the spectrum of the embedding after training, by depth.

    python experiments/figure7a.py                 # simulate, predict, save, draw: 30 s on one core
    python experiments/figure7a.py --plot-only     # redraw from the saved result

z = W_L .. W_1 x for L = 1, 2, 3, 4, 6, 8 layers, 16 x 16, each started with singular values exp(-0.35 k) and its own
random singular vectors; clean data N(0, I), noise of standard deviation 0.001, learning rate 0.01, time 100, batch 128,
temperature 0.1.  The prediction is the gradient flow of the finite-batch mean field from the same start.  What it
leaves unexplained is the noise of SGD: two runs that differ in their batches alone differ as much.

Writes figure7a.npz: t (T,), depths (6,); simulated (T, 6, runs, 16), predicted (T, 6, 16), singular
values of the product, whose squares are those of the embedding covariance; R^2 of their logarithms over all times, of
the prediction over the mean of the runs' logarithms, over each run, and of one run over the other; by depth the scores
of the change (collapse.results.change_scores).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gmean

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance, change_scores, change_text, r_squared
from collapse.theory import Descent, GaussianViews, MeanField, matrix_flow, sgd, singular_values

DIM = 16
NOISE = 1e-3
DEPTHS = (1, 2, 3, 4, 6, 8)


def start(seed: int, depth: int) -> list[NDArray]:
    """Layers with singular values exp(-0.35 k) in random bases."""
    rng, sigma = np.random.default_rng(seed + depth), np.exp(-0.35 * np.arange(DIM))
    bases = [np.linalg.svd(rng.random((DIM, DIM))) for _ in range(depth)]
    return [U * sigma @ Vh for U, _, Vh in bases]


def spectrum(layers: list[NDArray]) -> NDArray:
    """Singular values of the product W_L .. W_1, (..., 16)."""
    product = layers[0]
    for W in layers[1:]:
        product = W @ product
    return singular_values(product)


def count(w: NDArray) -> NDArray:
    """Collapsed dimensions of spectra (..., 16): the covariance w^2 below 1e-2 of the largest."""
    return (w**2 < 1e-2 * w[..., :1] ** 2).sum(-1)


def simulate(seed: int = 0, runs: int = 2, lr: float = 0.01, horizon: float = 100.0) -> tuple[Meta, Arrays]:
    """`runs` runs of SGD and the mean field's flow, depth by depth."""
    descent = Descent(lr, round(horizon / lr))
    at = np.unique([0, *np.geomspace(descent.steps / 1000, descent.steps, 40).astype(int)])
    views = GaussianViews(np.ones(DIM), np.full(DIM, NOISE))
    field = MeanField(np.eye(DIM), NOISE**2 * np.eye(DIM), descent.batch, descent.temperature)
    simulated, predicted = [], []
    for depth in DEPTHS:
        layers = start(seed, depth)
        stacked = [np.tile(W, (runs, 1, 1)) for W in layers]
        simulated.append(spectrum(sgd(stacked, views, range(seed, seed + runs), descent, at.tolist())))
        predicted.append(spectrum(matrix_flow(lr * at, layers, field.isotropic_gradient)))
    r2, changes = {}, {}
    for depth, values, forecast in zip(DEPTHS, simulated, predicted, strict=True):
        r2[depth] = {
            "mean": r_squared(gmean(values, 1), forecast),
            "runs": [r_squared(values[:, i], forecast) for i in range(runs)],
            "last_by_first": r_squared(values[:, -1], values[:, 0]),
        }
        changes[depth] = change_scores(values, forecast)
    return {"r2": r2, "changes": changes, "noise": NOISE}, {
        "t": lr * at,
        "depths": np.array(DEPTHS),
        "simulated": np.stack(simulated, axis=1),
        "predicted": np.stack(predicted, axis=1),
    }


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [
        "R^2 of ln singular values of the product, mean field over SGD, all times; collapsed dimensions at the end"
    ]
    counts = count(arrays["simulated"][-1]), count(arrays["predicted"][-1])
    for (depth, r2), simulated, predicted in zip(meta["r2"].items(), *counts, strict=True):
        runs = ", ".join(f"{value:.4f}" for value in r2["runs"])
        lines.append(
            f"  L = {depth}   mean of the runs {r2['mean']:.4f} (each {runs}; one run by another "
            f"{r2['last_by_first']:.4f})   collapsed: SGD {simulated.tolist()}, predicted {predicted}"
        )
    lines.append("the change ln s(t) / s(0):")
    lines += [f"  L = {depth}   {change_text(scores)}" for depth, scores in meta["changes"].items()]
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Spectrum of the embedding covariance at the end, one colour a depth."""
    fig, ax = plots.figure(plots.COLUMN, 2.6)
    index, depths = np.arange(1, DIM + 1), arrays["depths"]
    for j, (depth, color) in enumerate(zip(depths, plots.sequence_colors(len(depths)), strict=True)):
        predicted = 2 * np.log(arrays["predicted"][-1, j])
        ax.plot(index, predicted, color=color)
        ax.plot(index, 2 * np.log(arrays["simulated"][-1, j]).mean(0), "o", color=color)
        ax.annotate(
            f"$L={depth}$", (DIM, predicted[-1]), xytext=(5, 0), textcoords="offset points",
            va="center", color=color, fontsize=7,
        )  # fmt: skip
    ax.set(xlabel="index of the singular value", ylabel=r"$\ln\,\lambda$ of $\mathrm{Cov}(z)$", xlim=(0, 19.5))
    ax.set_xticks([1, 4, 8, 12, 16])
    plots.theory_legend(ax, loc="lower left")
    return fig


if __name__ == "__main__":
    # Depth multiplies a rounding by 1e4, and the solver of the prediction steps otherwise after one: values change by
    # 1e-3, and scores of the change that are next to zero by 0.025 of themselves.
    main(__file__, simulate, report, draw, Tolerance(1e-2, of={"changes": Tolerance(0.1)}))
