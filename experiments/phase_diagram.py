"""Phase diagram: how many dimensions collapse, by strength of the augmentation and by depth.

    python experiments/phase_diagram.py                 # simulate, predict, save, draw: 30 s on one core
    python experiments/phase_diagram.py --plot-only     # redraw from the saved result

16 modes with clean variance 1; the augmentation adds noise of standard deviation a k / 15 to mode k.  L balanced
aligned layers whose product starts at 0.3 exp(-0.4 k), whatever L; learning rate 1e-3, time 10, batch 128, temperature
0.1.  A mode is counted as collapsed below 1e-2 of the largest variance: because of the augmentation where it would
stop there (a k / 15 > 3, whatever L), or because of depth where it takes longer than the training to get there (k above
a bound, whatever a).  The background is that count in closed form, for an infinite batch (theory.collapsed_modes); the
line is where the two causes weigh the same.  At 15 points SGD, and the finite-batch mean field, whose clock is slower.

Writes phase_diagram.npz: amplitudes (64,), depths (8,), by_augmentation and by_depth (64, 8), counts in closed form,
and closed (64, 8) of both; points (15, 2), a and L; simulated and predicted (15, 16), singular values of the product at
the end, of SGD and of the mean field; closed_points (15,).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    collapsed_modes,
    escape_time,
    sgd,
    singular_values,
    stationary_modes,
)

DIM = 16
START = 0.3 * np.exp(-0.4 * np.arange(DIM))
CLEAN = np.ones(DIM)
THRESHOLD = 1e-2
HORIZON = 10.0
# The amplitudes simulated at each depth.
POINTS = {1: (0, 2, 3, 4), 2: (0, 1, 2, 3), 3: (0, 2, 4), 4: (0, 1), 6: (3,), 8: (0,)}


def noise(amplitude: float) -> NDArray:
    """Standard deviation of the augmentation, mode by mode."""
    return amplitude * np.arange(DIM) / (DIM - 1)


def count(w: NDArray) -> NDArray:
    """Collapsed dimensions of spectra (..., 16): m = w^2 below 1e-2 of the largest."""
    m = w**2
    return (m < THRESHOLD * m.max(-1, keepdims=True)).sum(-1)


def causes(amplitude: float, depth: int) -> tuple[int, int, int]:
    """Modes collapsed by augmentation, by depth and by either, in closed form."""
    ce = noise(amplitude) ** 2
    stationary = stationary_modes(CLEAN, ce, "dot", 0.1)
    level = np.full(DIM, np.sqrt(THRESHOLD * stationary.max()))
    slow = escape_time(START, level, CLEAN, depth, 0.1) > HORIZON
    either = collapsed_modes(START, CLEAN, ce, depth, HORIZON, 0.1, THRESHOLD)
    return int((stationary < level**2).sum()), int(slow.sum()), int(either.sum())


def train(depth: int, amplitudes: tuple[float, ...], seed: int, lr: float) -> NDArray:
    """Singular values of the product at the end, (amplitudes, 16), by SGD."""
    steps, runs = round(HORIZON / lr), len(amplitudes)
    views = GaussianViews(np.ones((runs, DIM)), np.array([noise(a) for a in amplitudes]))
    layer = np.tile(np.diag(START ** (1 / depth)), (runs, 1, 1))
    trained = sgd([layer] * depth, views, [seed] * runs, Descent(lr, steps), [steps])
    product = trained[0][-1]
    for W in trained[1:]:
        product = W[-1] @ product
    if not np.isfinite(product).all():
        raise InputError(f"SGD diverged at depth {depth} with learning rate {lr:g}; lower --lr")
    return singular_values(product)


def predict(depth: int, amplitude: float) -> NDArray:
    """The same by the mean field, (16,)."""
    field = MeanField(np.eye(DIM), np.diag(noise(amplitude) ** 2))
    modes = field.modes(np.array([0, HORIZON]), np.tile(START ** (1 / depth), (depth, 1)))
    return -np.sort(-modes[-1].prod(0))


def simulate(seed: int = 1, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """Closed form on a grid; SGD and the mean field at 15 points."""
    amplitudes, depths = np.linspace(0, 7, 64), np.arange(1, 9)
    grid = np.array([[causes(a, depth) for depth in depths.tolist()] for a in amplitudes])
    points = np.array([(a, depth) for depth, chosen in POINTS.items() for a in chosen])
    simulated = np.concatenate([train(depth, chosen, seed, lr) for depth, chosen in POINTS.items()])
    predicted = np.array([predict(int(depth), a) for a, depth in points])
    closed = np.array([causes(a, int(depth))[2] for a, depth in points])
    exact = {
        "mean_field": int((count(predicted) == count(simulated)).sum()),
        "closed": int((closed == count(simulated)).sum()),
    }
    meta = {"r2": r_squared(simulated, predicted), "exact": exact, "threshold": THRESHOLD, "horizon": HORIZON}
    return meta, {
        "amplitudes": amplitudes,
        "depths": depths,
        "by_augmentation": grid[..., 0],
        "by_depth": grid[..., 1],
        "closed": grid[..., 2],
        "points": points,
        "simulated": simulated,
        "predicted": predicted,
        "closed_points": closed,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    total, exact = len(arrays["points"]), meta["exact"]
    lines = [
        f"R^2 of the {arrays['simulated'].size} ln singular values at the end, mean field over SGD: {meta['r2']:.4f}",
        f"collapsed dimensions exact at {exact['mean_field']} of {total} points by the mean field, "
        f"{exact['closed']} in closed form",
        "  a  L   SGD  mean field  closed form",
    ]
    columns = count(arrays["simulated"]), count(arrays["predicted"]), arrays["closed_points"]
    for (a, depth), *counts in zip(arrays["points"].astype(int), *columns, strict=True):
        lines.append("  {}  {}   {:>3}  {:>10}  {:>11}".format(a, depth, *counts))
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Counts over amplitude and depth, the line where both causes weigh the same, and the simulated points."""
    fig, ax = plots.figure(plots.TEXT, 3.1)
    amplitudes, depths, closed = arrays["amplitudes"], arrays["depths"], arrays["closed"]
    colors = {"cmap": "viridis", "vmin": 0, "vmax": int(closed.max()) + 3}  # without the palest, for white text
    image = ax.pcolormesh(amplitudes, depths, closed.T, shading="nearest", rasterized=True, **colors)
    fig.colorbar(
        image, ax=ax, label="collapsed dimensions of 16", boundaries=np.arange(-0.5, closed.max() + 1), ticks=range(10)
    )
    # Where augmentation alone begins to collapse more modes than depth does: the left edge of the first such cell.
    more = arrays["by_augmentation"] > arrays["by_depth"]
    edge = amplitudes[more.argmax(0)] - (amplitudes[1] - amplitudes[0]) / 2
    ax.stairs(edge, np.arange(0.5, len(depths) + 1), orientation="horizontal", baseline=None, color="white", lw=1.5)
    ax.text(1.5, 7, "limited by depth", color="white", ha="center", va="center")
    ax.text(6.4, 3, "limited by augmentation", color="white", ha="center", va="center", rotation=90)
    simulated, predicted = count(arrays["simulated"]), count(arrays["predicted"])
    ax.scatter(*arrays["points"].T, c=simulated, s=60, edgecolors="white", linewidths=0.8, zorder=3, **colors)
    for (a, depth), measured, mean_field in zip(arrays["points"], simulated, predicted, strict=True):
        ax.annotate(
            f"{measured} / {mean_field}", (a, depth), xytext=(6, 0), textcoords="offset points",
            va="center", color="white", fontsize=7,
        )  # fmt: skip
    ax.set(xlabel="amplitude $a$ of the augmentation", ylabel="depth $L$", xlim=(-0.15, amplitudes[-1]))
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
