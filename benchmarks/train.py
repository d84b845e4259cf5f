"""How fast training is, as shares of what the same machine does without the work around it, within one run.

    python benchmarks/train.py                                      # on the CPU: two minutes on one core
    python benchmarks/train.py --device cuda --out train.json       # on one GPU: every stage, under 9 minutes

On the CPU: a ResNet-18 of quarter width at 32 px, bf16, from a set in memory, as `collapse train` runs it.  On a GPU:
a ResNet-50 at 224 px from JPEGs, decoded by the workers: crops of the photographs in --samples, or random
images.  Rounds of
    train       batches, augmentation and step, as the trainer makes them
    synthetic   the same step on tensors that are already there: the ceiling of any input pipeline
    bare        forward and backward of the two views, without augmentation, optimiser and online classifier
alternate in order; the result is the median of each and of their ratios, images a second (an image is two views), and
the share of the device's measured bf16 matrix rate that the model's products take.  Then, each alone: augmentation,
decoding, loss, optimiser.  On the CPU all times are those of the process, with one thread: other programs on the
machine do not count.  Prints one JSON document; with --out each stage is also saved as soon as it is done.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from collapse.data.labelled import Labelled, of_arrays, open_data
from collapse.recipes.config import Config, make_config
from collapse.recipes.views import to_device
from collapse.results import provenance, save_text, to_json
from collapse.training.loader import BatchOrder, batches
from collapse.training.loop import ahead
from collapse.training.losses import contrastive_loss
from collapse.training.network import Network
from collapse.training.state import Options, Training


def random_images(n: int, size: int, seed: int) -> np.ndarray:
    """(n, size, size, 3) uint8: smooth noise, which compresses like a photograph."""
    coarse = torch.rand(n, 3, max(2, size // 8), max(2, size // 8), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (fine * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_jpegs(folder: Path, n: int, seed: int) -> None:
    """n JPEGs of about 500 x 375 px, each image with four qualities, in ten classes."""
    for index, pixels in enumerate(random_images(n // 4, 500, seed)):
        for copy, quality in enumerate((85, 90, 92, 95)):
            path = folder / f"train/{index % 10}/{index}_{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[:375]).save(path, quality=quality)


def write_images(samples: Path | None, folder: Path, n: int, seed: int) -> None:
    """n JPEGs: crops of photographs, or random images where there are none."""
    if samples is None:
        write_jpegs(folder, n, seed)
    else:
        recrop_jpegs(samples, folder, n, seed)


def recrop_jpegs(samples: Path, folder: Path, n: int, seed: int) -> None:
    """n JPEGs in ten classes: crops of 90 % or more of each side of a zip's photographs, packed as these were.

    Random images decode too easily: 478 a second and core where photographs are 337.
    """
    for name in range(10):
        (folder / f"train/{name}").mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    parts = [(samples, folder, range(start, n, cores), seed) for start in range(cores)]
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        list(pool.map(_recrop, *zip(*parts, strict=True)))


def _recrop(samples: Path, folder: Path, indices: range, seed: int) -> None:
    with zipfile.ZipFile(samples) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        for index in indices:
            data, rng = io.BytesIO(archive.read(names[index % len(names)])), np.random.default_rng([seed, index])
            photo = JpegImagePlugin.JpegImageFile(data)
            size = np.array(photo.size)
            part = np.maximum(1, (size * rng.uniform(0.9, 1, 2)).astype(int))
            left, top = rng.integers(size - part + 1)
            packed = {"qtables": photo.quantization, "subsampling": JpegImagePlugin.get_sampling(photo)}
            crop = photo.crop((left, top, left + part[0], top + part[1]))
            crop.save(folder / f"train/{index % 10}/{index}.jpg", "JPEG", **packed)


def now(device: str) -> float:
    """Seconds: on the clock when the device has done all it was given, or of this process on the CPU."""
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """One trainer and what is measured of it. A round of a case is `steps` steps; times are seconds a step."""

    def __init__(self, config: Config, data: Labelled, options: Options, steps: int) -> None:
        self.plan = BatchOrder(len(data), config.batch_size, 1 << 20, config.seed)
        self.training = Training(config, len(data.classes), self.plan, options)
        self.device, self.config, self.steps = options.device, config, steps
        first = next(iter(batches(data, self.plan, self.training.augmentations, 0, 0, self.device)))
        self.first, self.labels = first, torch.from_numpy(data.labels)
        self.views = self.training.views(first)
        self.source = self._source(data, options.workers)

    def _source(self, data: Labelled, workers: int) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
        loader = batches(data, self.plan, self.training.augmentations, 0, workers, self.device)
        return iter(ahead(loader, self.training.views, self.device))

    def _labels(self, batch: Any) -> Tensor:
        return to_device(self.labels[torch.from_numpy(batch.images)], self.device)

    def train(self) -> None:
        batch, views = next(self.source)
        self.training.run_step(views, self._labels(batch))

    def synthetic(self) -> None:
        self.training.run_step(self.views, self._labels(self.first))

    def bare(self) -> None:
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16"):
            z, z_prime, _ = self.training.net(*self.views)
        torch.autograd.backward([z, z_prime], [torch.ones_like(z), torch.ones_like(z_prime)])

    def augment(self) -> None:
        self.training.views(self.first)

    def loss(self) -> None:
        z = torch.randn(2, self.config.batch_size, self.training.config.dim, device=self.device, requires_grad=True)
        contrastive_loss(z[0], z[1], 0.1).backward()

    def optimiser(self) -> None:
        for p in self.training.network.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        self.training.optimizer.step()

    def time(self, case: Callable[[], None]) -> float:
        """Seconds a step, the device's work included."""
        start = now(self.device)
        for _ in range(self.steps):
            case()
        seconds = (now(self.device) - start) / self.steps
        self.training.unread.clear()
        return seconds


def flops(config: Config) -> float:
    """Floating-point operations of one step's products, forward and backward, as torch counts them."""
    net = Network(config, 10).train()
    views = torch.randn(2, 2, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        z, z_prime, _ = net(*views)
        (z.sum() + z_prime.sum()).backward()
    return counter.get_total_flops() / 2 * config.batch_size


def matrix_rate(device: str) -> float:
    """bf16 products a second of a large square matrix, in operations."""
    n = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(5):
        start = now(device)
        for _ in range(10):
            a @ a
        seconds.append((now(device) - start) / 10)
    return 2 * n**3 / min(seconds)


def decode_rate(data: Labelled, seconds: float = 3.0) -> float:
    """Images a second that one process decodes and crops twice."""
    config = make_config("imagenet", batch_size=32)
    plan = BatchOrder(len(data), 32, 1 << 20, 0)
    views = (config.augmentation(0), config.augmentation(1))
    start, count = time.perf_counter(), 0
    for batch in batches(data, plan, views, 0, 0):
        count += len(batch.images)
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def rounds(bench: Bench, names: list[str], count: int) -> dict[str, Any]:
    """Images a second of each case, (count,) each, and the medians of the ratios of the first to the others."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(count + 1):
        for name in names[:: 1 if round_ % 2 else -1]:
            taken = bench.time(getattr(bench, name))
            if round_:  # the first warms up
                seconds[name].append(taken)
    ratios = {f"{names[0]} / {n}": statistics.median(np.divide(seconds[n], seconds[names[0]])) for n in names[1:]}
    rates = {name: [bench.config.batch_size / s for s in values] for name, values in seconds.items()}
    return {"images_per_second": rates, "ratios": ratios}


def measure(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Run every stage; `save` gets the result so far after each."""
    cuda = options.device.startswith("cuda")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if cuda:
            write_images(options.samples, Path(folder), 2048, options.seed)
            (Path(folder) / "val").mkdir()
            config = make_config("imagenet", batch_size=options.batch_size or 256)
            data = open_data(folder, "train")
            result["decode_images_per_second_per_process"] = decode_rate(data)
            save(result)
        else:
            small = {"planes": (16, 32, 64, 128), "batch_size": options.batch_size or 128, "precision": "bf16"}
            config = make_config("cifar10", **small)
            pixels = torch.from_numpy(random_images(4096, 32, options.seed)).permute(0, 3, 1, 2).contiguous()
            data = of_arrays(pixels, np.arange(4096) % 10)
        how = Options(device=options.device, workers=options.workers if cuda else 0, compile=cuda)
        bench = Bench(config, data, how, options.steps or (20 if cuda else 4))
        result |= {"arch": config.arch, "planes": config.planes, "image_size": config.image_size}
        result |= {"batch_size": config.batch_size, "precision": config.precision}
        for _ in range(3):
            bench.train()  # compilation, and the workers' start
        result |= rounds(bench, ["train", "synthetic", "bare"], options.rounds)
        save(result)
        if cuda:  # longer than the batches that wait in a queue, so that a loader that is too slow shows
            bench.steps = 120
            result["images_per_second_in_a_row"] = config.batch_size / bench.time(bench.train)
            save(result)
        result["flops_per_step"] = flops(config)
        result["matrix_flops_per_second"] = matrix_rate(options.device)
        rate = statistics.median(result["images_per_second"]["train"]) / config.batch_size
        result["flop_use"] = rate * result["flops_per_step"] / result["matrix_flops_per_second"]
        save(result)
        alone = ("augment", "loss", "optimiser")
        result["seconds_per_step"] = {name: min(bench.time(getattr(bench, name)) for _ in range(3)) for name in alone}
        if cuda:
            result["device"] = torch.cuda.get_device_name()
            result["memory_bytes"] = torch.cuda.max_memory_allocated()
        save(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:i]")
    parser.add_argument("--batch-size", type=int, help="default 128 on the CPU, 256 on a GPU")
    parser.add_argument("--steps", type=int, help="of a round: default 4 on the CPU, 20 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=Path, help="on a GPU: a zip of photographs, JPEGs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.device.startswith("cuda"):
        torch.set_num_threads(1)
    about = {"schema": 1, **provenance(), "date": str(date.today()), "threads": torch.get_num_threads()}
    final: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        final.update(about, load=os.getloadavg(), **result)
        if options.out:
            save_text(options.out, to_json(final))

    measure(options, save)
    print(to_json(final), end="")


if __name__ == "__main__":
    main()
