"""The last linear layer on a frozen trunk under Barlow Twins and VICReg: dead directions, predicted and measured.

    python experiments/networks/relaxation_losses.py  # train, relax, predict, draw: 2 minutes on one core
    python experiments/networks/relaxation_losses.py --plot-only  # redraw from the saved result

Trunks: small networks trained on scikit-learn's digits by `collapse train` with either loss.  Their representations h
of augmented views, the 16 leading principal components, centred, mean square 1, are computed once, 8 versions of each
image.  Then z = W h alone is trained, 16 x 16, by linear Barlow Twins (arXiv 2303.15438) and by VICReg, batch 128.
The prediction knows the covariances of h and nothing else: the flow of the exact mean loss of Gaussian data
(theory.barlow_twins_loss, theory.vicreg_loss).  h is as it is, or replaced by Gaussian points of the same covariances:
where only the second fits, it is the Gaussian assumption that fails.
Cells and thresholds were chosen before anything was run: two trunks, two losses, two sets; a direction is dead where
its variance in z is below 1e-2 of the largest.  Directions are those of the signal fraction, C0 u = rho C u.

Writes relaxation_losses.npz: trunks, losses, sets (2,) each; rho (2, 16) of each trunk, descending; steps (T,);
measured (2, 2, 2, T, 16) variances of the directions in z by trunk, loss and set; predicted (2, 2, T, 16).
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear_digits import BankViews, gaussian_like, moments
from numpy.typing import NDArray
from scipy.linalg import eigh

from collapse import load, plots
from collapse.data.labelled import open_data
from collapse.experiment import Arrays, Meta, main
from collapse.recipes.config import make_config
from collapse.results import Tolerance, r_squared, r_squared_change
from collapse.theory import Descent, barlow_twins_loss, loss_gradient, matrix_flow, sgd, vicreg_loss
from collapse.training.relaxation import represented
from collapse.training.state import Options
from collapse.training.train import train

DIM, VERSIONS, DEAD = 16, 8, 1e-2
TRUNKS = {"barlow-twins": 0.01, "vicreg": 0.1}  # with their learning rates
LOSSES = {
    "Barlow Twins": (Descent(1e-3, 2_000, similarity="barlow_twins"), barlow_twins_loss),
    "VICReg": (Descent(4e-3, 2_000, similarity="vicreg"), vicreg_loss),
}
SETS = ("real", "gaussian")


def representations(method: str, seed: int) -> NDArray:
    """(n, 8, 16): augmented views of the digits behind a trained trunk, principal components, mean square 1."""
    config = make_config(
        "digits", method=method, lr=TRUNKS[method], epochs=3, warmup=1, blocks=(1, 1), planes=(16, 32), seed=seed
    )
    data = open_data("sklearn:digits", "train")
    with tempfile.TemporaryDirectory() as folder:
        for _ in train(Path(folder), config, data, options=Options(spectrum_every=0, knn_every=0)):
            pass
        net = load(Path(folder) / "encoder.safetensors")
        found = represented(net, config, data, len(data), VERSIONS)
    found -= found.mean((0, 1))
    vectors = np.linalg.eigh(moments(found))[1][:, ::-1][:, :DIM]
    found = found @ vectors
    return found / np.sqrt((found**2).mean())


def covariances(bank: NDArray) -> tuple[NDArray, NDArray]:
    """C0 and Ce (16, 16) of exactly what two different versions of an image have."""
    means = bank.mean(1)
    Ce = moments(bank - means[:, None]) * VERSIONS / (VERSIONS - 1)
    return moments(means) - Ce / VERSIONS, Ce


def gaussian(bank: NDArray, seed: int) -> NDArray:
    """Gaussian points of the same covariances of means and of deviations."""
    rng, means = np.random.default_rng(seed), bank.mean(1, keepdims=True)
    return gaussian_like(means, rng) + gaussian_like(bank - means, rng)


def relaxed(trunk: str, seed: int, at: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """rho (16,), measured (2, 2, T, 16) and predicted (2, T, 16) of one trunk."""
    bank = representations(trunk, seed)
    C0, Ce = covariances(bank)
    rho, U = (part[..., ::-1] for part in eigh(C0, C0 + Ce))
    seen = (C0 + Ce) @ U
    start = 0.2 * np.eye(DIM) + 0.02 * np.random.default_rng(seed).standard_normal((DIM, DIM))
    banks = [torch.from_numpy(one).float() for one in (bank, gaussian(bank, seed))]
    measured, predicted = [], []
    for descent, loss in LOSSES.values():
        W = sgd([np.stack([start, start])], BankViews(banks), [seed, seed], descent, at.tolist())[0]
        gradient = loss_gradient(loss, C0, Ce, batch=descent.batch)
        flow = matrix_flow(descent.lr * at, [start], gradient, rtol=1e-3)[0]
        measured.append(((W @ seen) ** 2).sum(-2).swapaxes(0, 1))
        predicted.append(((flow @ seen) ** 2).sum(-2))
    return rho, np.stack(measured), np.stack(predicted)


def dead(variances: NDArray) -> NDArray:
    """How many of (..., 16) are below 1e-2 of the largest."""
    return (variances < DEAD * variances.max(-1, keepdims=True)).sum(-1)


def simulate(seed: int = 0) -> tuple[Meta, Arrays]:
    """All cells, and R^2 of the logarithms of what exceeds 1e-3 of the largest in both."""
    at = np.concatenate([[0], np.unique(np.geomspace(10, 2_000, 25).astype(int))])
    found = [relaxed(trunk, seed, at) for trunk in TRUNKS]
    rho, measured, predicted = (np.stack(part) for part in zip(*found, strict=True))
    cells = []
    for index in np.ndindex(measured.shape[:3]):
        one, other = measured[index], predicted[index[:2]]
        seen = np.all([s[1:] > 1e-3 * s[1:].max(1, keepdims=True) for s in (one, other)], axis=0)
        first = np.broadcast_to(one[0], one[1:].shape)[seen]
        names = {"trunk": [*TRUNKS][index[0]], "loss": [*LOSSES][index[1]], "set": SETS[index[2]]}
        counts = {"dead": int(dead(one[-1])), "predicted": int(dead(other[-1]))}
        r2 = r_squared(one[1:][seen], other[1:][seen])
        cells.append(
            {**names, **counts, "r2": r2, "r2_change": r_squared_change(one[1:][seen], other[1:][seen], first)}
        )
    arrays: Arrays = {"rho": rho, "steps": at, "measured": measured, "predicted": predicted}
    arrays |= {"trunks": np.array([*TRUNKS]), "losses": np.array([*LOSSES]), "sets": np.array(SETS)}
    return {
        "cells": cells,
        "r2": {f"{cell['trunk']} {cell['loss']} {cell['set']}": cell["r2"] for cell in cells},
    }, arrays


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [f"{'trunk, loss, set':<40}dead of 16: measured, predicted   R^2 of ln variance (of the change)"]
    for cell in meta["cells"]:
        name = ", ".join(cell[key] for key in ("trunk", "loss", "set"))
        lines.append(
            f"{name:<40}{cell['dead']:>21} {cell['predicted']:>10}   {cell['r2']:.3f} ({cell['r2_change']:.3f})"
        )
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Variance of each direction at the end over its signal fraction, by trunk and loss."""
    fig, axes = plots.figure(plots.TEXT, 2.3, columns=4, sharey=True)
    for ax, (trunk, loss) in zip(axes, np.ndindex(2, 2), strict=True):
        rho = arrays["rho"][trunk]
        for s, marker in ((0, "o"), (1, "^")):
            end = arrays["measured"][trunk, loss, s, -1]
            ax.plot(rho, np.log(end / end.max()), marker, color=f"C{s}", label=("real h", "Gaussian h")[s])
        end = arrays["predicted"][trunk, loss, -1]
        ax.plot(rho, np.log(end / end.max()), "-", color="0.3", label="predicted")
        ax.axhline(np.log(DEAD), ls=":", color="0.6")
        of = dict(zip(TRUNKS, LOSSES, strict=True))[[*TRUNKS][trunk]]
        ax.set(title=f"{[*LOSSES][loss]},\ntrunk by {of}", xlabel=r"signal fraction $\rho_k$")
    axes[0].set_ylabel(r"$\ln$ variance in $z$ / largest")
    axes[0].legend()
    return fig


if __name__ == "__main__":
    # Trunks are trained, which multiplies a rounding.  On another processor signal fractions differ by 0.06 of the
    # largest, variances of modes near the line of dying by 0.2 of it, and scores by 2e-3.
    near = Tolerance(0.5, floor=1.0)
    main(
        __file__,
        simulate,
        report,
        draw,
        Tolerance(1e-2, of={"rho": Tolerance(0.2, floor=1.0), "measured": near, "predicted": near}),
    )
