"""What a finite batch changes: where the flow stops without augmentation, against the batch size.

    python experiments/finite_batch.py            # 15 s on one core

One layer, dot product, temperature 0.1, isotropic data in d = 4 and 16 dimensions, no augmentation: the infinite batch
stops at m = sigma^2 = tau / c, a batch of N at u times that. u = 2 exactly at N = 2, whatever d; it falls slowly, and
no expansion in 1/N exists. Lines: the root of the mean field's gradient. Dots: SGD from there, the mean of the last
half.

Writes finite_batch.npz: dims (2,), lines (L,) batch sizes with mean_field (2, L), batches (B,) with simulated (2, B).
"""

from typing import Any

import numpy as np
from scipy.optimize import brentq

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.theory import Descent, GaussianViews, MeanField, sgd

DIMS = (4, 16)
LINES = 2 ** np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20])
BATCHES = np.array([32, 64, 128, 256, 512])
TAU = 0.1


def settled(d: int, batch: int) -> float:
    """u: the root of dL/dm_k at m_k = u tau, in the mean over the equal modes."""
    field = MeanField(np.eye(d), np.zeros((d, d)), batch, TAU)
    return float(brentq(lambda u: field.mode_gradient(np.full(d, u * TAU)).mean(), 0.5, 3))


def simulated(d: int, batch: int, seed: int, steps: int, lr: float) -> float:
    """u of SGD from where the mean field stops: the mean of tr(W^T W) over the last half, and over runs."""
    start = np.sqrt(settled(d, batch) * TAU) * np.eye(d)
    at = list(range(steps // 2, steps + 1, max(1, steps // 100)))
    views = GaussianViews(np.ones(d), np.zeros(d))
    W = sgd([np.tile(start, (2, 1, 1))], views, (seed, seed + 1), Descent(lr, steps, batch, TAU), at)[0]
    return float((W**2).sum((2, 3)).mean() / (d * TAU))


def simulate(seed: int = 0, steps: int = 2_000, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """u by the mean field for all batch sizes, by SGD for some."""
    lines = np.array([[settled(d, int(batch)) for batch in LINES] for d in DIMS])
    dots = np.array([[simulated(d, int(batch), seed, steps, lr) for batch in BATCHES] for d in DIMS])
    here = lines[:, [int(np.flatnonzero(batch == LINES)[0]) for batch in BATCHES]]
    r2 = float(1 - ((np.log(dots) - np.log(here)) ** 2).sum() / ((np.log(dots) - np.log(dots).mean()) ** 2).sum())
    meta = {"r2": r2, "largest_error": float(np.abs(dots / here - 1).max())}
    return meta, {"dims": np.array(DIMS), "lines": LINES, "mean_field": lines, "batches": BATCHES, "simulated": dots}


def report(meta: Meta, arrays: Arrays) -> str:
    return (
        f"u at N = 2: {arrays['mean_field'][0, 0]:.4f} (d = 4), {arrays['mean_field'][1, 0]:.4f} (d = 16)\n"
        f"mean field over SGD, N = 32 .. 512: largest relative error {meta['largest_error']:.2%}, "
        f"R^2 of ln u {meta['r2']:.4f}"
    )


def draw(meta: Meta, arrays: Arrays) -> Any:
    """u against the batch size."""
    fig, ax = plots.figure(height=2.4)
    for d, line, dots in zip(arrays["dims"], arrays["mean_field"], arrays["simulated"], strict=True):
        (drawn,) = ax.plot(arrays["lines"], line, label=f"mean field, $d = {d}$")
        ax.plot(arrays["batches"], dots, "o", color=drawn.get_color(), label=f"simulation, $d = {d}$")
    ax.axhline(1, color="0.3", linestyle="--", linewidth=0.8)
    ax.annotate("infinite batch", (2, 1), xytext=(0, 3), textcoords="offset points", fontsize=7, color="0.3")
    ax.set(xscale="log", xlabel="batch size $N$", ylabel=r"$u = \sigma^2 c / \tau$ where the flow stops")
    ax.set_xscale("log", base=2)
    ax.legend()
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
