"""Figure 1: what complete and dimensional collapse look like, on generated embeddings of the unit sphere.

    python experiments/figure1.py                 # generate, save, draw: 3 s
    python experiments/figure1.py --plot-only     # redraw from the saved result

Embeddings with 3 dimensions, normalised: spread over the sphere; all near one point; spread, but near a plane.  Bars
are the singular values of their covariance.  Rank measures see only their proportions, so a complete collapse shows in
the total variance, a dimensional one in the rank.

Writes figure1.npz: names (3,), embeddings (3, points, 3), singular_values (3, 3).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.metrics import effective_rank

NAMES = ("healthy", "complete collapse", "dimensional collapse")
JITTER = 0.03
TOWARDS = np.array([0.42, -0.8, 0.43])  # where the viewer stands, and about where all embeddings collapse to
NORMAL = np.array([-0.55, -0.35, 0.76])  # of the plane of the dimensional collapse


def project(points: NDArray) -> tuple[NDArray, NDArray]:
    """Points (n, 3) as seen from TOWARDS: (n, 2) on the paper, (n,) depth, larger is nearer."""
    near = TOWARDS / np.linalg.norm(TOWARDS)
    right = np.cross([0, 0, 1], near)
    right /= np.linalg.norm(right)
    return points @ np.stack([right, np.cross(near, right)], axis=1), points @ near


def simulate(seed: int = 0, points: int = 250) -> tuple[Meta, Arrays]:
    """Three clouds of `points` embeddings and the singular values of their covariances."""
    rng = np.random.default_rng(seed)
    normal = NORMAL / np.linalg.norm(NORMAL)
    sphere, flat = rng.standard_normal((2, points, 3))
    flat -= np.outer(flat @ normal, normal)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    jitter = JITTER * rng.standard_normal((2, points, 3))
    clouds = np.array([sphere, np.array([0.8, -0.5, 0.45]) + jitter[0], flat + jitter[1]])
    clouds /= np.linalg.norm(clouds, axis=2, keepdims=True)
    values = np.array([np.linalg.svd(np.cov(cloud.T), compute_uv=False) for cloud in clouds])
    return {"jitter": JITTER}, {"names": np.array(NAMES), "embeddings": clouds, "singular_values": values}


def report(meta: Meta, arrays: Arrays) -> str:
    lines = [f"{'embeddings':<22}{'singular values of the covariance':<36}effective rank, total variance"]
    for name, values in zip(arrays["names"], arrays["singular_values"], strict=True):
        numbers = "  ".join(f"{value:.5f}" for value in values)
        lines.append(f"{name:<22}{numbers:<36}{effective_rank(of_covariance=values):.2f}, {values.sum():.4f}")
    return "\n".join(lines)


def sphere(ax: Any) -> None:
    """The outline of the unit sphere and its equator, hidden half dotted."""
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color="0.6", linewidth=0.6)
    equator, depth = project(np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1))
    for shown, line in ((depth >= 0, "-"), (depth < 0, ":")):
        ax.plot(*np.where(shown[:, None], equator, np.nan).T, line, color="0.75", linewidth=0.6)


def bars(ax: Any, values: NDArray, top: float, color: str) -> None:
    """An inset of three singular values with their numbers."""
    inset = ax.inset_axes((0.86, -1.05, 0.84, 0.6), transform=ax.transData, facecolor="none")
    inset.bar(range(1, 4), values, color=color, width=0.7)
    for k, value in enumerate(values, 1):
        text = f"{value:.2f}"
        inset.annotate(text, (k, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6)
    inset.set(ylim=(0, top), xlim=(0.4, 3.6), yticks=[], xticks=[])
    inset.spines["left"].set_visible(False)
    inset.set_xlabel(r"$\lambda$ of $\mathrm{Cov}(z)$", fontsize=6, labelpad=2)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """One sphere a kind of embeddings; what lies behind is paler."""
    fig, axes = plots.figure(plots.TEXT, 2.35, columns=3)
    top = 1.25 * arrays["singular_values"].max()
    for ax, name, cloud, values, color in zip(
        axes, arrays["names"], arrays["embeddings"], arrays["singular_values"], ("C2", "C1", "C0"), strict=True
    ):
        sphere(ax)
        places, depth = project(cloud)
        order = depth.argsort()
        alpha = np.clip(0.55 + 0.45 * depth, 0.12, 1)
        ax.scatter(*places[order].T, s=5, color=color, alpha=alpha[order], linewidths=0)
        bars(ax, values, top, color)
        ax.set(xlim=(-1.03, 1.65), ylim=(-1.1, 1.03), aspect="equal")
        ax.set_title(name, x=0.38)
        ax.axis("off")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
