"""Figure 11, DirectCLR in the linear toy: the loss sees 4 of 16 coordinates of r; with and without a residual path.

    python experiments/figure11.py                 # simulate, predict, save, draw: 45 s on one core
    python experiments/figure11.py --plot-only     # redraw from the saved result

r = W2 W1 x, and the loss is that of r[:4].  W1 starts uniform in +-1/4; the second layer W2 is 1 plus a block that
starts at zero (with residual), uniform in +-1/4 (without), or the same with zero rows but for the first 4 (bare).
Clean data N(0, I), noise of standard deviation 3 on the last 8 of 16 coordinates; loss, batch, temperature and learning
rate of the official toy script; several runs from one start.  The gradient that reaches W1 has rank 4 at most at every
step, and only 4 rows of W2 move.  So the rest of r keeps what W1 held at the start: a residual path lets it through,
and nothing teaches it.

Writes figure11.npz: paths (3,), t (T,) = learning rate x steps; singular values of W2 W1, simulated (T, 3, seeds, 16),
predicted (mean field) and population (infinite batch), (T, 3, 16); the share of the clean data in the variance of r[:4]
and of r[4:], NaN where that part of r is zero, signal_simulated (the mean over seeds) and signal_predicted (T, 3, 2);
gradient (3, 3, 16): least, median and largest singular values of the gradient of W1 for each path, over every tenth
step of all runs; floor (3,), the rounding of weights below which these hold nothing; R^2 of the logarithms against the
mean of the runs' logarithms, and the ceilings, what the mean of the other runs explains of one.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gmean

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance, r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    matrix_flow,
    population_gradient,
    sgd,
    singular_values,
)

DIM, D0 = 16, 4
CLEAN, NOISE = np.ones(DIM), np.repeat([0.0, 3.0], DIM // 2)
C0, CE = np.diag(CLEAN**2), np.diag(NOISE**2)
PATHS = {"residual": "residual", "none": "no residual", "bare": "no residual, other rows zero"}
HEAD = np.eye(D0, DIM)  # a third layer, which does not train


def starts(seed: int) -> tuple[NDArray, dict[str, NDArray]]:
    """W1, and W2 for each path."""
    W1, W2 = np.random.default_rng(seed).uniform(-0.25, 0.25, (2, DIM, DIM))
    return W1, {"residual": np.eye(DIM), "none": W2, "bare": W2 * (np.arange(DIM) < D0)[:, None]}


def signal_shares(W: NDArray) -> NDArray:
    """Of r[:4] and r[4:] for products W (..., 16, 16): (..., 2); NaN where there is no variance."""
    energy = np.stack([(part**2).sum(-2) for part in np.split(W, [D0], axis=-2)], axis=-2)
    signal, total = energy @ C0.diagonal(), energy @ (C0 + CE).diagonal()
    return np.divide(signal, total, out=np.full_like(total, np.nan), where=total > 0)


def alive(values: NDArray) -> NDArray:
    """Without the singular values that are zero by construction: all are left, or 4 where nothing else leads to r."""
    return values[..., : int((values[0] > 1e-6 * values[0].max()).sum(-1).max())]


def train(W1: NDArray, second: NDArray, seeds: list[int], descent: Descent, at: list[int]) -> list[NDArray]:
    """(len(at), 3, seeds, rows, columns) of W1 and W2, from one W1 and three W2."""
    runs = len(PATHS) * len(seeds)
    layers = [np.tile(W1, (runs, 1, 1)), second.repeat(len(seeds), axis=0), np.tile(HEAD, (runs, 1, 1))]
    kept = sgd(layers, GaussianViews(CLEAN, NOISE), seeds * len(PATHS), descent, at, [None, None, 0 * HEAD])
    return [W.reshape(len(at), len(PATHS), len(seeds), DIM, DIM) for W in kept[:2]]


def gradients(W1: NDArray, pairs: NDArray, lr: float) -> tuple[NDArray, NDArray, int]:
    """(quantiles over steps and runs (3, 3, 16), floor (3,), largest rank) of the gradient of W1 at steps `pairs`."""
    values = singular_values(W1[pairs + 1] - W1[pairs]) / lr
    # Both weights are rounded to half an eps of float32; a random matrix of errors has norm 2 sqrt(16) times one.
    floor = 2 * np.sqrt(DIM) * np.finfo(np.float32).eps * np.abs(W1).max((0, 2, 3, 4)) / lr
    rank = (values > floor[:, None, None]).sum(-1).max()
    return np.quantile(values, [0, 0.5, 1], axis=(0, 2)), floor, int(rank)


def simulate(seed: int = 0, seeds: int = 4, steps: int = 10_000, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """The three paths, `seeds` runs each, as one batch; both predictions."""
    descent, (W1, seconds) = Descent(lr, steps), starts(seed)
    shown = np.concatenate([[0], np.unique(np.geomspace(10, steps, 40).astype(int))])
    tenth = np.arange(0, steps, 10)
    at = np.unique(np.concatenate([shown, tenth, tenth + 1]))
    first, second = train(W1, np.array(list(seconds.values())), [*range(seed, seed + seeds)], descent, at.tolist())
    quantiles, floor, rank = gradients(first, np.searchsorted(at, tenth), lr)
    moved = np.abs(second[-1] - second[0])[..., D0:, :].max()
    places = np.searchsorted(at, shown)
    products = {"simulated": second[places] @ first[places]}
    # Many points: with a residual path most of r is left alone, and a small pool's own error would move it.
    field = MeanField(C0, CE, descent.batch, descent.temperature, points=32_768)
    population = partial(population_gradient, C0=C0, Ce=CE, temperature=descent.temperature)
    for kind, gradient in (("predicted", field.gradient), ("population", population)):
        flows = [
            matrix_flow(lr * shown, [W1, W2, HEAD], gradient, masks=[None, None, 0 * HEAD]) for W2 in seconds.values()
        ]
        products[kind] = np.stack([W2 @ W1 for W1, W2, _ in flows], axis=1)
    values = {kind: singular_values(W) for kind, W in products.items()}
    meta = {"r2": scores(values), "d0": D0, "gradient_rank": rank, "other_rows_moved": float(moved)}
    return meta, {
        "paths": np.array(list(PATHS)),
        "t": lr * shown,
        **values,
        "signal_simulated": signal_shares(products["simulated"]).mean(2),
        "signal_predicted": signal_shares(products["predicted"]),
        "gradient": quantiles,
        "floor": floor,
    }


def scores(values: dict[str, NDArray]) -> Meta:
    """R^2 of ln singular values of each path, over all times, at the last, and of the change."""
    r2: Meta = {}
    for p, path in enumerate(PATHS):
        runs = alive(values["simulated"][:, p])
        mean, last = gmean(runs, -2), runs[-1]
        forecasts = {kind: values[kind][:, p, : runs.shape[-1]] for kind in ("predicted", "population")}
        r2[path] = {
            kind: {
                "trajectory": r_squared(mean, forecast),
                "final": r_squared(mean[-1], forecast[-1]),
                "change": r_squared_change(mean[1:], forecast[1:], mean[0]),
            }
            for kind, forecast in forecasts.items()
        }
        if len(last) > 1:
            r2[path]["ceiling"] = [r_squared(x, gmean(np.delete(last, i, axis=0), -2)) for i, x in enumerate(last)]
    return r2


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [
        "r = W2 W1 x, loss on r[:4]: R^2 of ln singular values, all times and last (which says nothing of a flat "
        "spectrum, as with other rows zero), mean field | infinite batch"
    ]
    for p, path in enumerate(arrays["paths"]):
        first, last = (gmean(alive(arrays["simulated"][:, p]), -2)[i] ** 2 for i in (0, -1))
        rank = [int((values > 1e-2 * values[0]).sum()) for values in (first, last)]
        before, after = arrays["signal_simulated"][[0, -1], p]
        r2 = meta["r2"][str(path)]
        fits = " | ".join(f"{r2[k]['trajectory']:.4f} {r2[k]['final']:.4f}" for k in ("predicted", "population"))
        lines.append(
            f"  {PATHS[str(path)]:<29} {fits}   rank of r {rank[0]} -> {rank[1]}, "
            f"signal share of r[:4] {before[0]:.3f} -> {after[0]:.3f}, of r[4:] {before[1]:.3f} -> {after[1]:.3f}"
        )
        lines.append("    runs of one another, last: " + " ".join(f"{value:.4f}" for value in r2.get("ceiling", [])))
    lines.append(
        f"rank of the gradient of W1 at every tenth step of all runs: at most {meta['gradient_rank']}; "
        f"the other rows of W2 moved by {meta['other_rows_moved']:g}"
    )
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: the spectrum of r. Middle: the gradient of W1, zeros put within the rounding. Right: what r learns."""
    fig, (left, middle, right) = plots.figure(plots.TEXT, 2.7, columns=3)
    index, t = np.arange(1, DIM + 1), arrays["t"]
    colors = (plots.HEAD_COLORS["DirectCLR"], "0.55", "0.15")  # DirectCLR, and what is taken from it
    for p, (path, marker, color) in enumerate(zip(arrays["paths"], "os^", colors, strict=True)):
        label = PATHS[str(path)].replace(", ", ",\n")
        simulated = 2 * np.log(gmean(alive(arrays["simulated"][:, p])[-1], -2))
        here = index[: len(simulated)]
        left.plot(here, 2 * np.log(arrays["predicted"][-1, p, : len(here)]), color=color, label=label)
        left.plot(here, simulated, marker, color=color)
        least, median, largest = np.log(np.maximum(arrays["gradient"][:, p], arrays["floor"].min() / 10))
        middle.plot(index, median, marker=marker, color=color)
        middle.fill_between(index, least, largest, color=color, alpha=0.2, linewidth=0)
        for part, dashes in enumerate(("-", "--")):
            right.plot(t[1:], arrays["signal_predicted"][1:, p, part], dashes, color=color)
            right.plot(t[1::3], arrays["signal_simulated"][1::3, p, part], marker, color=color)
    left.set(xlabel="index of the singular value", ylabel=r"$\ln\,\lambda$ of $\mathrm{Cov}(r)$ at the end")
    left.legend(loc="lower left")
    middle.axhspan(middle.get_ylim()[0], np.log(arrays["floor"].max()), color="0.9", zorder=0)
    middle.annotate("rounding", (0.6, 0.12), xycoords="axes fraction", color="0.4", fontsize=7)
    middle.set(xlabel="index of the singular value", ylabel=r"$\ln\,\sigma$ of the gradient of $W_1$")
    middle.margins(y=0)
    right.set(xscale="log", xlabel=r"time $t$ (steps $\times$ lr)", ylim=(0, 1.03))
    right.set_ylabel("share of signal in the variance")
    right.annotate("$r[:4]$", (0.6, 0.88), xycoords="axes fraction")
    right.annotate("$r[4:]$", (0.6, 0.08), xycoords="axes fraction")
    return fig


if __name__ == "__main__":
    # Float32: singular values agree to 3e-6, and the score of one nearly flat spectrum by the others to 4e-5.
    main(__file__, simulate, report, draw, Tolerance(1e-3))
