"""How cost grows: seconds over size, and the slope of their logarithms, beside what the formula says.

    python benchmarks/growth.py --out benchmarks/results/growth.json --plot figures/growth.png     # four minutes
    python benchmarks/growth.py --only loading listing                                             # some of it

Seconds are processor time of one thread: other programs on the machine count little.  A size is measured three times
and the least counts.  The slope is that of the line through the three largest sizes, where what is done once counts
little.  Over processes the seconds are those of one of them, each with as many images: what one more costs the others.
"""

import argparse
import os
import socket
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
import torch.multiprocessing as mp
from matplotlib.ticker import NullFormatter, NullLocator
from torch import Tensor, nn
from torchvision import models

import collapse
from collapse import plots
from collapse.data.images import Images
from collapse.encoders import processes
from collapse.recipes.config import make_config
from collapse.results import provenance, save_text, to_json
from collapse.spectra.covariance import Covariance
from collapse.training import parallel
from collapse.training.losses import contrastive_loss
from collapse.training.network import Network, backward

Call = Callable[[], Any]
Sizes = Iterator[tuple[int, Call]]


def rows(folder: Path) -> Sizes:
    """Adding n rows of 512 columns to a covariance: 2 n d^2 operations."""
    z = np.random.default_rng(0).standard_normal((1 << 17, 512), dtype=np.float32)
    for n in (1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17):
        yield n, partial(Covariance(512).update, z[:n])


def columns(folder: Path) -> Sizes:
    """Adding 8,192 rows of d columns to a covariance: 2 n d^2 operations."""
    rng = np.random.default_rng(0)
    for d in (256, 512, 1024, 2048, 4096):
        z = rng.standard_normal((8192, d), dtype=np.float32)
        yield d, partial(Covariance(d).update, z)


def eigenvalues(folder: Path) -> Sizes:
    """The singular values of a covariance of d columns: 4/3 d^3 operations."""
    rng = np.random.default_rng(0)
    for d in (256, 512, 1024, 2048):
        total = Covariance(d).update(rng.standard_normal((2 * d, d), dtype=np.float32))
        yield d, total.measured


def loading(folder: Path) -> Sizes:
    """Reading the checkpoint of a transformer of so many blocks, 48 wide."""
    for depth in (12, 48, 192, 768, 3000):
        path = folder / f"vit{depth}.pt"
        options: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
        torch.save(timm.models.vision_transformer.VisionTransformer(depth=depth, **options).state_dict(), path)
        yield depth, partial(collapse.load, path, heads=3, resize=32, crop=32)


def listing(folder: Path) -> Sizes:
    """Listing a zip of so many images."""
    for n in (1000, 10_000, 30_000, 100_000):
        path = folder / f"{n}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(n):
                archive.writestr(f"{number % 100:02d}/{number:07d}.jpg", b"\xff\xd8\xff")
        yield n, partial(Images, path)


def files(folder: Path) -> Sizes:
    """Listing a folder of so many images."""
    for n in (1000, 3000, 10_000, 30_000):
        place = folder / f"files{n}"
        for number in range(n):
            path = place / f"{number % 100:02d}/{number:07d}.jpg"
            if number < 100:
                path.parent.mkdir(parents=True)
            path.touch()
        yield n, partial(Images, place)


def loss(folder: Path) -> Sizes:
    """InfoNCE of a batch of b and its gradient, 128 columns: 2 b^2 m operations a product."""
    for b in (256, 512, 1024, 2048, 4096):
        z = torch.randn(2, b, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
        yield b, partial(_contrast, z)


def _contrast(z: Tensor) -> None:
    contrastive_loss(z[0], z[1], 0.1).backward()


def batch(folder: Path) -> Sizes:
    """Forward, loss and gradients of a batch of b, the digits' network."""
    torch.manual_seed(0)
    net = Network(make_config("digits", head="mlp"), 10).train()
    for b in (32, 64, 128, 256):
        x = torch.randn(2, b, 3, 8, 8)
        yield b, partial(backward, net, net, (x[0], x[1]), torch.arange(b) % 10, "cpu")


def world(folder: Path) -> Sizes:
    """A step of 64 images a process, of so many that train as one by gloo: 46 messages a step are of batch norms."""
    for count in (1, 2, 4):
        yield count, partial(_step_of_one, count, folder)


def _step_of_one(count: int, folder: Path) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_steps, (count, port, folder), count, start_method="fork")
    return float((folder / "step").read_text())


def _steps(rank: int, count: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.start("cpu")
    torch.manual_seed(0)
    net = Network(make_config("digits", head="mlp"), 10).train()
    parallel.synchronise(net, "cpu", False)
    wrapped, x, y = parallel.distributed(net), torch.randn(2, 64, 3, 8, 8), torch.arange(64) % 10
    before = 0.0
    for step in range(12):
        before = time.process_time() if step == 2 else before
        backward(wrapped, net, (x[0], x[1]), y, "cpu")
    if rank == 0:
        (folder / "step").write_text(str((time.process_time() - before) / 10))
    processes.stop()


def views(folder: Path) -> Sizes:
    """Diagnosing 512 images of 32 px from so many views, a small convolutional network."""
    net = models.resnet18(weights=None)
    x = torch.rand(512, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for count in (2, 4, 8, 16):
        yield count, partial(collapse.diagnose, net, x, views=count, device="cpu")


def layers(folder: Path) -> Sizes:
    """The spectra of all layers of a chain of so many, 512 wide, of 4,096 rows."""
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    for depth in (2, 4, 8, 16):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(512, 512) for _ in range(depth)))
        yield depth, partial(collapse.layer_spectra, net, x, device="cpu")


# What grows, over what, the slope that its formula has, and what the formula is.
WORK = (
    (rows, "rows n", 1, "2 n d²"),
    (columns, "columns d", 2, "2 n d²"),
    (eigenvalues, "columns d", 3, "4/3 d³"),
    (loading, "blocks", 1, "tensors"),
    (listing, "images in a zip", 1, "images"),
    (files, "images in a folder", 1, "images"),
    (loss, "batch b", 2, "6 b² m"),
    (batch, "batch b", 1, "b"),
    (world, "processes", 0, "1 and messages"),
    (views, "views V", 1, "V"),
    (layers, "layers", 1, "layers"),
)
OWN_CLOCK = (world,)  # these return the seconds


def measured(work: Callable[[Path], Sizes]) -> list[tuple[int, float]]:
    """(size, least processor seconds of three) of each size."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size, act in work(Path(folder)):
            times = []
            for _ in range(3):
                before = time.process_time()
                given = act()
                times.append(given if work in OWN_CLOCK else time.process_time() - before)
            found.append((size, min(times)))
            print(f"{work.__name__:<12}{size:>9}{min(times):>12.4f} s", flush=True)
    return found


def slope(found: list[tuple[int, float]]) -> float:
    """Of the logarithm of seconds over that of size, the three largest."""
    sizes, seconds = np.log(np.array(found[-3:], float)).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """A panel a piece of work: seconds over size, and the slope of the formula through the last."""
    with plots.style():
        across = 4
        fig, axes = plots.figure(plots.TEXT, 5.2, across, -(-len(cases) // across))
        for ax, case in zip(axes.flat[: len(cases)], cases, strict=True):
            sizes, seconds = np.array(case["sizes"], float), np.array(case["seconds"])
            ax.loglog(sizes, seconds[-1] * (sizes / sizes[-1]) ** case["expected"], "--", color="0.6")
            ax.loglog(sizes, seconds, "o-", markersize=3)
            ax.set_title(f"{case['work']}: slope {case['slope']:.2f}\nof the formula: {case['expected']}", fontsize=7)
            ax.set_xlabel(case["over"])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks([sizes[0], sizes[-1]], [f"{int(size):,}" for size in (sizes[0], sizes[-1])])
        for ax in axes.flat[len(cases) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("processor seconds")
        plots.save_figure(fig, path.with_suffix(""), [path.suffix])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [work.__name__ for work, *_ in WORK]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORK", help=", ".join(names))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", collapse.CollapseWarning)  # of toys
    result = {"schema": 1, **provenance(), "date": str(date.today()), "load": os.getloadavg(), "cores": os.cpu_count(),
              "clock": "processor time, one thread, the least of three", "cases": []}  # fmt: skip
    for work, over, expected, formula in WORK:
        if work.__name__ not in options.only:
            continue
        found = measured(work)
        case = {"work": work.__name__, "over": over, "formula": formula, "expected": expected, "slope": slope(found)}
        case |= {"sizes": [size for size, _ in found], "seconds": [seconds for _, seconds in found]}
        result["cases"].append(case)
        print(f"{work.__name__:<12}slope {case['slope']:.2f}, the formula {formula}: {expected}", flush=True)
        if options.out:
            save_text(options.out, to_json(result))
    if options.plot:
        draw(result["cases"], options.plot)


if __name__ == "__main__":
    main()
