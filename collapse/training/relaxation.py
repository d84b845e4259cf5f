"""Relaxation: the last linear map of a network, trained alone on real views until it stands still.

The problem it solves: theory says where the loss leaves a layer, and a training run ends long before its last layer is
there.  Here the trunk is frozen and its representations h of augmented views are computed once; a linear map r = W h
and the head behind it are trained on pairs of these views, and what they come to can be laid beside the theory.

h is centred, and scaled to a mean variance of 1; r = h at the start.  M is the map that the loss sees first: W, its
first rows (DirectCLR), or V W with the first linear layer V of a projector.  The gradient G of M is preconditioned,
H = G (Cov(h) + ridge)^-1, and the layers share it as gradient descent does: dW = -V^T H, dV = -H W^T.  So the
stationary points are those of gradient descent, while the time does not depend on how unequal the variances of h are.
W W^T - V^T V is conserved to rounding, as by gradient flow (lemma 3 of arXiv 2110.09348), however long the steps are.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from collapse import InputError, theory
from collapse.arguments import choice
from collapse.data.labelled import Labelled
from collapse.metrics.attribution import signal_and_augmentation
from collapse.models.heads import Subvector, default_dim, make_head
from collapse.recipes.config import Config
from collapse.recipes.views import uniforms
from collapse.spectra import Spectrum
from collapse.spectra.measure import spectrum
from collapse.training.losses import contrastive_loss

DEAD = 1e-3  # a share of the largest below which a direction counts as dead, beside the floor of rounding
CLEAR = 10.0  # times that floor, whose estimate lies among the values that rounding leaves
# What `make_head` calls it, and the steps of `Relaxation`.  The balance of a projector's first layer with W needs the
# ridge; behind a batch norm the gradient is larger.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {"lr": 0.05}),
    "directclr": ("lowrank-diagonal", {"lr": 0.05}),
    "linear": ("linear", {"lr": 0.02, "ridge": 1e-3}),
    "mlp": ("mlp", {"lr": 0.005, "ridge": 1e-3}),
}


class Views:
    """Representations of augmented views, centred and scaled, in their principal coordinates.

    Attributes:
        rows: (n, V, d) float32, mean variance 1, on the device of the relaxation.  basis: (d, d), h = basis y.
        signal, total: (d, d) float64 in these coordinates, S and S + A of `collapse.metrics.attribution`.
        fractions: (k,) signal fractions, descending, of the generalised eigenvectors of signal and total.
        modes: (d, k) these vectors, of unit total variance.  Directions below 1e-6 of the largest have none.

    Raises InputError: another shape.
    """

    def __init__(self, views: NDArray, device: str = "cpu") -> None:
        """views: (n, V, d) representations of V >= 2 views of n images.  device: where they are relaxed."""
        if views.ndim != 3 or views.shape[1] < 2 or len(views) < 2:
            raise InputError(f"views: got shape {views.shape}, expected (images, 2 views or more, d)")
        images, count, d = views.shape
        rows = views.astype(np.float64) - views.reshape(-1, d).mean(0, dtype=np.float64)
        rows /= np.sqrt((rows**2).mean())
        self.basis = np.linalg.eigh(np.cov(rows.reshape(-1, d).T))[1][:, ::-1].copy()
        rows = rows @ self.basis
        covariance, means = np.cov(rows.reshape(-1, d).T), np.cov(rows.mean(1).T)
        self.signal, augmentation = signal_and_augmentation(covariance, means, images, count)
        self.total = self.signal + augmentation
        values, vectors = np.linalg.eigh(self.total)
        kept = values > 1e-6 * values[-1]
        white = vectors[:, kept] / np.sqrt(values[kept])
        fractions, turn = scipy.linalg.eigh(white.T @ self.signal @ white)
        self.fractions, self.modes = fractions[::-1].copy(), (white @ turn)[:, ::-1].copy()
        self.rows = torch.from_numpy(rows).float().to(device)

    def predicted(self, width: int, temperature: float) -> NDArray:
        """(k,) shares of the modes in an embedding of `width` entries, by water-filling of the `width` largest."""
        shares = np.zeros(len(self.fractions))
        shares[:width] = theory.water_level(self.fractions[:width], temperature)[1]
        return shares


@dataclass(frozen=True)
class State:
    """What a relaxation has come to.

    r, z: spectra of the representation and of the embedding, rows of length one.  shares: (k,) of the modes in z.
    drift: |change of W W^T - V^T V| over itself at the start, which is rounding; 0 without V.
    """

    step: int
    r: Spectrum
    z: Spectrum
    shares: NDArray
    drift: float

    def living(self) -> dict[str, list[int]]:
        """Counts above DEAD times the largest and clear of the floor, of "r" and "z"."""
        spectra = {"r": self.r, "z": self.z}
        return {name: living(s.singular_values, s.floor) for name, s in spectra.items()}

    def moved(self, before: "State") -> float:
        """The largest change since: of the counts, as a share of the width; of the shares, in total variation."""
        pairs = [(self.living()[name], before.living()[name], len(s.singular_values))
                 for name, s in (("r", self.r), ("z", self.z))]  # fmt: skip
        counts = [abs(a - b) / width for now, then, width in pairs for a, b in zip(now, then, strict=True)]
        return max(*counts, float(np.abs(self.shares - before.shares).sum() / 2))


def represented(
    net: nn.Module, config: Config, data: Labelled, images: int, views: int, device: str = "cpu", workers: int = 0
) -> NDArray[np.float64]:
    """(images, views, d) representations of views augmented as in training, of images drawn from all classes.

    net: (n, 3, h, w) -> (n, d), taken to the device and to eval mode.  images: at most as many as data has.

    Raises InputError: an image cannot be read.
    """
    augmentation, preprocess = config.augmentation(0), config.preprocessing()
    chosen = data.subset(np.sort(np.random.default_rng(0).permutation(len(data))[:images]))
    found: list[list[NDArray]] = [[] for _ in range(views)]
    start, net = 0, net.eval().to(device)
    with torch.inference_mode():
        for pixels in chosen.batches(preprocess, 250, workers):
            indices = np.arange(start, start + len(pixels))
            start += len(pixels)
            there = pixels.to(device)
            for view in range(views):
                u = uniforms(config.seed + 1, 0, indices, view, augmentation.DRAWS)
                x = preprocess.standardise(augmentation(there, u))
                found[view].append(net(x).cpu().numpy())
    return np.stack([np.concatenate(one) for one in found], axis=1).astype(np.float64)


def agreement(shares: NDArray, predicted: NDArray) -> dict[str, float]:
    """How shares of modes (k,) agree with those predicted (k,), zero where a mode dies.

    spearman: rank correlation of those predicted to live.  held: what the others hold.
    """
    alive = predicted > 0
    spearman = float(stats.spearmanr(shares[alive], predicted[alive]).statistic)
    return {"spearman": spearman, "held": float(shares[~alive].sum())}


def living(values: NDArray, floor: float) -> list[int]:
    """How many of singular values, (d,), lie above DEAD times the largest, and CLEAR of the floor."""
    return [int((values > max(DEAD * values.max(), CLEAR * floor)).sum()), int((values > CLEAR * floor).sum())]


def _balanced_step(W: Tensor, V: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """W (d, d) and V (m, d) after a step of dW = -V^T H, dV = -H W^T, H (m, d), that conserves W W^T - V^T V.

    [W, V^T] moves by -[W, V^T] K with K = [[0, H^T], [H, 0]].  Here it is multiplied by the Cayley transform
    (1 - K / 2) (1 + K / 2)^-1: the flow of a constant H to second order.  Steps that add dW and dV let the difference
    grow with their noise, which changes what lives in r.
    """
    inner = torch.eye(len(H), dtype=H.dtype, device=H.device) - 0.25 * H @ H.T
    between, _ = torch.linalg.solve_ex(inner, V - 0.5 * H @ W.T)  # waits for no device
    return W - between.T @ H, 2 * between - V


class Relaxation:
    """A linear map W behind a frozen trunk, from r = h on, and a head, trained on pairs of views.

    Attributes: W (d, d) in the views' coordinates; V, the head's first linear layer, or None; rest, what follows.
    W and V are float64, whose rounding does not keep alive what dies, and all is computed with them in float32.
    All is on the views' device; draws of another kind of device are other draws.
    """

    @classmethod
    def of(cls, views: Views, head: str, temperature: float, seed: int = 0) -> "Relaxation":
        """Behind a new head of `HEADS`, with its steps; seed: of the head and of the batches.

        Raises InputError: no such head.
        """
        choice("head", head, tuple(HEADS))
        kind, how = HEADS[head]
        d = views.rows.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = make_head(kind, d, default_dim(kind, d))
        return cls(views, made, temperature, seed=seed, **how)

    def __init__(
        self,
        views: Views,
        head: nn.Module,
        temperature: float,
        lr: float = 0.05,
        batch: int = 256,
        ridge: float = 1e-6,
        seed: int = 0,
    ) -> None:
        """head: of `models.make_head`; it is trained in place.  lr: relative to the total variance of M h at the start.

        ridge: times the largest variance of h.  seed: of the batches.
        """
        self.views, self.temperature, self.batch = views, temperature, batch
        device = views.rows.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.W = torch.from_numpy(views.basis.copy()).to(device)
        head = head.to(device)
        linear = isinstance(head, nn.Sequential) and isinstance(head[0], nn.Linear)
        self.V = head[0].weight.detach().double() if linear else None  # type: ignore[index]
        self.rest: nn.Module = head[1:] if linear else nn.Identity()  # type: ignore[index]
        self.count = head.dim if isinstance(head, Subvector) else len(self.W)
        variances = torch.from_numpy(views.total.diagonal().copy()).float().to(device)
        self.inverse = 1 / (variances + ridge * variances.max())
        self.covariance = torch.from_numpy(views.total).float().to(device)
        self.conserved = self._difference()
        self.length, self.done = float(self._length()), 0
        self.rate = lr * self.length

    def _difference(self) -> Tensor:
        return self.W @ self.W.T - self.V.T @ self.V if self.V is not None else torch.zeros(1)

    def predicted(self) -> tuple[NDArray[np.float64], dict[str, list[int]]]:
        """(shares (k,) of the modes in z at rest, `State.living` there), asked before the first step.

        Water-filling of the trunk's own signal fractions.  r is z without a projector.  Behind DirectCLR the entries
        that the loss does not see stay as they are; the others have the shares of water-filling, and together the
        variance that they start with.  Behind a projector W W^T = 1 + V^T V - V0^T V0 for its first layer V, which
        leaves no direction of r dead: it stays as it was.
        """
        views, start = self.views, self.state()
        shares = views.predicted(len(start.z.singular_values), self.temperature)
        of_z = living(shares, 0.0)
        if self.V is not None:
            return shares, {"z": of_z, "r": start.living()["r"]}
        if self.count == len(self.W):
            return shares, {"z": of_z, "r": of_z}
        length = np.trace(views.basis[: self.count] @ views.total @ views.basis[: self.count].T)
        seen = (np.sqrt(length * shares) * views.modes).T[: self.count]
        rows = np.concatenate([seen, views.basis[self.count :]])
        values = np.linalg.eigvalsh(rows @ views.total @ rows.T)
        return shares, {"z": of_z, "r": living(values, 1e-13 * values.max())}

    def seen(self) -> Tensor:
        """M, the first map that the loss sees, (m, d) float32."""
        W = self.W[: self.count].float()
        return W if self.V is None else self.V.float() @ W

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Two different views of `batch` images at random, each (batch, d)."""
        images, count, _ = self.views.rows.shape
        chosen, first, ahead = (
            torch.randint(high, (self.batch,), generator=self.generator, device=self.generator.device)
            for high in (images, count, count - 1)
        )
        second = (first + 1 + ahead) % count
        return self.views.rows[chosen, first], self.views.rows[chosen, second]

    def step(self, share: float = 1.0) -> None:
        """One step on a fresh batch, of length `share` times lr."""
        if self.V is None and self.done % 10 == 0:
            self._rescale()
        M = self.seen().detach().requires_grad_()
        weights = list(self.rest.parameters())
        z, z_prime = (self.rest(rows @ M.T) for rows in self.pairs())
        G, *others = torch.autograd.grad(contrastive_loss(z, z_prime, self.temperature), [M, *weights])
        with torch.no_grad():
            rate = share * self.rate
            H = rate * G * self.inverse
            if self.V is None:
                self.W[: self.count] -= H
            else:
                self.W, self.V = _balanced_step(self.W, self.V, H.double())
            for weight, gradient in zip(weights, others, strict=True):
                weight.sub_(gradient, alpha=rate)
        self.done += 1

    def _rescale(self) -> None:
        """Bring M back to its first length, which the loss does not see and only the noise of the steps changes."""
        self.W[: self.count] *= (self.length / float(self._length())) ** 0.5

    def _length(self) -> Tensor:
        """Total variance of M h."""
        M = self.seen()
        return ((M @ self.covariance) * M).sum()

    @torch.no_grad()
    def state(self) -> State:
        """What it has come to, over all images in two views. Raises InputError: a row is NaN or infinite."""
        rows = self.views.rows[:, :2].flatten(0, 1)
        r, z = self._rows(rows)
        few = rows[:: max(1, len(rows) // 512)].double()
        errors = [a - b for a, b in zip(self._rows(few.float()), self._rows(few, torch.float64), strict=True)]
        spectra = [
            spectrum(output.cpu().numpy(), rounding=error.cpu().numpy())
            for output, error in zip((r, z), errors, strict=True)
        ]
        q = rows.double() @ torch.from_numpy(self.views.modes).to(rows.device)
        centred = z.double() - z.double().mean(0)
        shares = (centred.T @ q).square().sum(0).cpu().numpy()
        norm = self.conserved.norm()
        drift = float((self._difference() - self.conserved).norm() / norm) if self.V is not None else 0.0
        return State(self.done, spectra[0], spectra[1], shares / shares.sum(), drift)

    def _rows(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """r and z of rows (n, d) of length one, computed in dtype."""
        rest = self.rest.eval().to(dtype)
        r = rows.to(dtype) @ self.W.to(dtype).T
        z = rest(r[:, : self.count] if self.V is None else r @ self.V.to(dtype).T)
        self.rest.train().float()
        return nn.functional.normalize(r), nn.functional.normalize(z)


def relax(
    relaxation: Relaxation, first: int = 250, limit: int = 4000, still: float = 0.02,
    watch: Callable[[State, float], None] = lambda state, moved: None,
) -> tuple[State, float, float]:  # fmt: skip
    """Train until, over a doubling of the steps, nothing has moved by more than `still`, or `limit` is reached.

    Then the steps shrink to nothing over as many more as a quarter of those taken, which takes their noise out.

    Args:
        first: steps after which it is looked at first; then after twice as many, and so on.
        watch: called with each state and how far it is from the one before (`State.moved`).

    Returns:
        The last state, how far it had moved over the last doubling, and the seconds taken.
    """
    since, before, moved = time.perf_counter(), relaxation.state(), np.inf
    goal = first
    while moved > still and goal <= limit:
        while relaxation.done < goal:
            relaxation.step(min(1.0, (relaxation.done + 1) / first))
        now = relaxation.state()
        moved, before, goal = now.moved(before), now, 2 * goal
        watch(now, moved)
    more = relaxation.done // 4
    for k in range(more):
        relaxation.step(1 - (k + 1) / (more + 1))
    return relaxation.state(), moved, time.perf_counter() - since
