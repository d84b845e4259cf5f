"""What predicts the probe's accuracy: rank alone, signal fraction alone, or both?  All runs of the tables.

    python experiments/networks/predictors.py  # from the runs that are there; --data trains the rest

Rank is the effective rank of the representation's spectrum; signal fraction the share of its variance that is between
images, not between the views of one; both: LiDAR, which is the rank of what the signal adds over the augmentation, and
least squares on the two logarithms, each run predicted from those of other settings.

The seeds of one setting are not independent: whole settings are drawn for the bootstrap, and left out together.
Temperature and stem move accuracy and rank together, so rho is also taken among the heads of each regime of summary.py,
which are too few for an interval.

Writes experiments/results/predictors.json (runs: name, regime, probe_top1 and each predictor; correlations: predictor
-> Spearman's rho and its bootstrap 95 % interval, of all runs; gain: rho of both less that of rank alone, and its
interval; within: regime -> predictor -> rho, and settings, their number) and figures/predictors.png and .pdf.
"""

from typing import Any

import numpy as np
import study
import summary
from numpy.typing import NDArray
from scipy import stats

from collapse import InputError, plots
from collapse.experiment import Meta

TITLES = {
    "effective_rank": "effective rank",
    "signal_fraction": "signal fraction",
    "lidar": "LiDAR",
    "both": "predicted of both, %",
}


def left_out(x: NDArray, y: NDArray, groups: NDArray) -> NDArray:
    """Least squares of y (n,) on x (n, p) and a constant; each entry predicted from those of other groups (n,)."""
    design, found = np.column_stack([np.ones(len(x)), x]), np.empty(len(y))
    for group in np.unique(groups):
        own = groups == group
        found[own] = design[own] @ np.linalg.lstsq(design[~own], y[~own])[0]
    return found


def rhos(columns: dict[str, NDArray], y: NDArray) -> dict[str, float]:
    """Spearman's rho of each column with y: the correlation of the ranks."""
    ranks = stats.rankdata([*columns.values(), y], axis=1)
    return dict(zip(columns, np.corrcoef(ranks)[-1, :-1].tolist(), strict=True))


def correlations(columns: dict[str, NDArray], y: NDArray, groups: NDArray, seed: int) -> Meta:
    """rho of each column with y, and how much that of both exceeds that of rank, with percentile intervals.

    2,000 bootstrap samples of whole groups.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(2000):
        rows = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        drawn.append(rhos({key: column[rows] for key, column in columns.items()}, y[rows]))
    values = {key: (rho, np.array([one[key] for one in drawn])) for key, rho in rhos(columns, y).items()}
    (both, boths), (rank, ranks) = values["both"], values["effective_rank"]
    values["gain"] = both - rank, boths - ranks
    return {key: {"rho": rho, "interval": np.nanquantile(some, [0.025, 0.975])} for key, (rho, some) in values.items()}


def summarise(runs: summary.Runs) -> Meta:
    """Predictors and accuracy of every run."""
    own = {name: meta for name, (meta, _) in runs.items() if not name.startswith(study.CHOOSING)}
    metas = {name: meta | meta["metrics"] for name, meta in own.items()}
    keys = ("effective_rank", "signal_fraction", "lidar")
    metas = {name: meta for name, meta in metas.items() if not np.isnan([summary.known([meta], k) for k in keys]).any()}
    settings = np.array([name.rpartition("-")[0] for name in metas])
    if len(set(settings)) < 5:
        raise InputError(f"{len(set(settings))} settings are too few for a correlation; give --data to train more")
    columns = {key: np.array([meta[key] for meta in metas.values()]) for key in (*keys, "probe_top1")}
    logs = np.log(np.column_stack([columns["effective_rank"], columns["signal_fraction"]]))
    columns["both"] = 100 * left_out(logs, columns["probe_top1"], settings)
    regimes = np.array([summary.REGIMES[study.FINE * (study.FINE in n) + study.HOT * (study.HOT in n)] for n in metas])
    rows = [
        {"name": name, "regime": regimes[i]} | {key: values[i] for key, values in columns.items()}
        for i, name in enumerate(metas)
    ]

    top1, x = columns["probe_top1"], {key: columns[key] for key in TITLES}
    found = correlations(x, top1, settings, 0)
    names = [setting.removesuffix(study.HOT).removesuffix(study.FINE) for setting in settings.tolist()]
    heads, within = np.isin(names, list(study.HEADS)), {}
    for regime in dict.fromkeys(regimes.tolist()):
        own = heads & (regimes == regime)
        within[regime] = rhos({key: column[own] for key, column in x.items()}, top1[own])
        within[regime] |= {"settings": len(set(settings[own]))}
    return {"runs": rows, "gain": found.pop("gain"), "correlations": found, "within": within}


def report(found: Meta) -> str:
    """A line a predictor, of all runs; and of the heads of each regime."""
    lines = [f"Spearman's correlation with the probe's accuracy, {len(found['runs'])} runs, 95 % interval"]
    for key, one in [*found["correlations"].items(), ("gain", found["gain"])]:
        value, low, high = np.array([one["rho"], *one["interval"]], float)
        title = TITLES.get(key, "both less rank alone")
        lines.append(f"  {title:<24}{value:+.2f}  ({low:+.2f} to {high:+.2f})")
    for regime, part in found["within"].items():
        numbers = zip(TITLES, np.array([part[key] for key in TITLES], float), strict=True)
        values = ", ".join(f"{TITLES[key].partition(',')[0]} {value:+.2f}" for key, value in numbers)
        lines.append(f"{summary.spoken(regime)}, {part['settings']} heads: {values}")
    return "\n".join(lines)


FILLS = ("full", "none", "left", "bottom", "right")  # of each of summary.REGIMES, in its order here


def draw(found: Meta) -> Any:
    """A panel a predictor, a point a run: its colour and shape by head, its filling by regime."""
    fig, axes = plots.figure(plots.TEXT, 3.0, columns=len(TITLES), sharey=True)
    kinds = dict(
        zip(["none", "linear", "mlp", "directclr", "orthogonal", "diagonal", "lowrank"], "osv^D*P", strict=True)
    )
    fills = {regime: FILLS[index] for index, regime in enumerate(found["within"])}
    for ax, (key, label) in zip(axes, TITLES.items(), strict=True):
        for run in found["runs"]:
            kind = run["name"].split("-")[0]
            how = {"color": plots.HEAD_COLORS[study.LABELS[kind]], "fillstyle": fills[run["regime"]]}
            ax.plot(run[key], 100 * run["probe_top1"], kinds[kind], markersize=4, markeredgewidth=0.8, **how)
        one = found["correlations"][key]
        value, low, high = np.array([one["rho"], *one["interval"]], float)
        ax.set(xlabel=label)
        ax.set_title(rf"$\rho$ = {value:.2f} ({low:.2f}, {high:.2f})", fontsize=7)
    axes[-1].axline((43, 43), slope=1, color="0.7", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("probe top-1, %")
    for kind, marker in kinds.items():
        label = study.LABELS[kind]
        axes[0].plot([], [], marker, color=plots.HEAD_COLORS[label], markersize=4, label=label)
    for name, fill in fills.items():
        axes[0].plot([], [], "o", color="0.4", fillstyle=fill, markersize=5, label=summary.TITLES[name])
    seeds = f"{len(found['runs'])} runs of {found['config']['epochs']} epochs, a point a seed; line: as predicted"
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, title=seeds)
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("*-s?",), summarise, report, draw)
