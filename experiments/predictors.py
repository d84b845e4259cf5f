"""What predicts the probe's accuracy: rank alone, signal fraction alone, or both?  All runs of the tables.

    python experiments/predictors.py              # from the runs that are there; --data trains the rest

Rank is the effective rank of the representation's spectrum; signal fraction the share of its variance that is between
images, not between the views of one; both: LiDAR, which is the rank of what the signal adds over the augmentation, and
least squares on the two logarithms, each run predicted from the others.

Writes experiments/results/predictors.json (runs: name, probe_top1 and each predictor; correlations: predictor ->
Spearman's rho and its bootstrap 95 % interval) and figures/predictors.png and .pdf.
"""

from typing import Any

import numpy as np
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
    rows = [{"name": name} | {key: values[i] for key, values in columns.items()} for i, name in enumerate(metas)]
    found = {key: correlation(columns[key], columns["probe_top1"], 0) for key in TITLES}
    return {"runs": rows, "correlations": found}


def report(found: Meta) -> str:
    """A line a predictor."""
    lines = [f"Spearman's correlation with the probe's accuracy, {len(found['runs'])} runs, 95 % interval"]
    for key, one in found["correlations"].items():
        rho, low, high = np.array([one["rho"], *one["interval"]], float)
        lines.append(f"{TITLES[key]:<24}{rho:+.2f}  ({low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


def draw(found: Meta) -> Any:
    """A panel a predictor, a point a run, coloured by head."""
    fig, axes = plots.figure(plots.TEXT, 2.4, columns=len(TITLES), sharey=True)
    kinds = ["none", "linear", "mlp", "directclr", "orthogonal", "diagonal", "lowrank"]
    for ax, (key, label) in zip(axes, TITLES.items(), strict=True):
        for kind, marker in zip(kinds, "osv^D*P", strict=True):
            chosen = [run for run in found["runs"] if run["name"].split("-")[0] == kind]
            x, y = ([run[name] for run in chosen] for name in (key, "probe_top1"))
            ax.plot(x, 100 * np.array(y), marker, linestyle="", label=summary.study.LABELS[kind], markersize=4)
        one = found["correlations"][key]
        rho, low, high = np.array([one["rho"], *one["interval"]], float)
        ax.set(xlabel=label)
        ax.set_title(rf"$\rho$ = {rho:.2f} ({low:.2f}, {high:.2f})", fontsize=7)
    axes[0].set_ylabel("probe top-1, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("*-s?",), summarise, report, draw)
