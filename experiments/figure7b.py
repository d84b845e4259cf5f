"""Figure 7b, deeper networks with ReLU collapse more: the spectrum of the embedding after training, by depth.

    python experiments/figure7b.py                 # simulate, predict, save, draw: 40 s on one core
    python experiments/figure7b.py --plot-only     # redraw from the saved result

As figure7a.py, with a ReLU after each layer but the last, L = 1, 2, 3, 4, 6; the spectrum is that of the covariance of
the embeddings of 10,000 clean inputs.  Two predictions from the same start:
pool     the flow of the mean field's loss, E[f_N(p, q) - p], over a pool of quasi-random views sent through the
         network itself.  Its one approximation is that the negative logits of an anchor are Gaussian, now about a
         mean that the softmax does not see: p = z . (z' - E z') / tau, q = z^T Cov(z') z / tau^2.  Exact without ReLU.
linear   that of figure7a.py, as if there were no ReLU.
A ReLU gives the last hidden layer a mean, which tells no input from another: the last layer drops that direction, and
with it one dimension of the embedding dies, to the rounding of float32 (at L = 2, 3, 4; not yet at 6).

Writes figure7b.npz: t (T,), depths (5,); simulated (T, 5, runs, 16), pool and linear (T, 5, 16), singular values of the
embedding covariance; mean_cosine (5,), of the hidden mean with the direction that the last layer stretches least, zero
without a hidden layer; R^2 of the spectra's logarithms over all times and runs, values below 1e-8 of the largest
counted as that.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance, r_squared, r_squared_change
from collapse.theory import Descent, GaussianViews, MeanField, matrix_flow, negative_weights, sgd, singular_values

DIM = 16
NOISE = 1e-3
DEPTHS = (1, 2, 3, 4, 6)
NAMES = {"pool": "mean field with ReLU", "linear": "as if linear"}
FLOOR = 1e-8  # of the largest: what lies below is compared as if it lay there


def start(seed: int, depth: int) -> list[NDArray]:
    """Layers with singular values exp(-0.35 k) in random bases, those of figure7a.py."""
    rng, sigma = np.random.default_rng(seed + depth), np.exp(-0.35 * np.arange(DIM))
    bases = [np.linalg.svd(rng.random((DIM, DIM))) for _ in range(depth)]
    return [U * sigma @ Vh for U, _, Vh in bases]


def embed(x: torch.Tensor, layers: list[torch.Tensor]) -> torch.Tensor:
    """(n, 16) -> (n, 16), a ReLU after each layer but the last."""
    for W in layers[:-1]:
        x = torch.relu(x @ W.T)
    return x @ layers[-1].T


def spectrum(layers: list[NDArray], seed: int) -> NDArray:
    """Singular values of the embedding covariance over time, (T, 16), descending, for layers (T, 16, 16)."""
    clean = torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((10_000, DIM)))
    networks = zip(*map(torch.from_numpy, layers), strict=True)
    return np.array([singular_values(np.cov(embed(clean, list(network)).T)) for network in networks])


def mean_cosine(layers: list[NDArray], seed: int) -> float:
    """Cosine of the last hidden layer's mean with the last layer's least right singular vector, for layers (16, 16)."""
    if len(layers) == 1:
        return 0.0
    clean = torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((10_000, DIM)))
    hidden = torch.relu(embed(clean, [torch.from_numpy(W) for W in layers[:-1]])).mean(0).numpy()
    return float(abs(np.linalg.svd(layers[-1]).Vh[-1] @ hidden) / np.linalg.norm(hidden))


def pool_flow(t: NDArray, layers: list[NDArray], field: MeanField) -> list[NDArray]:
    """The gradient flow of the mean field's loss with the network's own embeddings: L arrays (T, 16, 16)."""
    # Each point has its opposite: a ReLU makes the mean over views one that a pool must get right.
    views = torch.from_numpy(np.concatenate([field.x, -field.x, field.x_prime, -field.x_prime]))
    tau, shape = field.temperature, (len(layers), DIM, DIM)

    def rate(_: float, flat: NDArray) -> NDArray:
        weights = torch.tensor(flat.reshape(shape), requires_grad=True)
        z, z_prime = embed(views, list(weights)).chunk(2)
        centred = z_prime - z_prime.mean(0)
        S = centred.T @ centred / len(centred)
        p, q = (z * centred).sum(1) / tau, ((z @ S) * z).sum(1) / tau**2
        pull, spread = negative_weights(p.detach().numpy(), q.detach().numpy(), field.batch)
        # df = pi dp + D dq / 2: an expression with the gradient of E[f - p].
        loss = (torch.from_numpy(spread) * q / 2 - torch.from_numpy(pull) * p).mean()
        return -torch.autograd.grad(loss, weights)[0].numpy().ravel()

    flow = solve_ivp(rate, (t[0], t[-1]), np.ravel(layers), "RK23", t_eval=t, rtol=1e-3, atol=1e-4)
    return list(flow.y.T.reshape(-1, *shape).swapaxes(0, 1))


def linear_flow(t: NDArray, layers: list[NDArray], field: MeanField) -> NDArray:
    """Singular values of the covariance without ReLU, (T, 16)."""
    product = np.eye(DIM)
    for W in matrix_flow(t, layers, field.isotropic_gradient):
        product = W @ product
    return singular_values(product) ** 2


def count(values: NDArray) -> NDArray:
    """Collapsed dimensions of spectra (..., 16): below 1e-2 of the largest."""
    return (values < 1e-2 * values[..., :1]).sum(-1)


def floored(values: NDArray) -> NDArray:
    return np.maximum(values, FLOOR * values[..., :1])


def simulate(
    seed: int = 0, runs: int = 1, lr: float = 0.01, horizon: float = 100.0, points: int = 512
) -> tuple[Meta, Arrays]:
    """SGD, the flow over a pool of 4 x `points` views, and the linear prediction, depth by depth."""
    descent = Descent(lr, round(horizon / lr), activation="relu")
    at = np.unique([0, *np.geomspace(descent.steps / 1000, descent.steps, 40).astype(int)])
    t, views = lr * at, GaussianViews(np.ones(DIM), np.full(DIM, NOISE))
    covariances = np.eye(DIM), NOISE**2 * np.eye(DIM), descent.batch, descent.temperature
    field, pool = MeanField(*covariances), MeanField(*covariances, points=points)
    found: dict[str, list[NDArray]] = {"simulated": [], "pool": [], "linear": []}
    cosines = []
    for depth in DEPTHS:
        layers = start(seed, depth)
        trained = sgd([np.tile(W, (runs, 1, 1)) for W in layers], views, range(seed, seed + runs), descent, at.tolist())
        found["simulated"].append(np.stack([spectrum([W[:, i] for W in trained], seed) for i in range(runs)], axis=1))
        cosines.append(mean_cosine([W[-1, 0] for W in trained], seed))
        found["pool"].append(spectrum(pool_flow(t, layers, pool), seed))
        found["linear"].append(linear_flow(t, layers, field))
    arrays = {name: np.stack(values, axis=1) for name, values in found.items()}
    simulated = floored(arrays["simulated"])
    r2 = {
        name: [
            r_squared(simulated[:, j], np.repeat(floored(arrays[name])[:, j, None], runs, axis=1))
            for j in range(len(DEPTHS))
        ]
        for name in ("pool", "linear")
    }
    meta = {"r2": r2, "r2_change": changes(arrays), "noise": NOISE}
    return meta, {"t": t, "depths": np.array(DEPTHS), "mean_cosine": np.array(cosines), **arrays}


def changes(arrays: Arrays) -> dict[str, list[float]]:
    """R^2 of the change of ln lambda from the start, by prediction and depth."""
    runs = floored(arrays["simulated"])
    return {
        name: [
            r_squared_change(runs[1:, j], np.broadcast_to(floored(arrays[name])[1:, j, None], runs[1:, j].shape), w0)
            for j, w0 in enumerate(runs[0])
        ]
        for name in ("pool", "linear")
    }


def report(meta: Meta, arrays: Arrays) -> str:
    lines = ["R^2 of ln singular values of Cov(z), all times, and collapsed dimensions at the end"]
    last = {name: count(arrays[name][-1]).tolist() for name in ("simulated", "pool", "linear")}
    for j, depth in enumerate(arrays["depths"]):
        lines.append(
            f"  L = {depth}   R^2 (of the change) pool {meta['r2']['pool'][j]:.3f} "
            f"({meta['r2_change']['pool'][j]:.3f}), linear {meta['r2']['linear'][j]:.3f} "
            f"({meta['r2_change']['linear'][j]:.3f})"
            f"   collapsed: SGD {last['simulated'][j]}, pool {last['pool'][j]}, linear {last['linear'][j]}"
            f"   cosine of hidden mean and dropped direction {arrays['mean_cosine'][j]:.3f}"
        )
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Spectra at the end by depth, over the pool's prediction on the left and the linear one on the right."""
    fig, axes = plots.figure(plots.TEXT, 2.6, columns=2, sharey=True)
    index, depths = np.arange(1, DIM + 1), arrays["depths"]
    for ax, name, dashes in zip(axes, ("pool", "linear"), ("-", "--"), strict=True):
        for j, (depth, color) in enumerate(zip(depths, plots.sequence_colors(len(depths)), strict=True)):
            predicted = np.log(arrays[name][-1, j])
            ax.plot(index, predicted, dashes, color=color, label=f"$L={depth}$")
            ax.plot(index, np.log(arrays["simulated"][-1, j]).mean(0), "o", color=color)
        ax.set(xlabel=f"index of the singular value; lines: {NAMES[name]}", xticks=[1, 4, 8, 12, 16])
    axes[0].set(ylabel=r"$\ln\,\lambda$ of $\mathrm{Cov}(z)$", ylim=(-42, 0))
    runs = arrays["simulated"].shape[2]
    axes[0].plot([], [], "o", color="0.4", label="SGD" if runs == 1 else f"SGD, mean of {runs} runs")
    axes[0].legend(loc="lower left")
    return fig


if __name__ == "__main__":
    # With ReLU, SGD multiplies a rounding by 1e7 and more: two processors part by the time of 20, and values of a run
    # then differ by up to their size.  Scores over all of them stay: by 1e-3, those of the change by a tenth.
    values = Tolerance(3)
    scores = Tolerance(0.2)
    main(
        __file__, simulate, report, draw, Tolerance(0.05, of={"simulated": values, "pool": values, "r2_change": scores})
    )
