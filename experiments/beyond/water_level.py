"""Where the diagnosis draws its line, in toys that leave no gap between the two mechanisms.

    python experiments/beyond/water_level.py  # train 170 networks, diagnose, save, draw: 8 minutes on one core
    python experiments/beyond/water_level.py --plot-only  # redraw from the saved result

The networks of diagnosis.py, trained at temperature 1 with cosine similarity in seven settings and with the dot product
in three, in which the signal fractions of what collapses lie on both sides of 1/2 and next to those of what lives.
`collapse.diagnose` is asked with the loss, when its line is `theory.collapse_line` of the fractions that it measures,
and without, when it is 1/2.
What took a direction is known by two controls of the same seeds.  One has the same start and no noise.  The other has
the noise and nothing implicit: one layer, an even start, and steps until it is at rest.  Collapsed in the first alone,
a direction is implicit; in the second alone, augmentation's; in both or in neither there is no one answer.

weak, medium     one layer, 400 steps; noise of standard deviation 0.6 to 0.8, and 0.8 to 0.95, on 4 to 8 coordinates
spread, cut      one layer, 400 steps and 160; noise from 0.1 to 1.5, evenly over the coordinates
even 0.9, 1.5    three layers, 2,000 steps; the same noise on all coordinates, 4 to 6 of them from a small start
both             three layers, 2,000 steps; noise from 0.1 to 1.5 and 4 to 6 coordinates from a small start
dot, dot cut     one layer, 3,200 steps and 480; dot product, half as many seeds; noise from 0.1 to 6 in equal ratios
dot both         three layers, 16,000 steps; the same, and 4 to 6 coordinates from a small start

Collapsed is below 1e-2 of the largest variance, and with the dot product, which shrinks a direction in proportion to
its signal fraction and kills none, below 1e-1.

Writes water_level.npz: confusion (10, 2, 2, 2), setting by line (loss's, 1/2) by truth by answer (augmentation,
implicit), of the directions that truth and diagnosis both give to a mechanism; either (10,), how many collapsed ones
have no one answer; lines (10, seeds), the loss's, NaN where a setting has fewer seeds; fractions, truth, setting, line
and undecided by the number of images, (k,).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from diagnosis import DIM, Noise, answers, network, variances
from numpy.typing import NDArray
from scipy.stats import ortho_group

import collapse
from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance
from collapse.theory import Descent, GaussianViews, sgd

MECHANISMS = ("augmentation", "implicit")
TEMPERATURE = 1.0


class Setting(NamedTuple):
    """Layers, steps, least and largest noise; whether on some coordinates alone; whether some start small."""

    depth: int
    steps: int
    low: float
    high: float
    some: bool = False
    small: bool = False
    similarity: str = "cosine"


SETTINGS = {
    "weak": Setting(1, 400, 0.6, 0.8, some=True),
    "medium": Setting(1, 400, 0.8, 0.95, some=True),
    "spread": Setting(1, 400, 0.1, 1.5),
    "cut": Setting(1, 160, 0.1, 1.5),
    "even 0.9": Setting(3, 2000, 0.9, 0.9, small=True),
    "even 1.5": Setting(3, 2000, 1.5, 1.5, small=True),
    "both": Setting(3, 2000, 0.1, 1.5, small=True),
    "dot": Setting(1, 3200, 0.1, 6, similarity="dot"),
    "dot cut": Setting(1, 480, 0.1, 6, similarity="dot"),
    "dot both": Setting(3, 16000, 0.1, 6, small=True, similarity="dot"),
}
THRESHOLDS, RATES, BATCHES = {"cosine": 1e-2, "dot": 0.1}, {"cosine": 0.02, "dot": 0.0025}, {"cosine": 64, "dot": 256}
AT_REST = {"cosine": 2000, "dot": 3200}  # steps after which one layer stands still


def coordinates(name: str, seed: int) -> tuple[NDArray, NDArray]:
    """(start of the product, standard deviation of the noise) of each coordinate, (16,) each."""
    setting, rng = SETTINGS[name], np.random.default_rng([list(SETTINGS).index(name), seed])
    spaced = np.linspace if setting.similarity == "cosine" else np.geomspace
    start, noise = rng.uniform(0.25, 0.35, DIM), rng.permutation(spaced(setting.low, setting.high, DIM))
    if setting.some:
        noise[rng.permutation(DIM)[rng.integers(4, 9) :]] = 0.1
    if setting.small:
        start[rng.permutation(DIM)[: rng.integers(4, 7)]] = rng.uniform(0.003, 0.02)
    if setting.similarity == "dot":
        start /= np.sqrt(1 + noise**2)  # else the first steps are too long where the noise is strong
    return start, noise


def train(setting: Setting, start: NDArray, noise: NDArray, seeds: list[int]) -> list[NDArray]:
    """The layers, each (runs, 16, 16), from a little beside diagonal ones."""
    root = np.sqrt(start ** (1 / setting.depth))
    beside = [[0.01 * np.random.default_rng([seed, layer]).standard_normal((DIM, DIM)) for seed in seeds]
              for layer in range(setting.depth)]  # fmt: skip
    layers = [root[:, :, None] * root[:, None, :] * (np.eye(DIM) + np.stack(one)) for one in beside]
    kind = setting.similarity
    descent = Descent(RATES[kind], setting.steps, BATCHES[kind], TEMPERATURE, kind)
    return [W[-1] for W in sgd(layers, GaussianViews(np.ones_like(noise), noise), seeds, descent, [setting.steps])]


def truths(name: str, start: NDArray, noise: NDArray, seeds: list[int]) -> tuple[list[NDArray], NDArray]:
    """(layers, what took each coordinate (runs, 16)): "alive", a mechanism, or "either"."""
    setting, quiet = SETTINGS[name], np.full_like(noise, 0.1)
    kind = setting.similarity
    scale = np.sqrt(1 + noise**2) if kind == "dot" else np.ones_like(noise)
    even = np.where(start * scale < 0.1, 0.3 / scale, start)
    layers, rest = train(setting, start, noise, seeds), setting._replace(depth=1, steps=AT_REST[kind])
    controls = [(train(setting, start, quiet, seeds), quiet), (train(rest, even, noise, seeds), noise)]
    dead, implicit, augmentation = (
        v < THRESHOLDS[kind] * v.max(1, keepdims=True)
        for v in (variances(of, added) for of, added in [(layers, noise), *controls])
    )
    told = np.select([implicit & ~augmentation, augmentation & ~implicit], ["implicit", "augmentation"], "either")
    return layers, np.where(dead, told, "alive")


def asked(
    similarity: str, layers: list[NDArray], noise: NDArray, seed: int, images: int
) -> tuple[NDArray, NDArray, NDArray, float]:
    """(causes, signal fractions, whether undecided, line) of the 16 coordinates of one network, by its loss's line."""
    rng = np.random.default_rng([seed, 5])
    rotations = ortho_group.rvs(DIM, size=len(layers) + 1, random_state=rng)
    x = torch.as_tensor(rng.standard_normal((images, DIM))).float()
    diagnosis = collapse.diagnose(
        network(layers, rotations, False, seed), x, views=4, augmentations=[Noise(rotations[0] * noise)],
        threshold=THRESHOLDS[similarity], temperature=TEMPERATURE if similarity == "cosine" else None,
        similarity=similarity, seed=seed, batch_size=4096,
    )  # fmt: skip
    found, line = diagnosis.blocks[-1].attribution, diagnosis.provenance["line"]
    made = rotations[0]
    for k, W in enumerate(layers):
        made = rotations[k + 1] @ W @ rotations[k].T @ made
    causes, fractions = answers(found, made * np.sqrt(1 + noise**2), False)
    thin = np.isin(fractions, found.fractions[found.undecided])
    return causes, fractions, thin, float(line)


def simulate(seed: int = 0, seeds: int = 20, images: int = 8192) -> tuple[Meta, Arrays]:
    """All settings."""
    confusion, lines = np.zeros((len(SETTINGS), 2, 2, 2), int), np.full((len(SETTINGS), seeds), np.nan)
    either = np.zeros(len(SETTINGS), int)
    kept: list[tuple[float, str, int, float, bool]] = []
    for at, (name, setting) in enumerate(SETTINGS.items()):
        chosen = list(range(seed, seed + (seeds if setting.similarity == "cosine" else -(-seeds // 2))))
        start, noise = (np.stack(a) for a in zip(*(coordinates(name, k) for k in chosen), strict=True))
        layers, truth = truths(name, start, noise, chosen)
        either[at] = (truth == "either").sum()
        for k in range(len(chosen)):
            network_of = [W[k] for W in layers]
            causes, fractions, open_, lines[at, k] = asked(setting.similarity, network_of, noise[k], chosen[k], images)
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
        f"of {meta['directions']} directions rightly attributed: {level} by the loss's line, {half} by 1/2",
        f"{open_.sum()} of them undecided by the number of images, of the others {(hit & ~open_).sum()} right;"
        f" {arrays['either'].sum()} more have no one answer",
    ]
    for at, (name, table, drawn) in enumerate(zip(meta["settings"], arrays["confusion"], arrays["lines"], strict=True)):
        right = table[:, [0, 1], [0, 1]].sum(1)
        left, levels = open_[arrays["setting"] == at].sum(), f"{np.nanmin(drawn):.2f} to {np.nanmax(drawn):.2f}"
        shown = f"{table[0].sum():>5} directions, right {right[0]:>4} and {right[1]:>4}"
        lines.append(f"  {name:<10}{shown}; {left:>3} undecided; line {levels}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Signal fraction over the line of its network's loss, a row a setting."""
    fig, ax = plots.figure(plots.TEXT, 3.4)
    rng = np.random.default_rng(0)
    for cause in MECHANISMS:
        use = arrays["truth"] == cause
        y = arrays["setting"][use] + rng.uniform(-0.3, 0.3, use.sum())
        ax.plot((arrays["fractions"] - arrays["line"])[use], y, ".", color=plots.CAUSE_COLORS[cause], label=cause)
    ax.axvline(0, color="0.3")
    ax.set(
        xlabel="signal fraction less the line of its network's loss; dotted: 1/2",
        yticks=range(len(meta["settings"])),
        yticklabels=meta["settings"],
    )
    for at, drawn in enumerate(arrays["lines"]):
        ax.plot([0.5 - np.nanmean(drawn)] * 2, [at - 0.4, at + 0.4], ":", color="0.3")
    ax.invert_yaxis()
    ax.legend(title="truth")
    return fig


if __name__ == "__main__":
    # Networks are trained: on another processor signal fractions differ by 0.014 of the largest, lines by 2e-5.
    main(__file__, simulate, report, draw, Tolerance(1e-3, of={"fractions": Tolerance(0.05, floor=1.0)}))
