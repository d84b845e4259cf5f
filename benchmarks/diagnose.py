"""How much `collapse diagnose` costs beyond the forward passes of its views, and how much memory it takes.

    python benchmarks/diagnose.py --out benchmarks/results/diagnose.json     # five minutes on 2 cores

ResNet-50 of random weights at 224 px on JPEGs of 500 x 375 that the script writes, 4 views an image, one thread. Before
each batch of the diagnosis a copy of the network passes as many views that are in memory already: the two take turns
every few seconds, so that what else the machine does weighs on both.  In processor seconds:
    bare       of the copy's forward passes
    streaming  of the diagnosis beside them: the views, the same passes, the taps, all covariances
    decoding   of the worker that reads and decodes, which has a core of its own
    fixed      of what is done once: the passes in float64 for the floor, and at the end the spectra
The ratios are those of 2,000 images: (fixed + 2000 streaming) / (2000 bare), and with the decoding.  Peak memory of the
process, over the first and over all images.
"""

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import resnet50

from collapse import diagnose, load
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.diagnosis import before_crop
from collapse.results import provenance, save_text, to_json

VIEWS, ROWS = 4, 32


def write_images(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.images, 0)
        torch.manual_seed(0)
        torch.save(resnet50().state_dict(), folder / "resnet50.pth")
        net = load(folder / "resnet50.pth")
        bare_net, batch = copy.deepcopy(net), torch.randn(ROWS, 3, 224, 224)
        bare: list[float] = []
        resumed: list[float] = []  # processor seconds of the diagnosis when it asks for each batch
        peaks: list[float] = []

        def taking_turns() -> Iterator[Tensor]:
            for pixels in pixel_batches(Images(folder), before_crop(net.preprocess), ROWS // VIEWS, 1):
                resumed.append(time.process_time() - sum(bare))
                peaks.append(peak())
                start = time.process_time()
                with torch.inference_mode():
                    bare_net(batch)
                bare.append(time.process_time() - start)
                yield pixels
            resumed.append(time.process_time() - sum(bare))

        with torch.inference_mode():
            bare_net(batch)
        before = os.times()
        start = time.process_time()
        diagnose(net, taking_turns(), views=VIEWS, batch_size=ROWS)
        whole = time.process_time() - start - sum(bare)
        after = os.times()
    an_image = ROWS // VIEWS
    # The first batch is left out: the passes that are made once go before it.
    streaming = float(np.median(np.diff(resumed)[1:])) / an_image
    passes = float(np.median(bare[1:])) / an_image
    fixed = whole - streaming * options.images
    children = after.children_user - before.children_user + after.children_system - before.children_system
    decoding = children / options.images
    result = {
        "schema": 1, **provenance(), "date": str(date.today()), "load": os.getloadavg(),
        "images": options.images, "views": VIEWS, "rows": ROWS,
        "seconds": {"bare": passes, "streaming": streaming, "decoding": decoding, "fixed": fixed},
        "batches": {"bare": bare, "streaming": np.diff(resumed).tolist()},
        "ratio": (fixed + 2000 * streaming) / (2000 * passes),
        "ratio_with_decoding": (fixed + 2000 * (streaming + decoding)) / (2000 * passes),
        "ratio_streaming": streaming / passes,
        "peak_mib": {"first": peaks[2], "last": peaks[-1], "with_spectra": peak()},
    }  # fmt: skip
    print(
        json.dumps({name: result[name] for name in result if name.startswith(("ratio", "seconds", "peak"))}, indent=1)
    )
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
