"""How much of the forward passes' speed `collapse embed` keeps, and how much memory it takes.

    python benchmarks/embed.py --out benchmarks/results/embed.json     # five minutes on 2 cores

ResNet-18 of random weights at 224 px on JPEGs of 500 x 375 that the script writes.  In an order that alternates:
    bare     a loop over the same number of normalised batches that are in memory already
    embed    reading, decoding in workers, resizing, cropping, normalising and the same forward passes
and the peak memory of `collapse embed` over a few and over many images, in processes of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18

from collapse import load
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.encoders.passes import embed
from collapse.results import provenance, save_text, to_json


def write_images(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)


def peak(folder: Path, checkpoint: Path, count: int, workers: int) -> float:
    """Peak MiB of the main process of `collapse embed` over the first `count` images, named again and again."""
    names = sorted(path.name for path in folder.glob("*.jpg"))
    listed = folder / "many.txt"
    listed.write_text("\n".join(names[i % len(names)] for i in range(count)))
    program = "import re, sys; from collapse.cli import main; main(sys.argv[1:]); " \
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # fmt: skip
    call = ["embed", checkpoint, listed, "--out", folder / "z.npy", "--force", "--resize", 32, "--crop", 32,
            "--workers", workers]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, *map(str, call)], check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.images, 0)
        torch.manual_seed(0)
        torch.save(resnet18().state_dict(), folder / "resnet18.pth")
        net = load(folder / "resnet18.pth")
        images = Images(folder)
        batch = torch.randn(options.batch_size, 3, 224, 224)
        seconds: dict[str, list[float]] = {"bare": [], "embed": []}

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(0, options.images, options.batch_size):
                net(batch)

        def ours() -> None:
            pixels = pixel_batches(images, net.preprocess, options.batch_size, options.workers)
            for _ in embed(net, pixels, net.preprocess):
                pass

        bare()
        for round_ in range(options.rounds):
            for case in (("bare", bare), ("embed", ours))[:: 1 if round_ % 2 else -1]:
                start = time.perf_counter()
                case[1]()
                seconds[case[0]].append(time.perf_counter() - start)
        memory = {count: peak(folder, folder / "resnet18.pth", count, options.workers) for count in (512, 4096)}
    share = float(np.median(np.divide(seconds["bare"], seconds["embed"])))
    result = {
        "schema": 1, **provenance(), "date": str(date.today()), "load": os.getloadavg(),
        "images": options.images, "workers": options.workers, "seconds": seconds, "share_of_bare": share,
        "peak_mib": memory,
    }  # fmt: skip
    print(json.dumps({"share_of_bare": share, "peak_mib": memory}))
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
