"""What the monitor costs a training loop at its default interval, as a share of the step.

    python benchmarks/monitor.py --out benchmarks/results/monitor.json     # two minutes on 2 cores

ResNet-18 without and with collapse.Monitor on its representation (d = 512, 64 images of 32 px a step).  The watched
steps and the report are timed, as medians beside plain steps of the same process; the share is
(window x (watched - plain) + report) / (every x plain).
"""

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torchvision.models import resnet18

from collapse import Monitor
from collapse.results import provenance, save_text, to_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = resnet18()
    net.fc = torch.nn.Identity()
    images = torch.randn(64, 3, 32, 32)

    def step() -> float:
        start = time.perf_counter()
        net.zero_grad()
        net(images).square().mean().backward()
        return time.perf_counter() - start

    monitor = Monitor(net)
    every, plain, watched, report = monitor.every, [], [], []
    step()
    for _ in range(options.steps):
        monitor.count = 0  # far from a report: the hook returns at once
        plain.append(step())
        monitor.count = every - 1  # in the window
        watched.append(step())
        start = time.perf_counter()
        monitor.step()
        report.append(time.perf_counter() - start)
    medians = {"plain": np.median(plain), "watched": np.median(watched), "report": np.median(report)}
    share = monitor.window * (medians["watched"] - medians["plain"]) + medians["report"]
    result = {
        "schema": 1,
        **provenance(),
        "date": str(date.today()),
        "load": os.getloadavg(),
        "every": every,
        "window": monitor.window,
        "seconds": medians,
        "share": float(share / (every * medians["plain"])),
    }
    print(json.dumps({"share": result["share"], "window": monitor.window}))
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
