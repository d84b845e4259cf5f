"""What the scripts of the study share: from the results of its runs to rows, claims, a JSON file and a figure."""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import study
from scipy import stats

from collapse import InputError, plots
from collapse.experiment import Arrays, Meta, ending, show
from collapse.results import load_result, provenance, save_text, strict, to_json
from collapse.results.screen import fitted
from collapse.training.relaxation import CLEAR


class Runs(dict[str, tuple[Meta, Arrays]]):
    """The results of runs by name; asking for one that is missing is an InputError.

    stored: whether they are the project's own of the preset that the relaxations are of.
    """

    stored = False

    def __missing__(self, name: str) -> tuple[Meta, Arrays]:
        raise InputError(f"run {name} is missing; give --data to train it")


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
    parser = study.flags(str(sys.modules["__main__"].__doc__))  # the script's
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there and the figure beside it")
    parser.add_argument("--plot-only", action="store_true", help="report and draw again from the saved result")
    options = parser.parse_args()
    with ending(f"{name}.py"):
        places = study.where(options)
        path = options.out or places.documents / f"{name}{places.ending}.json"
        if not options.plot_only:
            save_text(path, to_json(_document(name, patterns, summarise, options)))
        elif not path.exists():
            raise InputError(f"{path}: not there; without --plot-only it is made from the runs")
        drawn = path.with_suffix("") if options.out else places.figures / path.stem
        show([json.loads(path.read_text())], report, draw, drawn)


def _document(
    name: str, patterns: Sequence[str], summarise: Callable[[Runs], Meta], options: argparse.Namespace
) -> Meta:
    """The content of the JSON file; runs that are missing are trained, or left out with a line on stderr."""
    results = study.where(options).results
    configs = study.plan(options.preset, options.epochs, options.seed)
    names = [run for run in configs if any(fnmatch.fnmatchcase(run, pattern) for pattern in patterns)]
    if options.data is not None:
        study.queue(names, options)
    there = [run for run in names if (results / f"{run}.npz").exists()]
    if not there:
        raise InputError(f"{results}: no run of {', '.join(patterns)}; give --data to train them")
    if len(there) < len(names):
        print(f"{name}.py: {len(names) - len(there)} of {len(names)} runs are missing, left out", file=sys.stderr)
    runs = Runs({run: load_result(results / f"{run}.npz") for run in there})
    runs.stored = results == study.RESULTS / "study"
    found = summarise(runs)
    return strict({"schema": "collapse.study/1", **found, "config": configs[names[0]].as_dict(), **provenance()})


# The runs of a table at the values chosen, and where parts of the paper's picture appear; of table 2, the first two.
REGIMES = {
    "": "chosen",
    study.HOT: "temperature_0.5",
    study.FINE: "stem3",
    study.FINE + study.HOT: "stem3_temperature_0.5",
    study.PAPER: "paper",
}
TITLES = {
    "chosen": r"$\tau = 0.2$",
    "temperature_0.5": r"$\tau = 0.5$",
    "stem3": r"stem 3 × 3, $\tau = 0.2$",
    "stem3_temperature_0.5": r"stem 3 × 3, $\tau = 0.5$",
    "paper": r"paper's regime, $\tau = 0.1$",
}


def spoken(regime: str) -> str:
    """Its title for a terminal."""
    return TITLES[regime].replace(r"$\tau", "temperature").replace("$", "")


def regimes(heads: Sequence[str]) -> dict[str, str]:
    """The regimes that all of these heads are planned for."""
    return {key: name for key, name in REGIMES.items() if set(heads) <= set(study.FOUR) or key in ("", study.HOT)}


def rows(runs: Runs, heads: Sequence[str], regime: str = "") -> list[Meta]:
    """A row of a table for each name of study.HEADS, lists over its seeds; NaN for what a collapsed run leaves open."""
    found = []
    for head in heads:
        own = [runs[name] for seed in range(3) if (name := f"{head}{regime}-s{seed}") in runs]
        if not own:
            continue
        metas = [meta for meta, _ in own]
        ranks = [meta["metrics"] for meta in metas]
        about = {"name": head} | {key: metas[0]["config"][key] for key in ("method", "head", "dim", "temperature")}
        about |= {"seeds": [meta["config"]["seed"] for meta in metas]}
        found.append(
            about
            | {key: known(metas, key) for key in ("probe_top1", "knn_top1", "signal_fraction", "lidar")}
            | {key: known(ranks, key) for key in RANKS}
            | {FLOOR: [int((a["singular_values"] <= CLEAR * a["floor"]).sum()) for _, a in own]}
        )
    return found


def known(metas: Sequence[Meta], key: str) -> list[float]:
    """A value of each, NaN where it is null or absent."""
    return [np.nan if meta.get(key) is None else meta[key] for meta in metas]


RANKS = ("effective_rank", "collapsed_dimensions", "collapsed_dimensions_1e-03")
FLOOR = "at_floor"  # singular values that are not clear of the floor of rounding
COLUMNS = {
    "probe_top1": "probe %",
    "knn_top1": "kNN %",
    "effective_rank": "effective rank",
    RANKS[2]: "below 1e-3",
    FLOOR: "at the floor",
}


def claims(table: Sequence[Meta], key: str = "probe_top1") -> list[Meta]:
    """Each pair of rows whose means differ, the better first: difference, 95 % interval, p of Welch's t over seeds.

    p is Holm's, corrected for the number of pairs; the interval is that of the pair alone.  Left out are rows of one
    seed, or that do not vary, of which Welch's test says nothing.
    """
    pairs = []
    for one, two in combinations(table, 2):
        high, low = sorted((one, two), key=lambda row: -np.mean(row[key]))
        if min(len(high[key]), len(low[key])) < 2 or not min(np.std(high[key]), np.std(low[key])) > 0:
            continue
        test = stats.ttest_ind(high[key], low[key], equal_var=False)
        interval = list(test.confidence_interval())
        difference = float(np.mean(high[key]) - np.mean(low[key]))
        pairs.append(
            {
                "above": high["name"],
                "below": low["name"],
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
    lines = [("head", "seeds", *COLUMNS.values())]
    for row in table:
        values = [np.array(row[key]) * (100 if "%" in title else 1) for key, title in COLUMNS.items()]
        cells = [f"{v.mean():.1f} ± {v.std(ddof=1) if len(v) > 1 else np.nan:.1f}" for v in values]
        lines.append((study.LABELS[row["name"]], str(len(row["seeds"])), *cells))
    return fitted(lines, {"effective rank": "eff. rank", "below 1e-3": "< 1e-3", "at the floor": "at floor"})


def claims_text(pairs: Sequence[Meta], of: str, factor: float = 1) -> str:
    """A line a pair, of what is compared and times `factor`; backed is p < 0.05."""
    if not pairs:
        return ""
    lines = [(of, "difference", "95 % interval", "p", "backed")]
    for c in pairs:
        low, high = (f"{factor * end:+.1f}" for end in c["interval"])
        name = f"{study.LABELS[c['above']]} above {study.LABELS[c['below']]}"
        backed = "yes" if c["p"] < 0.05 else "no"
        lines.append((name, f"{factor * c['difference']:+.1f}", f"{low} to {high}", f"{c['p']:.2g}", backed))
    return fitted(lines, {"difference": "diff."})


def draw_tables(found: Meta) -> Any:
    """A point a seed and a bar for their mean; a row and a colour a head, in it a line and a marker a regime."""
    tables = {regime: found[regime]["rows"] for regime in TITLES if regime in found}
    names = [row["name"] for row in tables["chosen"]]
    labels = [f"{study.LABELS[row['name']]}, {len(row['seeds'])} seeds" for row in tables["chosen"]]
    fig, axes = plots.figure(plots.TEXT, 1.2 + 0.18 * len(labels) * len(tables), columns=3, sharey=True)
    shown = {
        "probe_top1": ("probe top-1, %", 100),
        "effective_rank": ("effective rank of r", 1),
        "signal_fraction": ("signal fraction of r", 1),
    }
    markers = {regime: marker for regime, marker in zip(TITLES, "os^Dv", strict=True) if regime in tables}
    for ax, (key, (label, factor)) in zip(axes, shown.items(), strict=True):
        for place, (regime, table) in enumerate(tables.items()):
            for row in table:
                values = factor * np.array(row[key], float)
                y = names.index(row["name"]) + 0.8 * ((place + 0.5) / len(tables) - 0.5)
                color = plots.HEAD_COLORS[study.LABELS[row["name"]]]
                ax.scatter(values, np.full(len(values), y), s=12, marker=markers[regime], color=color, alpha=0.4)
                ax.plot(values.mean(), y, "|", color=color, markersize=10, markeredgewidth=2)
        ax.set(xlabel=label, yticks=range(len(labels)), yticklabels=labels)
    axes[0].invert_yaxis()
    for regime, marker in markers.items():
        axes[0].scatter([], [], s=12, marker=marker, color="0.3", label=titled(found[regime]["config"], regime))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def tables(script: str, heads: Sequence[str]) -> None:
    """The whole of a script that makes a table of several heads, in each regime in which all of them were run."""

    def summarise(runs: Runs) -> Meta:
        found = {}
        for regime, name in regimes(heads).items():
            table = rows(runs, heads, regime)
            if len(table) == len(heads) or (table and not regime):
                keys = {"claims": "probe_top1", "rank_claims": "effective_rank", "collapsed_claims": RANKS[2]}
                own = [name for name in runs if name.rpartition("-s")[0] in {f"{head}{regime}" for head in heads}]
                config = runs[own[0]][0]["config"]
                found[name] = {"rows": table, "config": config} | {t: claims(table, key) for t, key in keys.items()}
        if "chosen" not in found:
            raise InputError(f"no run of {', '.join(heads)} at the values chosen; give --data to train them")
        return {"rows": found["chosen"]["rows"], **found}

    def report(found: Meta) -> str:
        parts = [(spoken(name), found[name]) for name in TITLES if name in found]
        kinds = (
            ("claims", "probe %", 100),
            ("rank_claims", "effective rank", 1),
            ("collapsed_claims", "below 1e-3", 1),
        )
        text = lambda one: (claims_text(one[key], of, factor) for key, of, factor in kinds)  # noqa: E731
        tables = ["\n".join([title, table_text(one["rows"]), *filter(None, text(one))]) for title, one in parts]
        return "\n\n".join([*tables, "p is Welch's over seeds, corrected by Holm for the pairs; backed is p < 0.05."])

    patterns = [f"{head}{regime}-s?" for head in heads for regime in regimes(heads)]
    main(script, patterns, summarise, report, draw_tables)


def relaxed(heads: Sequence[str], layer: str) -> Meta:
    """Of each temperature at which two of the heads or more were relaxed, trained trunk: head -> lists over its seeds.

    Lists: seeds, steps, values (singular values, what is not clear of the floor put there), measured and
    predicted (living directions above 1e-3 of the largest and clear of the floor).
    """
    path = study.RESULTS / "relaxation.npz"
    if not path.exists():
        return {}
    meta, arrays = load_result(path)
    found: Meta = {}
    for cell in meta["cells"]:
        if cell["trunk"] != "trained" or cell["head"] not in heads:
            continue
        one = found.setdefault(f"{cell['temperature']:g}", {}).setdefault(
            cell["head"], {"seeds": [], "steps": [], "values": [], "measured": [], "predicted": []}
        )
        values = np.maximum(arrays[f"{cell['name']}-{layer}"], CLEAR * cell["floors"][layer])
        entries = {"seeds": cell["seed"], "steps": cell["steps"], "values": values}
        for key, entry in (entries | {of: cell[of][layer] for of in ("measured", "predicted")}).items():
            one[key].append(entry)
    ordered = {t: {head: of[head] for head in heads if head in of} for t, of in found.items()}
    return {temperature: of for temperature, of in ordered.items() if len(of) > 1}


def span(numbers: Sequence[int]) -> str:
    """Least to largest, or the one there is."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def spectra(script: str, heads: Sequence[str], key: str, beside: Sequence[str] = ()) -> None:
    """The whole of a script that draws one kind of spectrum for several heads, a band over the seeds.

    Trained end to end, in each regime; before them, where the last map alone was relaxed (relaxation.py), there the
    heads of `beside` too.
    """
    layer = "z" if key.startswith("embedding") else "r"

    def summarise(runs: Runs) -> Meta:
        floor = max(float(arrays[key.replace("singular_values", "floor")]) for _, arrays in runs.values())
        found: Meta = {
            "floor": floor,
            "relaxed": relaxed((*heads, *beside), layer) if runs.stored else {},
            "configs": {},
        }
        for regime, title in REGIMES.items():
            names = {head: [f"{head}{regime}-s{seed}" for seed in range(3)] for head in heads}
            values = {head: [runs[name][1][key] for name in of if name in runs] for head, of in names.items()}
            if all(values.values()):
                found[title] = values
                found["configs"][title] = {key: runs[names[heads[0]][0]][0]["config"][key] for key in ("epochs", "lr")}
        if not found["configs"]:
            raise InputError(f"in no setting there is a run of each of {', '.join(heads)}; give --data to train them")
        return found

    patterns = [f"{head}{regime}-s[0-2]" for head in heads for regime in REGIMES]
    main(script, patterns, summarise, spectra_text, partial(draw_spectra, layer=layer))


def spectra_text(found: Meta) -> str:
    """Relaxed: how many are dead and were predicted to be; trained end to end: some values of the mean spectrum."""
    lines = []
    for temperature, of in found["relaxed"].items():
        for head, one in of.items():
            width = len(one["values"][0])
            where = f"temperature {temperature}, {study.LABELS[head]}, {span(one['steps'])} steps"
            counts = {"below 1e-3": ("measured", 0), "at the floor": ("measured", 1), "predicted": ("predicted", 1)}
            dead = {name: [width - living[k] for living in one[of]] for name, (of, k) in counts.items()}
            lines.append(f"relaxed, {where}: " + ", ".join(f"{name} {span(those)}" for name, those in dead.items()))
    for regime in (name for name in TITLES if name in found):
        for head, values in found[regime].items():
            logs = np.log(np.maximum(values, found["floor"]))
            at = [0, logs.shape[1] // 4, logs.shape[1] // 2, 3 * logs.shape[1] // 4, logs.shape[1] - 1]
            shown = ", ".join(f"{logs[:, k].mean():.1f}" for k in at)
            where = f"ln of value {', '.join(str(k + 1) for k in at)}"
            lines.append(f"{spoken(regime)}, {study.LABELS[head]}: {where}: {shown}")
    return "\n".join(lines)


def draw_spectra(found: Meta, layer: str) -> Any:
    """A panel a temperature of the relaxations, then one a regime trained end to end; layer: r or z."""
    panels = [(f"last map relaxed\n$\\tau = {t}$", of, True) for t, of in found["relaxed"].items()]
    panels += [(titled(found["configs"][name], name, "\n"), found[name], False) for name in TITLES if name in found]
    columns = len(panels) if len(panels) < 4 else (len(panels) + 1) // 2
    rows = -(-len(panels) // columns)
    shape = {"columns": columns, "rows": rows, "squeeze": False}
    fig, grid = plots.figure(plots.TEXT, 2.2 * rows + 0.3, **shape, sharex=True)
    for ax, (title, of, still) in zip(grid.flat[: len(panels)], panels, strict=True):
        values = {head: np.array(one["values"] if still else one) for head, one in of.items()}
        drawn = {study.LABELS[head]: np.maximum(one, found["floor"]) for head, one in values.items()}
        plots.plot_repeated_spectra(ax, drawn)
        for head, one in of.items() if still else ():
            color = plots.HEAD_COLORS[study.LABELS[head]]
            ax.axvline(np.mean(one["predicted"], axis=0)[1] + 0.5, color=color, linewidth=0.6)
        seeds = span([len(one) for one in values.values()])
        ax.set_title(f"{title}, {seeds} seed{'s' * (seeds != '1')}", fontsize="small")
        ax.get_legend().set_visible(False)
        ax.set(xlabel="", ylabel="")
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in grid.flat[len(panels) - columns : len(panels)]:  # also above a place that is empty
        ax.tick_params(labelbottom=True)
    fig.supxlabel("index of the singular value", fontsize="medium")
    fig.supylabel(rf"$\ln$ singular value of $\mathrm{{Cov}}({layer})$", fontsize="medium")
    legends = [ax.get_legend_handles_labels() for ax in grid.flat[: len(panels)]]
    lines = {label: line for handles, labels in legends for line, label in zip(handles, labels, strict=True)}
    thin = "thin: where theory puts the last living direction" if found["relaxed"] else None
    fig.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=4, title=thin)
    return fig


def titled(config: Meta, regime: str, between: str = ", ") -> str:
    """A regime's title with the epochs and the learning rate of its runs."""
    epochs, lr = config["epochs"], config["lr"]
    return f"{TITLES[regime]}{between}{epochs} epoch{'s' * (epochs > 1)}, lr {lr:g}"
