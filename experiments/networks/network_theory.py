"""The theory against a real network, at the last layers: its three statements.

    python experiments/networks/network_theory.py  # from the runs that are there; --data trains the rest

Top left, mechanism one: X = Sigma0 - Sigma1 (lemma 2, exact for the cosine loss too) of the representation under a
linear head, over training, at four strengths of augmentation: the weight of its negative eigenvalues, in whose
directions the head's gradient is decay, among all.  A cosine loss does not change with the head's scale, so that
tr(W X W^T) = 0: X always has negative eigenvalues, with no head of just half the weight; what tells is the change.
Top right and bottom left, mechanism two: two linear layers behind the network: alignment of their singular vectors,
and growth of the second layer's singular values.
Bottom right: how far augmentation shrinks directions, at four strengths: the share of the embedding's variance that
each generalised eigenvector of signal and augmentation has behind a linear head (dots), against water-filling of its
signal fraction (lines), t_k = tau (rho_k + mu)+, `theory.cosine_modes`, for an infinite batch and Gaussian data.

Writes experiments/results/network_theory.json (negative: strength -> epochs, share, weight of the negative eigenvalues,
and outside, the share of the directions that the head does not see along which X is negative; alignment: epochs, mean
of the leading 16, singular values; shrinkage: strength -> rho, measured and predicted shares, spearman of rho and
share, r2 of the logarithms of those above 1e-4 in both, dead: counts below that, held: what the modes predicted to be
dead hold) and figures/network_theory.png and .pdf.
"""

from typing import Any

import numpy as np
import study
import summary
from scipy import stats

from collapse import plots, theory
from collapse.experiment import Meta
from collapse.results import r_squared

LEADING = 16  # modes whose alignment is averaged
DEAD = 1e-4  # a share of the embedding's variance below which a mode is taken to be dead


def negative(arrays: summary.Arrays) -> Meta:
    """Count and weight of X's negative eigenvalues at each epoch, of those that are not rounding.

    outside: share of the directions that the head does not see along which X is negative.
    """
    values = arrays["x_eigenvalues"]
    counted = np.abs(values) > 1e-9 * np.abs(values).max(1, keepdims=True)
    below = counted & (values < 0)
    weight = -np.where(below, values, 0).sum(1) / np.abs(values).sum(1)
    product = arrays["head_singular_values"][0, -1]
    outside = (arrays["x_growth"][:, (product > 1e-9 * product[0]).sum() :] < 0).mean(1)
    return {"epochs": arrays["epochs"], "share": below.sum(1) / counted.sum(1), "weight": weight, "outside": outside}


def aligned(arrays: summary.Arrays) -> Meta:
    """Alignment of two linear layers, and their singular values, over the epochs."""
    sizes = arrays["head_singular_values"]
    found = {"epochs": arrays["epochs"], "alignment": arrays["alignment"][:, :LEADING].mean(1)}
    return found | {f"layer{k + 1}": sizes[:, k, : arrays["alignment"].shape[1]] for k in range(2)}


def shrunk(meta: Meta, arrays: summary.Arrays) -> Meta:
    """Measured and predicted shares of the modes."""
    rho = np.clip(arrays["modes_rho"], 0, 1)
    predicted = theory.cosine_modes(rho, 1 - rho, meta["config"]["temperature"])
    measured = arrays["modes_share"]
    dead = [int((share < DEAD).sum()) for share in (measured, predicted)]
    alive = (measured > DEAD) & (predicted > DEAD)
    fit = r_squared(measured[alive], predicted[alive])
    rank = float(stats.spearmanr(rho, measured).statistic)
    shares = {"rho": rho, "measured": measured, "predicted": predicted}
    held = {"median": np.median(measured[predicted < DEAD]), "together": measured[predicted < DEAD].sum()}
    return shares | {"dead": dead, "held": held, "spearman": rank, "r2": fit, "alive": int(alive.sum())}


def summarise(runs: summary.Runs) -> Meta:
    """The three parts."""
    strengths = {s: "linear-s0" if s == 1 else f"linear-strength{s:g}-s0" for s in study.STRENGTHS}
    return {
        "negative": {f"{s:g}": negative(runs[name][1]) for s, name in strengths.items()},
        "alignment": aligned(runs["linear-depth2-s0"][1]),
        "shrinkage": {f"{s:g}": shrunk(*runs[name]) for s, name in strengths.items()},
        "signal_fraction": {f"{s:g}": runs[name][0]["signal_fraction"] for s, name in strengths.items()},
    }


def report(found: Meta) -> str:
    """The figures behind the panels."""
    lines = []
    for s, one in found["negative"].items():
        parts = [", ".join(f"{100 * value:.0f}" for value in one[key]) for key in ("weight", "share", "outside")]
        lines.append(
            f"augmentation x {s}: negative eigenvalues of X at epochs {one['epochs']}: % of the weight {parts[0]}, "
            f"of the number {parts[1]}; of the directions that the head does not see {parts[2]}"
        )
    mean = ", ".join(f"{value:.2f}" for value in found["alignment"]["alignment"])
    lines.append(f"two linear layers: alignment of the leading {LEADING} modes {mean}")
    for s, one in found["shrinkage"].items():
        lines.append(
            f"augmentation x {s}: rank correlation of share with rho {one['spearman']:.2f}; R2 of ln shares of the "
            f"{one['alive']} alive {one['r2']:.2f}; below {DEAD:g} {one['dead'][0]}, predicted {one['dead'][1]}, "
            f"which hold {one['held']['median']:.1e} each, {one['held']['together']:.2f} together"
        )
    return "\n".join(lines)


def draw(found: Meta) -> Any:
    """The four panels."""
    fig, axes = plots.figure(plots.TEXT, 4.4, columns=2, rows=2)
    ((first, second), (third, fourth)) = axes
    colors = dict(zip(found["negative"], plots.sequence_colors(len(found["negative"])), strict=True))
    for s, one in found["negative"].items():
        first.plot(one["epochs"], 100 * np.array(one["weight"]), "o-", color=colors[s], label=f"× {s}")
    first.set(xlabel="epoch", ylabel="negative weight of X, %", ylim=(0, 100))
    first.legend(title="augmentation")
    two = found["alignment"]
    second.plot(two["epochs"], two["alignment"], "o-")
    second.set(xlabel="epoch", ylabel=f"alignment, leading {LEADING}", ylim=(0, 1))
    grown = np.log(np.array(two["layer2"]) / np.array(two["layer2"])[0])
    for marker, k in zip("osv", (1, LEADING, grown.shape[1]), strict=True):
        third.plot(two["epochs"], grown[:, k - 1], f"{marker}-", label=f"singular value {k}")
    third.set(xlabel="epoch", ylabel=r"second layer: $\ln$ growth")
    third.legend()
    for s, one in found["shrinkage"].items():
        fourth.plot(one["rho"], np.log10(one["measured"]), ".", color=colors[s], markersize=2, label=f"× {s}")
        rho, predicted = (np.array(one[key]) for key in ("rho", "predicted"))
        fourth.plot(rho[predicted > 0], np.log10(predicted[predicted > 0]), color=colors[s])
    fourth.set(xlabel=r"signal fraction $\rho_k$", ylabel=r"$\log_{10}$ share of variance of z", ylim=(-5, None))
    for ax in (first, second, third):
        ax.set_xticks(two["epochs"])
    fourth.legend(title="augmentation", markerscale=4, loc="upper left")
    return fig


if __name__ == "__main__":
    patterns = ("linear-s0", "linear-depth2-s0", "linear-strength*-s0")
    summary.main(__file__, patterns, summarise, report, draw)
