"""Strong augmentation shrinks and does not kill: the ratio of augmented to free directions over the noise amplitude.

    python experiments/beyond/shrinkage.py  # 35 s on one core

The official toy script's case: one layer, dot product, temperature 0.1, batch 128, noise of amplitude k on 8 of 16
coordinates.  At its k = 1.5 the clean covariance has 8 values near 0.15 and 8 near 0.01, a 14-fold shrinkage that reads
as a collapse on a linear axis.  The infinite batch puts the ratio at 1 / (1 + k^2)^2, the mean field of the batch a
little lower; it reaches zero only where there is no signal at all.  Whether a direction counts as collapsed is then a
matter of the threshold: the horizontal lines.

SGD starts from one small size of all directions, which knows nothing of the prediction: the ratio starts at 1, its
logarithm is a change from the start, and R^2 of it over k is one of changes.

Writes shrinkage.npz: amplitudes (A,), fine (F,), and the ratio of sigma^2 of augmented to free directions: simulated
(A,), the mean of two runs, mean_field (A,), population (F,); changes, the scores of the trajectories ln sigma^2(t) /
sigma^2(0), free and augmented (collapse.results.change_scores).
"""

from typing import Any

import numpy as np

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import change_scores, change_text, r_squared
from collapse.theory import Descent, GaussianViews, MeanField, sgd, stationary_modes

AMPLITUDES = np.array([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5])
DIM, HALF = 16, 8
START = 0.01  # sigma of all directions


def noise(amplitude: float) -> np.ndarray:
    return np.repeat([0.0, amplitude], HALF)


def predict(amplitude: float, t: np.ndarray) -> np.ndarray:
    """sigma^2 of each direction over time by the mean field, (T, 16)."""
    field = MeanField(np.eye(DIM), np.diag(noise(amplitude) ** 2))
    return field.modes(t, np.full((1, DIM), START))[:, 0] ** 2


def halves(m: np.ndarray) -> np.ndarray:
    """Mean over the free and over the augmented directions, (..., 16) -> (..., 2)."""
    return np.stack([m[..., :HALF].mean(-1), m[..., HALF:].mean(-1)], axis=-1)


def ratio(m: np.ndarray) -> np.ndarray:
    """Mean of the augmented over mean of the free directions, (..., 16) -> (...)."""
    return m[..., HALF:].mean(-1) / m[..., :HALF].mean(-1)


def simulate(seed: int = 0, runs: int = 2, steps: int = 12_000, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """SGD and the mean field from one start, the mean of the last half of both; an infinite batch where it stops."""
    at = np.unique([0, *np.geomspace(steps / 1000, steps, 40).astype(int), *range(steps // 2, steps, steps // 40)])
    late, count = at >= steps // 2, len(AMPLITUDES)
    deviations = np.tile([noise(amplitude) for amplitude in AMPLITUDES], (runs, 1))
    views = GaussianViews(np.ones_like(deviations), deviations)
    W = np.tile(START * np.eye(DIM), (runs * count, 1, 1))
    W = sgd([W], views, range(seed, seed + runs * count), Descent(lr, steps), at.tolist())[0]
    m = (W**2).sum(-2).reshape(len(at), runs, count, DIM)  # the diagonal of W^T W
    forecast = np.stack([predict(amplitude, lr * at) for amplitude in AMPLITUDES], axis=1)
    fine = np.linspace(0.01, 5.5, 200)
    population = ratio(np.array([stationary_modes(np.ones(DIM), noise(k) ** 2, "dot", 0.1) for k in fine]))
    simulated, mean_field = ratio(m[late].mean((0, 1))), ratio(forecast[late].mean(0))
    here = ratio(np.array([stationary_modes(np.ones(DIM), noise(k) ** 2, "dot", 0.1) for k in AMPLITUDES]))
    r2 = {"mean_field": r_squared(simulated, mean_field), "population": r_squared(simulated, here)}
    return {"r2": r2, "changes": change_scores(halves(m), halves(forecast))}, {
        "amplitudes": AMPLITUDES,
        "fine": fine,
        "simulated": simulated,
        "mean_field": mean_field,
        "population": population,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    chosen = int(np.flatnonzero(arrays["amplitudes"] == 1.5)[0])
    return (
        f"shrinkage at k = 1.5: simulated {1 / arrays['simulated'][chosen]:.1f}-fold, "
        f"mean field {1 / arrays['mean_field'][chosen]:.1f}, infinite batch {(1 + 1.5**2) ** 2:.1f}\n"
        f"R^2 of ln ratio over k: mean field {meta['r2']['mean_field']:.4f}, "
        f"infinite batch {meta['r2']['population']:.4f}\n"
        f"the change ln sigma^2(t) / sigma^2(0), mean field: {change_text(meta['changes'])}"
    )


def draw(meta: Meta, arrays: Arrays) -> Any:
    """ln of the ratio over the amplitude, with thresholds."""
    fig, ax = plots.figure(height=2.5)
    ax.plot(arrays["fine"], np.log(arrays["population"]), "--", color="0.4", label="infinite batch")
    ax.plot(arrays["amplitudes"], np.log(arrays["mean_field"]), label="mean field, $N = 128$")
    ax.plot(arrays["amplitudes"], np.log(arrays["simulated"]), "o", color="C0", label="simulation")
    for exponent in (-1, -2, -3):
        ax.axhline(exponent * np.log(10), color="0.8", linewidth=0.6, zorder=0)
        ax.annotate(f"threshold $10^{{{exponent}}}$", (0.05, exponent * np.log(10)), xytext=(0, -7), fontsize=6,
                    textcoords="offset points", color="0.4")  # fmt: skip
    ax.set(xlabel="noise amplitude $k$", ylabel=r"$\ln$ ratio of $\sigma^2$, augmented / free", xlim=(0, 5.5))
    ax.legend(loc="upper right")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
