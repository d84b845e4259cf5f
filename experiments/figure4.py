"""Figure 4, a drawing: the two-layer linear network of section 5, with the two views that the loss compares.

    python experiments/figure4.py                 # lay out, save, draw: 2 s
    python experiments/figure4.py --plot-only     # redraw from the saved result

Writes figure4.npz: of the boxes texts (B,), kinds (B,), centres and sizes (B, 2); arrows (A, 2), pairs of boxes;
notes (N,) and their places (N, 2).
"""

from typing import Any

import numpy as np

from collapse import plots
from collapse.experiment import Arrays, Meta, main

UPPER, LOWER, MIDDLE = 1.45, 0.35, 0.9
# (name, text, kind, x, y, width)
BOXES = [
    ("x0", "$x_0$", "data", 0.4, MIDDLE, 0.6),
    ("x", "$x$", "data", 1.75, UPPER, 0.6),
    ("x'", "$x$′", "data", 1.75, LOWER, 0.6),
    ("W1", "$W_1$", "layer", 2.9, UPPER, 0.7),
    ("W1'", "$W_1$", "layer", 2.9, LOWER, 0.7),
    ("W2", "$W_2$", "layer", 4.05, UPPER, 0.7),
    ("W2'", "$W_2$", "layer", 4.05, LOWER, 0.7),
    ("z", "$z$", "data", 5.15, UPPER, 0.6),
    ("z'", "$z$′", "data", 5.15, LOWER, 0.6),
    ("loss", "InfoNCE", "loss", 6.35, MIDDLE, 0.85),
]
ARROWS = ["x0 x", "x0 x'", "x W1", "W1 W2", "W2 z", "z loss", "x' W1'", "W1' W2'", "W2' z'", "z' loss"]
NOTES = [
    ("$x_0 + e$", 0.72, 1.4),
    ("$x_0 + e$′", 0.72, 0.4),
    ("same\nweights", 3.475, MIDDLE),
    ("$z = W_2 W_1 x$", 5.15, MIDDLE),
]
HEIGHT, STYLE = 0.42, "round,pad=0,rounding_size=0.08"
COLORS = {"data": "C6", "layer": "C0", "loss": "C1"}


def simulate() -> tuple[Meta, Arrays]:
    """The layout, in inches."""
    names, texts, kinds, x, y, widths = zip(*BOXES, strict=True)
    return {}, {
        "texts": np.array(texts),
        "kinds": np.array(kinds),
        "centres": np.stack([x, y], axis=1),
        "sizes": np.stack([widths, np.full(len(x), HEIGHT)], axis=1),
        "arrows": np.array([[names.index(end) for end in arrow.split()] for arrow in ARROWS]),
        "notes": np.array([text for text, _, _ in NOTES]),
        "places": np.array([place for _, *place in NOTES]),
    }


def report(meta: Meta, arrays: Arrays) -> str:
    chains = [" -> ".join(arrays["texts"][arrow]) for arrow in arrays["arrows"]]
    return "\n".join(["two views, two linear layers, one loss:", *(f"  {chain}" for chain in chains)])


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Boxes and arrows; what trains is blue, the loss orange."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    fig, ax = plots.figure(plots.TEXT, 1.8)
    patches = []
    for text, kind, centre, size in zip(
        *(arrays[name] for name in ("texts", "kinds", "centres", "sizes")), strict=True
    ):
        color = COLORS[str(kind)]
        (x, y), (width, height) = centre - size / 2, size
        face = "none" if kind == "data" else to_rgba(color, 0.12)
        shape = FancyBboxPatch((x, y), width, height, boxstyle=STYLE, edgecolor=color, facecolor=face, linewidth=1)
        patches.append(ax.add_patch(shape))
        ax.text(*centre, text, ha="center", va="center")
    for start, end in arrays["arrows"]:
        style = {"arrowstyle": "-|>", "patchA": patches[start], "patchB": patches[end], "shrinkA": 2, "shrinkB": 2}
        style |= {"color": "0.3", "linewidth": 0.8, "mutation_scale": 7}
        ax.annotate("", arrays["centres"][end], arrays["centres"][start], arrowprops=style)
    for x in (2.9, 4.05):
        ax.plot([x, x], [LOWER + HEIGHT / 2, UPPER - HEIGHT / 2], ":", color="C0")
    for text, place in zip(arrays["notes"], arrays["places"], strict=True):
        ax.text(*place, text, ha="center", va="center", fontsize=7, color="0.3")
    ax.set(xlim=(0.05, 6.83), ylim=(0.05, 1.75), aspect="equal")
    ax.axis("off")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
