"""What predicts the probe's accuracy: rank alone, signal fraction alone, or both?  All runs of the tables.

    python experiments/predictors.py              # from the runs that are there; --data trains the rest

Rank is the effective rank of the representation's spectrum; signal fraction the share of its variance that is between
images, not between the views of one; both: LiDAR, which is the rank of what the signal adds over the augmentation, and
least squares on the two logarithms, each run predicted from the others.

Temperature and stem move accuracy and rank together, so the correlations are also taken within each regime of
summary.py.

Writes experiments/results/predictors.json (runs: name, regime, probe_top1 and each predictor; correlations: predictor
-> Spearman's rho and its bootstrap 95 % interval, of all runs; within: regime -> the same) and figures/predictors.png
and .pdf.
"""

from typing import Any

import numpy as np
import study
import summary
from numpy.typing import NDArray
from scipy import stats
from summary import Meta

from collapse import plots

TITLES = {
    "effective_rank": "effective rank",
    "signal_fraction": "signal fraction",
    "lidar": "LiDAR",
    "both": "both, least squares, %",
}


def left_out(x: NDArray, y: NDArray) -> NDArray:
    """Least squares of y (n,) on x (n, p) and a constant; each entry predicted from the other n - 1."""
    design = np.column_stack([np.ones(len(x)), x])
    hat = design @ np.linalg.pinv(design)
    return y - (y - hat @ y) / (1 - np.diag(hat))


def correlation(x: NDArray, y: NDArray, seed: int) -> Meta:
    """Spearman's rho with a bootstrap interval (2,000 samples, bias-corrected)."""

    def rho(a: NDArray, b: NDArray) -> float:
        return stats.spearmanr(a, b).statistic

    options = {"paired": True, "vectorized": False, "n_resamples": 2000, "rng": np.random.default_rng(seed)}
    low, high = stats.bootstrap((x, y), rho, **options).confidence_interval
    return {"rho": float(rho(x, y)), "interval": [float(low), float(high)]}


def summarise(runs: summary.Runs) -> Meta:
    """Predictors and accuracy of every run."""
    metas = {name: meta for name, (meta, _) in runs.items()}
    columns = {
        key: np.array([meta[key] for meta in metas.values()]) for key in ("signal_fraction", "lidar", "probe_top1")
    }
    columns["effective_rank"] = np.array([meta["metrics"]["effective_rank"] for meta in metas.values()])
    logs = np.log(np.column_stack([columns["effective_rank"], columns["signal_fraction"]]))
    columns["both"] = 100 * left_out(logs, columns["probe_top1"])
    regimes = np.array([summary.REGIMES[study.FINE * (study.FINE in n) + study.HOT * (study.HOT in n)] for n in metas])
    rows = [
        {"name": name, "regime": regimes[i]} | {key: values[i] for key, values in columns.items()}
        for i, name in enumerate(metas)
    ]

    def correlations(of: NDArray) -> Meta:
        return {key: correlation(columns[key][of], columns["probe_top1"][of], 0) for key in TITLES}

    within = {name: correlations(regimes == name) for name in dict.fromkeys(regimes.tolist())}
    return {"runs": rows, "correlations": correlations(regimes == regimes), "within": within}


def report(found: Meta) -> str:
    """A line a predictor, of all runs and of each regime's."""
    lines = ["Spearman's correlation with the probe's accuracy, 95 % interval"]
    parts = {"all": found["correlations"]} | {summary.spoken(name): one for name, one in found["within"].items()}
    counts = [len(found["runs"]), *(sum(run["regime"] == name for run in found["runs"]) for name in found["within"])]
    for count, (name, part) in zip(counts, parts.items(), strict=True):
        lines.append(f"{name}, {count} runs")
        for key, one in part.items():
            rho, low, high = np.array([one["rho"], *one["interval"]], float)
            lines.append(f"  {TITLES[key]:<24}{rho:+.2f}  ({low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


def draw(found: Meta) -> Any:
    """A panel a predictor, a point a run, its shape by head and its colour by regime."""
    fig, axes = plots.figure(plots.TEXT, 2.6, columns=len(TITLES), sharey=True)
    kinds = dict(
        zip(["none", "linear", "mlp", "directclr", "orthogonal", "diagonal", "lowrank"], "osv^D*P", strict=True)
    )
    colors = {name: f"C{k}" for k, name in enumerate(found["within"])}
    for ax, (key, label) in zip(axes, TITLES.items(), strict=True):
        for run in found["runs"]:
            marker, color = kinds[run["name"].split("-")[0]], colors[run["regime"]]
            ax.plot(run[key], 100 * run["probe_top1"], marker, color=color, markersize=4)
        one = found["correlations"][key]
        rho, low, high = np.array([one["rho"], *one["interval"]], float)
        ax.set(xlabel=label)
        ax.set_title(rf"$\rho$ = {rho:.2f} ({low:.2f}, {high:.2f})", fontsize=7)
    axes[0].set_ylabel("probe top-1, %")
    for kind, marker in kinds.items():
        axes[0].plot([], [], marker, color="0.4", markersize=4, label=study.LABELS[kind])
    for name, color in colors.items():
        axes[0].plot([], [], "|", color=color, markersize=8, markeredgewidth=3, label=summary.TITLES[name])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("*-s?",), summarise, report, draw)
