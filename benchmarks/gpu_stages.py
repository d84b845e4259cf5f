"""The stages of gpu.py.  A figure is said as soon as it is known: one line of JSON in a file."""

import argparse
import faulthandler
import gc
import io
import json
import lzma
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, for the resumed run

import numpy as np
import torch
from gpu_correct import TINY, correct
from PIL import Image
from spectrum_gpu import CASES, measure, seconds
from torch import Tensor
from train import Bench, flops, matrix_rate, rounds, write_images

import collapse
from collapse import InputError
from collapse.arguments import device_of
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.data.labelled import Labelled, of_arrays, open_data
from collapse.data.preprocessing import Preprocessing
from collapse.encoders.accuracy import knn, probe
from collapse.encoders.passes import embed, features
from collapse.models.backbones import make_backbone
from collapse.models.encoder import Encoder
from collapse.recipes.config import Config, make_config
from collapse.results import strict
from collapse.training import relaxation
from collapse.training.network import Network
from collapse.training.online import Evaluation
from collapse.training.state import Options
from collapse.training.train import train

SAMPLES = "imagenet-100-samples.zip"  # photographs, beside --data
Say = Callable[[str, Any], None]
NAMES = {
    "none": "no projector", "directclr": "DirectCLR", "linear": "linear projector", "mlp": "2-layer projector",
}  # fmt: skip
STEPS = 4000  # of a relaxation, at most, and a quarter more: 20 s on an H200, which waits for its host


def card(options: argparse.Namespace, say: Say) -> None:
    """Versions, memory, rates of copies and products."""
    cuda = options.device == "cuda"
    say("versions", {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]})
    say("cores", len(os.sched_getaffinity(0)))
    say("open_files", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    shm = os.statvfs("/dev/shm")
    say("shm_bytes", shm.f_frsize * shm.f_bavail)
    if cuda:
        about = torch.cuda.get_device_properties(0)
        driver = Path("/proc/driver/nvidia/version")
        say("driver", driver.read_text().splitlines()[0] if driver.exists() else None)
        say("device", {"name": about.name, "bytes": about.total_memory, "capability": [about.major, about.minor]})
    n = 128 if options.tiny else 8192
    data = torch.empty(n * n * 4, dtype=torch.uint8, pin_memory=cuda)
    there = data.to(options.device)
    size = data.numel() / 1e9
    say("copy_to_device_gb_per_second", size / seconds(lambda: there.copy_(data, non_blocking=True), 5, options.device))
    say("copy_on_device_gb_per_second", 2 * size / seconds(lambda: there.clone(), 5, options.device))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(n, n, device=options.device).to(dtype)
        say(f"product_tflops_{str(dtype)[6:]}", 2 * n**3 / seconds(partial(torch.mm, a, a), 5, options.device) / 1e12)
    b = torch.randint(-64, 64, (n, n), dtype=torch.int8, device=options.device)
    say("product_tops_int8", 2 * n**3 / seconds(lambda: torch._int_mm(b, b.T), 5, options.device) / 1e12)


def _decode(contents: list[bytes]) -> np.ndarray:
    read = lambda data: np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB"))  # noqa: E731
    return np.stack([read(data) for data in contents])


def read_packed(path: Path) -> tuple[Labelled, Labelled]:
    """Training and validation images of one lzma file.

    It holds: 4 bytes, little-endian, the length of a JSON object {"n", "classes"}, the object, n uint16 lengths, n
    uint8 labels, n uint8 (1: validation), and n JPEGs of one size, one after another.
    Raises InputError: it does not.
    """
    try:
        with lzma.open(path) as file:
            about = json.loads(file.read(struct.unpack("<I", file.read(4))[0]))
            n = about["n"]
            lengths = np.frombuffer(file.read(2 * n), "<u2")
            labels, held = (np.frombuffer(file.read(n), np.uint8) for _ in range(2))
            images = [file.read(size) for size in lengths.tolist()]
        parts = [images[start : start + 2000] for start in range(0, n, 2000)]
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            pixels = torch.from_numpy(np.concatenate(list(pool.map(_decode, parts)))).permute(0, 3, 1, 2).contiguous()
    except (OSError, lzma.LZMAError, EOFError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path}: not images packed as --data wants them ({error}); see gpu_stages.py") from error
    split = [np.flatnonzero(held == part) for part in (0, 1)]
    train_set, val = (of_arrays(pixels[i], labels[i].astype(np.int64), about["classes"]) for i in split)
    return train_set, val


def table1(options: argparse.Namespace, say: Say) -> None:
    """Table 1 in small: --epochs, or as many as fit, the same for all heads; the largest contrast comes first.

    Encoders trained with two layers are left in --trunks, for `relaxed`.
    """
    began = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # training is in bf16; a spectrum sees TF32's rounding
    data, val = read_packed(options.data)
    if options.tiny:
        data, val = (part.subset(np.arange(0, len(part), -(-len(part) // 64))) for part in (data, val))
    base, seed = recipe(options), of_run(options)
    runs = [(t, head) for t in options.temperatures for head in ("none", "mlp", "directclr", "linear")]
    say("decode_seconds", time.monotonic() - began)
    epoch = epoch_seconds(base, data, options) if options.epochs is None else None
    since = time.monotonic()
    net = Network(base, 0)
    untrained = Encoder(net.backbone, net.projector, base.preprocessing(), {}).to(options.device).eval()
    say(f"untrained{seed}", evaluate(untrained, data, val, options))
    evaluation = time.monotonic() - since  # more than a later one takes, whose kernels are known
    say("online_seconds", online(base, data, val, options))
    left = options.seconds - (time.monotonic() - began) - len(runs) * evaluation
    epochs = max(2, min(200, int(left / len(runs) / epoch))) if epoch else options.epochs
    epochs = 2 if options.tiny else epochs
    about = {"epochs": epochs, "epoch_seconds": epoch, "evaluation_seconds": evaluation, "images": len(data)}
    say(f"recipe{seed}", {**base.as_dict(), **about})
    for temperature, head in runs:
        method, head_ = ("directclr", "none") if head == "directclr" else ("simclr", head)
        config = replace(base, temperature=temperature, epochs=epochs, method=method, head=head_)
        kept = _trunk(options, temperature) if head == "mlp" else None
        say(f"{head}, temperature {temperature}{seed}", table1_run(config, data, val, options, kept))


def recipe(options: argparse.Namespace) -> Config:
    """Of table1: the paper's views at 32 px, LARS."""
    size = {**TINY, "precision": "float32"} if options.tiny else {}
    batch = 32 if options.tiny else 512
    # LARS for short schedules: 0.075 times the root of the batch (arXiv 2002.05709, appendix B.1).
    views = {"scale": (0.08, 1.0), "blur": (1.0, 0.1), "solarize": (0.0, 0.2)}  # the paper's, as the study's *-paper-*
    how: dict[str, Any] = {"optimizer": "lars", "weight_decay": 1e-6, "lr": 0.075 * batch**0.5, **views, **size}
    return make_config("cifar10", warmup=1, batch_size=batch, seed=options.seed, arch=options.arch, **how)


def of_run(options: argparse.Namespace) -> str:
    """What tells the figures of one training of table1 from another's."""
    return f", seed {options.seed}" + ("" if options.arch == "resnet18" else f", {options.arch}")


def _trunk(options: argparse.Namespace, temperature: float) -> Path:
    return options.trunks / f"{options.arch}-{temperature}-{options.seed}.safetensors"


def trainer32(options: argparse.Namespace, say: Say) -> None:
    """Where a step of table1 goes: seconds of its parts, the device's included, and the kernels that it launches."""
    data, _ = read_packed(options.data)
    bench = Bench(recipe(options), data, _how(options), 2 if options.tiny else 50)
    for _ in range(2):
        bench.time(bench.train)
    parts = ("train", "synthetic", "bare", "augment")
    say(f"step_seconds{of_run(options)}", {name: bench.time(getattr(bench, name)) for name in parts})
    say(f"kernels{of_run(options)}", kernels(bench))


def relaxed(options: argparse.Namespace, say: Say) -> None:
    """Of each encoder in --trunks, and each head, a last map alone, until it stands still or the time is over.

    They take a card by turns: eight processes side by side finished none in the time of four.
    """
    data, _ = read_packed(options.data)
    data = data.subset(np.arange(0, len(data), -(-len(data) // 64))) if options.tiny else data
    images, views = (32, 3) if options.tiny else (5000, 8)
    found = [temperature for temperature in options.temperatures if _trunk(options, temperature).exists()]
    if not found:
        raise InputError(f"{options.trunks}: no encoder of seed {options.seed}; run table1 first")
    side_by_side = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
    with tempfile.TemporaryDirectory() as folder:
        for temperature in found:
            net = collapse.load(_trunk(options, temperature))
            config = replace(recipe(options), temperature=temperature)
            rows = relaxation.represented(net, config, data, images, views, options.device)
            np.save(Path(folder) / f"{temperature}.npy", rows)
        cells = [(temperature, head) for temperature in found[::-1] for head in relaxation.HEADS]
        with ProcessPoolExecutor(side_by_side, multiprocessing.get_context("spawn")) as pool:
            asked = {pool.submit(relax_cell, Path(folder), *cell, options): cell for cell in cells}
            for done in as_completed(asked):
                temperature, head = asked[done]
                say(f"{head}, temperature {temperature}{of_run(options)}", done.result())


def _how(options: argparse.Namespace, **more: Any) -> Options:
    return Options(**{"device": options.device, "compile": options.device == "cuda", **more})


def epoch_seconds(config: Config, data: Labelled, options: argparse.Namespace) -> float:
    """Of training alone, from some steps after compilation."""
    bench = Bench(config, data, _how(options), 2 if options.tiny else 25)
    bench.time(bench.train)
    return bench.time(bench.train) * bench.plan.per_epoch


def online(config: Config, data: Labelled, val: Labelled, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one measurement while a network trains, at the defaults: spectra, and nearest neighbours."""
    net = Network(config, len(data.classes)).to(options.device)
    measuring = Evaluation(net, data, val, Options().held, 0, options.device)
    ways = {"spectra": measuring.spectra, "neighbours": measuring.neighbours}
    return {name: seconds(way, 1, options.device) for name, way in ways.items()}


def table1_run(
    config: Config, data: Labelled, val: Labelled, options: argparse.Namespace, kept: Path | None
) -> dict[str, Any]:
    """Train one head; probe, neighbours and spectra of what came out; its file is kept as `kept`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        how = _how(options, spectrum_every=0, knn_every=0, log_every=10**6)
        lines = list(train(Path(folder) / "run", config, data, val, how))
        trained = time.monotonic() - start
        net = collapse.load(Path(folder) / "run/encoder.safetensors").to(options.device)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / "run/encoder.safetensors", kept)
    found = evaluate(net, data, val, options)
    times = {"train_seconds": trained, "evaluation_seconds": time.monotonic() - start - trained}
    return {**found, **times, "losses": [line["epoch_loss"] for line in lines]}


def evaluate(net: Encoder, data: Labelled, val: Labelled, options: argparse.Namespace) -> dict[str, Any]:
    """Probe and nearest neighbours with their intervals, spectra of representation and embedding."""
    rows = [torch.from_numpy(_features(net, part, options)).to(options.device) for part in (data, val)]
    with torch.no_grad():
        z = rows[1] if net.projector is None else net.projector(rows[1])
    four = (rows[0], data.labels, rows[1], val.labels)
    found = {"knn": knn(*four).as_dict(), "probe": probe(*four).as_dict()}
    spectra = {"representation": collapse.spectrum(rows[1].cpu()), "embedding": collapse.spectrum(z.cpu())}
    about = {
        name: {"effective_rank": s.metrics()["effective_rank"], "singular_values": s.singular_values}
        for name, s in spectra.items()
    }
    return {**found, **about}


def relax_cell(folder: Path, temperature: float, head: str, options: argparse.Namespace) -> dict[str, Any]:
    """Predict, relax and measure, from the views in TEMPERATURE.npy; as experiments/networks/relaxation.py."""
    torch.set_num_threads(1)
    views = relaxation.Views(np.load(folder / f"{temperature}.npy"), options.device)
    moving = relaxation.Relaxation.of(views, head, temperature, options.seed)
    shares, predicted = moving.predicted()
    first, limit = (2, 4) if options.tiny else (250, STEPS)
    state, moved, taken = relaxation.relax(moving, first, limit)
    return {
        "steps": state.step, "seconds": taken, "moved": moved, "drift": state.drift,
        "measured": state.living(), "predicted": predicted,
        **relaxation.agreement(state.shares, shares),
        "representation": {"singular_values": state.r.singular_values},
        "embedding": {"singular_values": state.z.singular_values},
    }  # fmt: skip


def _features(net: Any, data: Labelled, options: argparse.Namespace) -> np.ndarray:
    return features(net, data.batches(net.preprocess, 1000, 0), net.preprocess, options.device)


def trainer224(options: argparse.Namespace, say: Say) -> None:
    """ResNet-50 at 224 px from JPEGs: the trainer, the same step on tensors that are there, and bare passes.

    The JPEGs are crops of the photographs in SAMPLES, if that lies beside --data, else of random images.
    The step on tensors alone is also timed eager.
    """
    config = _imagenet(options)
    with tempfile.TemporaryDirectory() as folder:
        of = write_photographs(options, Path(folder), 16 if options.tiny else 2048)
        data = open_data(folder, "train")
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.jpg")]
        say("images", {"of": of, "count": len(sizes), "bytes": sum(sizes) / len(sizes)})
        eager = Bench(config, data, _how(options, compile=False), 2 if options.tiny else 10)
        eager.time(eager.synthetic)
        say("eager", {**of_memory(options), "images_per_second": config.batch_size / eager.time(eager.synthetic)})
        del eager
        _forget(options)
        workers = 0 if options.tiny else len(os.sched_getaffinity(0))
        bench = Bench(config, data, _how(options, workers=workers), 2 if options.tiny else 10)
        start = time.monotonic()
        bench.train()
        bench.training.read()  # waits
        say("first_step_seconds", time.monotonic() - start)
        of_rounds = rounds(bench, ["train", "synthetic", "bare"], 1)
        say("rounds", of_rounds)
        say("compiled", {**of_memory(options), "images_per_second": of_rounds["images_per_second"]["synthetic"][0]})
        bench.steps = 4 if options.tiny else 120
        rate = config.batch_size / bench.time(bench.train)
        say("images_per_second_in_a_row", rate)
        say("in_a_row / synthetic", rate / of_rounds["images_per_second"]["synthetic"][0])
        say("kernels", kernels(bench))
        operations, peak = flops(config), matrix_rate(options.device)
        say("flops", {"step": operations, "product": peak, "use": rate / config.batch_size * operations / peak})


def budget(options: argparse.Namespace, say: Say) -> None:
    """The step of trainer224 on tensors alone, compiled with a budget of memory (--checkpoint)."""
    config = _imagenet(options)
    pixels = torch.randint(0, 256, (config.batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8)
    data = of_arrays(pixels, np.arange(config.batch_size) % 10)
    bench = Bench(config, data, _how(options, checkpoint=True), 2 if options.tiny else 10)
    bench.time(bench.synthetic)
    say("step", {**of_memory(options), "images_per_second": config.batch_size / bench.time(bench.synthetic)})


def _imagenet(options: argparse.Namespace) -> Config:
    small: dict[str, Any] = {**TINY, "image_size": 32, "arch": "resnet18"} if options.tiny else {}
    return make_config("imagenet", batch_size=8 if options.tiny else 512, seed=options.seed, **small)


def _forget(options: argparse.Namespace) -> None:
    """Free what is not held, and count the device's memory anew."""
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def of_memory(options: argparse.Namespace) -> dict[str, int]:
    """The largest that the device has held since the last reset."""
    return {"memory_bytes": torch.cuda.max_memory_allocated()} if options.device == "cuda" else {}


def write_photographs(options: argparse.Namespace, folder: Path, count: int) -> str:
    """Write `count` JPEGs in folder/train/CLASS; says of what they are crops."""
    samples = options.data and options.data.with_name(SAMPLES)
    samples = samples if samples and samples.exists() else None
    write_images(samples, folder, count, options.seed)
    return SAMPLES if samples else "random"


def kernels(bench: Bench) -> dict[str, Any]:
    """How many kernels one step launches, and which take the longest."""
    cuda = bench.device.startswith("cuda")
    activity, where = torch.profiler.ProfilerActivity, torch.autograd.DeviceType
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        bench.train()
        if cuda:
            torch.cuda.synchronize()
    taken = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total  # noqa: E731
    # Of a device the host's calls are listed too; they run nothing there.
    ran = [event for event in profile.key_averages() if event.device_type == (where.CUDA if cuda else where.CPU)]
    events = sorted(ran, key=taken, reverse=True)
    return {
        "launched": sum(event.count for event in events),
        "milliseconds": sum(map(taken, events)) / 1e3,
        "longest": {event.key[:80]: taken(event) / 1e3 for event in events[:12]},
    }


def spectrum(options: argparse.Namespace, say: Say) -> None:
    """Products and eigenvalues, narrow to wide."""
    for d, rows in ((32, 1024),) if options.tiny else CASES:
        found = measure(d, rows, 1 if options.tiny else 5, options.device)
        say(f"d = {d}", {**found, "share": found["tflops"]["update"] / found["tflops"]["float64"]})


def extract(options: argparse.Namespace, say: Say) -> None:
    """Images a second of `embed`: from pixels in pinned memory, beside the bare forward pass, and from JPEGs.

    The bound of the last is what the workers decode.
    """
    torch.backends.cudnn.allow_tf32 = False  # as the commands do
    shape = TINY if options.tiny else {"blocks": (), "planes": ()}
    net = make_backbone("resnet18" if options.tiny else "resnet50", 224, stem=7, **shape).to(options.device).eval()
    batch, count, size = (4, 2, 64) if options.tiny else (256, 12, 224)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, pin_memory=options.device == "cuda")
    preprocess = Preprocessing()
    for precision in ("float32", "bf16"):

        def through(batches: Iterable[Tensor], precision: str = precision) -> None:
            for _ in embed(net, batches, preprocess, options.device, precision):
                pass

        layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
        x = preprocess.normalize(pixels.to(options.device)).contiguous(memory_format=layout)

        def bare(precision: str = precision, x: Tensor = x) -> None:
            kind = torch.device(options.device).type
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                for _ in range(count):
                    net(x)

        ways: tuple[Callable[[], None], ...] = (partial(through, [pixels] * count), bare)
        rates = [batch * count / seconds(way, 2, options.device) for way in ways]
        say(precision, {"images_per_second": rates[0], "bare": rates[1], "share": rates[0] / rates[1]})
    with tempfile.TemporaryDirectory() as folder:
        of = write_photographs(options, Path(folder), 16 if options.tiny else 1024)
        paths = sorted(map(str, Path(folder).rglob("*.jpg"))) * (1 if options.tiny else 12)
        listed = Path(folder) / "listed.txt"
        listed.write_text("\n".join(paths))
        images, workers = Images(listed), 0 if options.tiny else len(os.sched_getaffinity(0))

        def decoded() -> Iterator[Tensor]:
            return pixel_batches(images, preprocess, batch, workers)

        start = time.perf_counter()
        for _ in decoded():
            pass
        alone, start = time.perf_counter() - start, time.perf_counter()
        through(decoded())  # in bf16
        taken = time.perf_counter() - start
        rates = [len(paths) / s for s in (taken, alone)]
        say("files", {"of": of, "images_per_second": rates[0], "decoding": rates[1], "share": rates[0] / rates[1]})


def figures(options: argparse.Namespace, say: Say) -> None:
    """Spectra and accuracies of the heads of a ResNet-18, and rates, of what is known, in one figure."""
    from collapse import plots

    known = json.loads(options.out.read_text())["figures"]
    seeds = sorted({int(name[1]) for key in known if (name := re.fullmatch(r"table1/recipe, seed (\d+)", key))})
    with plots.style():
        fig, axes = plots.figure(plots.TEXT, 5.0, 2, 2)
        for ax, temperature in zip(axes[0], (0.1, 0.5), strict=True):
            draw_spectra(ax, known, temperature, seeds)
        draw_accuracies(axes[1, 0], known, seeds)
        draw_rates(axes[1, 1], known)
        fig.tight_layout()
        stem = options.figure or options.out.with_suffix("")
        plots.save_figure(fig, stem, [".png"])
    say("drawn", f"{stem.name}.png")


def draw_spectra(ax: Any, known: dict[str, Any], temperature: float, seeds: list[int]) -> None:
    """Of the representation, over the largest value, by head, a line a seed; of the untrained network in grey."""
    from collapse import plots

    named = {name: f"table1/{head}, temperature {temperature}" for head, name in NAMES.items()}
    for name, key in {**named, "untrained": "table1/untrained"}.items():
        color, dashes = plots.HEAD_COLORS.get(name, "0.6"), plots.HEAD_DASHES.get(name, "-")
        for run in runs_of(known, key, seeds):
            values = np.array(run["representation"]["singular_values"])
            values = values[values > 1e-7 * values[0]] / values[0]
            ax.plot(np.arange(1, len(values) + 1), np.log(values), color=color, ls=dashes, lw=0.9, label=name)
            name = "_"  # one entry in the legend
    ax.set(xlabel="index of the singular value", ylabel="ln (value over the largest)", ylim=(-14, 0.5))
    ax.set_title(rf"CIFAR-10, representation, $\tau = {temperature}$")
    if temperature == 0.5:
        ax.legend()


def runs_of(known: dict[str, Any], key: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of a key that are known, by seed."""
    return [known[f"{key}, seed {seed}"] for seed in seeds if f"{key}, seed {seed}" in known]


def draw_accuracies(ax: Any, known: dict[str, Any], seeds: list[int]) -> None:
    """The probe's, with 95 % intervals of the test images, by head and temperature, a point a seed."""
    from collapse import plots

    for place, (head, name) in enumerate(NAMES.items()):
        for offset, temperature, marker in ((-0.2, 0.1, "o"), (0.2, 0.5, "s")):
            for seed, run in enumerate(runs_of(known, f"table1/{head}, temperature {temperature}", seeds)):
                top, (low, high) = (100 * np.array(run["probe"][of]) for of in ("top1", "top1_interval"))
                how: dict[str, Any] = {"fmt": marker, "color": plots.HEAD_COLORS[name], "markersize": 3}
                x = place + offset + 0.13 * (seed - (len(seeds) - 1) / 2)
                ax.errorbar(x, top, [[top - low], [high - top]], **how)
    for temperature, marker in ((0.1, "o"), (0.5, "s")):
        ax.plot([], [], marker, color="0.3", markersize=3, label=rf"$\tau = {temperature}$")
    ax.set_xticks(range(len(NAMES)), [name.replace(" ", "\n") for name in NAMES.values()])
    ax.set(ylabel="probe, % of the test images", title="CIFAR-10, accuracy, a point a seed")
    ax.legend()


def draw_rates(ax: Any, known: dict[str, Any]) -> None:
    """Images a second, of training and of extraction."""
    row = known.get("trainer224/rounds", {}).get("images_per_second", {})
    rates = {
        "step, eager": known.get("trainer224/eager", {}).get("images_per_second"),
        "step, compiled": row.get("synthetic", [None])[0],
        "step, budget": known.get("budget/step", {}).get("images_per_second"),
        "bare, compiled": row.get("bare", [None])[0],
        "train JPEGs": known.get("trainer224/images_per_second_in_a_row"),
        "embed, float32": known.get("extract/float32", {}).get("images_per_second"),
        "embed, bf16": known.get("extract/bf16", {}).get("images_per_second"),
        "embed JPEGs": known.get("extract/files", {}).get("images_per_second"),
    }
    there = {name: rate for name, rate in rates.items() if rate}
    bars = ax.barh(list(there)[::-1], list(there.values())[::-1], color="0.6")
    ax.bar_label(bars, [f"{rate:,.0f}" for rate in list(there.values())[::-1]], padding=2)
    ax.locator_params("x", nbins=4)
    ax.set(xlabel="images a second", title="ResNet-50, 224 px", xlim=(0, 1.25 * max(there.values(), default=1)))


def require(device: str) -> None:
    """End the process, with a line, if the device is absent."""
    try:
        device_of(device)
    except InputError as error:
        print(f"gpu.py: {error}; --tiny --device cpu rehearses without one", file=sys.stderr)
        sys.exit(2)


STAGES = (card, correct, table1, relaxed, trainer32, trainer224, budget, spectrum, extract, figures)


def run(name: str, options: argparse.Namespace, limit: float, figures: Path, errors: Path) -> None:
    """One stage, in a process of its own, which leads the processes that it starts; it has `limit` seconds.

    At SIGUSR1 it says where it is.
    """
    os.setsid()
    log = os.open(errors, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.register(signal.SIGUSR1, file=log)
    if options.device == "cpu":
        torch.set_num_threads(1)
    stage = next(stage for stage in STAGES if stage.__name__ == name)
    with open(figures, "a", buffering=1, encoding="utf-8") as file:
        say = lambda key, value: print(json.dumps(strict({f"{name}/{key}": value})), file=file)  # noqa: E731
        try:
            stage(argparse.Namespace(**{**vars(options), "seconds": limit}), say)
        except InputError as error:
            raise SystemExit(f"gpu: {error}") from error
