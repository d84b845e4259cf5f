"""Cosine similarity: normalisation turns shrinkage into collapse, and temperature decides how much of it.

    python experiments/beyond/cosine.py  # 25 s on one core

One layer, d = 16, c0 = 1, noise amplitude from 0 to 1.5 along the modes, batch 128 (512 at temperature 0.1). t_k is
the share of mode k in the variance of the embedding. An infinite batch and wide embeddings give water-filling, t_k =
tau (rho_k + mu)_+, rho = c0 / c: modes of little signal are exactly zero. The mean field normalises the views exactly
and keeps Gaussian negatives; it falls short at temperature 0.2 and below, where 1 / tau is not small against the
square root of the number of live modes, and the bounded negatives of the sphere are not Gaussian.  At 0.5 it keeps one
mode at 2 % of the largest that SGD holds at 0.3 %: 7 dead by it, 8 by SGD and by water-filling.

SGD starts from equal shares, which know nothing of the prediction.

Writes cosine.npz: temperatures (5,), and shares (5, 16): simulated, the mean of two runs, mean_field, water.  r2 here
is on the shares themselves, many of which are zero; r2_log on their logarithms, where simulation and prediction exceed
1e-3: from equal shares it is also that of the change.  By temperature, ceiling is r2 and r2_log of one run by the other
and rms_log that of ln t in nats, mean field over the mean of the runs.
"""

from typing import Any

import numpy as np

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared
from collapse.theory import Descent, GaussianViews, MeanField, cosine_modes, sgd

TEMPERATURES = np.array([2, 1, 0.5, 0.2, 0.1])
DIM = 16
NOISE = np.linspace(0, 1.5, DIM)


def shares(m: np.ndarray) -> np.ndarray:
    """t_k of squared singular values m, (..., 16)."""
    s = m * (1 + NOISE**2)
    return s / s.sum(-1, keepdims=True)


def batch(temperature: float) -> int:
    return 512 if temperature == 0.1 else 128


def mean_field(temperature: float) -> np.ndarray:
    field = MeanField(np.eye(DIM), np.diag(NOISE**2), batch(temperature), temperature)
    return shares(field.modes(np.array([0, 1e5]), np.full((1, DIM), 0.5), "cosine")[-1, 0] ** 2)


def simulation(temperature: float, seed: int, steps: int) -> np.ndarray:
    """Mean share over the last half of the steps, from equal shares, of two runs: (2, 16)."""
    start = np.diag(0.5 / np.sqrt(1 + NOISE**2))
    descent = Descent(0.05 * temperature, steps, batch(temperature), temperature, "cosine")
    at = list(range(steps // 2, steps + 1, steps // 40))
    W = sgd([np.tile(start, (2, 1, 1))], GaussianViews(np.ones(DIM), NOISE), (seed, seed + 1), descent, at)[0]
    return shares((W**2).sum(-2)).mean(0)


def fit(measured: np.ndarray, predicted: np.ndarray) -> float:
    return float(1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())


def living(measured: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, where both exceed 1e-3."""
    on = (measured > 1e-3) & (predicted > 1e-3)
    return measured[on], predicted[on]


def simulate(seed: int = 0, steps: int = 8_000) -> tuple[Meta, Arrays]:
    """Shares by SGD, mean field and water-filling."""
    ones = np.ones(DIM)
    runs = np.array([simulation(tau, seed, steps) for tau in TEMPERATURES])
    arrays = {
        "simulated": runs.mean(1),
        "mean_field": np.array([mean_field(tau) for tau in TEMPERATURES]),
        "water": np.array([cosine_modes(ones, NOISE**2, tau) for tau in TEMPERATURES]),
    }
    kinds = ("mean_field", "water")
    pairs = {kind: list(zip(arrays["simulated"], arrays[kind], strict=True)) for kind in kinds}
    r2 = {kind: [fit(t, p) for t, p in pairs[kind]] for kind in kinds}
    r2_log = {kind: [r_squared(*living(t, p)) for t, p in pairs[kind]] for kind in kinds}
    ceiling = {"r2": [fit(*pair) for pair in runs], "r2_log": [r_squared(*living(*pair)) for pair in runs]}
    rms = [float(np.sqrt(np.mean(np.subtract(*np.log(living(t, p))) ** 2))) for t, p in pairs["mean_field"]]
    return {"r2": r2, "r2_log": r2_log, "ceiling": ceiling, "rms_log": rms}, {"temperatures": TEMPERATURES, **arrays}


def dead(t: np.ndarray) -> int:
    return int((t < 1e-2 * t.max()).sum())


def report(meta: Meta, arrays: Arrays) -> str:
    lines = ["tau    dead: SGD / mean field / water-filling    R^2 of t: mean field, water-filling (of ln t)"]
    for i, tau in enumerate(arrays["temperatures"]):
        counts = " / ".join(str(dead(arrays[name][i])) for name in ("simulated", "mean_field", "water"))
        fits = ", ".join(
            f"{meta['r2'][kind][i]:.3f} ({meta['r2_log'][kind][i]:.3f})" for kind in ("mean_field", "water")
        )
        ceiling = f"{meta['ceiling']['r2'][i]:.3f} ({meta['ceiling']['r2_log'][i]:.3f})"
        lines.append(
            f"{tau:<6g} {counts:<40} {fits}; one run by the other {ceiling}; rms {meta['rms_log'][i]:.2f} nats"
        )
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Share of each mode, by temperature."""
    fig, axes = plots.figure(plots.TEXT, 2.2, columns=len(TEMPERATURES), sharey=True)
    mode = np.arange(1, DIM + 1)
    for i, (tau, ax) in enumerate(zip(arrays["temperatures"], axes, strict=True)):
        ax.plot(mode, arrays["water"][i], "--", color="0.5", label="water-filling")
        ax.plot(mode, arrays["mean_field"][i], color="C0", label="mean field")
        ax.plot(mode, arrays["simulated"][i], "o", color="C0", label="mean of 2 runs")
        ax.set(title=rf"$\tau = {tau:g}$", xlabel="mode $k$")
    axes[0].set_ylabel("share $t_k$")
    axes[-1].legend()
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
