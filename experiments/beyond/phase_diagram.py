"""Phase diagram: how many dimensions collapse, by strength of the augmentation and by depth.

    python experiments/beyond/phase_diagram.py              # simulate, predict, save, draw: 80 s on one core
    python experiments/beyond/phase_diagram.py --plot-only  # redraw from the saved result

16 modes with clean variance 1; the augmentation adds noise of standard deviation a k / 15 to mode k.  L balanced
aligned layers whose product starts at 0.3 exp(-0.4 k), whatever L; learning rate 1e-3, time 10, batch 128, temperature
0.1.  A mode is counted as collapsed below 1e-2 of the largest variance: because of the augmentation where it would
stop there (a k / 15 > 3, whatever L), or because of depth where it takes longer than the training to get there (k above
a bound, whatever a).  The background and the line are the finite-batch mean field's: right of the line more modes
collapse than without augmentation.  Dashed, the same line in closed form, for an infinite batch
(theory.collapsed_modes): its clock is too fast, and its counts are too low by up to 2.  At 15 points SGD.

Writes phase_diagram.npz: amplitudes (15,), depths (8,), mean_field and closed (15, 8), counts by both; points (15, 2),
a and L; simulated and predicted (15, 16), singular values of the product at the end, of SGD and of the mean field;
closed_points (15,).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    collapsed_modes,
    sgd,
    singular_values,
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


def closed_form(amplitude: float, depth: int) -> int:
    """Modes collapsed by augmentation or by depth, infinite batch."""
    return int(collapsed_modes(START, CLEAN, noise(amplitude) ** 2, depth, HORIZON, 0.1, THRESHOLD).sum())


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
    """Mean field and closed form on a grid; SGD too at 15 points."""
    amplitudes, depths = np.linspace(0, 7, 15), np.arange(1, 9)
    grid = np.array([[count(predict(depth, a)) for depth in depths.tolist()] for a in amplitudes])
    closed_grid = np.array([[closed_form(a, depth) for depth in depths.tolist()] for a in amplitudes])
    points = np.array([(a, depth) for depth, chosen in POINTS.items() for a in chosen])
    simulated = np.concatenate([train(depth, chosen, seed, lr) for depth, chosen in POINTS.items()])
    predicted = np.array([predict(int(depth), a) for a, depth in points])
    closed = np.array([closed_form(a, int(depth)) for a, depth in points])
    exact = {
        "mean_field": int((count(predicted) == count(simulated)).sum()),
        "closed": int((closed == count(simulated)).sum()),
    }
    meta = {
        "r2": r_squared(simulated, predicted),
        "r2_change": r_squared_change(simulated, predicted, START),
        "exact": exact,
        "threshold": THRESHOLD,
        "horizon": HORIZON,
    }
    return meta, {
        "amplitudes": amplitudes,
        "depths": depths,
        "mean_field": grid,
        "closed": closed_grid,
        "points": points,
        "simulated": simulated,
        "predicted": predicted,
        "closed_points": closed,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    total, exact = len(arrays["points"]), meta["exact"]
    lines = [
        f"R^2 of the {arrays['simulated'].size} ln singular values at the end, mean field over SGD: {meta['r2']:.4f}, "
        f"of their change {meta['r2_change']:.4f}",
        f"collapsed dimensions exact at {exact['mean_field']} of {total} points by the mean field, "
        f"{exact['closed']} in closed form",
        "  a  L   SGD  mean field  closed form",
    ]
    columns = count(arrays["simulated"]), count(arrays["predicted"]), arrays["closed_points"]
    for (a, depth), *counts in zip(arrays["points"].astype(int), *columns, strict=True):
        lines.append("  {}  {}   {:>3}  {:>10}  {:>11}".format(a, depth, *counts))
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Counts over amplitude and depth, the line where augmentation begins to count, and the simulated points."""
    fig, ax = plots.figure(plots.TEXT, 3.1)
    amplitudes, depths, counts = arrays["amplitudes"], arrays["depths"], arrays["mean_field"]
    most = int(counts.max())
    colors = {"cmap": "viridis", "vmin": 0, "vmax": most + 3}  # without the palest, for white text
    image = ax.pcolormesh(amplitudes, depths, counts.T, shading="nearest", rasterized=True, **colors)
    fig.colorbar(
        image, ax=ax, label="collapsed dimensions of 16", boundaries=np.arange(-0.5, most + 1), ticks=range(most + 1)
    )
    for grid, style in ((counts, "-"), (arrays["closed"], "--")):
        # The right edge of the last cell that has no more than without augmentation.
        last = len(amplitudes) - 1 - (grid <= grid[0])[::-1].argmax(0)
        edge = amplitudes[last] + (amplitudes[1] - amplitudes[0]) / 2
        ax.stairs(edge, np.arange(0.5, len(depths) + 1), orientation="horizontal", baseline=None, color="white",
                  linestyle=style, lw=1.5)  # fmt: skip
    ax.text(1.5, 7, "limited by depth", color="white", ha="center", va="center")
    ax.text(6.75, 3, "limited by augmentation", color="white", ha="center", va="center", rotation=90)
    simulated, predicted = count(arrays["simulated"]), count(arrays["predicted"])
    ax.scatter(*arrays["points"].T, c=simulated, s=60, edgecolors="white", linewidths=0.8, zorder=3, **colors)
    for (a, depth), measured, mean_field in zip(arrays["points"], simulated, predicted, strict=True):
        ax.annotate(
            f"{measured} / {mean_field}", (a, depth), xytext=(6, 0), textcoords="offset points",
            va="center", color="white", fontsize=7,
        )  # fmt: skip
    ax.set(xlabel="amplitude $a$ of the augmentation", ylabel="depth $L$", xlim=(-0.25, amplitudes[-1] + 0.25))
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
