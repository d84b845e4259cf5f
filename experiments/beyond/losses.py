"""Contrastive and non-contrastive losses side by side on the same data: which directions does each lose?

    python experiments/beyond/losses.py              # simulate, predict, save, draw: 50 s on one core
    python experiments/beyond/losses.py --plot-only  # redraw from the saved result

One linear layer on 16 coordinates of Gaussian data, batch 128.  Clean variances and noise are set so that the
directions of most clean variance are not those of the largest signal fraction rho = c0 / (c0 + ce): c0 falls from 1.5
to 0.2 over the modes, noise of standard deviation alternates between 0.2 and values up to 1.5.
Losses: InfoNCE of dot product (temperature 0.1) and of cosine (0.5), the spectral contrastive loss (as InfoNCE's at
0.1), linear Barlow Twins, and VICReg with its code's weights.  Two embeddings: 16 entries, which start aligned, and 6
entries, which start small and at random: only 6 directions can stay.
VICReg's 16 entries start with a little beside the diagonal: aligned, it would keep every direction (vicreg_modes), but
that is a saddle.  Entries that mix the directions of little noise reach their deviation of 1 at a lower price, and the
covariance term, at its code's weight, does not keep them apart: VICReg loses the noisy directions.
Predicted: wide, from the stationary points in closed form (spectral), the mean field (dot, cosine), and the flow of the
exact mean loss of a batch (Barlow Twins, VICReg); narrow, from the rule of which 6 stay, largest rho for InfoNCE,
spectral and VICReg, largest c0 for Barlow Twins, which starts small and stops long before it feels its batch.
What an infinite batch would do is drawn too: in Barlow Twins a finite batch kills what little signal cannot pay for.

R^2 is over what exceeds 1e-3 of the largest in both: the noise of SGD keeps dead directions at 2e-4 to 2e-3 of it
(cosine) and 5e-5 to 2e-4 (VICReg), where the flow goes on to nothing.  With all above 1e-6 in both, the score of the
change falls from 0.995 to 0.910 (cosine) and from 0.999 to 0.942 (VICReg).

Writes losses.npz: c0, ce (16,); steps (T,); for each LOSS the variance of each direction, m c with m the diagonal of
W^T W: LOSS_simulated and LOSS_predicted (T, 16), LOSS_infinite (16,) at the end, wide; LOSS_narrow (16,), measured at
the end, and LOSS_kept (16,), 1 for the directions that the rule keeps; t (S,) and staircase (S, 3, 16), Barlow Twins
from a small start, by SGD, by the closed form and by the flow of the batch.
"""

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
    barlow_twins_loss,
    barlow_twins_modes,
    cosine_modes,
    loss_gradient,
    matrix_flow,
    population_modes,
    sgd,
    stationary_modes,
    vicreg_loss,
    vicreg_modes,
)

DIM, NARROW = 16, 6
C0 = np.linspace(1.5, 0.2, DIM)
NOISE = np.where(np.arange(DIM) % 2, 0.2, np.linspace(1.5, 0.6, DIM))
CE, VIEWS = NOISE**2, GaussianViews(np.sqrt(C0), NOISE)
C = C0 + CE
START = np.full(DIM, 0.2)  # singular values of W
LOSSES = {
    "dot": Descent(1e-3, 4_000, temperature=0.1),
    "cosine": Descent(0.02, 4_000, temperature=0.5, similarity="cosine"),
    "spectral": Descent(1e-3, 4_000, temperature=0.1, similarity="spectral"),
    "barlow_twins": Descent(1e-3, 4_000, similarity="barlow_twins"),
    "vicreg": Descent(4e-3, 4_000, similarity="vicreg"),
}
LABELS = {
    "dot": "InfoNCE, dot", "cosine": "InfoNCE, cosine", "spectral": "spectral contrastive",
    "barlow_twins": "Barlow Twins", "vicreg": "VICReg",
}  # fmt: skip


def variances(W: NDArray) -> NDArray:
    """Variance of the embedding along each direction, of W (..., m, 16): m_k c_k."""
    return (W**2).sum(-2) * C


def matrix_modes(name: str, t: NDArray, start: NDArray) -> NDArray:
    """Variances (T, 16) by the flow of the exact mean loss of the batch, from a matrix."""
    loss = {"barlow_twins": barlow_twins_loss, "vicreg": vicreg_loss}[name]
    gradient = loss_gradient(loss, np.diag(C0), np.diag(CE), batch=LOSSES[name].batch)
    return variances(matrix_flow(t, [start], gradient)[0])


def predict(name: str, t: NDArray, start: NDArray) -> NDArray:
    """Variances (T, 16) from the start."""
    descent = LOSSES[name]
    if name == "spectral":
        return population_modes(t, START, C0, CE, 1, descent.temperature) ** 2 * C
    if name in ("dot", "cosine"):
        field = MeanField(np.diag(C0), np.diag(CE), descent.batch, descent.temperature)
        return field.modes(t, START[None], name)[:, 0] ** 2 * C
    return matrix_modes(name, t, start)


def infinite(name: str) -> NDArray:
    """Variances (16,) where an infinite batch stops; shares for the cosine."""
    return {
        "dot": lambda: stationary_modes(C0, CE, "dot", 0.1) * C,
        "cosine": lambda: cosine_modes(C0, CE, 0.5),
        "spectral": lambda: stationary_modes(C0, CE, "dot", 0.1) * C,
        "barlow_twins": lambda: C / C0,
        "vicreg": lambda: vicreg_modes(C0, CE) * C,
    }[name]()


def kept(name: str) -> NDArray:
    """1 for the directions that stay in a narrow embedding, (16,)."""
    by = C0 if name == "barlow_twins" else C0 / C
    return (by.argsort().argsort() >= DIM - NARROW).astype(float)


def narrow(name: str, seed: int) -> NDArray:
    """Variances (16,) at the end in an embedding of 6 entries, by SGD from a random start."""
    start = 1e-3 * np.random.default_rng(seed).standard_normal((1, NARROW, DIM))
    descent = LOSSES[name]
    return variances(sgd([start], VIEWS, [seed], descent, [descent.steps])[0][0, 0])


def staircase(seed: int) -> tuple[NDArray, NDArray]:
    """t (T,), and m (T, 3, 16) of Barlow Twins from a small start: SGD, closed form, flow of the batch."""
    descent = Descent(1e-3, 2_000, similarity="barlow_twins")
    at = np.unique(np.linspace(0, descent.steps, 81).round().astype(int))
    start = np.diag(np.full(DIM, 0.01))
    W = sgd([start[None]], VIEWS, [seed], descent, at.tolist())[0][:, 0]
    t = descent.lr * at
    m = variances(W) / C, barlow_twins_modes(t, C0, start.diagonal() ** 2), matrix_modes("barlow_twins", t, start) / C
    return t, np.stack(m, axis=1)


def scores(measured: NDArray, predicted: NDArray) -> tuple[float, float]:
    """R^2 of levels and of the change, over what exceeds 1e-3 of the largest in both; (T, 16) from the start on."""
    seen = np.all([s[1:] > 1e-3 * s[1:].max(1, keepdims=True) for s in (measured, predicted)], axis=0)
    first = np.broadcast_to(measured[0], measured[1:].shape)[seen]
    now, expected = measured[1:][seen], predicted[1:][seen]
    return r_squared(now, expected), r_squared_change(now, expected, first)


def simulate(seed: int = 0) -> tuple[Meta, Arrays]:
    """All losses, wide and narrow."""
    at = np.concatenate([[0], np.unique(np.geomspace(10, 4_000, 40).astype(int))])
    arrays: Arrays = {"c0": C0, "ce": CE, "steps": at}
    meta: dict[str, Any] = {"r2": {}, "r2_change": {}, "kept": {}}
    for name, descent in LOSSES.items():
        start = np.diag(START) + (
            0.02 * np.random.default_rng(seed).standard_normal((DIM, DIM)) if name == "vicreg" else 0
        )
        W = sgd([start[None]], VIEWS, [seed], descent, at.tolist())[0][:, 0]
        measured, predicted = variances(W), predict(name, descent.lr * at, start)
        if name == "cosine":  # the loss has no scale, and noise lengthens it
            measured, predicted = (s / s.sum(1, keepdims=True) for s in (measured, predicted))
        meta["r2"][name], meta["r2_change"][name] = scores(measured, predicted)
        chosen, rule = narrow(name, seed), kept(name)
        meta["kept"][name] = int(((chosen.argsort().argsort() >= DIM - NARROW) == (rule > 0)).sum())
        arrays |= {f"{name}_simulated": measured, f"{name}_predicted": predicted, f"{name}_infinite": infinite(name)}
        arrays |= {f"{name}_narrow": chosen, f"{name}_kept": rule}
    arrays["t"], arrays["staircase"] = staircase(seed)
    sgd_m, closed, flow = arrays["staircase"][1:].swapaxes(0, 1)
    meta["r2"] |= {"staircase": r_squared(sgd_m, flow), "staircase_closed": r_squared(sgd_m, closed)}
    meta["r2_change"] |= {
        "staircase": r_squared_change(sgd_m, flow, np.full(DIM, 1e-4)),
        "staircase_closed": r_squared_change(sgd_m, closed, np.full(DIM, 1e-4)),
    }
    return meta, arrays


def lost(s: NDArray) -> int:
    """Directions below 1e-2 of the largest."""
    return int((s < 1e-2 * s.max()).sum())


def report(meta: Meta, arrays: Arrays) -> str:
    lines = ["                       R^2 of ln variance (change)   lost of 16: SGD / predicted / infinite batch   "
             "narrow: as the rule says"]  # fmt: skip
    for name, label in LABELS.items():
        counts = [lost(arrays[f"{name}_{kind}"][-1]) for kind in ("simulated", "predicted")]
        lines.append(
            f"  {label:<21}{meta['r2'][name]:.4f} ({meta['r2_change'][name]:.4f})   {counts[0]} / {counts[1]} / "
            f"{lost(arrays[f'{name}_infinite'])}   {meta['kept'][name]} of 16"
        )
    stairs = [f"{meta['r2'][n]:.4f} ({meta['r2_change'][n]:.4f})" for n in ("staircase", "staircase_closed")]
    lines.append(f"  Barlow Twins from a small start: flow of the batch {stairs[0]}, closed form {stairs[1]}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Top: ln variance of each direction at the end, wide. Bottom: share of each direction in a narrow embedding."""
    fig, axes = plots.figure(plots.TEXT, 3.8, columns=len(LOSSES), rows=2, sharex=True, sharey="row")
    mode = np.arange(1, DIM + 1)
    for (name, label), (top, bottom) in zip(LABELS.items(), axes.T, strict=True):
        ends = {kind: arrays[f"{name}_{kind}"] for kind in ("simulated", "predicted", "infinite")}
        for kind, marks in {"infinite": ":", "predicted": "-", "simulated": "o"}.items():
            s = ends[kind] if kind == "infinite" else ends[kind][-1]
            color = "0.5" if kind == "infinite" else "C0"
            top.plot(mode, np.log(np.maximum(s / s.max(), 1e-6)), marks, color=color, label=kind)
        share = arrays[f"{name}_narrow"] / arrays[f"{name}_narrow"].max()
        bottom.bar(mode, arrays[f"{name}_kept"], 0.9, color="0.85", label="kept by the rule")
        bottom.plot(mode, share, "o", color="C0", label="simulation")
        top.set(title=label, ylim=(-14.5, 0.8))
        bottom.set(xlabel="direction $k$", xticks=[1, 6, 11, 16], ylim=(0, 1.1))
    axes[0, 0].set_ylabel("16 entries:\n" + r"$\ln$ variance / largest")
    axes[1, 0].set_ylabel("6 entries:\nvariance / largest")
    axes[0, 2].legend(["infinite batch", "prediction", "simulation"], loc="lower left")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
