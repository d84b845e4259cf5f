"""Theorem 3: two aligned layers under a fixed X, the closed form over the flow of the matrices.

    python experiments/theorem3.py                # 3 s on one core

Eight modes, rates lam from -2 to 1, unequal layers in random bases; the matrices follow lemma 3 by a solver that
controls its step and knows nothing of the formula. Modes of positive rate blow up in finite time, at asinh(c / 2 s0) /
(c lam): the fixed X of the theorem cannot last, and population.py takes over.

Writes theorem3.npz: t (T,), lam (8,), simulated and predicted (T, 8), and the largest relative error.
"""

from typing import Any

import numpy as np
from scipy.stats import ortho_group

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance, r_squared
from collapse.theory import matrix_flow, two_layer_modes

MODES = 8


def simulate(seed: int = 0, horizon: float = 3.0, rtol: float = 1e-9) -> tuple[Meta, Arrays]:
    """The flow of the matrices, read along the modes, and the closed form."""
    rng = np.random.default_rng(seed)
    U, V, Q = ortho_group.rvs(MODES, size=3, random_state=rng)
    lam = np.linspace(-2, 1, MODES)
    sigma1, sigma2 = rng.uniform(0.2, 0.5, (2, MODES))
    t, X = np.linspace(0, horizon, 61), V * lam @ V.T
    W1, W2 = matrix_flow(t, [U * sigma1 @ V.T, Q * sigma2 @ U.T], lambda W: -W @ X, rtol, "DOP853")
    simulated = np.einsum("ak,tab,bk->tk", Q, W2 @ W1, V)
    predicted = two_layer_modes(t, lam, sigma1, sigma2)
    error = float(np.abs(simulated / predicted - 1).max())
    return {"r2": r_squared(simulated, predicted), "error": error, "rtol": rtol}, {
        "t": t,
        "lam": lam,
        "simulated": simulated,
        "predicted": predicted,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    return f"theorem 3: largest relative error {meta['error']:.1e} over {arrays['t'].size} times and {MODES} modes"


def draw(meta: Meta, arrays: Arrays) -> Any:
    """ln of the product's modes over time."""
    fig, ax = plots.figure(height=2.6)
    plots.plot_prediction(ax, arrays["t"], arrays["simulated"], arrays["predicted"], every=3)
    for k in (0, MODES - 1):
        place = (arrays["t"][-1], np.log(arrays["predicted"][-1, k]))
        label = rf"$\lambda={arrays['lam'][k]:g}$"
        ax.annotate(label, place, xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set(xlabel="time $t$", ylabel=r"$\ln\,\sigma_k(W_2)\,\sigma_k(W_1)$", xlim=(0, 1.25 * arrays["t"][-1]))
    plots.theory_legend(ax, loc="lower left")
    return fig


if __name__ == "__main__":
    # The error is that of the solver, of a tolerance of 1e-9 a step.
    main(__file__, simulate, report, draw, Tolerance(of={"error": Tolerance(bound=1e-7)}))
