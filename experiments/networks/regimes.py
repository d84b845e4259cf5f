"""Where does the paper's picture hold?  One setting changed at a time: rank and accuracy with and without a projector.

    python experiments/networks/regimes.py  # from the runs that are there; --data trains the rest

The paper finds that without a projector the representation has the lower rank.  Every run here is short, trains on two
fifths of the training images and is tested on another fifth, so the same runs serve to choose temperature, learning
rate and strength of augmentation, for all heads alike, by the probe's mean accuracy over four heads.  The runs in the
paper's own regime, a line a seed, change much at once and are tested on the test images; those with weaker views differ
from them in the views alone, so the two tell what stronger views do.

Writes experiments/results/regimes.json (settings: name, epochs, and for head none and mlp effective_rank at each epoch,
probe_top1 and collapsed_dimensions_1e-03 at the end; choice: setting -> head -> probe_top1; views: of the regime with
its own and with weaker views ln_ratio, of the ranks of none and mlp, a list over seeds, and the claim that they differ)
and figures/regimes.png and .pdf.
"""

from typing import Any

import numpy as np
import study
import summary

from collapse import plots
from collapse.experiment import Meta

TITLES = {
    "paper": "paper's regime, seed",
    "paper-weak": "its views weaker, seed",
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
            one = settings.setdefault(setting, {"setting": setting})
            one["epochs"] = [line["epoch"] for line in meta["curve"]]
            one[head] = {
                "effective_rank": [line["effective_rank"] for line in meta["curve"]],
                "probe_top1": meta["probe_top1"],
                "probe_interval": meta["probe_interval"],
                "collapsed_dimensions_1e-03": meta["metrics"]["collapsed_dimensions_1e-03"],
            }
    both = [one for one in settings.values() if {"none", "mlp"} <= set(one)]
    chosen = {setting: h for setting, h in choice.items() if set(study.FOUR) <= set(h)}
    return {"settings": both, "choice": chosen, "views": views(both)}


def ratio(one: Meta) -> float:
    """Effective rank without a projector over that with two layers, at the end."""
    return one["none"]["effective_rank"][-1] / one["mlp"]["effective_rank"][-1]


def views(settings: list[Meta]) -> Meta:
    """What the paper's views do to the ratio of the ranks, over seeds."""
    table: list[Meta] = [{"name": name, "ln_ratio": []} for name in ("paper", "paper-weak")]
    for row in table:
        row["ln_ratio"] = [np.log(ratio(one)) for one in settings if one["setting"].rpartition("-")[0] == row["name"]]
    table = [row for row in table if row["ln_ratio"]]
    return {"rows": table, "claims": summary.claims(table, "ln_ratio")}


def report(found: Meta) -> str:
    """Two tables: the map, and the choice."""
    lines = [
        f"{'setting':<20}{'rank none':>10}{'rank mlp':>10}{'probe none':>12}{'probe mlp':>11}   lower rank without?"
    ]
    for one in found["settings"]:
        none, mlp = one["none"], one["mlp"]
        ranks = [head["effective_rank"][-1] for head in (none, mlp)]
        lines.append(
            f"{one['setting']:<20}{ranks[0]:>10.1f}{ranks[1]:>10.1f}{100 * none['probe_top1']:>12.1f}"
            f"{100 * mlp['probe_top1']:>11.1f}   {'yes' if ratio(one) < 1 else 'no'}"
        )
    lines.append(f"\n{'probe, %':<20}" + "".join(f"{head:>11}" for head in (*study.FOUR, "mean")))
    for setting, heads in sorted(found["choice"].items(), key=lambda item: -np.mean(list(item[1].values()))):
        shown = [*(heads[head] for head in study.FOUR), np.mean(list(heads.values()))]
        lines.append(f"{setting:<20}" + "".join(f"{100 * value:>11.1f}" for value in shown))
    for row in found["views"]["rows"]:
        lines.append(
            f"ln ratio of the ranks, {row['name']}: " + ", ".join(f"{value:+.2f}" for value in row["ln_ratio"])
        )
    for one in found["views"]["claims"]:
        low, high = one["interval"]
        about = f"difference {one['difference']:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}, p = {one['p']:.2g}"
        lines.append(f"{one['above']} above {one['below']}: {about}")
    return "\n".join(lines)


def title(setting: str) -> str:
    """A setting as the figure names it."""
    axis, _, value = setting.rpartition("-")
    return "as the preset" if setting == "base" else f"{TITLES[axis]} {value.removeprefix('s')}"


def draw(found: Meta) -> Any:
    """Ratio of the ranks at each epoch, pale to dark, and difference of the accuracies, a line a setting."""
    settings = found["settings"][::-1]
    fig, axes = plots.figure(plots.TEXT, 0.85 + 0.2 * len(settings), columns=2, sharey=True)
    for y, one in enumerate(settings):
        ratios = np.array(one["none"]["effective_rank"]) / np.array(one["mlp"]["effective_rank"])
        shades = np.linspace(1, 0.2, len(ratios))[::-1]
        axes[0].scatter(ratios, np.full(len(ratios), y), c=shades, cmap="Blues", vmin=0, vmax=1, s=14, edgecolor="none")
        gain = 100 * (one["mlp"]["probe_top1"] - one["none"]["probe_top1"])
        half = [50 * np.diff(one[head]["probe_interval"])[0] for head in ("mlp", "none")]
        axes[1].errorbar(gain, y, xerr=np.hypot(*half), fmt="o", color="C0", markersize=4)
    axes[0].axvline(1, color="0.5", linewidth=0.8)
    axes[1].axvline(0, color="0.5", linewidth=0.8)
    axes[0].set(
        xscale="log", yticks=range(len(settings)),
        xlabel="effective rank, no projector / 2-layer\npale to dark: epoch by epoch; one seed",
        yticklabels=[title(one["setting"]) for one in settings],
    )  # fmt: skip
    axes[0].set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes[0].minorticks_off()
    axes[0].set_title(r"$\leftarrow$ the paper's order", loc="left")
    axes[1].set(xlabel="probe top-1, 2-layer less none, points\n95 % interval over test images; one seed")
    axes[1].set_title(r"the paper's order $\rightarrow$", loc="right")
    return fig


if __name__ == "__main__":
    summary.main(__file__, ("choice-*", "map-*", "*-paper-*"), summarise, report, draw)
