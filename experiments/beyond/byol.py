"""Learning without negatives: which directions BYOL, SimSiam, DirectPred and DirectCopy keep, predicted and simulated.

    python experiments/beyond/byol.py              # simulate, predict, save, draw: 20 s on one core
    python experiments/beyond/byol.py --plot-only  # redraw from the saved result

z = W x and a linear predictor P, both 12 x 12, that share a random basis at the start and are then left alone; clean
variance 1, noise variance 0 to 0.1 in eight directions and 0.5 to 0.8 in four; weight decay 0.21, batch 128.  Each
direction starts at a predictor eigenvalue of its own.  It lives if that lies above the smaller root of
p (c0 - c p) = gamma and ends at the larger (theory.predictor_roots): one rule for the four methods.  The four noisy
directions have no root.  Collapse is dimensional; it is complete at 1.5 times the decay, and without a predictor.
The rule is that of directions which stay apart.  In the long run a strong direction of the data invades the entry of
a weak one, at the rate p^2 (c - c') for equal c0; noise this even keeps that slower than the runs.
Methods: simsiam, predictor trained at twice the rate, target at once; byol, the same with a target of rate 1;
directpred and directcopy, set from the representation's covariance, boost 0.

Writes byol.npz: t (T,); for each METHOD the eigenvalues METHOD_p and METHOD_s of the predictor and of the
representation's covariance, (T, 2, 12): simulated and predicted, descending; living (7, 3),
counts by SGD, by the flow and by the rule, in the four methods, at 1.5 times the decay (simsiam, directpred), and
without a predictor.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ortho_group

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    Distillation,
    GaussianViews,
    distil,
    predictor_modes,
    predictor_roots,
    singular_values,
)

DIM, DECAY = 12, 0.21
C0 = np.ones(DIM)
CE = np.concatenate([np.linspace(0, 0.1, 8), np.linspace(0.5, 0.8, 4)])
NOISE = np.sqrt(CE)
P0 = np.array([0.8, 0.2, 0.6, 0.15, 0.9, 0.45, 0.25, 0.7, 0.8, 0.5, 0.3, 0.9])
METHODS = {
    "simsiam": Distillation(rate=2.0),
    "byol": Distillation(rate=2.0, target=1.0),
    "directpred": Distillation("directpred"),
    "directcopy": Distillation("directcopy"),
}
LABELS = {"simsiam": "SimSiam", "byol": "BYOL", "directpred": "DirectPred", "directcopy": "DirectCopy"}


def start(method: Distillation) -> NDArray:
    """Singular values of W with which the predictor is in balance at the start."""
    return {
        "trained": P0 / np.sqrt(method.rate),
        "directpred": P0 / np.sqrt(C0 + CE),
        "directcopy": np.sqrt(P0 / (C0 + CE)),
        "none": P0,
    }[method.predictor]


def run(method: Distillation, decay: float, seed: int, lr: float, horizon: float) -> tuple[NDArray, NDArray, NDArray]:
    """Times, and the eigenvalues p and s, (T, 2, 12) each: by SGD and by the flow."""
    steps, basis = round(horizon / lr), ortho_group.rvs(DIM, random_state=seed)
    at = np.unique(np.linspace(0, steps, 61).round().astype(int))
    w0 = start(method)
    P, W = distil(
        (basis * w0)[None], (basis * P0 @ basis.T)[None], GaussianViews(np.sqrt(C0), NOISE), [seed],
        Descent(lr, steps, weight_decay=decay), at.tolist(), method,
    )  # fmt: skip
    W = W[:, 0] * np.sqrt(C0 + CE)
    simulated = np.linalg.eigvalsh(P[:, 0] + P[:, 0].mT)[:, ::-1] / 2, singular_values(W) ** 2
    flow = predictor_modes(lr * at, w0, P0, C0, CE, method, decay)
    p, s = (np.stack([one, -np.sort(-two)], axis=1) for one, two in zip(simulated, flow, strict=True))
    return lr * at, p, s


def living(s: NDArray) -> NDArray:
    """How many of (..., 12) variances are above 1e-3."""
    return (s > 1e-3).sum(-1)


def simulate(seed: int = 0, lr: float = 0.02, horizon: float = 50.0) -> tuple[Meta, Arrays]:
    """The four methods; stronger decay and no predictor for the count alone."""
    arrays: Arrays = {}
    counts = []
    meta: dict[str, Any] = {"r2": {}, "r2_change": {}}
    low, _ = predictor_roots(C0, CE, DECAY)
    for name, method in METHODS.items():
        t, p, s = run(method, DECAY, seed, lr, horizon)
        arrays |= {"t": t, f"{name}_p": p, f"{name}_s": s}
        counts.append([*living(s[-1]), int((low < P0).sum())])
        for kind, values in {"p": p, "s": s}.items():
            # Below 1e-6 the noise of SGD and rounding are what is left.
            seen = values[1:].min(1) > 1e-6
            measured, predicted = values[1:, 0][seen], values[1:, 1][seen]
            first = np.broadcast_to(values[0, 1], values[1:, 0].shape)[seen]
            meta["r2"][f"{name}_{kind}"] = r_squared(measured, predicted)
            meta["r2_change"][f"{name}_{kind}"] = r_squared_change(measured, predicted, first)
    low, _ = predictor_roots(C0, CE, 1.5 * DECAY)
    for method in (METHODS["simsiam"], METHODS["directpred"]):
        _, _, s = run(method, 1.5 * DECAY, seed, lr, horizon)
        counts.append([*living(s[-1]), int((low < P0).sum())])
    _, _, s = run(Distillation("none"), DECAY, seed, lr, horizon)
    counts.append([*living(s[-1]), 0])
    return meta, {**arrays, "living": np.array(counts)}


def report(meta: Meta, arrays: Arrays) -> str:
    names = [*LABELS.values(), "SimSiam, 1.5 times the decay", "DirectPred, 1.5 times the decay", "no predictor"]
    lines = ["living directions of 12: SGD, flow, rule"]
    lines += [f"  {name:<32} {'  '.join(map(str, row))}" for name, row in zip(names, arrays["living"], strict=True)]
    lines.append("R^2 of ln eigenvalues, all times (of their change): predictor; representation")
    for name, label in LABELS.items():
        cells = [f"{meta['r2'][f'{name}_{kind}']:.4f} ({meta['r2_change'][f'{name}_{kind}']:.4f})" for kind in "ps"]
        lines.append(f"  {label:<11} {'; '.join(cells)}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Eigenvalues of the representation's covariance over time, by method."""
    fig, axes = plots.figure(plots.TEXT, 2.3, columns=4, sharey=True)
    for (name, label), ax in zip(LABELS.items(), axes, strict=True):
        simulated, predicted = arrays[f"{name}_s"].swapaxes(0, 1)
        plots.plot_prediction(ax, arrays["t"], np.maximum(simulated, 1e-12), np.maximum(predicted, 1e-12), every=4)
        ax.set(title=label, xlabel=r"time $t$", ylim=(-16, 1.5))
    axes[0].set_ylabel(r"$\ln\,\lambda$ of $\mathrm{Cov}(z)$")
    plots.theory_legend(axes[-1], loc="upper right", bbox_to_anchor=(1.08, 0.86))
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
