"""How much `collapse diagnose` costs beyond the forward passes of its views, and how much memory it takes.

    python benchmarks/diagnose.py --out benchmarks/results/diagnose.json     # fifteen minutes on 2 cores

ResNet-50 of random weights at 224 px on JPEGs of 500 x 375 that the script writes, 4 views an image.  In turns, over a
few and over more images:
    bare      a loop over as many normalised batches that are in memory already
    diagnose  decoding in a worker, the views, the same forward passes, all covariances, and at the end the spectra
The spectra cost the same whatever the number of images, so the time of diagnose is fixed + images x slope: both are
fitted, and the ratio to the bare passes is given for 2,000 images.  Peak memory of the process after each size.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from embed import write_images
from torchvision.models import resnet50

from collapse import diagnose, load
from collapse.results import provenance, save_text, to_json

VIEWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(16, 80), metavar=("FEW", "MORE"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    few, more = options.images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, more, 0)
        lists = {}
        for count in (few, more):
            lists[count] = folder / f"{count}.txt"
            lists[count].write_text("".join(f"{index:05d}.jpg\n" for index in range(count)))
        torch.manual_seed(0)
        torch.save(resnet50().state_dict(), folder / "resnet50.pth")
        net = load(folder / "resnet50.pth")
        batch = torch.randn(options.batch_size, 3, 224, 224)

        @torch.inference_mode()
        def bare(count: int) -> None:
            for _ in range(0, count * VIEWS, options.batch_size):
                net(batch)

        def ours(count: int) -> None:
            diagnose(net, str(lists[count]), VIEWS, batch_size=options.batch_size, workers=options.workers)

        bare(few)
        seconds: dict[str, dict[int, list[float]]] = {"bare": {few: [], more: []}, "diagnose": {few: [], more: []}}
        peaks = {}
        for _ in range(options.rounds):
            for count in (few, more):
                for case, act in (("bare", bare), ("diagnose", ours)):
                    start = time.perf_counter()
                    act(count)
                    seconds[case][count].append(time.perf_counter() - start)
                peaks[count] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    least = {case: {count: min(times) for count, times in of.items()} for case, of in seconds.items()}
    slope = {case: (of[more] - of[few]) / (more - few) for case, of in least.items()}
    fixed = least["diagnose"][few] - few * slope["diagnose"]
    result = {
        "schema": 1, **provenance(), "date": str(date.today()), "load": os.getloadavg(),
        "images": [few, more], "views": VIEWS, "workers": options.workers, "threads": options.threads,
        "seconds": seconds, "seconds_an_image": slope, "fixed_seconds": fixed,
        "ratio_per_image": slope["diagnose"] / slope["bare"],
        "ratio_of_2000": (fixed + 2000 * slope["diagnose"]) / (2000 * slope["bare"]),
        "peak_mib": peaks,
    }  # fmt: skip
    print(json.dumps({name: result[name] for name in ("seconds_an_image", "fixed_seconds", "ratio_per_image",
                                                      "ratio_of_2000", "peak_mib")}))  # fmt: skip
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
