"""Figure 9, a drawing: SimCLR compares projected representations, DirectCLR a part of the representation itself.

    python experiments/figure9.py                 # augment, lay out, save, draw: 5 s
    python experiments/figure9.py --plot-only     # redraw from the saved result

The two images are views of one of scikit-learn's digits, drawn by the augmentation of digits.py.

Writes figure9.npz: views (2, 8, 8) in 0..1; of the boxes texts (B,), kinds (B,), centres and sizes (B, 2); arrows
(A, 2), pairs of boxes; notes (N,) and their places (N, 2).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from collapse import plots
from collapse.experiment import Arrays, Meta, main
from collapse.recipes.config import make_config
from collapse.recipes.views import Augmentation, uniforms

AUGMENTATION = make_config("digits").augmentation(0)
HEIGHT, MIDDLE, APART = 2.3, 1.02, 1.1
HALF = 0.4  # of the height of a representation
Box = tuple[str, str, float, float, float, float]  # text, kind, x, y, width, height
COLORS = {"layer": "C0", "loss": "C1", "used": "C0", "rest": "0.55"}


def branch(x: float, view: int, projector: bool) -> tuple[list[Box], list[tuple[int, int]]]:
    """Boxes of one view from x on, and the arrows between them; the last box is what the loss takes."""
    y, prime = MIDDLE + APART * (0.5 - view), "′" * view
    boxes = [("", f"view{view}", x, y, 0.5, 0.5), ("$f$", "layer", x + 0.75, y, 0.45, 0.45)]
    if projector:
        boxes.append((f"$r${prime}", "used", x + 1.35, y, 0.22, 2 * HALF))
        boxes.append(("$g$", "layer", x + 1.9, y, 0.45, 0.45))
        boxes.append((f"$z${prime}", "used", x + 2.4, y, 0.22, HALF))
        return boxes, [(0, 1), (1, 2), (2, 3), (3, 4)]
    # The part that the loss sees is the one beside it.
    inside = 1 - 2 * view
    boxes.append(("", "whole", x + 1.35, y, 0.22, 2 * HALF))
    boxes.append(("", "rest", x + 1.35, y + inside * 0.2 * HALF, 0.22, 1.6 * HALF))
    boxes.append(("", "used", x + 1.35, y - inside * 0.8 * HALF, 0.22, 0.4 * HALF))
    return boxes, [(0, 1), (1, 2)]


def panel(x: float, projector: bool) -> tuple[list[Box], list[tuple[int, int]]]:
    """Both views and the loss."""
    boxes: list[Box] = []
    arrows: list[tuple[int, int]] = []
    for view in (0, 1):
        more, between = branch(x, view, projector)
        arrows += [(start + len(boxes), end + len(boxes)) for start, end in between]
        boxes += more
    ends = len(boxes) // 2 - 1, len(boxes) - 1
    boxes.append(("InfoNCE", "loss", x + (2.4 if projector else 2.2), MIDDLE, 0.7, 0.3))
    return boxes, arrows + [(end, len(boxes) - 1) for end in ends]


def simulate(seed: int = 6, image: int = 5) -> tuple[Meta, Arrays]:
    """Two views of digit `image`, and the layout, in inches."""
    pixels = torch.from_numpy(load_digits().images[image] / 16).float()[None, None]
    views = [AUGMENTATION(pixels, uniforms(seed, 0, np.array([image]), v, Augmentation.DRAWS))[0, 0] for v in (0, 1)]
    boxes, arrows = panel(0.3, True)
    more, further = panel(3.75, False)
    arrows += [(start + len(boxes), end + len(boxes)) for start, end in further]
    texts, kinds, *layout = zip(*boxes, *more, strict=True)
    x, y, width, height = np.array(layout)
    notes = [
        ("SimCLR: a projector g, thrown away after training", 1.5, HEIGHT - 0.13),
        ("DirectCLR: no projector", 5.1, HEIGHT - 0.13),
        ("$r[0{:}d_0]$", 5.5, MIDDLE + 0.36),
        ("$r$′$[0{:}d_0]$", 5.5, MIDDLE - 0.36),
        ("the rest of $r$\nis not in the loss", 5.85, MIDDLE + APART / 2 + 0.12),
    ]
    return {}, {
        "views": np.stack(views),
        "texts": np.array(texts),
        "kinds": np.array(kinds),
        "centres": np.stack([x, y], axis=1),
        "sizes": np.stack([width, height], axis=1),
        "arrows": np.array(arrows),
        "notes": np.array([text for text, _, _ in notes]),
        "places": np.array([place for _, *place in notes]),
    }


def report(meta: Meta, arrays: Arrays) -> str:
    return (
        "SimCLR:    image -> encoder f -> r -> projector g -> z -> InfoNCE\n"
        "DirectCLR: image -> encoder f -> r,  r[0:d0] -> InfoNCE"
    )


def draw_box(ax: Any, kind: str, centre: NDArray, size: NDArray) -> Any:
    """A layer is rounded, part of a representation is not."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08" if kind in ("layer", "loss") else "square,pad=0"
    color = to_rgba(COLORS.get(kind, "0.3"), 0 if kind == "whole" else 1)
    face = (*color[:3], {"used": 0.35, "rest": 0.15, "whole": 0}.get(kind, 0.12))
    (x, y), (width, height) = centre - size / 2, size
    return FancyBboxPatch((x, y), width, height, boxstyle=style, edgecolor=color, facecolor=face, linewidth=1)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Blue is what the loss reaches, grey what it does not see, orange the loss."""
    fig, ax = plots.figure(plots.TEXT, HEIGHT)
    patches = []
    for text, kind, centre, size in zip(
        *(arrays[name] for name in ("texts", "kinds", "centres", "sizes")), strict=True
    ):
        patches.append(ax.add_patch(draw_box(ax, str(kind), centre, size)))
        ax.text(*centre, text, ha="center", va="center")
        if str(kind).startswith("view"):
            edges = (centre[:, None] + size[:, None] * np.linspace(-0.5, 0.5, 9)).copy()
            ax.pcolormesh(*edges, arrays["views"][int(str(kind)[-1]), ::-1], cmap="gray_r", rasterized=False)
    for start, end in arrays["arrows"]:
        style = {"arrowstyle": "-|>", "patchA": patches[start], "patchB": patches[end], "shrinkA": 1, "shrinkB": 1}
        style |= {"color": "0.3", "linewidth": 0.8, "mutation_scale": 7}
        ax.annotate("", arrays["centres"][end], arrays["centres"][start], arrowprops=style)
    for text, place in zip(arrays["notes"], arrays["places"], strict=True):
        ax.text(*place, text, ha="center", va="center", fontsize=7)
    ax.set(xlim=(0, plots.TEXT), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
