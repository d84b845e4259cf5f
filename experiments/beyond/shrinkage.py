"""Strong augmentation shrinks and does not kill: the ratio of augmented to free directions over the noise amplitude.

    python experiments/beyond/shrinkage.py  # 15 s on one core

The official toy script's case: one layer, dot product, temperature 0.1, batch 128, noise of amplitude k on 8 of 16
coordinates.  At its k = 1.5 the clean covariance has 8 values near 0.15 and 8 near 0.01, a 14-fold shrinkage that reads
as a collapse on a linear axis.  The infinite batch puts the ratio at 1 / (1 + k^2)^2, the mean field of the batch a
little lower; it reaches zero only where there is no signal at all.  Whether a direction counts as collapsed is then a
matter of the threshold: the horizontal lines.

Writes shrinkage.npz: amplitudes (A,), fine (F,), and the ratio of sigma^2 of augmented to free directions: simulated
(A,), mean_field (A,), population (F,).
"""

from typing import Any

import numpy as np

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared
from collapse.theory import Descent, GaussianViews, MeanField, sgd, stationary_modes

AMPLITUDES = np.array([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5])
DIM, HALF = 16, 8


def noise(amplitude: float) -> np.ndarray:
    return np.repeat([0.0, amplitude], HALF)


def settled(amplitude: float) -> np.ndarray:
    """sigma^2 of each direction where the mean field stops."""
    field = MeanField(np.eye(DIM), np.diag(noise(amplitude) ** 2))
    sigma = stationary_modes(np.ones(DIM), noise(amplitude) ** 2, "dot", 0.1) ** 0.5
    return field.modes(np.array([0.0, 1e3]), sigma[None])[-1, 0] ** 2


def ratio(m: np.ndarray) -> np.ndarray:
    """Mean of the augmented over mean of the free directions, (..., 16) -> (...)."""
    return m[..., HALF:].mean(-1) / m[..., :HALF].mean(-1)


def simulate(seed: int = 0, steps: int = 8_000, lr: float = 5e-4) -> tuple[Meta, Arrays]:
    """SGD from where the mean field stops, the mean of the last half; the predictions."""
    start = np.array([settled(amplitude) for amplitude in AMPLITUDES])
    views = GaussianViews(np.ones((len(AMPLITUDES), DIM)), np.array([noise(amplitude) for amplitude in AMPLITUDES]))
    runs = np.sqrt(start)[:, :, None] * np.eye(DIM)
    at = range(steps // 2, steps + 1, steps // 40)
    W = sgd([runs], views, range(seed, seed + len(runs)), Descent(lr, steps), list(at))[0]
    m = (W**2).sum(-2).mean(0)  # the diagonal of W^T W, over the last half
    fine = np.linspace(0.01, 5.5, 200)
    population = ratio(np.array([stationary_modes(np.ones(DIM), noise(k) ** 2, "dot", 0.1) for k in fine]))
    simulated, mean_field = ratio(m), ratio(start)
    here = ratio(np.array([stationary_modes(np.ones(DIM), noise(k) ** 2, "dot", 0.1) for k in AMPLITUDES]))
    r2 = {"mean_field": r_squared(simulated, mean_field), "population": r_squared(simulated, here)}
    return {"r2": r2}, {
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
        f"infinite batch {meta['r2']['population']:.4f}"
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
