"""The theory against a real network where theory speaks: at the place where the last map stands still.

    python experiments/networks/relaxation.py --data cifar10.zip                    # what is missing, minutes a cell
    python experiments/networks/relaxation.py --data cifar10.zip --only '*-t0.5-*'  # some cells, by name
    python experiments/networks/relaxation.py --plot-only

The trunk is frozen: the study's encoder of SimCLR with two layers ("trained"), or the network that it started from
("start").  5,000 training images in 8 views each, those of training, are represented once a seed; then
collapse.training.relaxation trains a linear map of all 512 entries, r = h at the start and nothing whitened, and the
head behind it, until over a doubling of the steps no count and no share moves by more than STILL, or --limit steps are
done.  What water-filling of the trunk's own signal fractions predicts at that temperature is computed before.

Cells, in the order in which they are worth having: CELLS.  Each is kept in runs/relaxation/ as it ends, so that the
script goes on where it was stopped; the result sums up those that are there.

Writes experiments/results/relaxation.npz (of each cell NAME: NAME-r, NAME-z singular values of rows of length one;
NAME-start of r = h; NAME-fractions, NAME-shares, NAME-predicted of the modes; meta: cells, a list of name, trunk, head,
temperature, seed, steps, seconds, moved over the last doubling, drift, floors, measured and predicted living directions
of r and z above 1e-3 of the largest and clear of the floor, error, their differences as shares of the width, spearman
of the shares of the modes predicted to live, held, what the others hold; orders, see `orders`) and the figure.
"""

import fnmatch
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch

from collapse import InputError, plots
from collapse.data.labelled import open_data
from collapse.experiment import Arrays, Meta, main
from collapse.results import load_result, save_result
from collapse.training.relaxation import HEADS, Relaxation, State, Views, agreement, living, relax, represented

RUNS = Path("runs") / "relaxation"
TRUNKS = {"trained": "mlp", "start": "start"}
IMAGES, VIEWS = 5000, 8
FIRST, LIMIT, STILL = 250, 8000, 0.02  # steps; what may move over a doubling of them
CELLS = [("trained", head, t, seed) for t in (0.5, 0.2, 0.1) for seed in range(3) for head in HEADS]
CELLS += [("start", head, 0.5, seed) for seed in range(3) for head in HEADS]


def name_of(cell: tuple[str, str, float, int]) -> str:
    """As files and --only name it."""
    trunk, head, temperature, seed = cell
    return f"{trunk}-{head}-t{temperature:g}-s{seed}"


@cache
def views_of(trunk: str, seed: int, source: str) -> Views:
    """Representations of augmented views, kept in runs/."""
    path = RUNS / f"{trunk}-s{seed}.npz"
    if not path.exists():
        print(f"{trunk}, seed {seed}: {IMAGES} images in {VIEWS} views", file=sys.stderr, flush=True)
        config = replace(study.plan(study.PRESET)["mlp-s0"], seed=seed)
        data = open_data(source, "train")
        data = data.subset(np.sort(np.random.default_rng([seed, 7]).permutation(len(data))[:IMAGES]))
        found = represented(study.encoders()[TRUNKS[trunk]], config, data, IMAGES, VIEWS)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_result(path, {"images": IMAGES}, views=found.astype(np.float32))
    return Views(load_result(path)[1]["views"])


def perform(cell: tuple[str, str, float, int], source: str, limit: int) -> None:
    """Predict, relax for at most `limit` steps and a quarter more, measure and save one cell."""
    trunk, head, temperature, seed = cell
    views = views_of(trunk, seed, source)
    relaxation = Relaxation.of(views, head, temperature, seed)
    start = relaxation.state()
    predicted, counts = relaxation.predicted()
    since = time.perf_counter()

    def watch(state: State, moved: float) -> None:
        line = f"step {state.step}, {time.perf_counter() - since:.0f} s: living {state.living()}, moved {moved:.3f}"
        print(f"{name_of(cell)}: {line}, predicted {counts}", file=sys.stderr, flush=True)

    watch(start, np.inf)
    state, moved, seconds = relax(relaxation, FIRST, limit, STILL, watch)
    about = {"name": name_of(cell), "trunk": trunk, "head": head, "temperature": temperature, "seed": seed}
    about |= {"steps": state.step, "seconds": seconds, "moved": moved, "drift": state.drift}
    about |= {"floors": {"r": state.r.floor, "z": state.z.floor}, "predicted": counts}
    arrays = {"r": state.r.singular_values, "z": state.z.singular_values, "start": start.r.singular_values}
    arrays |= {"fractions": views.fractions, "shares": state.shares, "predicted": predicted}
    save_result(RUNS / f"{name_of(cell)}.npz", about, **arrays)
    print(f"{name_of(cell)}: living {state.living()}, predicted {counts}", file=sys.stderr, flush=True)


def judged(meta: Meta, arrays: Arrays) -> Meta:
    """A cell as `perform` has kept it, and what was measured, beside what was predicted."""
    cell = {key: value for key, value in meta.items() if key not in ("schema", "command", "versions")}
    cell["measured"] = {of: living(arrays[of], cell["floors"][of]) for of in ("r", "z")}
    pairs = {of: zip(cell["measured"][of], cell["predicted"][of], strict=True) for of in ("r", "z")}
    cell["error"] = {of: [abs(a - b) / len(arrays[of]) for a, b in both] for of, both in pairs.items()}
    return cell | agreement(arrays["shares"], arrays["predicted"])


def orders(cells: list[Meta]) -> list[Meta]:
    """Of each trunk, temperature and seed with all heads: dead directions of r by head, at DEAD and at the floor.

    paper: whether none has the most, then DirectCLR, then both projectors.
    """
    found: dict[tuple[str, float, int], dict[str, list[int]]] = {}
    for cell in cells:
        key = cell["trunk"], cell["temperature"], cell["seed"]
        found.setdefault(key, {})[cell["head"]] = [512 - count for count in cell["measured"]["r"]]
    lines = []
    for (trunk, temperature, seed), dead in found.items():
        if len(dead) == len(HEADS):
            paper = [dead["none"][k] > dead["directclr"][k] > max(dead["linear"][k], dead["mlp"][k]) for k in (0, 1)]
            lines.append({"trunk": trunk, "temperature": temperature, "seed": seed, "dead": dead, "paper": paper})
    return lines


def simulate(data: str = "", only: str = "*", limit: int = LIMIT) -> tuple[Meta, Arrays]:
    """The cells named by `only` that are missing are trained, if data is given; all that are there are summed up."""
    todo = [cell for cell in CELLS if fnmatch.fnmatchcase(name_of(cell), only)]
    todo = [cell for cell in todo if not (RUNS / f"{name_of(cell)}.npz").exists()]
    torch.set_num_threads(1)
    for k, cell in enumerate(todo if data else []):
        print(f"{len(todo) - k} cells to do, next {name_of(cell)}", file=sys.stderr, flush=True)
        perform(cell, data, limit)
    paths = [RUNS / f"{name_of(cell)}.npz" for cell in CELLS]
    done = [load_result(path) for path in paths if path.exists()]
    if not done:
        raise InputError(f"{RUNS}: no cell is there; give --data to train them")
    cells = [judged(meta, found) for meta, found in done]
    arrays = {f"{meta['name']}-{key}": value for meta, found in done for key, value in found.items()}
    return {"cells": cells, "orders": orders(cells)}, arrays


def pair(counts: list[int]) -> str:
    """Above 1e-3 of the largest, and above the floor."""
    return f"{counts[0]:>4} {counts[1]:>4}"


def report(meta: Meta, arrays: Arrays) -> str:
    """A line a cell, and whether all keep what was asked of them."""
    title = f"{'living above 1e-3, the floor':<30}{'z':>10}{'predicted':>11}{'r':>11}{'predicted':>11}"
    lines = [f"{title}   steps  seconds  moved  rank   held"]
    for cell in meta["cells"]:
        counts = "".join(f"  {pair(cell[of][layer])}" for layer in "zr" for of in ("measured", "predicted"))
        made = f"{cell['steps']:>8} {cell['seconds']:>8.0f} {cell['moved']:>6.3f} {cell['spearman']:>5.2f}"
        lines.append(f"{cell['name']:<29}{counts}{made} {cell['held']:>6.3f}")
    lines.append(f"{len(meta['cells'])} of {len(CELLS)} cells; within 10 % of the width, and the largest error:")
    for head in HEADS:
        errors = np.array(
            [[*cell["error"]["z"], *cell["error"]["r"]] for cell in meta["cells"] if cell["head"] == head]
        )
        columns = zip(("z at 1e-3", "z at the floor", "r at 1e-3", "r at the floor"), errors.T, strict=True)
        shown = ", ".join(f"{name} {(of <= 0.1).sum()} of {len(of)} ({of.max():.0%})" for name, of in columns)
        lines.append(f"  {study.LABELS[head]}: {shown}")
    lines.append(f"rank correlation of shares from {min(cell['spearman'] for cell in meta['cells']):.2f} on")
    for order in meta["orders"]:
        dead = ", ".join(f"{study.LABELS[head]} {pair(counts)}" for head, counts in order["dead"].items())
        at, floor = ("yes" if held else "no" for held in order["paper"])
        where = f"{order['trunk']}, temperature {order['temperature']:g}, seed {order['seed']}"
        lines.append(f"{where}: dead in r: {dead}; the paper's order at 1e-3: {at}, at the floor: {floor}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: living directions of z, measured over predicted.  Right: shares of the modes without a projector."""
    fig, (ax, beside) = plots.figure(plots.TEXT, 2.8, columns=2)
    for head in HEADS:
        cells = [cell for cell in meta["cells"] if cell["head"] == head]
        for marker, k in (("o", 0), ("^", 1)):
            found = [[cell[of]["z"][k] for cell in cells] for of in ("predicted", "measured")]
            label = study.LABELS[head] if k == 0 else None
            shift = 0.94 + 0.04 * list(HEADS).index(head)
            ax.plot(
                shift * np.array(found[0]),
                found[1],
                marker,
                color=plots.HEAD_COLORS[study.LABELS[head]],
                markerfacecolor=("none" if k else None),
                label=label,
            )
    ax.plot([1, 512], [1, 512], color="0.3")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="living directions of z, predicted",
        ylabel="measured",
        xlim=(10, 600),
        ylim=(1.5, 600),  # the legend stands under the points
    )
    ax.plot([], [], "o", color="0.3", label="above 1e-3 of the largest")
    ax.plot([], [], "^", color="0.3", markerfacecolor="none", label="above the floor")
    ax.legend(loc="lower right")
    chosen = [cell for cell in meta["cells"] if (cell["trunk"], cell["head"], cell["seed"]) == ("trained", "none", 0)]
    for cell, color in zip(chosen, plots.sequence_colors(len(chosen)), strict=True):
        rho, shares, predicted = (arrays[f"{cell['name']}-{key}"] for key in ("fractions", "shares", "predicted"))
        beside.plot(rho, shares, "o", color=color, markeredgewidth=0, alpha=0.7)
        beside.plot(rho, predicted, color=color, label=rf"$\tau = {cell['temperature']:g}$, {cell['steps']} steps")
    beside.set(xlabel=r"signal fraction $\rho_k$ of h", ylabel="share of the variance of z", xlim=(0, 1))
    beside.legend(title="no projector, seed 0")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
