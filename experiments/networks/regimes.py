"""Where does the paper's picture hold?  One setting changed at a time: rank and accuracy with and without a projector.

    python experiments/networks/regimes.py  # from the runs that are there; --data trains the rest

The paper finds that without a projector the representation has the lower rank.  Every run here is short, trains on two
fifths of the training images and is tested on another fifth, so the same runs serve to choose temperature, learning
rate and strength of augmentation, for all heads alike, by the probe's mean accuracy over four heads.  The runs in the
paper's own regime change much at once and are tested on the test images; those with weaker views differ from them in
the views alone.  Those and the runs with crops from less of the area have three seeds, and tell what stronger views do.

Writes experiments/results/regimes.json (settings: name, seeds, ln_ratio of the ranks of none and mlp at the end, and
for either head lists over the seeds: effective_rank, one an epoch, probe_top1, probe_interval and
collapsed_dimensions_1e-03 at the end; choice: setting -> head -> probe_top1; views: of each group of settings that
differ in the views alone, rows, ln_ratio over seeds, and the claims that they differ) and figures/regimes.png and .pdf.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import study
import summary
from numpy.typing import NDArray
from scipy import stats

from collapse import plots
from collapse.experiment import Meta

VIEWS = (("paper", "paper-weak"), tuple(f"crop-{value:g}" for value in study.CROPS))
WHOLE = {"base": "as the preset", "paper": "paper's regime", "paper-weak": "its views weaker"}
TITLES = {
    "temperature": r"$\tau$",
    "crop": "crops from",
    "lr": "learning rate ×",
    "strength": "augmentation ×",
    "stem": "first convolution",
    "epochs": "epochs ×",
    "batch_size": "batch ×",
    "width": "width ×",
    "weight_decay": "weight decay ×",
}


def summarise(runs: summary.Runs) -> Meta:
    """Both orderings at every setting, and the table by which values are chosen."""
    settings: dict[str, Meta] = {}
    choice: dict[str, Meta] = {}
    for name, (meta, _) in runs.items():
        head, setting = name.removeprefix("choice-").removeprefix("map-").split("-", 1)
        if name.startswith("choice-"):
            choice.setdefault(setting, {})[head] = meta["probe_top1"]
        if head in ("none", "mlp"):
            of = settings.setdefault(re.sub(r"-s\d$", "", setting), {"none": {}, "mlp": {}})[head]
            of[meta["config"]["seed"]] = {
                "effective_rank": [line["effective_rank"] for line in meta["curve"]],
                "probe_top1": meta["probe_top1"],
                "probe_interval": meta["probe_interval"],
                "collapsed_dimensions_1e-03": meta["metrics"]["collapsed_dimensions_1e-03"],
            }
    found = [one for name, heads in settings.items() if (one := together(name, heads))]
    chosen = {setting: h for setting, h in choice.items() if set(study.FOUR) <= set(h)}
    return {"settings": found, "choice": chosen, "views": [compared(found, names) for names in VIEWS]}


def together(name: str, heads: Meta) -> Meta:
    """A setting: lists over the seeds that both heads have; empty without one."""
    seeds = sorted(set(heads["none"]) & set(heads["mlp"]))
    if not seeds:
        return {}
    lists = {head: {key: [of[seed][key] for seed in seeds] for key in of[seeds[0]]} for head, of in heads.items()}
    return {"setting": name, "seeds": seeds, "ln_ratio": list(ln_ratios(lists)[:, -1]), **lists}


def ln_ratios(one: Meta) -> NDArray:
    """(seeds, epochs): ln of the effective rank without a projector over that with two layers."""
    none, mlp = (np.log(one[head]["effective_rank"]) for head in ("none", "mlp"))
    return none - mlp


def compared(settings: Sequence[Meta], names: Sequence[str]) -> Meta:
    """What views do to the ratio of the ranks, over seeds, all else equal."""
    rows = [{"name": one["setting"], "ln_ratio": one["ln_ratio"]} for one in settings if one["setting"] in names]
    return {"rows": rows, "claims": summary.claims(rows, "ln_ratio")}


def report(found: Meta) -> str:
    """Two tables, the map and the choice; then what views do."""
    lines = [
        f"{'setting':<16}{'seeds':>6}{'rank none':>11}{'rank mlp':>10}{'probe none':>12}{'probe mlp':>11}"
        "   lower rank without?"
    ]
    for one in found["settings"]:
        ranks = [np.mean([curve[-1] for curve in one[head]["effective_rank"]]) for head in ("none", "mlp")]
        probes = [100 * np.mean(one[head]["probe_top1"]) for head in ("none", "mlp")]
        lower = sum(value < 0 for value in one["ln_ratio"])
        lines.append(
            f"{one['setting']:<16}{len(one['seeds']):>6}{ranks[0]:>11.1f}{ranks[1]:>10.1f}{probes[0]:>12.1f}"
            f"{probes[1]:>11.1f}   in {lower} of {len(one['seeds'])}"
        )
    lines.append(f"\n{'probe, %':<20}" + "".join(f"{head:>11}" for head in (*study.FOUR, "mean")))
    for setting, heads in sorted(found["choice"].items(), key=lambda item: -np.mean(list(item[1].values()))):
        shown = [*(heads[head] for head in study.FOUR), np.mean(list(heads.values()))]
        lines.append(f"{setting:<20}" + "".join(f"{100 * value:>11.1f}" for value in shown))
    for group in found["views"]:
        for row in group["rows"]:
            values = ", ".join(f"{value:+.2f}" for value in row["ln_ratio"])
            lines.append(f"ln ratio of the ranks, {row['name']}: {values}")
        for one in group["claims"]:
            low, high = one["interval"]
            about = f"difference {one['difference']:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}, p = {one['p']:.2g}"
            lines.append(f"{one['above']} above {one['below']}: {about}")
    return "\n".join(lines)


def title(one: Meta) -> str:
    """A setting as the figure names it, and its seeds where they are several."""
    setting, seeds = one["setting"], len(one["seeds"])
    axis, _, value = setting.rpartition("-")
    name = WHOLE[setting] if setting in WHOLE else f"{TITLES[axis]} {value}"
    return f"{name}, {seeds} seeds" if seeds > 1 else name


def half_width(values: NDArray) -> float:
    """Of the 95 % interval of a mean, by Student's t; 0 for one value."""
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else 0.0


def draw(found: Meta) -> Any:
    """Ratio of the ranks at each epoch, pale to dark, and difference of the accuracies, a line a setting."""
    settings = found["settings"][::-1]
    fig, axes = plots.figure(plots.TEXT, 0.85 + 0.2 * len(settings), columns=2, sharey=True)
    for y, one in enumerate(settings):
        ratios = ln_ratios(one)
        means = np.exp(ratios.mean(0))
        half = half_width(ratios[:, -1])
        axes[0].plot(means[-1] * np.exp([-half, half]), [y, y], color="C0", linewidth=1)
        shades = np.linspace(1, 0.2, len(means))[::-1]
        axes[0].scatter(means, np.full(len(means), y), c=shades, cmap="Blues", vmin=0, vmax=1, s=14, edgecolor="none")
        gains = 100 * (np.array(one["mlp"]["probe_top1"]) - one["none"]["probe_top1"])
        of_images = np.hypot(*(50 * np.diff(one[head]["probe_interval"][0])[0] for head in ("mlp", "none")))
        error = half_width(gains) if len(gains) > 1 else of_images
        axes[1].errorbar(gains.mean(), y, xerr=error, fmt="o", color="C0", markersize=4)
    axes[0].axvline(1, color="0.5", linewidth=0.8)
    axes[1].axvline(0, color="0.5", linewidth=0.8)
    axes[0].set(
        xscale="log", yticks=range(len(settings)), xlim=(0.25, 5),
        xlabel="effective rank, no projector / 2-layer\npale to dark: epochs; line: 95 % over seeds",
        yticklabels=[title(one) for one in settings],
    )  # fmt: skip
    axes[0].set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes[0].minorticks_off()
    axes[0].set_title(r"$\leftarrow$ the paper's order", loc="left")
    axes[1].set(xlabel="probe top-1, 2-layer less none, points\n95 % over seeds or, of one, test images")
    axes[1].set_title(r"the paper's order $\rightarrow$", loc="right")
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("choice-*", "map-*", "*-paper-*"), summarise, report, draw)
