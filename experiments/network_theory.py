"""The theory against a real network, at the last layers: its three statements, one row of panels.

    python experiments/network_theory.py          # from the runs that are there; --data trains the rest

Left, mechanism one: X = Sigma0 - Sigma1 (lemma 2, exact for the cosine loss too) of the representation, over training:
the share of its eigenvalues that are negative, in whose directions the head's gradient is decay.
Middle, mechanism two: two linear layers behind the network: alignment of their singular vectors and growth of their
singular values.
Right: how far augmentation shrinks directions, at four strengths: the share of the embedding's variance that each
generalised eigenvector of signal and augmentation has behind a linear head, against water-filling of its signal
fraction, t_k = tau (rho_k + mu)+ (`theory.cosine_modes`), which takes an infinite batch and Gaussian data.

Writes experiments/results/network_theory.json (negative: run -> epochs, share, weight of the negative eigenvalues;
alignment: epochs, mean of the leading 16, singular values; shrinkage: strength -> rho, measured and predicted shares,
correlation) and figures/network_theory.png and .pdf.
"""

from typing import Any

import numpy as np
import study
import summary
from scipy import stats
from summary import Meta

from collapse import plots, theory

LEADING = 16  # modes whose alignment is averaged
DEAD = 1e-4  # a share of the embedding's variance below which a mode is taken to be dead


def negative(arrays: summary.Arrays) -> Meta:
    """Count and weight of X's negative eigenvalues at each epoch, of those that are not rounding."""
    values = arrays["x_eigenvalues"]
    counted = np.abs(values) > 1e-9 * np.abs(values).max(1, keepdims=True)
    below = counted & (values < 0)
    weight = -np.where(below, values, 0).sum(1) / np.abs(values).sum(1)
    return {"epochs": arrays["epochs"], "share": below.sum(1) / counted.sum(1), "weight": weight}


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
    rank = stats.spearmanr(rho, measured).statistic
    return {"rho": rho, "measured": measured, "predicted": predicted, "dead": dead, "spearman": float(rank)}


def summarise(runs: summary.Runs) -> Meta:
    """The three parts."""
    strengths = {s: "linear-s0" if s == 1 else f"linear-strength{s:g}-s0" for s in study.STRENGTHS}
    return {
        "negative": {name: negative(runs[f"{name}-s0"][1]) for name in ("none", "linear")},
        "alignment": aligned(runs["linear-depth2-s0"][1]),
        "shrinkage": {f"{s:g}": shrunk(*runs[name]) for s, name in strengths.items()},
        "signal_fraction": {f"{s:g}": runs[name][0]["signal_fraction"] for s, name in strengths.items()},
    }


def report(found: Meta) -> str:
    """The figures behind the panels."""
    lines = []
    for name, one in found["negative"].items():
        shares = ", ".join(f"{100 * share:.0f}" for share in one["share"])
        lines.append(f"X of {study.LABELS[name]}: negative eigenvalues, % at epochs {one['epochs']}: {shares}")
    mean = ", ".join(f"{value:.2f}" for value in found["alignment"]["alignment"])
    lines.append(f"two linear layers: alignment of the leading {LEADING} modes {mean}")
    for s, one in found["shrinkage"].items():
        lines.append(
            f"augmentation x {s}: rank correlation of share with rho {one['spearman']:.2f}; modes below {DEAD:g} "
            f"of the variance {one['dead'][0]}, predicted {one['dead'][1]}, of {len(one['rho'])}"
        )
    return "\n".join(lines)


def draw(found: Meta) -> Any:
    """The three panels."""
    fig, axes = plots.figure(plots.TEXT, 2.5, columns=3)
    for name, one in found["negative"].items():
        axes[0].plot(one["epochs"], 100 * np.array(one["share"]), "o-", label=study.LABELS[name])
    axes[0].set(xlabel="epoch", ylabel="negative eigenvalues of X, %", ylim=(0, 100))
    axes[0].legend()
    two = found["alignment"]
    axes[1].plot(two["epochs"], two["alignment"], "o-", color="C2", label=f"alignment, leading {LEADING}")
    axes[1].axhline(0, color="0.8", linewidth=0.6)
    grown = np.array(two["layer2"])
    axes[1].plot(
        two["epochs"],
        np.log(grown[:, LEADING - 1] / grown[0, LEADING - 1]),
        "s-",
        color="C0",
        label=rf"$\ln$ growth, value {LEADING}",
    )
    axes[1].plot(
        two["epochs"],
        np.log(grown[:, -1] / grown[0, -1]),
        "v-",
        color="C1",
        label=rf"$\ln$ growth, value {grown.shape[1]}",
    )
    axes[1].set(xlabel="epoch", ylabel="two linear layers")
    axes[1].legend()
    for color, (s, one) in zip(plots.sequence_colors(len(found["shrinkage"])), found["shrinkage"].items(), strict=True):
        axes[2].plot(one["rho"], np.log10(one["measured"]), ".", color=color, markersize=2, label=f"× {s}")
        alive = np.array(one["predicted"]) > 0
        axes[2].plot(np.array(one["rho"])[alive], np.log10(np.array(one["predicted"])[alive]), color=color)
    axes[2].set(xlabel=r"signal fraction $\rho_k$", ylabel=r"$\log_{10}$ share of the embedding's variance")
    axes[2].legend(title="augmentation", markerscale=3)
    return fig


if __name__ == "__main__":
    patterns = ("none-s0", "linear-s0", "linear-depth2-s0", "linear-strength*-s0")
    summary.main(__file__, patterns, summarise, report, draw)
