"""Diagnosis where the truth is known: toy networks that collapse by one mechanism, by both, by dead units, in rounding.

    python experiments/beyond/diagnosis.py  # train 250 networks, diagnose, save, draw: 3 minutes on one core
    python experiments/beyond/diagnosis.py --plot-only  # redraw from the saved result

Linear networks on 16 coordinates of clean variance 1, trained by SGD on InfoNCE of cosine similarity at temperature 1,
then turned by random rotations of data, hidden units and embedding.  By scenario:

none           one layer, hardly any noise
augmentation   one layer; noise of standard deviation 1.2 to 2.5 on 4 to 8 coordinates
implicit       three layers, hardly any noise; on 4 to 8 coordinates the product starts at 0.003 to 0.02, else at 0.3
both           three layers, noise on 4 to 6 coordinates and a small start on 4 to 6 others
silent         as both, and a ReLU that leaves the 16 units as they are, and 8 units more: 4 without weights or that the
               ReLU holds at zero, and 4 that repeat sums of two others, so that 4 combinations are rounding

What took a direction is known by two controls, trained from the same start with the same seeds: collapsed without the
noise too, it is "implicit"; collapsed with it only, "augmentation".  Collapsed is below 1e-2 of the largest variance.
A direction that `collapse.diagnose` finds, from 512 images and 4 views, belongs to the coordinate that makes most of
its variance, one to one.

Writes diagnosis.npz: confusion (5, 5, 5), scenario by truth by answer, in the order of `causes`; right (5, seeds),
shares of the directions that are not alive in truth or by the answer; fractions (k,) and truth (k,) of the directions
that both truth and answer give to a mechanism.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import seaborn as sns
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group
from torch import Tensor, nn

import collapse
from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.metrics.attribution import CAUSES, Attribution
from collapse.theory import Descent, GaussianViews, sgd

DIM = 16
THRESHOLD = 1e-2
SCENARIOS = ("none", "augmentation", "implicit", "both", "silent")
STEPS = {1: 80, 3: 2000}  # by depth: one layer kills within a few hundred steps, to rounding
EXTRA = 4  # of each kind of silent units


@dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise of covariance root root^T to vectors."""

    root: NDArray[np.float64]
    DRAWS: int = DIM

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
        return images + (normal @ torch.as_tensor(self.root).T).to(images.dtype)


def settings(scenario: str, seed: int) -> tuple[NDArray, NDArray]:
    """(start of the product, standard deviation of the noise) of each coordinate, (16,) each."""
    rng = np.random.default_rng([SCENARIOS.index(scenario), seed])
    order, noisy, small = rng.permutation(DIM), *rng.integers(4, 7 if scenario in ("both", "silent") else 9, 2)
    start, noise = rng.uniform(0.25, 0.35, DIM), np.full(DIM, 0.1)
    if scenario in ("augmentation", "both", "silent"):
        noise[order[:noisy]] = rng.uniform(1.2, 2.5, noisy)
    if scenario in ("implicit", "both", "silent"):
        start[order[DIM - small :]] = rng.uniform(0.003, 0.02, small)
    return start, noise


def train(scenario: str, start: NDArray, noise: NDArray, seeds: list[int]) -> list[NDArray]:
    """The layers, each (runs, 16, 16), of runs that start at diagonal layers with a little beside the diagonal."""
    depth, layers = 1 if scenario in ("none", "augmentation") else 3, []
    for layer in range(depth):
        beside = [0.01 * np.random.default_rng([seed, layer]).standard_normal((DIM, DIM)) for seed in seeds]
        balanced = start ** (1 / depth)
        mixed = np.sqrt(balanced[:, :, None] * balanced[:, None, :]) * np.stack(beside)
        layers.append(balanced[:, :, None] * np.eye(DIM) + mixed)
    descent = Descent(0.02, STEPS[depth], batch=64, temperature=1.0, similarity="cosine")
    return [W[-1] for W in sgd(layers, GaussianViews(np.ones_like(noise), noise), seeds, descent, [descent.steps])]


def variances(layers: list[NDArray], noise: NDArray) -> NDArray:
    """(runs, 16): variance of the embedding that each coordinate of the data makes."""
    product = layers[0]
    for W in layers[1:]:
        product = W @ product
    return (product**2).sum(1) * (1 + noise**2)


def truths(layers: list[NDArray], control: list[NDArray], noise: NDArray) -> NDArray:
    """(runs, 16) causes, by the counterfactual."""
    with_noise, without = (
        v < THRESHOLD * v.max(1, keepdims=True)
        for v in (variances(layers, noise), variances(control, np.full_like(noise, 0.1)))
    )
    return np.where(~with_noise, "alive", np.where(without, "implicit", "augmentation"))


def network(layers: list[NDArray], rotations: NDArray, silent: bool, seed: int) -> nn.Sequential:
    """The layers between random rotations (depth + 1, 16, 16), and with `silent` units a ReLU."""
    turned = [rotations[k + 1] @ W @ rotations[k].T for k, W in enumerate(layers)]
    bias = np.zeros(DIM)
    if silent:
        rng = np.random.default_rng([seed, 7])
        pairs = np.stack([rng.choice(DIM, 2, replace=False) for _ in range(EXTRA)])
        last, off = turned[-1], np.zeros((EXTRA, DIM))
        off[: EXTRA // 2] = 0.1 * rng.standard_normal((EXTRA // 2, DIM))
        turned[-1] = np.concatenate([last, off, last[pairs[:, 0]] + last[pairs[:, 1]]])
        # Far above zero the ReLU is the identity; far below, or without weights, a unit is constant.
        bias = np.concatenate([np.full(DIM, 30.0), np.repeat([-30.0, 30.0], EXTRA // 2), np.full(EXTRA, 30.0)])
    linear = [nn.Linear(W.shape[1], W.shape[0]) for W in turned]
    with torch.no_grad():
        for layer, W in zip(linear, turned, strict=True):
            layer.weight.copy_(torch.as_tensor(W))
            layer.bias.zero_()
        linear[-1].bias.copy_(torch.as_tensor(bias))
    return nn.Sequential(*linear, *([nn.ReLU()] if silent else []))


def answers(found: Attribution, made: NDArray, silent: bool) -> tuple[NDArray, NDArray]:
    """(causes, signal fractions) that the diagnosis gives to each of the 16 coordinates and then to the silent ones.

    made: (d, 16) what a deviation of each coordinate makes of the embedding.  Matched one to one by the share of a
    direction's variance that a coordinate makes; directions that are left are silent ones: dead first, then rounding.
    """
    shares = (found.directions.T @ made) ** 2
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-9 * (made**2).sum())
    rows, columns = linear_sum_assignment(-shares)
    matched = rows[np.argsort(columns)]
    rest = np.setdiff1d(np.arange(len(shares)), matched)
    order = np.concatenate([matched, rest[np.argsort(found.causes[rest])]]) if silent else matched
    return found.causes[order], found.fractions[order]


def diagnose(scenario: str, layers: list[NDArray], noise: NDArray, seed: int, images: int) -> tuple[NDArray, NDArray]:
    """Of one trained network, (causes, signal fractions) in the order of `answers`."""
    rng, silent = np.random.default_rng([seed, 5]), scenario == "silent"
    rotations = ortho_group.rvs(DIM, size=len(layers) + 1, random_state=rng)
    net = network(layers, rotations, silent, seed)
    x = torch.as_tensor(rng.standard_normal((images, DIM))).float()
    found = collapse.diagnose(
        net, x, views=4, augmentations=[Noise(rotations[0] * noise)], threshold=THRESHOLD, seed=seed, batch_size=4096
    ).blocks[-1].attribution  # fmt: skip
    made = rotations[0]
    for layer in net:
        if isinstance(layer, nn.Linear):
            made = layer.weight.detach().double().numpy() @ made
            made[layer.bias.detach().numpy() < 0] = 0  # the ReLU holds them at zero
    return answers(found, made * np.sqrt(1 + noise**2), silent)


def run(scenario: str, seeds: list[int], images: int) -> tuple[NDArray, NDArray, NDArray]:
    """(truths, answers, signal fractions) of all runs of a scenario, (runs, k) each."""
    start, noise = (np.stack(a) for a in zip(*(settings(scenario, seed) for seed in seeds), strict=True))
    layers, control = (train(scenario, start, n, seeds) for n in (noise, np.full_like(noise, 0.1)))
    truth = truths(layers, control, noise)
    if scenario == "silent":
        beside = np.repeat(["dead", "rounding"], EXTRA)
        truth = np.concatenate([truth, np.tile(beside, (len(seeds), 1))], 1)
    found = [
        diagnose(scenario, [W[k] for W in layers], noise[k], seed, images) for k, seed in enumerate(seeds)
    ]  # fmt: skip
    return truth, np.stack([causes for causes, _ in found]), np.stack([fractions for _, fractions in found])


def simulate(seed: int = 0, seeds: int = 50, images: int = 512) -> tuple[Meta, Arrays]:
    """All scenarios."""
    chosen = list(range(seed, seed + seeds))
    confusion, right = np.zeros((len(SCENARIOS), 5, 5), int), np.ones((len(SCENARIOS), seeds))
    kept: list[tuple[NDArray, NDArray]] = []
    for at, scenario in enumerate(SCENARIOS):
        truth, answer, fractions = run(scenario, chosen, images)
        for row, cause in enumerate(CAUSES):
            for column, other in enumerate(CAUSES):
                confusion[at, row, column] = ((truth == cause) & (answer == other)).sum()
        counted = (truth != "alive") | (answer != "alive")
        right[at] = ((truth == answer) & counted).sum(1) / np.maximum(1, counted.sum(1))
        mechanisms = np.isin(truth, ("augmentation", "implicit")) & np.isin(answer, ("augmentation", "implicit"))
        kept.append((fractions[mechanisms], truth[mechanisms]))
    counted = confusion.sum() - confusion[:, 0, 0].sum()
    hits = sum(confusion[:, k, k].sum() for k in range(1, 5))
    arrays = {"confusion": confusion, "right": right, "fractions": np.concatenate([f for f, _ in kept]),
              "truth": np.concatenate([t for _, t in kept])}  # fmt: skip
    return {"share": float(hits / counted), "directions": int(counted), "causes": list(CAUSES)}, arrays


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [
        f"{100 * meta['share']:.2f} % of {meta['directions']} directions that are collapsed, in truth or by the answer,"
        " are attributed rightly",
        "truth, by scenario    answer: " + " ".join(f"{cause:>12}" for cause in CAUSES),
    ]
    for scenario, table in zip(SCENARIOS, arrays["confusion"], strict=True):
        for cause, row in zip(CAUSES, table, strict=True):
            if row.sum():
                lines.append(f"  {scenario:<14}{cause:<16}" + " ".join(f"{count:>12}" for count in row))
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """The confusion table over all scenarios, and the signal fractions of the two mechanisms."""
    fig, (ax, beside) = plots.figure(plots.TEXT, 2.7, columns=2)
    table = arrays["confusion"].sum(0)
    sns.heatmap(np.log1p(table), annot=table, fmt="d", cmap="Blues", cbar=False, yticklabels=CAUSES,
                annot_kws={"fontsize": 7}, ax=ax)  # fmt: skip
    ax.set_xticks(ax.get_xticks(), CAUSES, rotation=30, ha="right")
    ax.set(xlabel="answer", ylabel="truth")
    sns.histplot(x=arrays["fractions"], hue=arrays["truth"], hue_order=["augmentation", "implicit"],
                 palette=plots.CAUSE_COLORS, bins=np.linspace(0, 1, 41), alpha=0.8, linewidth=0, ax=beside)  # fmt: skip
    beside.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    beside.set(xlabel="signal fraction", ylabel="collapsed directions", yscale="log")
    sns.move_legend(beside, "upper left", title="truth")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
