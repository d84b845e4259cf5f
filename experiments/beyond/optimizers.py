"""Weight decay, momentum and LARS: where a direction dies exactly, how depth makes death sudden, and three clocks.

    python experiments/beyond/optimizers.py              # simulate, predict, save, draw: 90 s on one core
    python experiments/beyond/optimizers.py --plot-only  # redraw from the saved result

Dot product, temperature 0.1, batch 128; L balanced aligned layers.

Death.  Weight decay gamma leaves sigma^2 = tau (c0 - gamma tau / 2)+ / c^2 of one layer: size falls to zero without a
jump.  With L layers m^(1 - 1/L) (c0 - c^2 m / tau) = gamma tau / 2 has two roots or none: a mode keeps at least
(L - 1) / (2 L - 1) of its size or dies, and it dies too if it starts below the smaller root (theory.critical_start).
Eight clean variances fall from 1 to 0.2, noise 0.1, the product starts at 0.3 exp(-0.2 k). Grid: L = 1, 2, 3 by five
decays, shares of the largest that the first mode survives; three runs. Dead is below 1e-2 of the undecayed size at 8.
No mode of the grid starts within 8 % of the smaller root. On a grid of 16 modes some started within 2 % of it: there
the noise of a run says which way a mode goes, and one just above the largest decay takes until 16 to die.
InfoNCE is predicted by the mean field; its positives' weight pi slows growth but not decay, so that more dies than in
an infinite batch. The spectral contrastive loss has no bias at any batch: there the closed form is the prediction.

Clocks. 16 coordinates, c0 = 1, hardly any noise, product from 0.3 exp(-0.4 k); a mode escapes at 0.1. Decay 0.3;
momentum 0.9, the flow with inertia in the time lr / (1 - beta); LARS, the path of plain descent at the time lars_time
says, with the norms of gradients on batches drawn along the path. LARS undoes the slowing by 1 - pi, which all
gradients share; the noise of SGD, which lengthens the gradient and not the progress, slows it instead.

Writes optimizers.npz: depths (3,), shares (5,), decays (3, 5); for LOSS in dot, spectral LOSS_simulated and
LOSS_predicted (3, 5, 8), singular values of the product at the end, the first with an axis of runs in front, closed
(3, 5, 8), those of the closed form; margins (3, 5, 8), ln of the start over the smaller root;
sizes (3, S) over fine (S,) shares, the first mode; escapes (E, 6): optimiser, depth, mode, and the escape times of
SGD, of the prediction and of an infinite batch without noise.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import r_squared, r_squared_change
from collapse.theory import (
    Descent,
    GaussianViews,
    MeanField,
    aligned_flow,
    critical_start,
    lars_time,
    population_modes,
    sgd,
    stationary_modes,
)
from collapse.theory.descent import dot_product_gradient

DIM, MODES, TAU = 16, 8, 0.1  # coordinates of the races and of the grid
RUNS = 3  # of each point of the grid
DEPTHS = (1, 2, 3)
SHARES = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
CLEAN = np.geomspace(1, 0.2, MODES)  # variances
NOISE = np.full(MODES, 0.1)
START = 0.3 * np.exp(-0.2 * np.arange(MODES))
UNDECAYED = stationary_modes(CLEAN, NOISE**2, "dot", TAU)
STEEP = 0.3 * np.exp(-0.4 * np.arange(DIM))
LEVEL = 0.1  # of the product, at which a mode has escaped
OPTIMIZERS = {
    "decay": Descent(4e-3, 2_000, weight_decay=0.3),
    "momentum": Descent(2e-4, 4_000, momentum=0.9),
    "lars": Descent(1e-3, 2_200, trust=1.0),
}
CLOCK = np.concatenate([[0], np.geomspace(1e-3, 40, 160)])  # times of plain descent, for LARS


def largest_decay(depth: int) -> float:
    """The largest decay that the first mode survives."""
    a = 1 - 1 / depth
    x = a / (1 + a)
    return float(2 * CLEAN[0] / TAU * UNDECAYED[0] ** a * x**a * (1 - x))


def product(trained: list[NDArray]) -> NDArray:
    """Diagonal of the product of layers (T, R, d, d): (T, R, d)."""
    W = trained[0]
    for layer in trained[1:]:
        W = layer @ W
    return np.abs(np.diagonal(W, axis1=-2, axis2=-1))


def dead(w: NDArray) -> NDArray:
    """How many of the modes of (..., 8) are dead."""
    return (w**2 < 1e-2 * UNDECAYED).sum(-1)


def train_decayed(loss: str, depth: int, decay: float, seed: int, lr: float, horizon: float) -> NDArray:
    """The product's singular values at the end of each run, (3, 8)."""
    steps = round(horizon / lr)
    layers = [np.tile(np.diag(START ** (1 / depth)), (RUNS, 1, 1))] * depth
    descent = Descent(lr, steps, similarity=loss, weight_decay=decay)
    seeds = range(seed, seed + RUNS)
    return product(sgd(layers, GaussianViews(np.sqrt(CLEAN), NOISE), seeds, descent, [steps]))[0]


def grid(seed: int, lr: float, horizon: float) -> Arrays:
    """Singular values at the end on the grid: both losses, simulated and predicted, and the closed form."""
    field, t = MeanField(np.diag(CLEAN), np.diag(NOISE**2)), np.array([0, horizon])
    found: dict[str, list] = {
        f"{loss}_{kind}": [] for loss in ("dot", "spectral") for kind in ("simulated", "predicted")
    }
    closed, roots = [], []
    for depth in DEPTHS:
        sigma = np.tile(START ** (1 / depth), (depth, 1))
        for decay in SHARES * largest_decay(depth):
            for loss in ("dot", "spectral"):
                found[f"{loss}_simulated"].append(train_decayed(loss, depth, decay, seed, lr, horizon))
            found["dot_predicted"].append(field.modes(t, sigma, weight_decay=decay)[-1].prod(0))
            found["spectral_predicted"].append(population_modes(t, START, CLEAN, NOISE**2, depth, TAU, decay)[-1])
            size = stationary_modes(CLEAN, NOISE**2, "dot", TAU, decay, depth)
            roots.append(critical_start(CLEAN, NOISE**2, depth, TAU, decay))
            closed.append(np.sqrt(size) * (roots[-1] < START))
    shape = len(DEPTHS), len(SHARES), MODES
    with np.errstate(divide="ignore"):  # one layer has no smaller root, and what dies from any start none at all
        found |= {"closed": closed, "margins": np.log(START) - np.log(roots)}
    arrays = {name: np.array(values) for name, values in found.items()}
    return {
        name: np.moveaxis(values, -2, 0).reshape(RUNS, *shape) if values.ndim == 3 else values.reshape(shape)
        for name, values in arrays.items()
    }


def crossings(t: NDArray, w: NDArray) -> NDArray:
    """First time at which each column of w, (T, K), reaches the level, linear in ln w; NaN if never or at once."""
    times = np.full(w.shape[1], np.nan)
    for k in np.flatnonzero((w[0] < 0.99 * LEVEL) & (w >= LEVEL).any(0)):
        i = int((w[:, k] >= LEVEL).argmax())
        before, after = np.log(w[i - 1 : i + 1, k] / LEVEL)
        times[k] = t[i - 1] + (t[i] - t[i - 1]) * before / (before - after)
    return times


def gradient_norms(path: NDArray, depth: int, batch: int) -> NDArray:
    """|g| of a layer along a path of the product (T, 16), the harmonic mean over 16 batches, (T,)."""
    generator = [torch.Generator().manual_seed(1)]
    x = GaussianViews(np.ones(DIM), np.full(DIM, 1e-3)).draw(generator, 16, batch)[0].flatten(1, 2)
    norms = []
    for w in torch.from_numpy(path).float():
        above = w ** (1 - 1 / depth)  # of the other layers together
        G = dot_product_gradient(torch.diag(w).expand(16, -1, -1), x.clone(), TAU)
        norms.append(1 / (1 / (above[:, None] * G).flatten(1).norm(dim=1)).mean().item())
    return np.array(norms)


def on_lars_clock(t: NDArray, path: NDArray, norms: NDArray, depth: int) -> NDArray:
    """A path of plain descent at times CLOCK, (C, 16), as LARS goes it: at its times t."""
    weights = np.linalg.norm(path ** (1 / depth), axis=1)
    clock = lars_time(CLOCK, weights, norms, 1.0)
    return np.exp(np.array([np.interp(t, clock, column) for column in np.log(path).T])).T


def infinite(m: NDArray) -> NDArray:
    """dL/dm of an infinite batch, c0 = c = 1."""
    return (m / TAU - 1) / TAU


def predict(name: str, depth: int, t: NDArray, field: MeanField) -> tuple[NDArray, NDArray]:
    """The product's modes (T, 16): of the batch as it is, and of an infinite one without noise."""
    descent, sigma = OPTIMIZERS[name], np.tile(STEEP ** (1 / depth), (depth, 1))
    if name != "lars":
        inertia = descent.inertia if descent.momentum else 0.0
        flows = (aligned_flow(t, sigma, g, descent.weight_decay, inertia) for g in (field.mode_gradient, infinite))
        finite, limit = (flow.prod(1) for flow in flows)
        return finite, limit
    finite, limit = (aligned_flow(CLOCK, sigma, g).prod(1) for g in (field.mode_gradient, infinite))
    norms = gradient_norms(finite, depth, descent.batch)
    return on_lars_clock(t, finite, norms, depth), on_lars_clock(t, limit, mean_norms(limit, depth, infinite), depth)


def mean_norms(path: NDArray, depth: int, gradient: Callable[[NDArray], NDArray]) -> NDArray:
    """The norm of a layer's mean gradient along a path of the product, (T,)."""
    slopes = np.array([gradient(m) for m in path**2])
    return np.linalg.norm(2 * path ** (2 - 1 / depth) * slopes, axis=1)


def slowing(field: MeanField) -> dict[str, list[float]]:
    """How much later a mode escapes at N = 128 than in an infinite batch, without noise: geometric mean and largest.

    Of plain descent and of LARS, over the three depths.
    """
    ratios: dict[str, list] = {"plain": [], "lars": []}
    t = np.linspace(0, 2, 2001)
    for depth in DEPTHS:
        sigma, found = np.tile(STEEP ** (1 / depth), (depth, 1)), []
        for gradient in (field.mode_gradient, infinite):
            path = aligned_flow(CLOCK, sigma, gradient).prod(1)
            lars = on_lars_clock(t, path, mean_norms(path, depth, gradient), depth)
            found.append((crossings(CLOCK, path), crossings(t, lars)))
        for name, (finite, limit) in zip(ratios, zip(*found, strict=True), strict=True):
            ratios[name] += (finite / limit)[np.isfinite(finite) & np.isfinite(limit)].tolist()
    return {name: [float(np.exp(np.log(r).mean())), max(r)] for name, r in ratios.items()}


def race(name: str, depth: int, seed: int, field: MeanField) -> tuple[NDArray, NDArray, NDArray]:
    """Rows of escapes, and the trajectories by SGD and predicted, each (T, 16)."""
    descent = OPTIMIZERS[name]
    at = np.unique(np.linspace(0, descent.steps, 401).round().astype(int))
    layers = [np.diag(STEEP ** (1 / depth))[None]] * depth
    simulated = product(sgd(layers, GaussianViews(np.ones(DIM), np.full(DIM, 1e-3)), [seed], descent, at.tolist()))
    # Momentum rests half a step before its first (Descent.inertia).
    t = descent.clock * (at + (0.5 if descent.momentum else 0) * (at > 0))
    finite, limit = predict(name, depth, t, field)
    times = np.array([crossings(t, w) for w in (simulated[:, 0], finite, limit)])
    here = np.flatnonzero(np.isfinite(times).all(0))
    index = list(OPTIMIZERS).index(name)
    return np.array([[index, depth, k, *times[:, k]] for k in here]), simulated[:, 0], finite


def simulate(seed: int = 0, lr: float = 4e-3, horizon: float = 8.0) -> tuple[Meta, Arrays]:
    """The grid of deaths and the races of three optimisers."""
    arrays = grid(seed, lr, horizon)
    runs = arrays["dot_simulated"].shape
    pairs = {
        loss: (arrays[f"{loss}_simulated"], np.broadcast_to(arrays[f"{loss}_predicted"], runs))
        for loss in ("dot", "spectral")
    }
    alive = {
        loss: (both[0] ** 2 > 1e-2 * UNDECAYED) & (both[1] ** 2 > 1e-2 * UNDECAYED) for loss, both in pairs.items()
    }
    from_start = np.broadcast_to(START, runs)
    meta: dict[str, Any] = {"r2": {}, "r2_change": {}, "exact": {}}
    for loss, (measured, predicted) in pairs.items():
        on = alive[loss]
        meta["r2"][loss] = r_squared(measured[on], predicted[on])
        meta["r2_change"][loss] = r_squared_change(measured[on], predicted[on], from_start[on])
        meta["exact"][loss] = int((dead(measured) == dead(predicted)).all(0).sum())
    meta["exact"]["closed"] = int((dead(arrays["spectral_simulated"]) == dead(arrays["closed"])).all(0).sum())
    margins = np.abs(arrays["margins"])
    meta["margin"] = float(margins[np.isfinite(margins)].min())
    field, rows = MeanField(np.eye(DIM), 1e-6 * np.eye(DIM)), []
    for name in OPTIMIZERS:
        races = [race(name, depth, seed, field) for depth in DEPTHS]
        rows += [row for row, _, _ in races if len(row)]
        measured, predicted = (np.stack(parts) for parts in list(zip(*races, strict=True))[1:])
        meta["r2"][name] = r_squared(measured[:, 1:], predicted[:, 1:])
        meta["r2_change"][name] = r_squared_change(measured[:, 1:], predicted[:, 1:], STEEP)
        of = np.concatenate([row for row, _, _ in races if len(row)])
        meta["r2"][f"{name}_escapes"] = r_squared(of[:, 3], of[:, 4])
    escapes = np.concatenate(rows)
    meta["r2"]["escapes"] = r_squared(escapes[:, 3], escapes[:, 4])
    meta["r2"]["escapes_infinite"] = r_squared(escapes[:, 3], escapes[:, 5])
    meta["slowing"] = slowing(field)
    decays = np.array([SHARES * largest_decay(depth) for depth in DEPTHS])
    fine = np.linspace(0, 1.1, 441)
    sizes = [
        [stationary_modes(CLEAN[:1], NOISE[:1] ** 2, "dot", TAU, x * largest_decay(depth), depth)[0] for x in fine]
        for depth in DEPTHS
    ]
    return meta, {
        "depths": np.array(DEPTHS),
        "shares": SHARES,
        "decays": decays,
        "fine": fine,
        "sizes": np.array(sizes),
        "escapes": escapes,
        **arrays,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    exact, r2, change = meta["exact"], meta["r2"], meta["r2_change"]
    lines = [f"dead directions exact in all runs at {exact['dot']} of 15 points (InfoNCE, mean field), "
             f"{exact['spectral']} of 15 (spectral loss, infinite batch), {exact['closed']} of 15 (its closed form); "
             f"no start nearer than {meta['margin']:.0%} to the smaller root"]  # fmt: skip
    columns = [
        dead(arrays["dot_simulated"][0]), dead(arrays["dot_predicted"]), dead(arrays["spectral_simulated"][0]),
        dead(arrays["closed"]),
    ]  # fmt: skip
    for i, depth in enumerate(arrays["depths"]):
        cells = "   ".join("{}/{} {}/{}".format(*(column[i, j] for column in columns)) for j in range(len(SHARES)))
        lines.append(f"  L = {depth}, InfoNCE SGD/mean field, spectral SGD/closed form:   {cells}")
    names = ("dot", "spectral", *OPTIMIZERS)
    lines.append("R^2 of ln w (of its change): " + ", ".join(f"{n} {r2[n]:.4f} ({change[n]:.4f})" for n in names))
    each = ", ".join(f"{n} {r2[f'{n}_escapes']:.4f}" for n in OPTIMIZERS)
    lines.append(
        f"R^2 of ln escape time, {len(arrays['escapes'])} modes: {r2['escapes']:.4f}, infinite batch "
        f"{r2['escapes_infinite']:.4f}; {each}"
    )
    plain, lars = meta["slowing"]["plain"], meta["slowing"]["lars"]
    lines.append(
        "later at N = 128 than in an infinite batch, no noise, geometric mean and largest: plain descent "
        f"{plain[0]:.2f}, {plain[1]:.2f}; LARS {lars[0]:.2f}, {lars[1]:.2f}; and with the noise of SGD"
    )
    for index, name in enumerate(OPTIMIZERS):
        rows = arrays["escapes"][arrays["escapes"][:, 0] == index]
        late = rows[:, 3] / rows[:, 5]
        lines.append(f"  {name:<9} later by {np.exp(np.log(late).mean()):.2f} "
                     f"(geometric mean), at most {late.max():.2f}")  # fmt: skip
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Size of the first mode over decay; dead directions on the grid, depths a little apart; escape times."""
    fig, (left, middle, right) = plots.figure(plots.TEXT, 2.4, columns=3)
    colors = plots.sequence_colors(len(DEPTHS))
    markers = dict(zip(OPTIMIZERS, "os^", strict=True))
    for i, (depth, color) in enumerate(zip(arrays["depths"], colors, strict=True)):
        left.plot(arrays["fine"], arrays["sizes"][i] / UNDECAYED[0], color=color, label=f"$L={depth}$")
        first = (arrays["spectral_simulated"][:, i, :, 0] ** 2).mean(0)
        left.plot(arrays["shares"], first / UNDECAYED[0], "o", color=color)
        beside = arrays["shares"] + 0.015 * (i - 1)
        middle.plot(beside, dead(arrays["dot_predicted"][i]), color=color)
        middle.plot(beside, dead(arrays["dot_simulated"][0, i]), "o", color=color)
        middle.plot(beside, dead(arrays["closed"][i]), "--", color=color, linewidth=0.8)
        for index, name in enumerate(OPTIMIZERS):
            rows = arrays["escapes"][(arrays["escapes"][:, 0] == index) & (arrays["escapes"][:, 1] == depth)]
            right.plot(rows[:, 4], rows[:, 3], markers[name], color=color, markeredgewidth=0)
    ends = np.array([arrays["escapes"][:, 3:5].min(), arrays["escapes"][:, 3:5].max()])
    right.plot(ends, ends, color="0.6", zorder=0)
    for name, marker in markers.items():
        right.plot([], [], marker, color="0.3", label={"lars": "LARS"}.get(name, name))
    left.set(xlabel=r"decay $\gamma$ / largest survived", ylabel=r"$\sigma^2$ / without decay, first mode")
    middle.set(xlabel=r"decay $\gamma$ / largest survived", ylabel="dead directions of 8", ylim=(-0.3, 8.6))
    right.set(xscale="log", yscale="log", xlabel="escape time, predicted", ylabel="escape time, SGD")
    middle.plot([], [], "--", color="0.3", linewidth=0.8, label="infinite batch")
    left.legend()
    middle.legend(loc="upper left")
    right.legend(loc="lower right")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
