"""Theorem 2, alignment: two linear layers under a fixed positive definite X, and how far the theorem carries.

    python experiments/theorem2.py                 # integrate, save, draw: 5 s on one core
    python experiments/theorem2.py --plot-only     # redraw from the saved result

Both layers are 16 x 16, with singular values exp(-0.02 k) and independent random singular vectors; X has eigenvalues
from 1 to 0.5 in a random basis.  The flow dW_l/dt of lemma 3 with dL/dW = -W X blows up in finite time; here its clock
is slowed by the largest singular value of W = W2 W1, which leaves the path as it is and makes growth exponential.
K = W2^T W2 - W1 W1^T is conserved.  Where W1 W1^T = U diag(h) U^T has outgrown it, V2 are the eigenvectors of a
slightly perturbed matrix, and 1 - A_kk = 1/2 sum_j (K_jk / (h_k - h_j))^2 with K in the basis U: the prediction, to
first order.  Before it blows up only the leading mode outgrows all bounds; the others stop on their way, aligned as far
as they have grown.

Writes theorem2.npz: growth (T, 16), singular values of W1 over the initial ones; distance and predicted (T, 16),
1 - A_kk of A = |V2^T U1|; first, last (16, 16), A at both ends; K_drift (T,), relative.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ortho_group

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.results import Tolerance, r_squared
from collapse.theory import alignment, matrix_flow, singular_values

DIM = 16
SMALL = 0.03  # the prediction is of first order: it is scored and drawn where it says less than this


def start(seed: int) -> tuple[list[NDArray], NDArray]:
    """Two layers in random bases, and X."""
    bases = ortho_group.rvs(DIM, size=5, random_state=seed)
    sigma, lam = np.exp(-0.02 * np.arange(DIM)), np.linspace(1, 0.5, DIM)
    return [bases[0] * sigma @ bases[1].T, bases[2] * sigma @ bases[3].T], bases[4] * lam @ bases[4].T


def distance(A: NDArray) -> NDArray:
    """1 - A_kk of an orthogonal matrix's absolute value, without the cancellation: rows are unit vectors."""
    diagonal = A.diagonal()
    return ((A**2).sum(1) - diagonal**2) / (1 + diagonal)


def first_order(W1: NDArray, K: NDArray) -> NDArray:
    """1 - A_kk where K is a small perturbation of W1 W1^T."""
    U, sigma, _ = np.linalg.svd(W1)
    gaps = np.subtract.outer(sigma**2, sigma**2) + np.diag(np.full(DIM, np.inf))
    return ((U.T @ K @ U / gaps) ** 2).sum(1) / 2


def imbalance(W1: NDArray, W2: NDArray) -> NDArray:
    return W2.T @ W2 - W1 @ W1.T


def simulate(seed: int = 0, horizon: float = 4.5) -> tuple[Meta, Arrays]:
    """The flow up to a growth of the leading mode by about exp(horizon)."""
    layers, X = start(seed)
    t = np.linspace(0, horizon, 46)
    flow = matrix_flow(t, layers, lambda W: -W @ X / np.linalg.norm(W, 2), rtol=1e-9, method="DOP853")
    pairs, K = list(zip(*flow, strict=True)), imbalance(*layers)
    A = np.array([alignment(*pair) for pair in pairs])
    measured = np.array([distance(a) for a in A])
    predicted = np.array([first_order(W1, K) for W1, _ in pairs])
    drift = np.array([np.linalg.norm(imbalance(*pair) - K) for pair in pairs]) / np.linalg.norm(K)
    small = predicted < SMALL
    sigma = singular_values(flow[0])
    return {"r2": r_squared(measured[small], predicted[small]), "scored": int(small.sum())}, {
        "growth": sigma / sigma[0],
        "distance": measured,
        "predicted": predicted,
        "first": A[0],
        "last": A[-1],
        "K_drift": drift,
    }


def report(meta: Meta, arrays: Arrays) -> str:
    growth, distance = arrays["growth"][-1], arrays["distance"]
    lines = [
        f"R^2 of ln(1 - A_kk), first order over the flow, {meta['scored']} values below {SMALL}: {meta['r2']:.4f}",
        f"largest relative drift of K: {arrays['K_drift'].max():.1e}",
    ]
    lines += [
        f"  mode {k + 1:>2}: grown {growth[k]:6.2f}-fold, 1 - A_kk from {distance[0, k]:.2f} to {distance[-1, k]:.1e}"
        for k in (0, 1, 2, 4, 8, 15)
    ]
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Left: distance from the identity against growth. Right: the alignment matrix at the end."""
    fig, (left, right) = plots.figure(plots.TEXT, 2.6, columns=2, width_ratios=(1.3, 1))
    modes = (0, 1, 4, 8)
    growth, measured, predicted = (arrays[name] for name in ("growth", "distance", "predicted"))
    for k, color in zip(modes, plots.sequence_colors(len(modes)), strict=True):
        small = predicted[:, k] < SMALL
        left.plot(growth[small, k], np.log(predicted[small, k]), color=color)
        left.plot(growth[:, k], np.log(measured[:, k]), "o", color=color, markeredgewidth=0, alpha=0.8)
        place = (growth[-1, k], np.log(measured[-1, k]))
        left.annotate(
            f"$k={k + 1}$", place, xytext=(5, 4), textcoords="offset points", va="bottom", color=color, fontsize=7
        )
    left.set(
        xscale="log", xlabel=r"growth of $\sigma_k(W_1)$ over its start", ylabel=r"$\ln(1 - A_{kk})$", xlim=(0.9, 150)
    )
    plots.theory_legend(left, loc="lower left")
    image = right.imshow(arrays["last"], cmap="viridis", vmin=0, vmax=1)
    right.set(xlabel=r"$|V_2^\top U_1|$ at the end", xticks=[0, 15], yticks=[0, 15])
    right.set_xticklabels([1, DIM])
    right.set_yticklabels([1, DIM])
    fig.colorbar(image, ax=right, shrink=0.8)
    return fig


if __name__ == "__main__":
    # Drift is the error of the solver, which its tolerance of 1e-9 a step bounds.
    main(__file__, simulate, report, draw, Tolerance(of={"K_drift": Tolerance(bound=1e-6)}))
