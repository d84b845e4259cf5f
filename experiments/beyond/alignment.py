"""Identity or anti-identity: what decides the alignment of two layers, and when it turns.

    python experiments/beyond/alignment.py              # simulate, predict, save, draw: 20 s on one core
    python experiments/beyond/alignment.py --plot-only  # redraw from the saved result

A = |V2^T U1| of two 16 x 16 layers.  The conserved K = W2^T W2 - W1 W1^T pulls their Gram matrices apart, G -+ K / 2,
and the product's singular values w hold them together: A tends to the identity where w is spread more widely than half
the eigenvalues of K, to the anti-identity where it is less (theory.alignment_index).  While modes grow one after
another w is spread; where it stops at one size it is not, so that A turns.  Figure 5's anti-identity and the paper's
identity are two sides of one line.
Eight settings: clean variances from 1 down to `low`, layers with singular values a exp(-0.1 k) in random bases.
Spectral contrastive loss (any batch has the gradient of an infinite one) at temperature 1, batch 128.
The rule is of first order in K / w.  Outside, at `low` 0.6 and a = 1.3, the end was right and the turn came at 2.3, not
at 0.8.
The end is predicted from the start alone, K and sqrt(m*) = sqrt(tau c0) / c; the last turn's time from the flow's w.
Measured: the sign of the difference of A's mean diagonal and antidiagonal, in SGD.

Writes alignment.npz: settings (8, 2), low and a; t (T,); A (T, 8, 16, 16) at some times and difference (D, 8) at times
t_fine (D,), by SGD; index (D, 8), of the flow's w; ends (8,), the index of the end; turns (8, 2), times of the last
turn by SGD and by the rule, NaN without one; sigma (D, 2, 8, 16), of the product by SGD and by the flow.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ortho_group

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    alignment,
    alignment_index,
    matrix_flow,
    population_gradient,
    sgd,
    singular_values,
    stationary_modes,
)

DIM, TAU = 16, 1.0
SETTINGS = np.array([(1, 0.6), (1, 0.8), (1, 1.0), (0.8, 0.8), (0.8, 1.0), (0.5, 0.7), (0.3, 0.8), (0.1, 1.1)])


def start(a: float, seed: int) -> list[NDArray]:
    bases = ortho_group.rvs(DIM, size=4, random_state=seed)
    sigma = a * np.exp(-0.1 * np.arange(DIM))
    return [bases[0] * sigma @ bases[1].T, bases[2] * sigma @ bases[3].T]


def clean(low: float) -> NDArray:
    return np.geomspace(1, low, DIM)


def difference(W1: NDArray, W2: NDArray) -> float:
    """Mean of the diagonal less mean of the antidiagonal of A."""
    A = alignment(W1, W2)
    return float(A.diagonal().mean() - A[::-1].diagonal().mean())


def last_turn(t: NDArray, sign: NDArray) -> float:
    """The last time at which `sign` goes from above to below zero, linear in between; NaN if never."""
    down = np.flatnonzero((sign[:-1] > 0) & (sign[1:] <= 0))
    if len(down) == 0:
        return float("nan")
    i = down[-1]
    return float(t[i] + (t[i + 1] - t[i]) * sign[i] / (sign[i] - sign[i + 1]))


def flow(t: NDArray, low: float, layers: list[NDArray]) -> tuple[NDArray, NDArray]:
    """(index (T,), singular values of the product (T, 16)) by the flow of an infinite batch."""
    gradient = partial(population_gradient, C0=np.diag(clean(low)), Ce=np.zeros((DIM, DIM)), temperature=TAU)
    W1, W2 = matrix_flow(t, layers, gradient, rtol=1e-5)
    w = singular_values(W2 @ W1)
    return alignment_index(w, layers[1].T @ layers[1] - layers[0] @ layers[0].T), w


def simulate(seed: int = 3, lr: float = 5e-3, horizon: float = 12.0) -> tuple[Meta, Arrays]:
    """Eight runs at once, and the flow of each."""
    steps, runs = round(horizon / lr), len(SETTINGS)
    at = np.unique(np.concatenate([[0], np.geomspace(10, steps, 70).astype(int)]))
    starts = [start(a, seed + run) for run, (_, a) in enumerate(SETTINGS)]
    layers = [np.array(layer) for layer in zip(*starts, strict=True)]
    views = GaussianViews(np.sqrt([clean(low) for low, _ in SETTINGS]), np.zeros((runs, DIM)))
    descent = Descent(lr, steps, temperature=TAU, similarity="spectral")
    W1, W2 = sgd(layers, views, range(seed, seed + runs), descent, at.tolist())
    t = lr * at
    flows = [flow(t, low, layers) for (low, _), layers in zip(SETTINGS, starts, strict=True)]
    index, w = (np.stack(part, axis=1) for part in zip(*flows, strict=True))
    measured = np.array([[difference(*pair) for pair in zip(*now, strict=True)] for now in zip(W1, W2, strict=True)])
    ends = np.array([
        alignment_index(np.sqrt(stationary_modes(clean(low), 0 * clean(low), "dot", TAU)), b.T @ b - a @ a.T)
        for (low, _), (a, b) in zip(SETTINGS, starts, strict=True)
    ])  # fmt: skip
    turns = np.array([[last_turn(t, measured[:, r]), last_turn(t, index[:, r])] for r in range(runs)])
    sigma = np.stack([singular_values(W2 @ W1), w], axis=1)
    shown = np.linspace(0, len(at) - 1, 12).astype(int)
    both = np.isfinite(turns).all(1)
    meta = {
        "r2": r_squared(sigma[1:, 0], sigma[1:, 1]),
        "r2_change": r_squared_change(sigma[1:, 0], sigma[1:, 1], sigma[0, 0]),
        "right": int((np.sign(measured[-1]) == np.sign(ends)).sum()),
        "largest_error": float(np.abs(turns[both, 1] / turns[both, 0] - 1).max()) if both.any() else None,
        "turns": int(both.sum()),
    }
    A = np.array([[alignment(*pair) for pair in zip(W1[i], W2[i], strict=True)] for i in shown])
    return meta, {"settings": SETTINGS, "t": t[shown], "A": A, "t_fine": t, "difference": measured, "index": index,
                  "ends": ends, "turns": turns, "sigma": sigma}  # fmt: skip


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [f"sign of the end right at {meta['right']} of {len(arrays['settings'])} settings; time of the last turn "
             f"within {meta['largest_error']:.0%} at {meta['turns']}",
             f"R^2 of ln singular values of the product, all times: {meta['r2']:.4f} (change {meta['r2_change']:.4f})",
             "  low   a     index of the end   diagonal - antidiagonal   last turn: SGD, rule"]  # fmt: skip
    columns = zip(arrays["settings"], arrays["ends"], arrays["difference"][-1], arrays["turns"], strict=True)
    for (low, a), end, measured, (turn, rule) in columns:
        lines.append(f"  {low:<4g}  {a:<4g}  {end:>+.2f}   {measured:>+.2f}   {turn:.2f}, {rule:.2f}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Diagonal less antidiagonal over time, with the rule's turns; the end against the index."""
    fig, (left, right) = plots.figure(plots.TEXT, 2.6, columns=2)
    colors = plots.sequence_colors(len(arrays["settings"]))
    t = arrays["t_fine"][1:]
    for run, ((low, a), color) in enumerate(zip(arrays["settings"], colors, strict=True)):
        left.plot(t, arrays["difference"][1:, run], "o", color=color, markersize=2)
        if np.isfinite(arrays["turns"][run, 1]):
            left.axvline(arrays["turns"][run, 1], color=color, linewidth=0.8)
        right.plot(arrays["ends"][run], arrays["difference"][-1, run], "o", color=color, label=f"{low:g}, {a:g}")
    for ax in (left, right):
        ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    right.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    left.set(xscale="log", xlabel=r"time $t$; lines: the turn predicted", ylabel="diagonal $-$ antidiagonal of $A$")
    right.set(xlabel="alignment index of the end, from the start alone", ylabel="diagonal $-$ antidiagonal at the end",
              xlim=(-1.1, 1.1))  # fmt: skip
    right.legend(title="lowest $c_0$, scale $a$", fontsize=6, title_fontsize=6, loc="lower right")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
