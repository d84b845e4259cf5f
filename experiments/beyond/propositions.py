"""Propositions 1 and 2: what a linear projector of each kind does to the representation, simulated and predicted.

    python experiments/beyond/propositions.py              # simulate, predict, save, draw: 90 s on one core
    python experiments/beyond/propositions.py --plot-only  # redraw from the saved result

r = W x is the representation, z = P W x what the loss sees; all 16 x 16; clean data N(0, I), noise of standard
deviation 3 on the last 8 coordinates; loss, batch, temperature and learning rate of the official toy script.  W starts
uniform in +-1/4 and meets each head of HEADS in turn, each with the same batches; several runs, one a seed of these.
The prediction is the gradient flow of the finite-batch mean field, from a large pool of points: behind a low-rank head
much of W is left alone, and a small pool's own error would move it.  Singular values of W near e^-4 are left to the
noise of SGD, which the flow lacks: the ceiling is what the mean of the other runs explains of one.

Of table 2 this shows that without a head, or with an orthogonal one, r collapses most, and no more: a diagonal head
protects r only if it starts small (kappa > 0 below), a trainable one keeps the most rank where the paper has a low-rank
one on top, and r keeps rank by not becoming invariant, as the share of signal in it says.

Then the aligned case in closed form: kappa = sigma_W^2 - sigma_P^2 is conserved in each mode, so where the product of
W and P stops at m the representation keeps (kappa + sqrt(kappa^2 + 4 m)) / 2.

Writes propositions.npz: heads (H,), t (T,) = learning rate x steps; singular values of W, simulated (T, H, seeds, 16),
predicted and population (infinite batch), (T, H, 16); of r at the end effective_rank, rank (of the covariance, above
1e-2 of the largest) and signal (share of the clean data in the variance), each (H, 3): start, simulated (the mean over
seeds), predicted; kappa (K,), m (2,), split_simulated and split_predicted (2, K): sigma_W^2 of modes without noise and
with it.  R^2 of the logarithms, of predictions against the mean of the runs' logarithms, and the ceilings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gmean, ortho_group

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.metrics import effective_rank
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    conserved_split,
    matrix_flow,
    population_gradient,
    sgd,
    singular_values,
)
from collapse.theory.arrays import Floats

DIM, RANK = 16, 10
CLEAN, NOISE = np.ones(DIM), np.repeat([0.0, 3.0], DIM // 2)
C0, CE = np.diag(CLEAN**2), np.diag(NOISE**2)
KAPPA = 0.34
HEADS = {
    "none": "none",
    "orthogonal": "orthogonal, fixed",
    "trainable": "trainable",
    "diagonal": "diagonal, from 1",
    "small": r"diagonal, from $\pm\frac{1}{4}$",
    "lowrank": "low-rank, fixed",
    "lowrank-diagonal": "low-rank diagonal, fixed",
}


def uniform(rng: np.random.Generator, *shape: int) -> NDArray:
    """As a layer of torch with 16 inputs starts."""
    return rng.uniform(-0.25, 0.25, shape)


def heads(rng: np.random.Generator) -> dict[str, tuple[NDArray, NDArray]]:
    """Each head's initial P and the mask of its entries that train."""
    one, fixed = np.eye(DIM), np.zeros((DIM, DIM))
    U, V = ortho_group.rvs(DIM, size=2, random_state=rng)
    first = np.diag(np.arange(DIM) < RANK).astype(float)
    return {
        "none": (one, fixed),
        "orthogonal": (U, fixed),
        "trainable": (uniform(rng, DIM, DIM), fixed + 1),
        "diagonal": (one, one),
        "small": (np.diag(uniform(rng, DIM)), one),
        "lowrank": (U @ first @ V, fixed),
        "lowrank-diagonal": (first, fixed),
    }


def signal_share(W: NDArray) -> NDArray:
    """tr(W C0 W^T) / tr(W C W^T) of (..., 16, 16)."""
    energy = (W**2).sum(-2)
    return energy @ C0.diagonal() / (energy @ (C0 + CE).diagonal())


def measures(W: NDArray) -> dict[str, float]:
    """Of the representations W x of (seeds, 16, 16), each the mean over the seeds."""
    spectra = singular_values(W) ** 2
    return {
        "effective_rank": np.mean([effective_rank(of_covariance=values) for values in spectra]),
        "rank": np.mean((spectra > 1e-2 * spectra[:, :1]).sum(1)),
        "signal": signal_share(W).mean(),
    }


def scores(simulated: NDArray, forecasts: dict[str, NDArray]) -> dict[str, Any]:
    """R^2 of one head, simulated (T, seeds, 16), forecasts (T, 16): over all times, at the last, and of the change."""
    mean, seeds = gmean(simulated, -2), range(simulated.shape[1])
    r2: dict[str, Any] = {
        kind: {
            "trajectory": r_squared(mean, values),
            "final": r_squared(mean[-1], values[-1]),
            "change": r_squared_change(mean[1:], values[1:], mean[0]),
        }
        for kind, values in forecasts.items()
    }
    last = simulated[-1]
    if len(last) > 1:
        r2["ceiling"] = [r_squared(last[i], gmean(np.delete(last, i, axis=0), -2)) for i in seeds]
    return r2


def compare_heads(seed: int, seeds: int, descent: Descent) -> tuple[Meta, Arrays]:
    """All heads, `seeds` runs of each as one batch; both predictions of each."""
    rng = np.random.default_rng(seed)
    W, projectors = uniform(rng, DIM, DIM), heads(rng)
    at = np.concatenate([[0], np.unique(np.geomspace(10, descent.steps, 40).astype(int))])
    P, masks = (np.repeat(np.array(part), seeds, axis=0) for part in zip(*projectors.values(), strict=True))
    batches = list(range(seed, seed + seeds)) * len(HEADS)
    layers = [np.tile(W, (len(P), 1, 1)), P]
    trained = sgd(layers, GaussianViews(CLEAN, NOISE), batches, descent, at.tolist(), [None, masks])[0]
    trained = trained.reshape(len(at), len(HEADS), seeds, DIM, DIM)
    points = {"lowrank": 65_536, "lowrank-diagonal": 65_536, "small": 8_192}
    fields = {name: MeanField(C0, CE, descent.batch, descent.temperature, points.get(name, 2048)) for name in HEADS}
    population = partial(population_gradient, C0=C0, Ce=CE, temperature=descent.temperature)
    gradients: dict[str, Callable[[str], Callable[[Floats], Floats]]] = {
        "predicted": lambda name: fields[name].gradient,
        "population": lambda name: population,
    }
    flows = {
        kind: np.array(
            [
                matrix_flow(descent.lr * at, [W, P], of(name), masks=[None, mask])[0]
                for name, (P, mask) in projectors.items()
            ]
        )
        for kind, of in gradients.items()
    }
    simulated, forecasts = singular_values(trained), {kind: singular_values(flow) for kind, flow in flows.items()}
    r2 = {
        head: scores(simulated[:, h], {kind: values[h] for kind, values in forecasts.items()})
        for h, head in enumerate(HEADS)
    }
    ends = [
        [measures(W[None]), measures(trained[-1, h]), measures(flows["predicted"][h, -1:])] for h in range(len(HEADS))
    ]
    same = np.abs(trained[:, 0] - trained[:, 1]).max()
    return {"r2": r2, "none_orthogonal": float(same)}, {
        "t": descent.lr * at,
        "simulated": simulated,
        **{kind: values.swapaxes(0, 1) for kind, values in forecasts.items()},
        **{name: np.array([[values[name] for values in row] for row in ends]) for name in ends[0][0]},
    }


def split(seed: int, descent: Descent, runs: int = 3) -> Arrays:
    """sigma_W^2 of aligned layers at the end of SGD, over kappa, and in closed form from where the product stops."""
    kappa = np.linspace(-KAPPA, KAPPA, runs * DIM // 2).reshape(-1, runs).T
    wide = np.tile(kappa, 2)
    start = conserved_split(np.full(wide.shape, 0.01), wide)
    layers = [np.sqrt(values)[:, None] * np.eye(DIM) for values in (start, start - wide)]
    W, _ = sgd(layers, GaussianViews(CLEAN, NOISE), range(seed, seed + runs), descent, [descent.steps])
    field = MeanField(C0, CE, descent.batch, descent.temperature)
    m = field.modes(np.array([0.0, 50.0]), np.full((1, DIM), 0.1))[-1, 0] ** 2
    m = m.reshape(2, -1).mean(1)
    simulated = np.diagonal(W[0] @ W[0].mT, axis1=1, axis2=2).reshape(runs, 2, -1)
    order = kappa.ravel().argsort()
    return {
        "kappa": kappa.ravel()[order],
        "m": m,
        "split_simulated": simulated.swapaxes(0, 1).reshape(2, -1)[:, order],
        "split_predicted": conserved_split(m[:, None] + 0 * order, kappa.ravel()[order] + 0 * m[:, None]),
    }


def simulate(seed: int = 0, seeds: int = 4, steps: int = 10_000, lr: float = 1e-3) -> tuple[Meta, Arrays]:
    """Every head from one start of W, `seeds` runs each; the aligned layers; the predictions of both."""
    descent = Descent(lr, steps)
    meta, arrays = compare_heads(seed, seeds, descent)
    aligned = split(seed + seeds, descent)
    meta["r2"]["split"] = r_squared(aligned["split_simulated"], aligned["split_predicted"])
    return meta | {"batch": descent.batch, "rank": RANK}, {"heads": np.array(list(HEADS)), **arrays, **aligned}


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [
        "ln singular values of W at the end: R^2 of the mean field (of an infinite batch; what runs explain of one "
        "another), and of r, simulated / predicted:"
    ]
    for h, head in enumerate(arrays["heads"]):
        r2 = meta["r2"][str(head)]
        ceiling = f"{min(r2['ceiling']):.3f}" if "ceiling" in r2 else "one run"
        numbers = " ".join(
            f"  {name.replace('_', ' ')} {arrays[name][h, 1]:.{digits}f} / {arrays[name][h, 2]:.{digits}f}"
            for name, digits in {"rank": 1, "effective_rank": 2, "signal": 2}.items()
        )
        lines.append(
            f"  {head:<17} {r2['predicted']['final']:.4f} ({r2['population']['final']:.4f}; {ceiling}) {numbers}"
        )
    rank, effective, share = (arrays[name][0, 0] for name in ("rank", "effective_rank", "signal"))
    lines.append(f"  at the start: rank {rank:.0f}, effective rank {effective:.2f}, signal share {share:.2f}")
    lines.append(f"  largest difference of W between none and orthogonal: {meta['none_orthogonal']:.0e}")
    lines.append(f"aligned layers, sigma_W^2 over kappa: R^2 of ln {meta['r2']['split']:.4f}")
    return "\n".join(lines)


# The panels of the heads; none stands in both.  Colours of heads that other figures have are theirs.
PANELS = {
    "heads that train": ("none", "trainable", "diagonal", "small"),
    "fixed heads": ("none", "lowrank", "lowrank-diagonal"),
}
NAMED = {
    "none": "no projector",
    "trainable": "linear projector",
    "diagonal": "diagonal",
    "lowrank": "low-rank, fixed",
    "lowrank-diagonal": "DirectCLR",
}


def draw_heads(ax: Any, heads: tuple[str, ...], arrays: Arrays) -> None:
    """The spectrum of r at the end, a colour a head."""
    index, places = np.arange(1, DIM + 1), arrays["heads"].tolist()
    for head in heads:
        h, color = places.index(head), plots.HEAD_COLORS.get(NAMED.get(head, ""), "0.5")
        label = "none = orthogonal" if head == "none" else HEADS[head]
        ax.plot(index, 2 * np.log(arrays["predicted"][-1, h]), color=color, label=label)
        ax.plot(index, 2 * np.log(gmean(arrays["simulated"][-1, h], -2)), "o", color=color)
    ax.set(xlabel="index of the singular value", xticks=[1, 4, 8, 12, 16])
    ax.legend(loc="lower left")


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Two panels: the spectrum of r by head.  Right: what the first of two aligned layers keeps, over kappa."""
    fig, (left, middle, right) = plots.figure(plots.TEXT, 2.9, columns=3)
    for ax, (title, heads) in zip((left, middle), PANELS.items(), strict=True):
        draw_heads(ax, heads, arrays)
        ax.set(title=title, ylim=(-12.5, 1))
    left.set_ylabel(rf"$\ln\,\lambda$ of $\mathrm{{Cov}}(r)$, mean of {arrays['simulated'].shape[2]} runs")
    curves = (("without noise", "0.2"), ("with noise", "0.55"))
    for (label, color), predicted, simulated in zip(
        curves, arrays["split_predicted"], arrays["split_simulated"], strict=True
    ):
        right.plot(arrays["kappa"], np.log(predicted), color=color, label=label)
        right.plot(arrays["kappa"], np.log(simulated), "o", color=color)
    right.set(
        xlabel=r"$\kappa = \sigma_W^2 - \sigma_P^2$", ylabel=r"$\ln\,\sigma_W^2$", title="aligned layers, one run"
    )
    right.legend(loc="lower right")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
