"""Figure 3, strong augmentation: one linear layer, simulated by SGD and predicted by the finite-batch mean field.

    python experiments/figure3.py                 # simulate, predict, save, draw: 25 s on one core
    python experiments/figure3.py --plot-only     # redraw from the saved result

z = W x, 16 x 16; clean data N(0, I); the augmentation adds Gaussian noise to the last 8 coordinates, of standard
deviation k for each of 8 amplitudes.  Loss, batch, temperature and learning rate are the official toy script's.
Two starts: random, uniform in +-1/4 as a layer of torch; and aligned, diagonal with 0.3 exp(-0.15 (i mod 8)).

Writes figure3.npz: amplitudes (A,), t (T,) = learning rate x steps; for each start NAME in random, aligned the singular
values NAME_simulated, NAME_predicted (mean field) and NAME_population (infinite batch), each (T, A, 16); and R^2 of
their logarithms over all times and at the last, pooled over amplitudes.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    matrix_flow,
    population_gradient,
    population_modes,
    sgd,
    singular_values,
)

AMPLITUDES = np.array([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3])
DIM = 16
CLEAN = np.eye(DIM)


def noise(amplitude: float) -> NDArray:
    """Standard deviation of the augmentation, coordinate by coordinate."""
    return np.repeat([0.0, amplitude], DIM // 2)


def starts(seed: int) -> dict[str, NDArray]:
    """The two initial layers."""
    random = np.random.default_rng(seed).uniform(-0.25, 0.25, (DIM, DIM))
    return {"random": random, "aligned": np.diag(0.3 * np.exp(-0.15 * (np.arange(DIM) % 8)))}


def predict(name: str, W: NDArray, t: NDArray, amplitude: float, descent: Descent) -> tuple[NDArray, NDArray]:
    """Singular values over time, each (T, 16), for the batch of the simulation and for an infinite one."""
    Ce = np.diag(noise(amplitude) ** 2)
    field = MeanField(CLEAN, Ce, descent.batch, descent.temperature)
    if name == "aligned":
        sigma, c0 = W.diagonal(), CLEAN.diagonal()
        finite = field.modes(t, sigma[None])[:, 0]
        infinite = population_modes(t, sigma, c0, Ce.diagonal(), 1, descent.temperature)
        return -np.sort(-finite), -np.sort(-infinite)
    gradients = field.gradient, partial(population_gradient, C0=CLEAN, Ce=Ce, temperature=descent.temperature)
    finite, infinite = (singular_values(matrix_flow(t, [W], gradient)[0]) for gradient in gradients)
    return finite, infinite


def simulate(seed: int = 7, steps: int = 10_000, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """All amplitudes from both starts, as one batch of 16 runs; the prediction of each."""
    descent, layers = Descent(lr, steps), starts(seed)
    at = np.concatenate([[0], np.unique(np.geomspace(10, steps, 50).astype(int))])
    deviations = np.array([noise(amplitude) for amplitude in AMPLITUDES])
    views = GaussianViews(np.ones((2 * len(AMPLITUDES), DIM)), np.tile(deviations, (2, 1)))
    runs = np.repeat(np.array(list(layers.values())), len(AMPLITUDES), axis=0)
    W = sgd([runs], views, [seed + 100 * run for run in range(len(runs))], descent, at.tolist())[0]
    t, arrays, r2 = lr * at, {}, {}
    for name, values in zip(layers, np.split(singular_values(W), 2, axis=1), strict=True):
        forecasts = [predict(name, layers[name], t, amplitude, descent) for amplitude in AMPLITUDES]
        arrays[f"{name}_simulated"] = values
        for kind, forecast in zip(
            ("predicted", "population"), map(np.array, zip(*forecasts, strict=True)), strict=True
        ):
            arrays[f"{name}_{kind}"] = forecast = forecast.swapaxes(0, 1)
            r2[f"{name}_{kind}"] = {
                "trajectory": r_squared(values, forecast),
                "final": r_squared(values[-1], forecast[-1]),
                "change": r_squared_change(values[1:], forecast[1:], values[0]),
            }
    return {"r2": r2, "batch": descent.batch, "temperature": descent.temperature}, {
        "amplitudes": AMPLITUDES,
        "t": t,
        **arrays,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    lines = ["R^2 of ln singular values of W, prediction over simulation, 8 amplitudes"]
    for name, r2 in meta["r2"].items():
        start, kind = name.split("_")
        label = {"predicted": "mean field of the batch", "population": "infinite batch"}[kind]
        lines.append(
            f"  {start:<8} start, {label:<24} all times {r2['trajectory']:.4f}   last {r2['final']:.4f}   "
            f"change {r2['change']:.4f}"
        )
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: the spectrum at the end, by amplitude. Right: the run with the most noise, over time."""
    fig, (left, right) = plots.figure(plots.TEXT, 2.6, columns=2)
    predicted, simulated = arrays["random_predicted"], arrays["random_simulated"]
    index = np.arange(1, DIM + 1)
    for a, color in enumerate(plots.sequence_colors(len(AMPLITUDES))):
        left.plot(index, np.log(predicted[-1, a]), color=color)
        left.plot(index, np.log(simulated[-1, a]), "o", color=color)
        label = f"$k={arrays['amplitudes'][a]:g}$"
        place = (DIM, np.log(predicted[-1, a, -1]))
        left.annotate(label, place, xytext=(5, 0), textcoords="offset points", va="center", color=color, fontsize=7)
    left.set(xlabel="index of the singular value", ylabel=r"$\ln\,\sigma$ of $W$ at the end", xlim=(0, 19))
    left.set_xticks([1, 4, 8, 12, 16])
    plots.theory_legend(left, loc="lower left")
    plots.plot_prediction(right, arrays["t"][1:], simulated[1:, -1], predicted[1:, -1], every=2)
    right.set(xscale="log", xlabel=r"time $t$ (steps $\times$ learning rate)", ylabel=r"$\ln\,\sigma$ of $W$, $k=3$")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
