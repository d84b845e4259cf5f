"""Collapsed dimensions against time, depth and initial scale, and the times at which modes escape.

    python experiments/beyond/collapsed_dimensions.py              # simulate, predict, save, draw: 35 s on one core
    python experiments/beyond/collapsed_dimensions.py --plot-only  # redraw from the saved result

L balanced aligned layers, 16 x 16, whose product starts at a exp(-0.4 k) for three scales a; clean data N(0, I),
noise of standard deviation 0.001, batch 128, temperature 0.1, learning rate 0.004, time 40.  A dimension is collapsed
where its variance is below 1e-2 of the largest.  A mode escapes when its product reaches 0.1, which takes a logarithm
of its start for one layer and a power of it for more (theory.escape_time, infinite batch).  A finite batch is slower:
once the first modes tell the positives apart every gradient shrinks.  The mean field knows this.

Writes collapsed_dimensions.npz: t (T,); scales (3,), depths (5,); simulated, predicted and population (T, 5, 3),
counts by SGD, the mean field and the infinite batch; escapes (E, 6): depth, scale, mode, and the three times, of the
modes that start below 0.1 and reach it in all three; changes, by depth, the scores of ln w(t) / w(0) of all modes and
scales, the mean field over SGD (collapse.results.change_scores; the ceiling is of two runs at the largest scale).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import change_scores, change_text, r_squared
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    escape_time,
    population_modes,
    sgd,
    singular_values,
)

DIM = 16
NOISE = 1e-3
CLEAN = np.ones(DIM)
DEPTHS = (1, 2, 3, 4, 6)
SCALES = (0.3, 0.1, 0.03)
LEVEL = 0.1  # of the product, at which a mode has escaped


def start(scale: float) -> NDArray:
    """Singular values of the product."""
    return scale * np.exp(-0.4 * np.arange(DIM))


def count(w: NDArray) -> NDArray:
    """Collapsed dimensions of spectra (..., 16): m = w^2 below 1e-2 of the largest."""
    m = w**2
    return (m < 1e-2 * m.max(-1, keepdims=True)).sum(-1)


def crossings(t: NDArray, w: NDArray) -> NDArray:
    """First time at which each column of w, (T, K), reaches the level, linear in ln w.

    NaN for those that do not, or that start there.
    """
    times = np.full(w.shape[1], np.nan)
    for k in np.flatnonzero((w[0] < 0.99 * LEVEL) & (w >= LEVEL).any(0)):
        i = int((w[:, k] >= LEVEL).argmax())
        before, after = np.log(w[i - 1 : i + 1, k] / LEVEL)
        times[k] = t[i - 1] + (t[i] - t[i - 1]) * before / (before - after)
    return times


def train(depth: int, seed: int, descent: Descent, at: NDArray) -> tuple[NDArray, NDArray]:
    """Singular values and diagonal of the product by SGD, (T, scales + 1, 16); last, a second run of the first."""
    layer = np.array([np.diag(start(scale) ** (1 / depth)) for scale in (*SCALES, SCALES[0])])
    views = GaussianViews(CLEAN, np.full(DIM, NOISE))
    trained = sgd([layer] * depth, views, [seed] * len(SCALES) + [seed + 1], descent, at.tolist())
    product = trained[0]
    for W in trained[1:]:
        product = W @ product
    return singular_values(product), np.abs(np.diagonal(product, axis1=-2, axis2=-1))


def predict(t: NDArray, depth: int, scale: float, field: MeanField) -> tuple[NDArray, NDArray]:
    """The product's modes by the mean field and for an infinite batch, (T, 16)."""
    finite = field.modes(t, np.tile(start(scale) ** (1 / depth), (depth, 1))).prod(1)
    return finite, population_modes(t, start(scale), CLEAN, NOISE**2 * CLEAN, depth)


def simulate(seed: int = 4, lr: float = 0.004, horizon: float = 40.0) -> tuple[Meta, Arrays]:
    """All scales at once, depth by depth."""
    descent = Descent(lr, round(horizon / lr))
    at = np.unique(np.linspace(0, descent.steps, 801).round().astype(int))
    t, field = lr * at, MeanField(np.eye(DIM), NOISE**2 * np.eye(DIM))
    counts: dict[str, list] = {"simulated": [], "predicted": [], "population": []}
    escapes, changes = [], {}
    for depth in DEPTHS:
        values, diagonal = train(depth, seed, descent, at)
        values, again = values[:, :-1], values[:, [0, -1]]
        forecasts = [
            np.stack(both, axis=1) for both in zip(*(predict(t, depth, a, field) for a in SCALES), strict=True)
        ]
        for name, w in zip(counts, (values, *forecasts), strict=True):
            counts[name].append(count(w))
        scores = change_scores(values[:, None], forecasts[0])
        changes[depth] = scores | {"ceiling": change_scores(again, again.mean(1))["ceiling"]}
        for i, scale in enumerate(SCALES):
            early = np.array(escape_time(start(scale), np.full(DIM, LEVEL), CLEAN, depth))
            times = np.stack([crossings(t, diagonal[:, i]), crossings(t, forecasts[0][:, i]), early])
            for k in np.flatnonzero(np.isfinite(times).all(0)):
                escapes.append([depth, scale, k, *times[:, k]])
    rows = np.array(escapes)
    measured, finite, infinite = rows[:, 3:].T
    r2 = {"mean_field": r_squared(measured, finite), "infinite_batch": r_squared(measured, infinite)}
    return {"r2": r2, "changes": changes, "noise": NOISE, "level": LEVEL}, {
        "t": t,
        "scales": np.array(SCALES),
        "depths": np.array(DEPTHS),
        **{name: np.stack(values, axis=1).astype(np.int16) for name, values in counts.items()},
        "escapes": rows,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    r2, rows = meta["r2"], arrays["escapes"]
    late = rows[:, 3] / rows[:, 5]
    last = {name: arrays[name][-1] for name in ("simulated", "predicted", "population")}
    lines = [
        f"R^2 of ln escape time, {len(rows)} modes: mean field {r2['mean_field']:.4f}, "
        f"infinite batch {r2['infinite_batch']:.4f}",
        f"SGD escapes later than an infinite batch by {np.exp(np.log(late).mean()):.2f} (geometric mean), "
        f"at most {late.max():.2f}",
        "collapsed dimensions at the end, SGD / mean field / infinite batch:",
    ]
    for j, scale in enumerate(arrays["scales"]):
        cells = [
            f"L={depth}: {last['simulated'][i, j]}/{last['predicted'][i, j]}/{last['population'][i, j]}"
            for i, depth in enumerate(arrays["depths"])
        ]
        lines.append(f"  scale {scale:<5g}" + "   ".join(cells))
    lines.append("the change ln w(t) / w(0), mean field over SGD:")
    lines += [f"  L = {depth}   {change_text(scores)}" for depth, scores in meta["changes"].items()]
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Counts over time by depth, counts at the end by scale, and escape times."""
    fig, (left, middle, right) = plots.figure(plots.TEXT, 2.4, columns=3)
    t, depths, scales = arrays["t"], arrays["depths"], arrays["scales"]
    colors = plots.sequence_colors(len(depths))
    dots = np.unique(np.geomspace(1, len(t) - 1, 25).astype(int))
    for i, (depth, color) in enumerate(zip(depths, colors, strict=True)):
        left.plot(t[1:], arrays["predicted"][1:, i, 0], color=color)
        left.plot(t[dots], arrays["simulated"][dots, i, 0], "o", color=color)
        middle.plot(scales, arrays["predicted"][-1, i], color=color)
        middle.plot(scales, arrays["simulated"][-1, i], "o", color=color)
        rows = arrays["escapes"][arrays["escapes"][:, 0] == depth]
        right.plot(rows[:, 4], rows[:, 3], "o", color=color, label=f"$L={depth}$")
        right.plot(rows[:, 5], rows[:, 3], "x", color=color, markeredgewidth=0.6, alpha=0.7)
    right.plot([], [], "x", color="0.3", markeredgewidth=0.6, label="infinite batch")
    ends = np.array([arrays["escapes"][:, 3:].min(), arrays["escapes"][:, 3:].max()])
    right.plot(ends, ends, color="0.6", zorder=0)
    left.set(xscale="log", xlabel=r"time $t$ (steps $\times$ lr)", ylabel="collapsed dimensions of 16")
    middle.set(xscale="log", xlabel="initial scale $a$", ylabel="collapsed dimensions at the end")
    middle.set_xticks(scales, [f"{scale:g}" for scale in scales])
    middle.minorticks_off()
    right.set(xscale="log", yscale="log", xlabel="escape time, predicted", ylabel="escape time, SGD")
    plots.theory_legend(left, loc="lower right", bbox_to_anchor=(1, 0.08))
    right.legend(loc="lower right", handletextpad=0.1)
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
