"""The study on real networks: trains and measures every run that tables 1 and 2, figures 2, 8 and 10 and the map need.

    python experiments/networks/study.py --data cifar10.zip  # what is missing, two runs at a time
    python experiments/networks/study.py --data cifar10.zip --only 'choice-*'  # some runs, by name
    python experiments/networks/study.py --list  # their names, and which are done
    torchrun --nproc-per-node 8 experiments/networks/study.py --data imagenet --preset imagenet --only mlp-s0  # one run

A run is an entry of `plan`: the preset with a few values changed.  It trains in runs/study/NAME with `collapse train`'s
own loop, so it goes on where it was interrupted, and leaves experiments/results/study/NAME.npz; another preset of KEPT
has such folders of its own, anything else leaves its results in runs/.

Runs named choice-* and map-* train on two fifths of the training images and are tested on another fifth of them, so
that nothing is chosen by the images that the tables report on.  Runs named *-paper-* train on a quarter of them.

A result holds, of the test images: singular_values and floor of the representation, embedding_singular_values and
embedding_floor (all of rows of length one).  But for those runs, from 4 views of 2,000 of them too: between and
within, (d,) variance of the image means and within images along each principal direction of the representation;
modes_rho and modes_share (linear heads), signal fraction of each generalised eigenvector and its share of the
embedding's variance; and of each kept epoch, where the head is linear: epochs, x_eigenvalues (e, d) of X (lemma 2 for
cosines, of the last product), x_growth (e, d), the rate v^T X v of each right singular vector v of the head's product,
head_singular_values (e, layers, d) and alignment (e, d) of the last two layers.  meta: config, data, curve (an entry an
epoch), probe and knn top-1 with 95 % intervals, metrics, lidar, signal_fraction.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

import collapse
from collapse import InputError, metrics, theory
from collapse.data.labelled import Labelled, open_data, to_memory
from collapse.encoders import processes
from collapse.encoders.accuracy import knn, probe, wilson
from collapse.encoders.passes import features
from collapse.experiment import Arrays, Meta, ending, say
from collapse.metrics.attribution import signal_and_augmentation
from collapse.models.encoder import Encoder
from collapse.models.heads import Subvector
from collapse.recipes.config import Config, make_config
from collapse.results import save_result
from collapse.spectra.measure import spectrum
from collapse.training.network import Network, resolve, save_encoder
from collapse.training.relaxation import represented
from collapse.training.run import Signals
from collapse.training.train import Options, train

RESULTS = Path(__file__).parents[1] / "results"
PRESET = "cifar10-narrow"
KEPT = {PRESET: "", "tiny-imagenet-narrow": "-tiny-imagenet"}  # what the names of a preset's results end with
CHOOSING = ("choice-", "map-")  # names of runs that see no test image
VIEWS, SEEN = 4, 2000  # views of so many images for the signal and the augmentation
BANK = 10_000  # training images of the probe and the nearest neighbours

HEADS: dict[str, dict[str, Any]] = {
    "none": {"head": "none"},
    "linear": {"head": "linear"},
    "mlp": {"head": "mlp"},
    "directclr": {"method": "directclr"},
    "orthogonal": {"head": "orthogonal"},
    "diagonal": {"head": "diagonal"},
    "lowrank": {"head": "lowrank"},
}
LABELS = {
    "none": "no projector",
    "linear": "linear projector",
    "mlp": "2-layer projector",
    "directclr": "DirectCLR",
    "orthogonal": "orthogonal, fixed",
    "diagonal": "diagonal",
    "lowrank": "low-rank, fixed",
}


def strength(s: float) -> dict[str, Any]:
    """Augmentation of strength s, 1 being the preset's: area cut away and every colour change in proportion."""
    colours = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
    return {"scale": (round(max(0.02, 1 - 0.8 * s), 3), 1.0), **{k: round(v * s, 3) for k, v in colours.items()}}


STRENGTHS = (0.25, 0.5, 1.0, 1.2)
FOUR = ("none", "mlp", "linear", "directclr")  # table 1
# Each changed alone.  What is chosen for all heads alike; then what else might change the sign of an ordering.
CHOICES = {"temperature": (0.1, 0.5), "lr": (3,), "strength": (0.5,)}
AXES = {
    "temperature": (0.05, 1.0),
    "stem": (3,),
    "epochs": (4,),
    "batch_size": (1 / 4, 4),
    "weight_decay": (10,),
    "width": (1 / 2, 2),
}
# Least areas of the crops, three seeds each, for what augmentation alone does; 0.2 is the preset's.
CROPS = (0.08, 0.2)
# What regimes.py says of the choice: the best mean of the probe over the four heads.  Of the presets of
# KEPT, that is; another's values stay as they are.
CHOSEN: dict[str, float] = {"lr": 3}
HOT = "-t0.5"  # in the names of runs at the temperature where the paper's order of ranks appears
# In those of runs on feature maps four times as wide, where its order of accuracies appears; dear, so one epoch.
FINE, FINE_VALUES = "-stem3", {"stem": 3, "epochs": 1, "warmup": 0.17}
# In those of runs in the paper's own regime: its views, optimiser, temperature and peak rate, and fine maps.  A minute
# of a CPU core leaves a small network, smaller batches, and one epoch of a quarter of the images: 97 steps.
PAPER = "-paper"
PAPERS = ("scale", "blur", "sigma", "solarize", "temperature", "optimizer", "weight_decay", "lr")
PAPER_VALUES = {name: getattr(Config(), name) for name in PAPERS} | {
    "stem": 3,
    "arch": "resnet18",
    "blocks": (1, 1, 1, 1),
    "planes": (8, 16, 32, 256),
    "epochs": 1,
    "warmup": 0.1,
    "batch_size": 128,
    "precision": "float32",
}
# In those of two heads in that regime but for the views, which are the preset's: what stronger ones do by themselves.
WEAK, VIEWS_CHANGED = PAPER + "-weak", ("scale", "blur", "sigma", "solarize")
D0 = (1 / 64, 1 / 16, 0.176, 0.35, 0.7)  # shares of the representation's width; the paper's is 360 / 2048 = 0.176


def changed(axis: str, value: float, base: Config) -> dict[str, Any]:
    """The preset's values with one axis changed, by a factor `value`; temperature, stem, strength and crop to it."""
    if axis in ("temperature", "stem"):
        return {axis: value}
    if axis == "strength":
        return strength(value)
    if axis == "crop":
        return {"scale": (value, 1.0), "precision": "float32"}  # a CPU without bf16 is eight times as long in it
    if axis == "width":
        planes = base.planes or (64, 128, 256, 512)
        return {"planes": tuple(round(p * value) for p in planes)}
    old = getattr(base, axis)
    return {axis: type(old)(old * value)}


@cache
def plan(preset: str, epochs: float = 1.0, seed: int = 0) -> dict[str, Config]:
    """Name -> configuration of every run, in the order in which they are worth having.

    epochs is a factor for all; seed is added to that of every run, which NAME-s0 to NAME-s2 count from.
    """
    base = make_config(preset)
    width = int(Network(base, 1).backbone.width)  # type: ignore[arg-type]
    found: dict[str, dict[str, Any]] = {f"choice-{head}-base": HEADS[head] for head in FOUR}
    for kind, axes, heads in (("choice", CHOICES, FOUR), ("map", AXES, FOUR[:2])):
        late = {
            f"{kind}-{head}-{axis}-{value:.3g}": HEADS[head] | changed(axis, value, base)
            for axis, values in axes.items()
            for value in values
            for head in heads
        }
        found |= late if kind == "choice" else _tables(base, width, CHOSEN if preset in KEPT else {}) | late
    found |= {
        f"map-{head}-crop-{value:.3g}-s{seed}": HEADS[head] | changed("crop", value, base) | {"seed": seed}
        for seed in range(3)
        for value in CROPS
        for head in FOUR[:2]
    }
    configs = {name: resolve(make_config(preset, **values)) for name, values in found.items()}
    return {
        name: replace(
            config,
            epochs=max(1, round(config.epochs * epochs)),
            warmup=config.warmup * epochs,
            seed=config.seed + seed,
        )
        for name, config in configs.items()
    }


def _tables(base: Config, width: int, choice: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The runs behind the tables and figures of the paper: with the values chosen, and where its picture appears."""
    chosen = {k: v for axis, value in choice.items() for k, v in changed(axis, value, base).items()}
    rows = [(head, seed) for seed in range(3) for head in FOUR]
    rows += [(head, seed) for seed in range(2) for head in ("orthogonal", "diagonal", "lowrank")]
    found = {f"{head}-s{seed}": chosen | HEADS[head] | {"seed": seed} for head, seed in rows}
    more = {f"linear-strength{s:g}-s0": HEADS["linear"] | strength(s) for s in STRENGTHS if s != 1}
    sizes = [max(1, round(width * share)) for share in D0]
    more |= {f"directclr-d{d0}-s0": HEADS["directclr"] | {"dim": d0} for d0 in sizes if d0 != sizes[2]}
    more["linear-depth2-s0"] = HEADS["linear"] | {"depth": 2}
    found |= {name: chosen | values for name, values in more.items()}
    found |= {f"{head}{HOT}-s{seed}": found[f"{head}-s{seed}"] | {"temperature": 0.5} for head, seed in rows}
    fine = {f"{head}{FINE}-s{seed}": HEADS[head] | FINE_VALUES | {"seed": seed} for head, seed in rows if head in FOUR}
    fine |= {name.replace(FINE, FINE + HOT): v | {"temperature": 0.5} for name, v in fine.items()}
    paper = {
        f"{head}{PAPER}-s{seed}": PAPER_VALUES | HEADS[head] | {"seed": seed} for seed in range(3) for head in FOUR
    }
    views = {name: getattr(base, name) for name in VIEWS_CHANGED}
    weak = {n.replace(PAPER, WEAK): v | views for n, v in paper.items() if n.startswith(FOUR[:2])}
    return found | fine | paper | weak


@cache
def data_of(source: str, split: str) -> Labelled:
    """A set, decoded once a process if it is small."""
    return to_memory(open_data(source, split), 0)


def sets(name: str, source: str) -> tuple[Labelled, Labelled]:
    """(training, test) images of a run."""
    train_set = data_of(source, "train")
    order = np.random.default_rng(0).permutation(len(train_set))
    cut = len(order) // 5
    if name.startswith(CHOOSING):
        return train_set.subset(np.sort(order[cut : 3 * cut])), train_set.subset(np.sort(order[:cut]))
    seen = train_set.subset(np.sort(order[cut : cut + len(order) // 4])) if PAPER in name else train_set
    return seen, data_of(source, "val")


def perform(name: str, config: Config, given: argparse.Namespace) -> str:
    """Train and measure one run, or go on with it; returns a line about it, for the first process of several."""
    places, workers = where(given), given.workers
    train_set, test_set = sets(name, given.data)
    cuda, whole = torch.cuda.is_available(), not name.startswith(CHOOSING) and PAPER not in name
    device = processes.start("cuda" if cuda else "cpu")
    first = processes.rank() == 0
    try:
        with Signals() as signals:
            how = {"compile": cuda, "checkpoint": given.checkpoint, "stop": signals}
            options = Options(device, workers, knn_every=0, keep_every=int(whole), **how)
            for _ in train(places.runs / name, config, train_set, test_set, options):
                pass
    finally:
        processes.stop()
    if not first:
        return ""
    net = load(places.runs / name / "encoder.safetensors", config)
    meta, arrays = measure(net, config, train_set, test_set, device, workers)
    if whole:
        more, found = mechanisms(net, places.runs / name, config, test_set, device, workers)
        meta, arrays = meta | more, arrays | found
    lines = [json.loads(line) for line in (places.runs / name / "metrics.jsonl").read_text().splitlines()]
    meta |= {"config": config.as_dict(), "curve": [line for line in lines if "epoch_loss" in line]}
    about = {"name": name, "data": {"path": Path(given.data).name, "digest": train_set.digest}}
    places.results.mkdir(parents=True, exist_ok=True)
    save_result(places.results / f"{name}.npz", {**about, **meta}, **arrays)
    rank = meta["metrics"]["effective_rank"]
    return f"{name}: probe {meta['probe_top1']:.3f}, kNN {meta['knn_top1']:.3f}, effective rank {rank:.1f}"


def load(path: Path, config: Config) -> Encoder:
    """A run's encoder, with DirectCLR's subvector, of which the file has no tensor."""
    return collapse.load(path, **({"dim": config.dim} if config.method == "directclr" else {}))


def encoders() -> dict[str, Encoder]:
    """The four that are stored, after the one that they started from."""
    config = plan(PRESET)["none-s0"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.safetensors"
        save_encoder(path, Network(config, 10))
        start = collapse.load(path)
    stored = {head: collapse.load(RESULTS / f"study/{head}.safetensors") for head in FOUR}
    return {"start": start, **stored}


def measure(
    net: Encoder, config: Config, train_set: Labelled, test_set: Labelled, device: str, workers: int
) -> tuple[Meta, Arrays]:
    """Probes, and the spectra of the test images."""
    preprocess = config.preprocessing()
    bank = train_set.subset(np.sort(np.random.default_rng(0).permutation(len(train_set))[:BANK]))
    keys, queries = (
        features(net, data.batches(preprocess, 256, workers), preprocess, device) for data in (bank, test_set)
    )
    labelled = (keys, bank.labels, queries, test_set.labels)
    fitted, nearest = probe(*labelled), knn(*labelled)
    with torch.no_grad():
        z = net.projector.eval().cpu()(torch.from_numpy(queries)).numpy() if net.projector else queries
    r_spectrum, z_spectrum = spectrum(queries), spectrum(z)
    meta = {
        "probe_top1": fitted.top1,
        "probe_interval": wilson(fitted.correct1, fitted.n),
        "knn_top1": nearest.top1,
        "knn_interval": wilson(nearest.correct1, nearest.n),
        "images": {"train": len(train_set), "bank": len(keys), "test": len(queries)},
        "metrics": r_spectrum.metrics(),
        "embedding_metrics": z_spectrum.metrics(),
    }
    arrays = {
        "singular_values": r_spectrum.singular_values,
        "floor": np.array(r_spectrum.floor),
        "embedding_singular_values": z_spectrum.singular_values,
        "embedding_floor": np.array(z_spectrum.floor),
    }
    return meta, arrays


def mechanisms(
    net: Encoder, folder: Path, config: Config, test_set: Labelled, device: str, workers: int
) -> tuple[Meta, Arrays]:
    """Signal and augmentation of the test images; where the head is linear, what becomes of them over the epochs."""
    views = represented(net, config, test_set, SEEN, VIEWS, device, workers)
    meta, arrays = signal_of(views)
    if config.head in ("none", "linear", "lowrank", "orthogonal"):
        arrays |= modes_of(views, product(net.projector, views.shape[-1])[-1])
    kept = sorted(folder.glob("encoder-*.safetensors"))
    if kept and config.head in ("none", "linear"):
        arrays |= over_time(kept, config, test_set, device, workers)
    return meta, arrays


def covariances(views: NDArray) -> tuple[NDArray, NDArray]:
    """(d, d) signal and augmentation of (images, views, d), as in `collapse.metrics.attribution`."""
    images, count, d = views.shape
    total, means = np.cov(views.reshape(-1, d).T), np.cov(views.mean(1).T)
    return signal_and_augmentation(total, means, images, count)


def signal_of(views: NDArray) -> tuple[Meta, Arrays]:
    """Signal and augmentation along the principal directions of the representations, rows of length one."""
    unit = views / np.maximum(np.linalg.norm(views, axis=2, keepdims=True), np.finfo(float).tiny)
    between, within = covariances(unit)
    vectors = np.linalg.eigh(between + within)[1][:, ::-1]
    along = [np.einsum("ik,ij,jk->k", vectors, c, vectors) for c in (between, within)]
    images, count, d = unit.shape
    rank = metrics.lidar(unit.reshape(-1, d), np.repeat(np.arange(images), count))
    fraction = float(np.trace(between) / np.trace(between + within))
    return {"signal_fraction": fraction, "lidar": rank}, {"between": along[0], "within": along[1]}


def modes_of(views: NDArray, W: NDArray) -> Arrays:
    """Signal fraction rho of the generalised eigenvectors of signal and total, and their share of z = W r's variance.

    With U^T C U = 1 and U^T C0 U = rho, r = C U y for uncorrelated y of variance 1, so mode k adds |W C u_k|^2.
    Directions in which r hardly varies (1e-6 of the largest) are left out.
    """
    between, within = covariances(views)
    total = between + within
    values, vectors = np.linalg.eigh(total)
    alive = values > 1e-6 * values[-1]
    white = vectors[:, alive] / np.sqrt(values[alive])
    rho, turn = scipy.linalg.eigh(white.T @ between @ white)
    share = ((W @ total @ white @ turn) ** 2).sum(0)
    return {"modes_rho": rho[::-1], "modes_share": share[::-1] / share.sum()}


def product(projector: nn.Module | None, d: int) -> list[NDArray]:
    """The linear layers of a head, the first first, and their product; no head is the identity."""
    layers = (
        [m.weight.detach().cpu().double().numpy() for m in projector.modules() if isinstance(m, nn.Linear)]
        if projector
        else []
    )
    total = np.eye(d)[: projector.dim if isinstance(projector, Subvector) else d]
    for layer in layers:
        total = layer @ total
    return [*layers, total]


def over_time(kept: list[Path], config: Config, data: Labelled, device: str, workers: int) -> Arrays:
    """X and the head's layers at each kept epoch; see the file's first lines."""
    found: dict[str, list[Any]] = {
        name: [] for name in ("x_eigenvalues", "x_growth", "head_singular_values", "alignment")
    }
    for path in kept:
        net = load(path, config)
        views = represented(net, config, data, 2 * config.batch_size, VIEWS, device, workers)
        *layers, W = product(net.projector, views.shape[-1])
        X = theory.gram_difference(views[:, 0], views[:, 1], W, "cosine", config.temperature)
        right = np.linalg.svd(W)[2]
        found["x_eigenvalues"].append(np.linalg.eigvalsh(X)[::-1])
        found["x_growth"].append(np.einsum("ki,ij,kj->k", right, X, right))
        sizes = [np.linalg.svd(layer, compute_uv=False) for layer in [*layers, W]]
        found["head_singular_values"].append([np.pad(v, (0, len(X) - len(v))) for v in sizes])
        if len(layers) > 1:
            found["alignment"].append(np.abs(np.diag(theory.alignment(layers[-2], layers[-1]))))
    epochs = [int(path.stem.rpartition("-")[2]) for path in kept]
    return {"epochs": np.array(epochs)} | {name: np.array(rows) for name, rows in found.items() if rows}


def _start() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    """Stop this process when its parent is gone, however that ended: a run has a minute to save."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    ended = time.monotonic() + 60
    while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and time.monotonic() < ended:
        time.sleep(0.1)
    os._exit(128 + signal.SIGTERM)


def queue(names: list[str], options: argparse.Namespace) -> None:
    """Perform the runs of these names that have no result yet: two at a time, one with a GPU or under torchrun."""
    results, folder = where(options).results, where(options).runs
    configs = plan(options.preset, options.epochs, options.seed)
    todo = [name for name in names if not (results / f"{name}.npz").exists()]
    if todo and options.data is None:
        raise InputError(f"{len(todo)} runs are missing, the first is {todo[0]}; give --data to train them")
    jobs = [(name, configs[name], options) for name in todo]
    if torch.cuda.is_available() or "WORLD_SIZE" in os.environ:
        for job in jobs:
            if line := perform(*job):
                say(line)
        return
    total = sum(configs[name].epochs for name in todo)
    with (
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _start) as pool,
        tqdm(total=total, unit=" epochs", desc=f"{len(todo)} runs", disable=None) as bar,
    ):
        waiting = iter(jobs)  # a process that stops with its queue finds no other run to begin
        left = {pool.submit(perform, *job) for job in islice(waiting, 2)}
        try:
            while left:
                done, left = wait(left, timeout=2, return_when=FIRST_COMPLETED)
                left |= {pool.submit(perform, *job) for job in islice(waiting, len(done))}
                bar.update(sum(_epochs(folder / name) for name in todo) - bar.n)
                for ended in done:
                    tqdm.write(ended.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _epochs(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count('"epoch_loss"') if log.exists() else 0


class Places(NamedTuple):
    """Folders of the runs, of their results, of the documents that sum them up and of figures; what names end with."""

    runs: Path
    results: Path
    documents: Path
    figures: Path
    ending: str = ""


def where(options: argparse.Namespace) -> Places:
    """Among the project's results for a preset of KEPT as it is; with another number of epochs or seed, in runs/."""
    if options.preset in KEPT and options.epochs == 1 and options.seed == 0:
        ending = KEPT[options.preset]
        study = f"study{ending}"
        return Places(Path("runs") / study, RESULTS / study, RESULTS, RESULTS.parents[1] / "figures", ending)
    own = Path("runs") / f"study-{Path(options.preset).stem}-x{options.epochs:g}"
    if options.seed:
        own = own.with_name(f"{own.name}-seed{options.seed}")
    return Places(own, own / "results", own, own)


def flags(doc: str) -> argparse.ArgumentParser:
    """What every script of the study takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as for collapse train; needed if a run is missing")
    parser.add_argument("--preset", default=PRESET, help=f"as for collapse train ({PRESET})")
    parser.add_argument("--epochs", type=float, default=1.0, help="a factor for all runs' epochs (1)")
    parser.add_argument("--seed", type=int, default=0, help="added to the seed of every run (0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode large images, a rank (0)")
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations: less memory, the same result")
    return parser


if __name__ == "__main__":
    parser = flags(__doc__ or "")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="runs by name, * and ? as in a shell"
    )
    parser.add_argument("--list", action="store_true", help="print the names, and which are done")
    given = parser.parse_args()
    with ending("study.py"):
        planned = plan(given.preset, given.epochs)
        chosen = [name for name in planned if any(fnmatch.fnmatchcase(name, pattern) for pattern in given.only)]
        if not chosen:
            raise InputError(f"--only {' '.join(given.only)}: no run of that name; see --list")
        if given.list:
            say("\n".join(f"{name}{'  done' * (where(given).results / f'{name}.npz').exists()}" for name in chosen))
        else:
            queue(chosen, given)
