"""`collapse diagnose` on the study's encoders, on the network that they started from, and on both relaxed.

    python experiments/networks/network_diagnosis.py --data cifar10.zip  # five minutes
    python experiments/networks/network_diagnosis.py --plot-only

2,000 test images in 4 views each, those of training; collapsed is below 1e-3 of the largest variance.  The line between
the causes is that of the loss at the temperature that the encoder's file states (0.2).  The start, of the same seed as
the others, is the control: what it shows no training has made.  Relaxed: a linear map behind the start, and behind the
trunk that was trained with two layers, has been trained at that temperature as in relaxation.py, RELAXED steps.

Writes network_diagnosis.npz (counts (encoders, causes), of the representation; lines (encoders,): signal fraction of
the line; below (encoders,): how many alive lie below it; orders (encoders,): rank correlation of variance with signal
fraction; ranks (encoders,): effective rank; fractions (encoders,): median signal fraction of the alive; meta: encoders,
causes, verdicts) and the figure.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import relaxation
import study
import torch
from torch import nn

import collapse
from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.metrics.attribution import CAUSES
from collapse.models.encoder import Encoder
from collapse.training.relaxation import Relaxation, relax

RELAXED = 2000  # steps at most, and a quarter more
TITLES = {"start": "the start", "start-relaxed": "start, relaxed", "mlp-relaxed": "2-layer, relaxed"}


def relaxed(net: Encoder, trunk: str, data: str) -> Encoder:
    """The network with a linear map of its representation, trained alone without a projector."""
    views = relaxation.views_of(trunk, 0, data)
    d = views.rows.shape[-1]
    moving = Relaxation.of(views, "none", net.report["temperature"])
    relax(moving, relaxation.FIRST, RELAXED, relaxation.STILL)
    last = nn.Linear(d, d, bias=False)
    with torch.no_grad():
        last.weight.copy_(moving.W @ torch.from_numpy(views.basis).T)
    backbone = nn.Sequential(OrderedDict(trunk=net.backbone, last=last))
    return Encoder(backbone, None, net.preprocess, net.report).eval()


def simulate(data: str = "cifar10.zip", seed: int = 0, threshold: float = 1e-3) -> tuple[Meta, Arrays]:
    """Diagnose each; data: as for collapse train; seed: of the images and of their views."""
    torch.set_num_threads(1)
    test, config = study.data_of(data, "val"), study.plan(study.PRESET)["none-s0"]
    chosen = test.subset(np.sort(np.random.default_rng(seed).permutation(len(test))[: study.SEEN]))
    how: dict[str, Any] = {"augmentations": (config.augmentation(0), config.augmentation(1)), "seed": seed}
    nets = study.encoders()
    for name, trunk in (("start", "start"), ("mlp", "trained")):
        nets[f"{name}-relaxed"] = relaxed(nets[name], trunk, data)
    found: dict[str, list[Any]] = {name: [] for name in ("counts", "lines", "below", "orders", "ranks", "fractions")}
    names, verdicts = [], []
    for name, net in nets.items():
        pixels = chosen.batches(config.preprocessing(), 64, 0)
        diagnosis = collapse.diagnose(net, pixels, views=study.VIEWS, threshold=threshold, **how)
        block = next(block for block in diagnosis.blocks if block.layer == "representation")
        alive = block.attribution.fractions[block.attribution.of("alive")]
        found["counts"].append(list(block.attribution.counts().values()))
        found["lines"].append(diagnosis.provenance["line"])
        found["below"].append((alive < diagnosis.provenance["line"]).sum())
        found["orders"].append(block.signal_order())
        found["ranks"].append(block.spectrum.metrics()["effective_rank"])
        found["fractions"].append(np.median(alive))
        names.append(name)
        verdicts.append(diagnosis.verdict)
    arrays = {name: np.array(values) for name, values in found.items()}
    return {"encoders": names, "causes": CAUSES, "verdicts": verdicts, "config": {"data": Path(data).name}}, arrays


def title(name: str) -> str:
    """An encoder as the figure names it."""
    return TITLES[name] if name in TITLES else study.LABELS[name]


def report(meta: Meta, arrays: Arrays) -> str:
    """A line an encoder."""
    heads = (("line", 7), ("alive below", 13), ("order", 7), ("eff. rank", 11), ("median", 8))
    lines = [f"{'':<18}" + "".join(f"{of:>13}" for of in CAUSES) + "".join(f"{name:>{n}}" for name, n in heads)]
    for k, name in enumerate(meta["encoders"]):
        counts = "".join(f"{count:>13}" for count in arrays["counts"][k])
        line, below, order, rank, median = (arrays[of][k] for of in ("lines", "below", "orders", "ranks", "fractions"))
        lines.append(f"{title(name):<18}{counts}{line:>7.2f}{below:>13}{order:>7.2f}{rank:>11.1f}{median:>8.2f}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Bars of the counts, over them the number alive and the rank correlation; start and relaxed ones apart."""
    fig, ax = plots.figure(plots.TEXT, 3.2)
    names = [title(name) for name in meta["encoders"]]
    counts = dict(zip(CAUSES, arrays["counts"].T, strict=True))
    plots.plot_causes_by_depth(ax, names, counts, arrays["counts"].sum(1), arrays["ranks"])
    ax.lines[0].set_linestyle("none")
    for k, (alive, *others) in enumerate(arrays["counts"]):
        share = alive / (alive + sum(others))
        told = f"{alive} alive\norder {arrays['orders'][k]:.2f}"
        ax.annotate(told, (k, share), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6)
    for at in (0.5, len(study.FOUR) + 0.5):
        ax.axvline(at, color="0.3", linewidth=0.8, linestyle="--")
    ax.get_legend().remove()
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    ax.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=7)
    epochs = study.plan(study.PRESET)["none-s0"].epochs
    about = f"before training, after {epochs} epochs, and with the last map alone relaxed; seed 0"
    ax.set_xlabel(f"{about}\norder: rank correlation of variance with signal fraction", fontsize=7)
    ax.set_ylabel(f"share of the {arrays['counts'][0].sum()} directions of r")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
