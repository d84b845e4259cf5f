"""`collapse diagnose` on the study's encoders, and on the network that they started from.

    python experiments/networks/network_diagnosis.py --data cifar10.zip  # a minute
    python experiments/networks/network_diagnosis.py --plot-only

2,000 test images in 4 views each, those of training; collapsed is below 1e-3 of the largest variance.  The start, of
the same seed as the others, is the control: what it shows no training has made.

Writes network_diagnosis.npz (counts (encoders, causes), of the representation; lines (encoders, 2): how many directions
augmentation would have with the line at a signal fraction of 1/3 and 2/3; ranks (encoders,): effective rank; fractions
(encoders,): median signal fraction of what is collapsed; meta: encoders, causes, verdicts) and the figure.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import study
from torch import nn

import collapse
from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.metrics.attribution import CAUSES, augmentation_at_line
from collapse.training.network import Network, save_encoder


def encoders() -> dict[str, nn.Module]:
    """The four that are stored, after the one that they started from."""
    config = study.plan(study.PRESET)["none-s0"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.safetensors"
        save_encoder(path, Network(config, 10))
        start = collapse.load(path)
    stored = {head: collapse.load(study.RESULTS / f"study/{head}.safetensors") for head in study.FOUR}
    return {"start": start, **stored}


def simulate(data: str = "cifar10.zip", seed: int = 0, threshold: float = 1e-3) -> tuple[Meta, Arrays]:
    """Diagnose each; data: as for collapse train; seed: of the images and of their views."""
    test, config = study.data_of(data, "val"), study.plan(study.PRESET)["none-s0"]
    chosen = test.subset(np.sort(np.random.default_rng(seed).permutation(len(test))[: study.SEEN]))
    how: dict[str, Any] = {"augmentations": (config.augmentation(0), config.augmentation(1)), "seed": seed}
    found: dict[str, list[Any]] = {name: [] for name in ("counts", "lines", "ranks", "fractions")}
    names, verdicts = [], []
    for name, net in encoders().items():
        pixels = chosen.batches(config.preprocessing(), 64, 0)
        diagnosis = collapse.diagnose(net, pixels, views=study.VIEWS, threshold=threshold, **how)
        block = next(block for block in diagnosis.blocks if block.layer == "representation")
        found["counts"].append(list(block.attribution.counts().values()))
        lines = augmentation_at_line(block.attribution)
        found["lines"].append([lines["1/3"], lines["2/3"]])
        found["ranks"].append(block.spectrum.metrics()["effective_rank"])
        collapsed = block.attribution.fractions[block.attribution.collapsed()]
        found["fractions"].append(np.median(collapsed) if len(collapsed) else np.nan)
        names.append(name)
        verdicts.append(diagnosis.verdict)
    arrays = {name: np.array(values) for name, values in found.items()}
    return {"encoders": names, "causes": CAUSES, "verdicts": verdicts, "config": {"data": Path(data).name}}, arrays


def title(name: str) -> str:
    """An encoder as the figure names it."""
    return "the start" if name == "start" else study.LABELS[name]


def report(meta: Meta, arrays: Arrays) -> str:
    """A line an encoder."""
    lines = [
        f"{'':<20}" + "".join(f"{cause:>14}" for cause in CAUSES) + f"{'1/3, 2/3':>12}{'eff. rank':>11}{'median':>8}"
    ]
    for k, name in enumerate(meta["encoders"]):
        counts = "".join(f"{count:>14}" for count in arrays["counts"][k])
        other = "{}, {}".format(*arrays["lines"][k])
        lines.append(f"{title(name):<20}{counts}{other:>12}{arrays['ranks'][k]:>11.1f}{arrays['fractions'][k]:>8.2f}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Bars of the counts, with the number alive, the start apart from what was trained from it."""
    fig, ax = plots.figure(plots.COLUMN, 3.2)
    names = [title(name) for name in meta["encoders"]]
    counts = dict(zip(CAUSES, arrays["counts"].T, strict=True))
    plots.plot_causes_by_depth(ax, names, counts, arrays["counts"].sum(1), arrays["ranks"])
    ax.lines[0].set_linestyle("none")
    for k, (alive, *others) in enumerate(arrays["counts"]):
        share = alive / (alive + sum(others))
        ax.annotate(f"{alive} alive", (k, share), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6)
    ax.axvline(0.5, color="0.3", linewidth=0.8, linestyle="--")
    ax.get_legend().remove()
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    ax.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=7)
    epochs = study.plan(study.PRESET)["none-s0"].epochs
    ax.set_xlabel(f"before training, and after {epochs} epochs; seed 0", fontsize=7)
    ax.set_ylabel(f"share of the {arrays['counts'][0].sum()} directions of r")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
