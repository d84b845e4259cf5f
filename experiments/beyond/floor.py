"""The floor: what of a spectrum is data, and what is rounding, of the forward pass or of the stored embeddings.

    python experiments/beyond/floor.py  # 40 s on one core

A residual network and projector of random weights see the 1,797 digits; its last two layers have singular values that
fall from 1 to 1e-6 over 96 directions, and lead to 128, so that the truth, computed in float64, is known: a slope, and
nothing.  The same network in float32, as a figure of the paper is made, in bfloat16 autocast as networks are trained,
and the float64 embeddings stored in float32, bfloat16 and float16.  Where a curve leaves the truth is its rounding; the
floor says where.  "storage" is from the dtype of the rows alone; "forward" runs 16 images in float64 too, as
`collapse spectrum CHECKPOINT IMAGES` does.

The authors' own picture of figure 2 has 94 of 128 values between e^-3.7 and e^-6.3 and then falls below e^-25, to what
float32 leaves of nothing.  In bfloat16 the fall would stand at the same index and end at its floor.

Writes floor.npz: names (6,), spectra (6, 128), storage and forward (6,), the floors of each (forward NaN for stored
embeddings); measured (6,), the largest singular value in a direction that in truth has none.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from collapse import plots, spectrum
from collapse.experiment import Arrays, Meta, main
from collapse.models.resnet import ResNet, ResNetShape

DIM, LIVE = 128, 96
PAPER = {"living": 94, "largest": -3.7, "smallest": -6.3}  # read off the authors' figure 2: count, ln of the values
NAMES = ("float64", "float32 forward", "bfloat16 forward", "stored float32", "stored float16", "stored bfloat16")


def network(seed: int, images: Tensor) -> nn.Module:
    """Backbone and projector in eval mode, the batch norms with the statistics of the images."""
    torch.manual_seed(seed)
    narrow, last = nn.Linear(128, LIVE, bias=False), nn.Linear(LIVE, DIM, bias=False)
    nn.init.orthogonal_(last.weight)
    with torch.no_grad():
        nn.init.orthogonal_(narrow.weight).mul_(torch.logspace(0, -6, LIVE)[:, None])
    backbone = ResNet(ResNetShape((1, 1, 1, 1), (16, 32, 64, 128), stem=3, stem_planes=16))
    net = nn.Sequential(backbone, nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), narrow, last)
    for _ in range(30):
        net(images[torch.randperm(len(images))[:128]])
    return net.eval()


@torch.inference_mode()
def embeddings(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """L2-normalised rows of each way of computing or storing them; normalised in the precision they have, as usual."""
    z = {"float32 forward": nn.functional.normalize(net(images))}
    with torch.autocast("cpu", torch.bfloat16):
        z["bfloat16 forward"] = nn.functional.normalize(net(images))
    exact = nn.functional.normalize(net.double()(images.double()))
    z["float64"] = exact
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z[f"stored {str(dtype).removeprefix('torch.')}"] = exact.to(dtype)
    return z


def simulate(seed: int = 0) -> tuple[Meta, Arrays]:
    """Spectra and floors of all six."""
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    z = embeddings(network(seed, images), images)
    spectra = {name: spectrum(z[name], normalize=False, method="qr") for name in NAMES}
    exact = spectrum(z["float64"], normalize=False, method="qr", vectors=True)
    assert exact.vectors is not None
    dead = exact.vectors[:, LIVE:]
    measured, forward = [], []
    for name in NAMES:
        rows = z[name].double().numpy()
        measured.append(np.linalg.eigvalsh(np.cov((rows @ dead).T))[-1])
        errors = (z[name][:16].double() - z["float64"][:16]).numpy()
        known = spectrum(z[name], normalize=False, method="qr", rounding=errors).floor
        forward.append(known if name.endswith("forward") else np.nan)
    return {"paper": PAPER}, {
        "names": np.array(NAMES),
        "spectra": np.array([spectra[name].singular_values for name in NAMES]),
        "storage": np.array([spectra[name].floor for name in NAMES]),
        "forward": np.array(forward),
        "measured": np.array(measured),
    }


def floors(arrays: Arrays) -> NDArray:
    """The floor that a user sees: with the forward pass where there is one."""
    return np.where(np.isnan(arrays["forward"]), arrays["storage"], arrays["forward"])


def report(meta: Meta, arrays: Arrays) -> str:
    lines = ["ln of the floor by the dtype of the rows, with the forward pass, and measured"]
    for name, *values in zip(*(arrays[key] for key in ("names", "storage", "forward", "measured")), strict=True):
        shown = " ".join(f"{np.log(value):8.1f}" if value > 0 else "       -" for value in values)
        lines.append(f"  {name:<18}{shown}")
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """Spectra, each with its floor as a short line at the right edge."""
    fig, ax = plots.figure(plots.COLUMN, 2.6)
    index = np.arange(1, DIM + 1)
    for name, values, floor in zip(arrays["names"], arrays["spectra"], floors(arrays), strict=True):
        color = "0.2" if name == "float64" else None
        (line,) = ax.plot(index, np.log(np.maximum(values, 1e-40)), color=color, label=name)
        ax.plot([DIM * 1.02, DIM * 1.08], np.log([floor, floor]), color=line.get_color(), linewidth=2, clip_on=False)
    ax.fill_between([1, PAPER["living"]], PAPER["smallest"], PAPER["largest"], color="0.85", zorder=0)
    ax.plot([PAPER["living"]] * 2, [PAPER["smallest"], -25], color="0.7", linestyle=":", zorder=0)
    corner = {"xytext": (-3, -3), "textcoords": "offset points", "ha": "right", "va": "top"}
    ax.annotate("the paper's figure 2", (PAPER["living"], PAPER["smallest"]), **corner, fontsize=6, color="0.4")
    ax.set(
        xlabel="index of the singular value", ylabel=r"$\ln$ singular value of $\mathrm{Cov}(z)$",
        ylim=(-66, 0), xlim=(0, DIM * 1.09),
    )  # fmt: skip
    ax.legend(fontsize=6, loc="lower left")
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw)
