"""A study in miniature on real images: figure 10 and table 1 of the paper, on scikit-learn's 1,797 handwritten digits.

    python experiments/networks/digits.py              # train 4 heads x 2 temperatures x 3 seeds: 3 minutes on 2 cores
    python experiments/networks/digits.py --plot-only  # redraw from the saved result

The same small residual network is trained contrastively without a projector, with a linear one, with a two-layer one,
and by DirectCLR, at two temperatures of the loss, which decide whether the paper's picture appears; 1,197 images train
it, 600 test the representation (nearest neighbours and a linear probe, both fitted on the 1,197), all 1,797 give the
spectrum.  Runs are kept in runs/digits under a name that holds a digest of their
configuration and of the training code: an interrupted study goes on, a changed one trains anew.

Writes experiments/results/digits.npz (heads; temperatures; knn, probe, effective_rank and collapsed, each (heads,
temperatures, seeds); singular_values, with a last axis d), figures/digits.png and .pdf, and for the command line
runs/digits/HEAD.safetensors (first seed, last temperature) and runs/digits/images/CLASS/*.png.
"""

import hashlib
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

import collapse
from collapse import models, plots
from collapse.data.labelled import of_arrays
from collapse.encoders.accuracy import knn_top1, probe_top1
from collapse.encoders.passes import embed
from collapse.experiment import Arrays, Meta, main
from collapse.recipes import views
from collapse.recipes.config import Config, make_config
from collapse.results import Tolerance, to_json
from collapse.results.outputs import atomic_write
from collapse.spectra import Spectrum
from collapse.spectra.measure import spectrum
from collapse.training import losses, network, optim
from collapse.training import train as training

RUNS = Path("runs/digits")  # below the folder in which the script is started

HEADS = {
    "none": {"head": "none"},
    "linear": {"head": "linear", "dim": 64},
    "mlp": {"head": "mlp", "dim": 64},
    "directclr": {"method": "directclr", "head": "none", "dim": 24},
}
TEMPERATURES = (0.1, 0.5)
LABELS = {"none": "no projector", "linear": "linear projector", "mlp": "2-layer projector", "directclr": "DirectCLR"}
BASE = make_config("digits")
TRAIN = 1197
SAVE_EVERY = 10 * (TRAIN // BASE.batch_size)  # steps of ten epochs

# Training multiplies a rounding until a network is as far away as one of another seed.  Of eight networks, trained
# on another processor, accuracies change by 0.012, effective rank by 0.045, singular values by 0.4 of themselves.
TOLERANCE = Tolerance(
    of={
        "knn": Tolerance(0.03),
        "probe": Tolerance(0.03),
        "effective_rank": Tolerance(0.15),
        "singular_values": Tolerance(1.0),
        "collapsed": Tolerance(1.0, floor=0.1),
        "floor": Tolerance(0.2),
    }
)

epochs_done: Any = None  # a counter that the worker processes share


def digits() -> tuple[torch.Tensor, NDArray, NDArray, NDArray]:
    """(pixels (1797, 3, 8, 8) uint8, labels, training indices, test indices); the split is fixed."""
    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8))
    order = np.random.default_rng(0).permutation(len(pixels))
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target, order[:TRAIN], order[TRAIN:]


def run_folder(runs: Path, head: str, config: Config) -> Path:
    """Where a run is kept: its name tells apart every configuration and every version of the training code."""
    digest = hashlib.sha256(to_json(asdict(config)).encode())
    for module in (models, network, optim, losses, training, views):
        digest.update(Path(str(module.__file__)).read_bytes())
    return runs / f"{head}-t{config.temperature:g}-seed{config.seed}-{digest.hexdigest()[:8]}"


def _share(counter: Any) -> None:
    global epochs_done
    epochs_done = counter
    torch.set_num_threads(1)


def _train(run: Path, config: Config) -> None:
    pixels, labels, train_indices, _ = digits()
    data = of_arrays(pixels[torch.from_numpy(train_indices)], labels[train_indices])
    for line in training.train(run, config, data, options=training.Options(save_every=SAVE_EVERY)):
        with epochs_done.get_lock():
            epochs_done.value += "epoch_loss" in line


def train_all(runs: dict[Path, Config]) -> None:
    """Train every run that is not finished, two at a time, with one bar over the epochs of all."""
    todo = {run: config for run, config in runs.items() if not (run / "encoder.safetensors").exists()}
    spawn = multiprocessing.get_context("spawn")
    counter = spawn.Value("i", sum(_logged(run) for run in todo))
    total = sum(config.epochs for config in todo.values())
    with (
        ProcessPoolExecutor(2, spawn, _share, (counter,)) as pool,
        tqdm(total=total, unit=" epochs", desc=f"training {len(todo)} networks", disable=not todo) as bar,
    ):
        jobs = {pool.submit(_train, run, config) for run, config in todo.items()}
        try:
            while jobs:
                done, jobs = wait(jobs, timeout=0.5)
                bar.update(min(counter.value, total) - bar.n)
                for job in done:
                    job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _logged(run: Path) -> int:
    """Epochs that a resumed run will not repeat."""
    resume = run / "resume.pt"
    steps = torch.load(resume, weights_only=True)["step"] if resume.exists() else 0
    return steps // (TRAIN // BASE.batch_size)


def evaluate(run: Path) -> tuple[Spectrum, float, float]:
    """(spectrum of the representation, nearest-neighbour top-1, linear-probe top-1) of a finished run."""
    pixels, labels, train, test = digits()
    net = collapse.load(run / "encoder.safetensors")
    r = torch.cat(list(embed(net, pixels.split(512), net.preprocess))).numpy()
    split = (r[train], labels[train], r[test], labels[test])
    return spectrum(r), knn_top1(*split), probe_top1(*split)


def simulate(seed: int = 0, seeds: int = 3, epochs: int = BASE.epochs, runs: Path = RUNS) -> tuple[Meta, Arrays]:
    """Train and evaluate every head at every temperature, `seeds` times from `seed` on; networks are kept in `runs`."""
    write_images(runs / "images")
    base = replace(BASE, epochs=epochs)
    grid = {
        (head, temperature, one): replace(base, temperature=temperature, seed=one, **options)  # type: ignore[arg-type]
        for head, options in HEADS.items()
        for temperature in TEMPERATURES
        for one in range(seed, seed + seeds)
    }
    folders = {key: run_folder(runs, key[0], config) for key, config in grid.items()}
    train_all({folders[key]: config for key, config in grid.items()})
    measured = [evaluate(folders[key]) for key in tqdm(grid, desc="evaluating", unit=" networks")]
    for head in HEADS:
        shutil.copyfile(folders[head, TEMPERATURES[-1], seed] / "encoder.safetensors", runs / f"{head}.safetensors")
    shape = (len(HEADS), len(TEMPERATURES), seeds)
    ranks = [s.metrics() for s, _, _ in measured]
    return {"base": asdict(base), "heads": HEADS}, {
        "heads": np.array(list(HEADS)),
        "temperatures": np.array(TEMPERATURES),
        "singular_values": np.array([s.singular_values for s, _, _ in measured]).reshape(*shape, -1),
        "floor": np.array([s.floor for s, _, _ in measured]).reshape(shape),
        "knn": np.array([knn for _, knn, _ in measured]).reshape(shape),
        "probe": np.array([probe for _, _, probe in measured]).reshape(shape),
        "effective_rank": np.array([rank["effective_rank"] for rank in ranks]).reshape(shape),
        "collapsed": np.array([rank["collapsed_dimensions_1e-03"] for rank in ranks]).reshape(shape),
    }


def write_images(folder: Path) -> None:
    """The digits as PNG files, one folder a class, for the command line."""
    pixels, labels, _, _ = digits()
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                Image.fromarray(image[0].numpy()).save(partial)


COLUMNS = {"knn": "kNN %", "probe": "probe %", "effective_rank": "effective rank", "collapsed": "below 1e-3"}


def report(meta: Meta, arrays: Arrays) -> str:
    """Mean and standard deviation over the seeds, one line a temperature and head."""
    lines = [f"{'temperature':<12}{'head':<18}" + "".join(f"{title:>16}" for title in COLUMNS.values())]
    for t, temperature in enumerate(arrays["temperatures"]):
        for h, head in enumerate(arrays["heads"]):
            values = np.array([arrays[name][h, t] * (100 if "%" in title else 1) for name, title in COLUMNS.items()])
            spread = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
            cells = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in zip(values.mean(1), spread, strict=True))
            lines.append(f"{temperature:<12g}{LABELS[str(head)]:<18}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def draw(meta: Meta, arrays: Arrays) -> Any:
    """One panel a temperature."""
    temperatures = arrays["temperatures"]
    fig, axes = plots.figure(plots.TEXT, 2.6, columns=len(temperatures), sharey=True)
    for t, ax in enumerate(axes):
        spectra = {LABELS[str(head)]: arrays["singular_values"][h, t] for h, head in enumerate(arrays["heads"])}
        plots.plot_repeated_spectra(ax, spectra)
        ax.set_title(rf"temperature $\tau = {temperatures[t]:g}$")
    axes[0].set_ylabel(r"$\ln$ singular value of $\mathrm{Cov}(r)$")
    axes[1].set_ylabel("")
    axes[1].get_legend().remove()
    return fig


if __name__ == "__main__":
    main(__file__, simulate, report, draw, TOLERANCE)
