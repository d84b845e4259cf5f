"""What a finite batch changes: where the flow stops without augmentation, against the batch size.

    python experiments/beyond/finite_batch.py  # 40 s on one core

One layer, dot product, temperature 0.1, isotropic data in d = 4 and 16 dimensions, no augmentation: the infinite batch
stops at m = sigma^2 = tau / c, a batch of N at u times that. u = 2 exactly at N = 2, whatever d; it falls slowly, and
no expansion in 1/N exists. Lines: the root of the mean field's gradient.  Dots: SGD from u = 1 and from u = 2.3, for
six times the relaxation time 1 / (4 m d2L/dm2) that the mean field gives (up to 11, the longer the smaller N), the mean
of the last third.  A run that starts at the prediction, or stops before it has relaxed, says nothing of it.

Writes finite_batch.npz: dims (2,), lines (L,) batch sizes with mean_field (2, L), batches (B,) with simulated
(2, B, 2), by start, and relaxation (2, B).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import Descent, GaussianViews, MeanField, sgd

DIMS = (4, 16)
LINES = 2 ** np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20])
BATCHES = np.array([32, 64, 128, 256, 512])
STARTS = (1.0, 2.3)
TAU = 0.1


def slope(d: int, batch: int) -> Callable[[float], float]:
    """u -> dL/dm_k at m_k = u tau, in the mean over the equal modes."""
    field = MeanField(np.eye(d), np.zeros((d, d)), batch, TAU)
    return lambda u: float(field.mode_gradient(np.full(d, u * TAU)).mean())


def settled(d: int, batch: int) -> float:
    """u: the root of the slope."""
    return float(brentq(slope(d, batch), 0.5, 3))


def relaxation(d: int, batch: int) -> float:
    """Time in which a deviation from the root falls to 1/e: dm/dt = -4 m dL/dm."""
    u, of = settled(d, batch), slope(d, batch)
    return 1 / (4 * u * (of(1.01 * u) - of(0.99 * u)) / (0.02 * u))


def simulated(d: int, batch: int, seed: int, lr: float) -> NDArray:
    """u of SGD from both starts, (2,): the mean of tr(W^T W) over the last third of six relaxation times."""
    steps = max(1_500, round(6 * relaxation(d, batch) / lr))
    layers = np.array([np.sqrt(u * TAU) * np.eye(d) for u in STARTS])
    at = list(range(2 * steps // 3, steps + 1, max(1, steps // 100)))
    views = GaussianViews(np.ones(d), np.zeros(d))
    W = sgd([layers], views, (seed, seed + 1), Descent(lr, steps, batch, TAU), at)[0]
    return (W**2).sum((2, 3)).mean(0) / (d * TAU)


def simulate(seed: int = 0, lr: float = 2e-3) -> tuple[Meta, Arrays]:
    """u by the mean field for all batch sizes, by SGD for some."""
    lines = np.array([[settled(d, int(batch)) for batch in LINES] for d in DIMS])
    dots = np.array([[simulated(d, int(batch), seed, lr) for batch in BATCHES] for d in DIMS])
    times = np.array([[relaxation(d, int(batch)) for batch in BATCHES] for d in DIMS])
    here = lines[:, [int(np.flatnonzero(batch == LINES)[0]) for batch in BATCHES], None]
    both = np.broadcast_to(here, dots.shape)
    meta = {
        "r2": r_squared(dots, both),
        "r2_change": r_squared_change(dots, both, np.array(STARTS)),
        "largest_error": [float(errors.max()) for errors in np.abs(dots / here - 1)],
    }
    return meta, {"dims": np.array(DIMS), "lines": LINES, "mean_field": lines, "batches": BATCHES, "simulated": dots,
                  "relaxation": times}  # fmt: skip


def report(meta: Meta, arrays: Arrays) -> str:
    return (
        f"u at N = 2: {arrays['mean_field'][0, 0]:.4f} (d = 4), {arrays['mean_field'][1, 0]:.4f} (d = 16)\n"
        f"mean field over SGD, N = 32 .. 512: largest relative error {meta['largest_error'][0]:.2%} (d = 4), "
        f"{meta['largest_error'][1]:.2%} (d = 16), R^2 of ln u {meta['r2']:.4f}, of its change {meta['r2_change']:.4f}"
    )


def draw(meta: Meta, arrays: Arrays) -> Any:
    """u against the batch size."""
    fig, ax = plots.figure(height=2.4)
    for d, line, dots in zip(arrays["dims"], arrays["mean_field"], arrays["simulated"], strict=True):
        (drawn,) = ax.plot(arrays["lines"], line, label=f"mean field, $d = {d}$")
        for start, marker in enumerate("^v"):  # from below, from above
            label = f"simulation, $d = {d}$" if start == 0 else None
            ax.plot(arrays["batches"], dots[:, start], marker, color=drawn.get_color(), label=label)
    ax.axhline(1, color="0.3", linestyle="--", linewidth=0.8)
    ax.annotate("infinite batch", (2, 1), xytext=(0, 3), textcoords="offset points", fontsize=7, color="0.3")
    ax.set(xscale="log", xlabel="batch size $N$", ylabel=r"$u = \sigma^2 c / \tau$ where the flow stops")
    ax.set_xscale("log", base=2)
    ax.legend()
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
