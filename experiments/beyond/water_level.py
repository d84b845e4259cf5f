"""Where the diagnosis draws its line, in toys that leave no gap between the two mechanisms.

    python experiments/beyond/water_level.py  # train 140 networks, diagnose, save, draw: 2 minutes on one core
    python experiments/beyond/water_level.py --plot-only  # redraw from the saved result

The networks of diagnosis.py, trained with cosine similarity at temperature 1, in seven settings in which the signal
fractions of what collapses lie on both sides of 1/2 and next to those of what lives.  `collapse.diagnose` is asked with
the temperature, when its line is the water level of the fractions that it measures, and without, when it is 1/2.
What took a direction is known by two controls of the same seeds: collapsed without the noise and not with an even
start, it is implicit; the other way round, augmentation; where both or neither collapse there is no one answer.

weak, medium     one layer, 400 steps; noise of standard deviation 0.6 to 0.8, and 0.8 to 0.95, on 4 to 8 coordinates
spread, cut      one layer, 400 steps and 160; noise from 0.1 to 1.5, evenly over the coordinates
even 0.9, 1.5    three layers, 2,000 steps; the same noise on all coordinates, 4 to 6 of them from a small start
both             three layers, 2,000 steps; noise from 0.1 to 1.5 and 4 to 6 coordinates from a small start

Writes water_level.npz: confusion (7, 2, 2, 2), setting by line (level, 1/2) by truth by answer (augmentation,
implicit), of the directions that truth and diagnosis both give to a mechanism; either (7,), how many collapsed ones
have no one answer; lines (7, seeds), the water level; fractions, truth, setting, line and undecided by the number of
images, (k,).
"""

from typing import Any

import numpy as np
import torch
from diagnosis import DIM, THRESHOLD, Noise, answers, network, variances
from numpy.typing import NDArray
from scipy.stats import ortho_group

import collapse
from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.theory import Descent, GaussianViews, sgd

MECHANISMS = ("augmentation", "implicit")
TEMPERATURE = 1.0
# Name: depth, steps, least and largest noise, whether on some coordinates alone, whether some start small.
SETTINGS = {
    "weak": (1, 400, 0.6, 0.8, True, False),
    "medium": (1, 400, 0.8, 0.95, True, False),
    "spread": (1, 400, 0.1, 1.5, False, False),
    "cut": (1, 160, 0.1, 1.5, False, False),
    "even 0.9": (3, 2000, 0.9, 0.9, False, True),
    "even 1.5": (3, 2000, 1.5, 1.5, False, True),
    "both": (3, 2000, 0.1, 1.5, False, True),
}


def coordinates(name: str, seed: int) -> tuple[NDArray, NDArray]:
    """(start of the product, standard deviation of the noise) of each coordinate, (16,) each."""
    _, _, low, high, some, small = SETTINGS[name]
    rng = np.random.default_rng([list(SETTINGS).index(name), seed])
    start, noise = rng.uniform(0.25, 0.35, DIM), rng.permutation(np.linspace(low, high, DIM))
    if some:
        noise[rng.permutation(DIM)[rng.integers(4, 9) :]] = 0.1
    if small:
        start[rng.permutation(DIM)[: rng.integers(4, 7)]] = rng.uniform(0.003, 0.02)
    return start, noise


def train(name: str, start: NDArray, noise: NDArray, seeds: list[int]) -> list[NDArray]:
    """The layers, each (runs, 16, 16), from a little beside diagonal ones."""
    depth, steps, *_ = SETTINGS[name]
    root = np.sqrt(start ** (1 / depth))
    beside = [[0.01 * np.random.default_rng([seed, layer]).standard_normal((DIM, DIM)) for seed in seeds]
              for layer in range(depth)]  # fmt: skip
    layers = [root[:, :, None] * root[:, None, :] * (np.eye(DIM) + np.stack(one)) for one in beside]
    descent = Descent(0.02, steps, batch=64, temperature=TEMPERATURE, similarity="cosine")
    return [W[-1] for W in sgd(layers, GaussianViews(np.ones_like(noise), noise), seeds, descent, [steps])]


def truths(name: str, start: NDArray, noise: NDArray, seeds: list[int]) -> tuple[list[NDArray], NDArray]:
    """(layers, what took each coordinate (runs, 16)): "alive", a mechanism, or "either"."""
    layers = train(name, start, noise, seeds)
    quiet, even = np.full_like(noise, 0.1), np.where(start < 0.1, 0.3, start)
    controls = [(layers, noise), (train(name, start, quiet, seeds), quiet), (train(name, even, noise, seeds), noise)]
    dead, implicit, augmentation = (
        v < THRESHOLD * v.max(1, keepdims=True) for v in (variances(of, added) for of, added in controls)
    )
    told = np.select([implicit & ~augmentation, augmentation & ~implicit], ["implicit", "augmentation"], "either")
    return layers, np.where(dead, told, "alive")


def asked(layers: list[NDArray], noise: NDArray, seed: int, images: int) -> tuple[NDArray, NDArray, NDArray, float]:
    """(causes, signal fractions, whether undecided, line) of the 16 coordinates of one network, by the water level."""
    rng = np.random.default_rng([seed, 5])
    rotations = ortho_group.rvs(DIM, size=len(layers) + 1, random_state=rng)
    x = torch.as_tensor(rng.standard_normal((images, DIM))).float()
    diagnosis = collapse.diagnose(
        network(layers, rotations, False, seed), x, views=4, augmentations=[Noise(rotations[0] * noise)],
        threshold=THRESHOLD, temperature=TEMPERATURE, seed=seed, batch_size=4096,
    )  # fmt: skip
    found, line = diagnosis.blocks[-1].attribution, diagnosis.provenance["line"]
    made = rotations[0]
    for k, W in enumerate(layers):
        made = rotations[k + 1] @ W @ rotations[k].T @ made
    causes, fractions = answers(found, made * np.sqrt(1 + noise**2), False)
    thin = np.isin(fractions, found.fractions[found.undecided])
    return causes, fractions, thin, float(line)


def simulate(seed: int = 0, seeds: int = 20, images: int = 2048) -> tuple[Meta, Arrays]:
    """All settings."""
    chosen = list(range(seed, seed + seeds))
    confusion, lines = np.zeros((len(SETTINGS), 2, 2, 2), int), np.zeros((len(SETTINGS), seeds))
    either = np.zeros(len(SETTINGS), int)
    kept: list[tuple[float, str, int, float, bool]] = []
    for at, name in enumerate(SETTINGS):
        start, noise = (np.stack(a) for a in zip(*(coordinates(name, k) for k in chosen), strict=True))
        layers, truth = truths(name, start, noise, chosen)
        either[at] = (truth == "either").sum()
        for k in range(seeds):
            causes, fractions, open_, lines[at, k] = asked([W[k] for W in layers], noise[k], chosen[k], images)
            use = np.isin(truth[k], MECHANISMS) & np.isin(causes, MECHANISMS)
            for which, line in enumerate((lines[at, k], 0.5)):
                answer = np.where(fractions < line, *MECHANISMS)
                for row, column in np.ndindex(2, 2):
                    hit = (truth[k] == MECHANISMS[row]) & (answer == MECHANISMS[column]) & use
                    confusion[at, which, row, column] += hit.sum()
            kept += [(fractions[c], truth[k, c], at, lines[at, k], open_[c]) for c in np.flatnonzero(use)]
    columns = [np.array(column) for column in zip(*kept, strict=True)]
    arrays = dict(zip(("fractions", "truth", "setting", "line", "undecided"), columns, strict=True))
    right = confusion[:, :, [0, 1], [0, 1]].sum((0, 2))
    meta = {"settings": list(SETTINGS), "right": right.tolist(), "directions": int(confusion[:, 0].sum())}
    return meta, {"confusion": confusion, "either": either, "lines": lines, **arrays}


def report(meta: Meta, arrays: Arrays) -> str:
    level, half = meta["right"]
    open_ = arrays["undecided"]
    hit = (arrays["fractions"] < arrays["line"]) == (arrays["truth"] == MECHANISMS[0])
    lines = [
        f"of {meta['directions']} directions rightly attributed: {level} by the water level, {half} by 1/2",
        f"{open_.sum()} of them undecided by the number of images, of the others {(hit & ~open_).sum()} right;"
        f" {arrays['either'].sum()} more have no one answer",
    ]
    for at, (name, table, drawn) in enumerate(zip(meta["settings"], arrays["confusion"], arrays["lines"], strict=True)):
        right = table[:, [0, 1], [0, 1]].sum(1)
        left, levels = open_[arrays["setting"] == at].sum(), f"{drawn.min():.2f} to {drawn.max():.2f}"
        shown = f"{table[0].sum():>5} directions, right {right[0]:>4} and {right[1]:>4}"
        lines.append(f"  {name:<10}{shown}; {left:>3} undecided; level {levels}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Signal fraction over the water level of its network, a row a setting."""
    fig, ax = plots.figure(plots.TEXT, 2.8)
    rng = np.random.default_rng(0)
    for cause in MECHANISMS:
        use = arrays["truth"] == cause
        y = arrays["setting"][use] + rng.uniform(-0.3, 0.3, use.sum())
        ax.plot((arrays["fractions"] - arrays["line"])[use], y, ".", color=plots.CAUSE_COLORS[cause], label=cause)
    ax.axvline(0, color="0.3")
    ax.set(
        xlabel="signal fraction less the water level of its network; dotted: 1/2",
        yticks=range(len(meta["settings"])),
        yticklabels=meta["settings"],
    )
    for at, drawn in enumerate(arrays["lines"]):
        ax.plot([0.5 - drawn.mean()] * 2, [at - 0.4, at + 0.4], ":", color="0.3")
    ax.invert_yaxis()
    ax.legend(title="truth")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
