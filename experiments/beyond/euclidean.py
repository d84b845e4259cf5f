"""The Euclidean loss of section 4: one layer under strong augmentation, the infinite batch over SGD.

    python experiments/beyond/euclidean.py  # 20 s on one core

Clean data N(0, I), noise variances geometric from 0.25 to 8, temperature 1, learning rate 4e-3, 4,000 steps.  The modes
of the infinite batch decouple, d ln m / dt = -4 ce + 2 c (2 + s) / (1 + s)^2, s = m c, and that already fits a finite
batch where s is small; it is not for weak augmentation, where s is large and the positive fills the softmax.

Writes euclidean.npz: t (T,), and for each of the settings d4_n32, d4_n128, d4_n512, d16_n128 the squared singular
values SETTING_simulated and SETTING_predicted (T, d)."""

from typing import Any

import numpy as np
from scipy.stats import gmean

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import Descent, GaussianViews, euclidean_modes, sgd

SETTINGS = {"d4_n32": (4, 32), "d4_n128": (4, 128), "d4_n512": (4, 512), "d16_n128": (16, 128)}
LR, SEEDS = 4e-3, 2


def simulate(seed: int = 0, steps: int = 4_000) -> tuple[Meta, Arrays]:
    """m = sigma^2 of aligned modes over time, SGD (mean of the logs of two runs) and infinite batch."""
    at = np.concatenate([[0], np.unique(np.geomspace(10, steps, 40).astype(int))])
    t, arrays, r2, r2_change = LR * at, {}, {}, {}
    for name, (d, batch) in SETTINGS.items():
        ce, m0 = np.geomspace(0.25, 8, d), np.full(d, 0.25)
        runs = np.tile(np.diag(np.sqrt(m0)), (SEEDS, 1, 1))
        descent = Descent(LR, steps, batch, 1.0, "euclidean")
        W = sgd([runs], GaussianViews(np.ones(d), np.sqrt(ce)), range(seed, seed + SEEDS), descent, at.tolist())[0]
        arrays[f"{name}_simulated"] = gmean((W**2).sum(-2), 1)
        arrays[f"{name}_predicted"] = euclidean_modes(t, m0, np.ones(d), ce)
        both = arrays[f"{name}_simulated"], arrays[f"{name}_predicted"]
        r2[name], r2_change[name] = r_squared(*both), r_squared_change(both[0][1:], both[1][1:], m0)
    return {"r2": r2, "r2_change": r2_change}, {"t": t, **arrays}


def report(meta: Meta, arrays: Arrays) -> str:
    fits = "   ".join(
        f"d = {d}, N = {batch}: {meta['r2'][name]:.4f} ({meta['r2_change'][name]:.4f})"
        for name, (d, batch) in SETTINGS.items()
    )
    return f"Euclidean loss, infinite batch over SGD, R^2 of ln sigma^2 over all times (of its change)\n  {fits}"


def draw(meta: Meta, arrays: Arrays) -> Any:
    """ln sigma^2 over time, d = 4 and 16 at N = 128."""
    fig, axes = plots.figure(plots.TEXT, 2.4, columns=2)
    for name, ax in zip(("d4_n128", "d16_n128"), axes, strict=True):
        values = arrays[f"{name}_simulated"][1:], arrays[f"{name}_predicted"][1:]
        plots.plot_prediction(ax, arrays["t"][1:], *values, every=3)
        d, batch = SETTINGS[name]
        label = r"time $t$ (steps $\times$ learning rate)"
        ax.set(xscale="log", title=f"$d = {d}$, $N = {batch}$", xlabel=label, ylabel=r"$\ln\,\sigma^2$ of $W$")
    plots.theory_legend(axes[0], loc="lower left")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
