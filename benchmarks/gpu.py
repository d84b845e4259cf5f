"""Everything that is measured on one GPU, in one command of less than nine minutes.

    make gpu DATA=cifar10.xz            # with python3 and the packages that are there; nothing is installed
    PYTHONPATH=. python3 benchmarks/gpu.py --data cifar10.xz                                              # the same
    PYTHONPATH=. python3 benchmarks/gpu.py --only card,correct --seconds 110
    PYTHONPATH=. python3 benchmarks/gpu.py --tiny --device cpu --data FILE      # every line of it, in a minute or two

Stages, in this order (gpu_stages.py):
    card        versions, memory, rates of copies and products
    correct     CPU against the device: views, losses and gradients of all heads, optimisers, spectra by both methods,
                the monitor, which must not wait; a resumed run to the bit; compiled against eager
    table1      ResNet-18, or --arch resnet50, 3 x 3 stem, CIFAR-10, LARS, the paper's views: heads none, mlp,
                directclr, linear at --temperatures; probe and nearest neighbours with intervals, spectra
    relaxed     a last map behind the trunks that table1 has left in --trunks, alone, beside the prediction
    trainer32   a step of table1: seconds of its parts, kernels
    trainer224  ResNet-50 at 224 px from photographs, if imagenet-100-samples.zip lies beside --data: 120 steps in a
                row, the same on tensors in memory, bare passes, kernels, eager
    budget      the step of trainer224 on tensors in memory with a budget of memory
    spectrum    products and eigenvalues at d = 512, 2048, 8192
    extract     embeddings of a ResNet-50 against its bare forward pass, float32 and bf16, and from JPEGs
    figures     spectra and accuracies of the heads, rates: one figure
Each stage is a forked process with a limit of its own, so one that fails, hangs or breaks the device costs no other its
time.
--out is written again after every figure; what it held before stays, but for figures of the same name.
--data: see `read_packed` in gpu_stages.py.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from collapse.results import provenance, save_text, to_json

BEGAN = time.monotonic()
SCHEMA = 2
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/\":]+/)+")  # of this machine; what a stage says is kept without them
# Shares of the time; what a stage leaves goes to those after it.
SHARES = {
    "card": 20, "correct": 45, "table1": 155, "relaxed": 50, "trainer32": 25, "trainer224": 110, "budget": 60,
    "spectrum": 15, "extract": 30, "figures": 10,
}  # fmt: skip


OF_DATA = ("table1", "relaxed", "trainer32")


class Document:
    """The result, written again whenever it grows."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.about = {**provenance(), "date": str(date.today()), "seed": options.seed}
        self.path = path
        self.values = {"schema": SCHEMA, "tiny": options.tiny, "stages": dict[str, Any](), "figures": dict[str, Any]()}
        former = json.loads(path.read_text()) if path.exists() else {}
        if former.get("schema") == SCHEMA and former["tiny"] == options.tiny:
            self.values = former

    def save(self) -> None:
        """Write it."""
        save_text(self.path, to_json(self.values))

    def add(self, lines: list[str]) -> None:
        """Take figures, one JSON object of name and value a line."""
        for line in lines:
            self.values["figures"].update(json.loads(line))
        if lines:
            self.save()


def run_stage(name: str, options: argparse.Namespace, limit: float, document: Document, folder: Path) -> bool:
    """Run one stage in a process of its own and take its figures as they come; whether it ended before its limit."""
    import gpu_stages  # once for all stages, and nothing of it wakes the device

    figures, errors, start = folder / f"{name}.figures", folder / f"{name}.errors", time.monotonic()
    figures.touch()
    errors.touch()
    stage = multiprocessing.get_context("fork").Process(
        target=gpu_stages.run, args=(name, options, limit, figures, errors)
    )
    with open(figures, encoding="utf-8") as lines:
        stage.start()
        while True:
            ended = not stage.is_alive()  # asked first: what it wrote before it ended is read below
            document.add(whole_lines(lines))
            if ended or time.monotonic() - start > limit:
                break
            time.sleep(0.1)
        if not ended:
            if stage.pid is not None:
                os.kill(stage.pid, signal.SIGUSR1)
                time.sleep(0.2)  # it says where it stands
            stage.kill()
            stage.join()
        if stage.pid is not None:
            with suppress(ProcessLookupError):  # what it has started
                os.killpg(stage.pid, signal.SIGKILL)
    text = FOLDERS.sub("", errors.read_text(errors="replace"))
    said = text.strip().splitlines() or [""]
    last = said[-1][:300]
    status = "done" if stage.exitcode == 0 else f"failed: {last}" if ended else f"ended at its limit: {last}"
    taken = {"status": status, "seconds": time.monotonic() - start, "limit": limit}
    key = name + (gpu_stages.of_run(options) if name in OF_DATA else "")
    document.values["stages"][key] = {**taken, **document.about, "said": [] if status == "done" else said[-40:]}
    document.save()
    print(f"{name}: {status} ({time.monotonic() - start:.0f} s)", flush=True)
    return status == "done"


def ready(device: str) -> bool:
    """Whether torch is there and has the device; if not, a line says so. Asked in a fork, for asking wakes a device."""
    try:
        import gpu_stages
    except ImportError as error:
        print(f"gpu.py: {error}; give a python that has it: make gpu PYTHON=.venv/bin/python", file=sys.stderr)
        return False
    asked = multiprocessing.get_context("fork").Process(target=gpu_stages.require, args=(device,))
    asked.start()
    asked.join()
    return asked.exitcode == 0


def whole_lines(file: Any) -> list[str]:
    """The lines that are complete by now; a half one is left for the next call."""
    found: list[str] = []
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return found
        found.append(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help=f"CIFAR-10 in one file, for {', '.join(OF_DATA)}")
    parser.add_argument("--only", default=",".join(SHARES), help=f"stages, of {','.join(SHARES)}")
    parser.add_argument("--seconds", type=float, default=520, help="for all stages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", default="resnet18", choices=("resnet18", "resnet50"), help="of table1")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.1, 0.5], help="of table1")
    parser.add_argument("--trunks", type=Path, default=Path("build/trunks"), help="where table1 leaves encoders")
    parser.add_argument("--epochs", type=int, help="of table1; default as many as fit")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="every line, on networks and images of no size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--figure", type=Path, help="its name without .png; default beside --out")
    options = parser.parse_args()
    names = [name for name in SHARES if name in options.only.split(",")]
    unknown = sorted(set(options.only.split(",")) - SHARES.keys())
    if unknown:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(SHARES)}")
    if options.epochs is not None and options.epochs < 2:
        parser.error(f"--epochs: {options.epochs} is too few; give 2 or more, for the first warms up")
    for name in OF_DATA if options.data is None else ():
        if name in names:
            print(f"{name}: left out, for there is no --data", flush=True)
            names.remove(name)
    if options.data is not None and not options.data.exists():
        parser.error(f"--data: {options.data} is not there")
    if not ready(options.device):
        return 2
    document, spent, done = Document(options.out, options), 0, 0
    document.save()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            spent += SHARES[name]
            end = BEGAN + options.seconds * spent / sum(SHARES[other] for other in names)
            done += run_stage(name, options, max(1.0, end - time.monotonic()), document, Path(folder))
    print(f"{options.out}: {done} of {len(names)} stages done")
    return 0 if done == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
