"""What the scripts of the study share: from the results of its runs to rows, claims, a JSON file and a figure."""

import fnmatch
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import study
from scipy import stats

from collapse import InputError, plots
from collapse.experiment import Arrays, Meta
from collapse.results import load_result, provenance, save_text, strict, to_json

Runs = dict[str, tuple[Meta, Arrays]]


def main(
    script: str,
    patterns: Sequence[str],
    summarise: Callable[[Runs], Meta],
    report: Callable[[Meta], str],
    draw: Callable[[Meta], Any],
) -> None:
    """The whole of a script that sums some runs up: results/NAME.json, a report, figures/NAME.png and .pdf.

    Runs that have no result yet are trained first, if --data is given.

    Args:
        script: the script's __file__.
        patterns: names of the runs it needs, * and ? as in a shell.
        summarise: the runs' results -> what the JSON holds, beside schema, command, versions and config.
        report: that -> the lines to print.
        draw: that -> a matplotlib figure.
    """
    name = Path(script).stem
    options = study.flags(str(sys.modules[summarise.__module__].__doc__)).parse_args()
    try:
        results, _ = study.where(options)
        usual = results == study.RESULTS
        configs = study.plan(options.preset, options.epochs)
        names = [run for run in configs if any(fnmatch.fnmatchcase(run, pattern) for pattern in patterns)]
        study.queue(names, options)
        found = summarise({run: load_result(results / f"{run}.npz") for run in names})
        config = configs[names[0]].as_dict()
        document = strict({"schema": "collapse.study/1", **found, "config": config, **provenance()})
        save_text((study.RESULTS.parent if usual else results.parent) / f"{name}.json", to_json(document))
        print(report(document))
        with plots.style():
            figure = draw(document)
        plots.save_figure(figure, (study.RESULTS.parents[1].parent / "figures" if usual else results.parent) / name)
    except InputError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def rows(runs: Runs, heads: Sequence[str], count: int) -> list[Meta]:
    """A row of a table for each head, lists over its first `count` seeds."""
    found = []
    for head in heads:
        metas = [meta for seed in range(count) if (meta := runs.get(f"{head}-s{seed}", ({}, {}))[0])]
        ranks = [meta["metrics"] for meta in metas]
        found.append(
            {
                "method": metas[0]["config"]["method"],
                "head": head,
                "seeds": [meta["config"]["seed"] for meta in metas],
                "dim": metas[0]["config"]["dim"],
                **{
                    key: [meta[key] for meta in metas] for key in ("probe_top1", "knn_top1", "signal_fraction", "lidar")
                },
                **{key: [rank[key] for rank in ranks] for key in RANKS},
            }
        )
    return found


RANKS = ("effective_rank", "collapsed_dimensions", "collapsed_dimensions_1e-03")
COLUMNS = {"probe_top1": "probe %", "knn_top1": "kNN %", "effective_rank": "effective rank", RANKS[2]: "below 1e-3"}


def claims(table: Sequence[Meta], key: str = "probe_top1") -> list[Meta]:
    """Each pair of rows whose means differ, the better first: difference, 95 % interval, p of Welch's t over seeds.

    p is Holm's, corrected for the number of pairs.
    """
    pairs = []
    for one, two in combinations(table, 2):
        high, low = sorted((one, two), key=lambda row: -np.mean(row[key]))
        test = stats.ttest_ind(high[key], low[key], equal_var=False)
        interval = list(test.confidence_interval())
        difference = float(np.mean(high[key]) - np.mean(low[key]))
        pairs.append(
            {
                "above": high["head"],
                "below": low["head"],
                "difference": difference,
                "interval": interval,
                "p": float(test.pvalue),
            }
        )
    largest = 0.0
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair["p"])):
        largest = max(largest, min(1.0, pair["p"] * (len(pairs) - rank)))
        pair["p"] = largest
    return pairs


def table_text(table: Sequence[Meta]) -> str:
    """Mean and standard deviation over seeds, a line a row."""
    lines = [f"{'head':<20}{'seeds':>6}" + "".join(f"{title:>18}" for title in COLUMNS.values())]
    for row in table:
        values = [np.array(row[key]) * (100 if "%" in title else 1) for key, title in COLUMNS.items()]
        cells = [f"{v.mean():.1f} ± {v.std(ddof=1) if len(v) > 1 else np.nan:.1f}" for v in values]
        lines.append(
            f"{study.LABELS[row['head']]:<20}{len(row['seeds']):>6}" + "".join(f"{cell:>18}" for cell in cells)
        )
    return "\n".join(lines)


def claims_text(pairs: Sequence[Meta]) -> str:
    """A line a pair."""
    return "\n".join(
        f"{study.LABELS[c['above']]} above {study.LABELS[c['below']]}: {100 * c['difference']:+.1f} points, "
        f"95 % interval {100 * c['interval'][0]:+.1f} to {100 * c['interval'][1]:+.1f}, p = {c['p']:.2g} "
        f"({'backed' if c['p'] < 0.05 else 'not backed'})"
        for c in pairs
    )


def draw_table(table: Sequence[Meta]) -> Any:
    """A point a seed: accuracy of the probe beside the effective rank, a line a head."""
    fig, axes = plots.figure(plots.TEXT, 0.6 + 0.32 * len(table), columns=3, sharey=True)
    shown = {
        "probe_top1": ("probe top-1, %", 100),
        "effective_rank": ("effective rank of r", 1),
        "signal_fraction": ("signal fraction of r", 1),
    }
    for ax, (key, (label, factor)) in zip(axes, shown.items(), strict=True):
        for y, row in enumerate(table[::-1]):
            values = factor * np.array(row[key])
            ax.plot(values, np.full(len(values), y), "o", color="0.6", markersize=3)
            ax.plot(values.mean(), y, "|", color="C0", markersize=12, markeredgewidth=2)
        ax.set(xlabel=label, yticks=range(len(table)), yticklabels=[study.LABELS[row["head"]] for row in table[::-1]])
        ax.margins(y=0.2)
    return fig


def spectra(script: str, heads: Sequence[str], key: str) -> None:
    """The whole of a script that draws one kind of spectrum for several heads, a band over the seeds."""

    def summarise(runs: Runs) -> Meta:
        names = {head: [f"{head}-s{seed}" for seed in range(3)] for head in heads}
        floor = max(float(arrays[key.replace("singular_values", "floor")]) for _, arrays in runs.values())
        values = {head: [runs[name][1][key] for name in of] for head, of in names.items()}
        return {"spectra": values, "floor": floor}

    def report(found: Meta) -> str:
        lines = []
        for head, values in found["spectra"].items():
            logs = np.log(np.maximum(values, found["floor"]))
            at = sorted({0, logs.shape[1] // 4, logs.shape[1] // 2, 3 * logs.shape[1] // 4, logs.shape[1] - 1})
            shown = ", ".join(f"{logs[:, k].mean():.1f}" for k in at)
            lines.append(f"{study.LABELS[head]:<20} ln of value {', '.join(str(k + 1) for k in at)}: {shown}")
        return "\n".join(lines)

    def draw(found: Meta) -> Any:
        fig, ax = plots.figure()
        plots.plot_repeated_spectra(ax, {study.LABELS[head]: np.array(v) for head, v in found["spectra"].items()})
        return fig

    main(script, [f"{head}-s[0-2]" for head in heads], summarise, report, draw)
