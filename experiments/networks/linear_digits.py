"""Real images, real augmentation, a linear network: how far the Gaussian theory goes on scikit-learn's digits.

    python experiments/networks/linear_digits.py              # augment, simulate, predict, save, draw: 25 s on one core
    python experiments/networks/linear_digits.py --plot-only  # redraw from the saved result

z = W x on the 64 pixels of 1,797 images, in crops, rotations and changes of brightness and contrast as in digits.py;
pixels centred and scaled to a mean square of 1; dot-product loss, batch and temperature of the official toy script.
W starts uniform in +-0.03, a quarter of a layer of torch, so that the loss is not saturated at the start.
Each image has 32 versions, made beforehand; a batch draws distinct images and two distinct versions of each, so that
    C0 = covariance of the image means - Ce / 32,    Ce = covariance within images (divisor 31)
are exactly the second moments of what SGD sees.  The prediction knows nothing else of the images.

To tell what a failure of the prediction is due to, the image means, the deviations from them, or both are replaced by
Gaussian ones of exactly the same covariance: four data sets, one prediction.  It fits real images with Gaussian
augmentation, and neither set with the real one, under which more of the embedding collapses.

Directions are those of the signal fraction, C0 u = rho C u, u^T C u = 1: an infinite batch stops at
W^T W = tau C^-1 C0 C^-1, where direction k has the variance u^T C W^T W C u = tau rho.

Writes linear_digits.npz: sets (4,), t (T,) = learning rate x steps, rho (64,) descending; spectrum, the singular values
of W C^1/2, and variance along the directions: NAME_simulated (T, 4, seeds, 64), NAME_predicted (mean field) and
NAME_population (infinite batch), (T, 64); kurtosis (2, 64), excess, of means and of deviations along the directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.stats import kurtosis
from sklearn.datasets import load_digits
from torch import Tensor

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.recipes.config import make_config
from collapse.recipes.views import Augmentation, uniforms
from collapse.results import Tolerance, change_scores, change_text, r_squared
from collapse.theory import Descent, MeanField, matrix_flow, population_gradient, sgd, singular_values
from collapse.theory.arrays import Floats

AUGMENTATION = make_config("digits").augmentation(0)
START, POINTS = 0.03, 4096
FLOOR = 1e-6  # of the largest: float32 weights are rounded by 2^-24, 64 columns of them by eight times as much in norm
MARKERS = "os^v"
SETS = {
    "real": "digits",
    "images": "real images, Gaussian augmentation",
    "augmentation": "Gaussian images, real augmentation",
    "gaussian": "both Gaussian",
}


@dataclass(frozen=True)
class BankViews:
    """Two different versions of each of `batch` different images, one bank of versions (n, versions, d) a run."""

    banks: Sequence[Tensor]

    def draw(self, generators: Sequence[torch.Generator], steps: int, batch: int) -> Tensor:
        """(R, steps, 2, batch, d) float32."""
        return torch.stack([self._pairs(*run, steps, batch) for run in zip(self.banks, generators, strict=True)])

    def _pairs(self, bank: Tensor, generator: torch.Generator, steps: int, batch: int) -> Tensor:
        n, versions, _ = bank.shape
        images = torch.rand(steps, n, generator=generator).topk(batch, sorted=False).indices
        first = torch.randint(versions, images.shape, generator=generator)
        further = torch.randint(1, versions, images.shape, generator=generator)
        rows = torch.stack([first, (first + further) % versions], dim=1) + versions * images[:, None]
        return bank.view(n * versions, -1)[rows]


def augmented(versions: int, seed: int) -> NDArray:
    """(n, versions, 64): each digit's versions, centred, mean square 1."""
    pixels = torch.from_numpy(load_digits().images / 16).float()[:, None]
    draws = [uniforms(seed, 0, np.arange(len(pixels)), v, Augmentation.DRAWS) for v in range(versions)]
    bank = torch.stack([AUGMENTATION(pixels, u) for u in draws], dim=1).flatten(2).double().numpy()
    bank -= bank.mean((0, 1))
    return bank / np.sqrt((bank**2).mean())


def moments(x: NDArray) -> NDArray:
    """(d, d) second moments of (..., d)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows / len(rows)


def gaussian_like(x: NDArray, rng: np.random.Generator) -> NDArray:
    """Gaussian points of the shape and exactly the second moments of x, (n, versions, d); centred where x is."""
    normal = rng.standard_normal(x.shape)
    normal -= normal.mean(1 if x.shape[1] > 1 else 0, keepdims=True)
    white = np.linalg.solve(np.linalg.cholesky(moments(normal)), normal.reshape(-1, x.shape[-1]).T).T
    return (white @ np.linalg.cholesky(moments(x)).T).reshape(x.shape)


def data_sets(bank: NDArray, seed: int) -> dict[str, NDArray]:
    """The bank, and the same with Gaussian deviations, Gaussian means, or both."""
    rng = np.random.default_rng(seed)
    means = bank.mean(1, keepdims=True)
    deviations = bank - means
    noise, points = gaussian_like(deviations, rng), gaussian_like(means, rng)
    sets = (bank, means + noise, points + deviations, points + noise)
    return dict(zip(SETS, sets, strict=True))


def measure(W: NDArray, C: NDArray, U: NDArray) -> Arrays:
    """The spectrum of W C^1/2 and the variance along the directions U, both (..., 64)."""
    return {"spectrum": singular_values(W @ np.linalg.cholesky(C)), "variance": ((W @ C @ U) ** 2).sum(-2)}


def predict(W: NDArray, t: NDArray, C0: NDArray, Ce: NDArray, descent: Descent) -> dict[str, NDArray]:
    """W(t), (T, 64, 64): the mean field of the batch, and an infinite batch."""
    gradients: dict[str, Callable[[Floats], Floats]] = {
        "predicted": MeanField(C0, Ce, descent.batch, descent.temperature, POINTS).gradient,
        "population": partial(population_gradient, C0=C0, Ce=Ce, temperature=descent.temperature),
    }
    return {kind: matrix_flow(t, [W], gradient, rtol=1e-3)[0] for kind, gradient in gradients.items()}


def floored(values: NDArray) -> NDArray:
    return np.maximum(values, FLOOR * values.max(-1, keepdims=True))


def scores(arrays: Arrays) -> Meta:
    """R^2 of the logarithms, of each prediction and of the start, against the mean over seeds; and between two runs.

    Values below `FLOOR` of the largest, which rounding alone decides, count as that.
    changes: of each prediction, the scores of the change from the start (collapse.results.change_scores).
    """
    r2: Meta = {}
    for s, name in enumerate(SETS):
        for what in ("spectrum", "variance"):
            runs = np.log(floored(arrays[f"{what}_simulated"][:, s]))
            mean = np.exp(runs.mean(1))
            forecasts = {kind: floored(arrays[f"{what}_{kind}"]) for kind in ("predicted", "population")}
            forecasts["start"] = np.broadcast_to(mean[0], mean.shape)
            r2[f"{name}_{what}"] = {
                kind: {"trajectory": r_squared(mean, values), "final": r_squared(mean[-1], values[-1])}
                for kind, values in forecasts.items()
            } | {"runs": r_squared(np.exp(runs[-1, 0]), np.exp(runs[-1, -1]))}
            r2[f"{name}_{what}"]["changes"] = {
                kind: change_scores(np.exp(runs), forecasts[kind]) for kind in ("predicted", "population")
            }
    return r2


def simulate(
    seed: int = 0, seeds: int = 2, steps: int = 5000, lr: float = 1e-3, versions: int = 32
) -> tuple[Meta, Arrays]:
    """The four data sets, `seeds` runs each, as one batch from one start; the prediction that they share."""
    descent, bank = Descent(lr, steps), augmented(versions, seed)
    d, means = bank.shape[-1], bank.mean(1)
    deviations = bank - means[:, None]
    Ce = moments(deviations) * versions / (versions - 1)
    C0 = moments(means) - Ce / versions
    rho, U = (part[..., ::-1] for part in eigh(C0, C0 + Ce))
    W = np.random.default_rng(seed).uniform(-START, START, (d, d))
    at = np.concatenate([[0], np.unique(np.geomspace(10, steps, 30).astype(int))])
    banks = [torch.from_numpy(one).float() for one in data_sets(bank, seed).values() for _ in range(seeds)]
    batches = list(range(seed, seed + seeds)) * len(SETS)
    trained = sgd([np.tile(W, (len(banks), 1, 1))], BankViews(banks), batches, descent, at.tolist())[0]
    trained = trained.reshape(len(at), len(SETS), seeds, d, d)
    flows = {"simulated": trained} | predict(W, lr * at, C0, Ce, descent)
    arrays = {
        f"{what}_{kind}": values for kind, flow in flows.items() for what, values in measure(flow, C0 + Ce, U).items()
    }
    meta = {
        "r2": scores(arrays),
        "temperature": descent.temperature,
        "trace": {"C0": np.trace(C0), "Ce": np.trace(Ce)},
        "dropped": d - int(np.linalg.matrix_rank(C0 + Ce, hermitian=True)),
        "clipped": int((np.linalg.eigvalsh(C0 + Ce - C0 @ np.linalg.pinv(C0 + Ce, hermitian=True) @ C0) < 0).sum()),
        "condition_of_C": np.linalg.cond(C0 + Ce),
        "negative": int((rho < 0).sum()),
        "chance": 2 * np.sqrt(d / len(bank)) / versions,
    }
    tails = np.stack([kurtosis(part.reshape(-1, d) @ U) for part in (means, deviations)])
    return meta, {"sets": np.array(list(SETS)), "t": lr * at, "rho": rho, "kurtosis": tails, **arrays}


def collapsed(spectrum: NDArray) -> NDArray:
    """How many eigenvalues of the embedding covariance lie below 1e-2 of the largest."""
    return (spectrum < 0.1 * spectrum[..., :1]).sum(-1)


def report(meta: Meta, arrays: Arrays) -> str:
    trace = meta["trace"]
    lines = [
        f"tr C0 {trace['C0']:.1f}, tr Ce {trace['Ce']:.1f}, condition of C {meta['condition_of_C']:.0f}; directions "
        f"that the pseudo-inverse of C drops: {meta['dropped']}, of x' given x that have a variance below zero and are "
        f"clipped: {meta['clipped']}",
        f"signal fractions {arrays['rho'][0]:.2f} to {arrays['rho'][-1]:.4f}, {meta['negative']} of them below zero; "
        f"where there is no signal they reach {meta['chance']:.3f} either way by chance",
        "R^2 of logarithms at the end (all times), mean field; infinite batch; no training at all; between runs:",
    ]
    for name in arrays["sets"]:
        for what in ("spectrum", "variance"):
            r2 = meta["r2"][f"{name}_{what}"]
            kinds = "; ".join(
                f"{r2[kind]['final']:7.3f} ({r2[kind]['trajectory']:.3f})"
                for kind in ("predicted", "population", "start")
            )
            lines.append(f"  {SETS[str(name)]:<35} {what:<9} {kinds}; {r2['runs']:.4f}")
            lines.append(f"  {'':<35} change, mean field {change_text(r2['changes']['predicted'])}")
    counts = [", ".join(map(str, collapsed(runs))) for runs in arrays["spectrum_simulated"][-1]]
    lines.append("covariance below 1e-2 of the largest at the end: " + "; ".join(counts))
    predicted = collapsed(arrays["spectrum_predicted"])
    lines.append(f"  predicted {predicted[-1]}, at the start {predicted[0]}")
    means, deviations = np.median(arrays["kurtosis"], axis=1)
    lines.append(f"median excess kurtosis over directions: image means {means:.1f}, deviations {deviations:.1f}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: the digits over time. Middle: the four data sets at the end. Right: variance by signal fraction, if > 0."""
    fig, axes = plots.figure(plots.TEXT, 3.0, columns=3)
    draw_spectra(axes[0], axes[1], arrays)
    right, use = axes[2], arrays["rho"] > 0
    x = np.log(arrays["rho"][use])
    right.plot(x, np.log(arrays["variance_predicted"][-1, use]), color="0.3")
    right.plot(x, np.log(meta["temperature"]) + x, "--", color="0.6", label=r"$t\to\infty$: $\tau\rho$")
    for s, marker in enumerate(MARKERS):
        right.plot(x, np.log(arrays["variance_simulated"][-1, s]).mean(0)[use], marker, color=f"C{s}", markersize=2)
    right.set(xlabel=r"$\ln\rho$, signal fraction", ylabel="ln variance along the direction")
    right.legend(loc="upper left")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=6)
    return fig


def draw_spectra(left: Any, middle: Any, arrays: Arrays) -> None:
    """Spectra of the embedding covariance: of the digits at three times, of the four data sets at the end."""
    simulated, predicted = 2 * np.log(arrays["spectrum_simulated"]).mean(2), 2 * np.log(arrays["spectrum_predicted"])
    t, index = arrays["t"], np.arange(1, predicted.shape[1] + 1)
    for i, color in zip(np.searchsorted(t, t[-1] * np.array([0, 0.1, 1])), plots.sequence_colors(3), strict=True):
        left.plot(index, predicted[i], color=color, label=f"$t={t[i]:.2g}$")
        left.plot(index[::-3], simulated[i, 0, ::-3], "o", color=color)
    left.set(xlabel="index of the singular value", ylabel=r"$\ln\,\lambda$ of $\mathrm{Cov}(z)$", title="digits")
    left.legend(loc="lower left")
    middle.plot(index, predicted[-1], color="0.3", label="prediction")
    bottom = predicted[-1].min() - 1
    for s, (label, marker) in enumerate(zip(SETS.values(), MARKERS, strict=True)):
        below = int((simulated[-1, s] < bottom).sum())
        label = label.replace(", ", ",\n") + (f"\n({below} values below)" if below else "")
        middle.plot(index[s::4], simulated[-1, s, s::4], marker, color=f"C{s}", label=label)
    middle.set(xlabel="index of the singular value", ylim=(bottom, None), title="at the end")


if __name__ == "__main__":
    # Float32: values agree to 4e-5 of themselves, and scores of a change that are next to zero to 8e-4.
    main(__file__, simulate, report, draw, Tolerance(1e-2))
