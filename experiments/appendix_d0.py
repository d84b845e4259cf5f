"""DirectCLR against d0, the number of entries of r that the loss sees (the paper's appendix), one seed each.

    python experiments/appendix_d0.py                             # from the runs that are there; --data trains the rest

Writes experiments/results/appendix_d0.json (rows as in table1.json, with dim) and figures/appendix_d0.png and .pdf.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from collapse import InputError, plots
from collapse.experiment import Meta

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary


def summarise(runs: summary.Runs) -> Meta:
    """A row each d0, and accuracy of no projector at all for comparison, seed 0."""
    d0 = {meta["config"]["dim"]: name for name, (meta, _) in runs.items() if name.startswith("directclr")}
    if not d0:
        raise InputError("no run of DirectCLR; give --data to train them")
    metas = [runs[d0[dim]][0] for dim in sorted(d0)]
    keys = ("probe_top1", "probe_interval", "knn_top1", "signal_fraction")
    rows = [
        {"method": "directclr", "head": "none", "seeds": [0], "dim": dim}
        | {key: [meta[key]] for key in keys}
        | {key: [meta["metrics"][key]] for key in summary.RANKS}
        for dim, meta in zip(sorted(d0), metas, strict=True)
    ]
    return {"rows": rows, "none": runs["none-s0"][0]["probe_top1"], "width": len(runs["none-s0"][1]["singular_values"])}


def report(found: Meta) -> str:
    """A line each d0."""
    lines = [
        f"d0 = {row['dim']:>4}: probe {100 * row['probe_top1'][0]:.1f} %, effective rank {row['effective_rank'][0]:.1f}"
        for row in found["rows"]
    ]
    return "\n".join([*lines, f"no projector: probe {100 * found['none']:.1f} %"])


def draw(found: Meta) -> Any:
    """Accuracy with its interval, and rank, against d0."""
    fig, axes = plots.figure(plots.TEXT, 2.3, columns=2)
    d0 = [row["dim"] for row in found["rows"]]
    top1 = 100 * np.array([row["probe_top1"][0] for row in found["rows"]])
    interval = 100 * np.array([row["probe_interval"][0] for row in found["rows"]])
    axes[0].errorbar(d0, top1, abs(interval - top1[:, None]).T, fmt="o-", label="DirectCLR, 95 % interval")
    axes[0].axhline(100 * found["none"], color="0.5", linestyle="--", label="no projector")
    axes[0].set(ylabel="probe top-1, %")
    axes[0].legend(loc="lower right")
    axes[1].plot(d0, [row["effective_rank"][0] for row in found["rows"]], "o-")
    axes[1].set(ylabel="effective rank of r")
    for ax in axes:
        ax.set(xlabel=f"$d_0$, of {found['width']} entries", xscale="log", xticks=d0, xticklabels=d0)
        ax.minorticks_off()
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("directclr-s0", "directclr-d*-s0", "none-s0"), summarise, report, draw)
