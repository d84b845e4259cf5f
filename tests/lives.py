"""Runs that are killed and go on, each life a fork of this program.

    python tests/lives.py FOLDER                                              # by test_train.py; 20 seconds
    python tests/lives.py FOLDER --every benchmarks/results/resume.json       # 15 minutes
    python tests/lives.py FOLDER --behind --every FILE     # states are written by a thread, as they are on a GPU

Prints one JSON object: how the lives of three chains ended, and what two runs in one folder did.  With --every, a run
is killed once at each moment there is and then finished, and then 200 times at random; what differs from the unbroken
run in weights, curve or spectra is counted.  Flags after the result's name go to the run, such as --data of images
that workers decode.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from collapse import cli
from collapse.data.labelled import open_data
from collapse.results import provenance, save_text, to_json
from collapse.training import online, train  # noqa: F401  (loaded once, for all lives)
from collapse.training.run import Run

BEHIND = "--behind" in sys.argv
CALL = (
    "train --preset digits --data sklearn:digits --workers 0 --device cpu --blocks 1 1 --planes 8 32 --batch-size 128 "
    "--epochs 2 --dim 8 --save-every 3 --log-every 4 --spectrum-every 7 --held 200"
)


def strike_at(place):
    """Send the process a signal at the `place`-th moment before or after a step, a line, a sync or a rename."""
    passed = 0

    def watched(function):
        def call(*arguments, **options):
            nonlocal passed
            for moment in range(2):
                passed += 1
                if passed == place:
                    os.kill(os.getpid(), signal.SIGKILL if place % 4 else signal.SIGTERM)
                if moment == 0:
                    result = function(*arguments, **options)
            return result

        return call

    os.replace, os.fsync = watched(os.replace), watched(os.fsync)
    train.Training.run_step, Run.log = watched(train.Training.run_step), watched(Run.log)


def write_behind():
    """Let every state be copied, and written by a thread."""
    opened = Run.__init__

    def init(self, *arguments, **options):
        opened(self, *arguments, **options)
        self.behind = True

    Run.__init__ = init


def begin(folder, place=0, more=(), errors=os.devnull):
    """The id of a forked process that trains in `folder`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(600)  # a life whose parent was killed ends all the same
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115
        strike_at(place)
        code = cli.main([*CALL.split(), "--out", folder, *more])
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder):
    """What must not depend on how often a run died: the bytes of weights and spectra, the curve without the clock."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k not in ("images_per_second", "waited")} for line in lines]
    names = ("encoder.safetensors", "spectra.npz")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names], curve


def live_on(folder, places, more=()):
    """Lives that die at the places given, then one that ends; how many ended by a signal."""
    ends = []
    while not os.path.exists(f"{folder}/encoder.safetensors"):
        ends.append(end(begin(folder, next(places, 0), more)))
    return sum(code != 0 for code in ends)


def every(root, out, *more):
    """Die once at each moment; then 200 times in one run at random places."""
    assert end(begin(f"{root}/unbroken", more=more)) == 0
    expected, differing, place = result(f"{root}/unbroken"), [], 0
    while True:
        place += 1
        folder = f"{root}/place{place}"
        deaths = live_on(folder, iter([place]), more)
        differing += [place] * (result(folder) != expected)
        if not deaths:  # past the last moment
            break
    rng, deaths, runs = random.Random(0), 0, 0
    while deaths < 200:
        runs += 1
        deaths += live_on(f"{root}/random{runs}", (rng.randrange(1, 12) for _ in range(60)), more)
        differing += [f"random {runs}"] * (result(f"{root}/random{runs}") != expected)
    command = ["tests/lives.py", "FOLDER", *["--behind"] * BEHIND, *sys.argv[2:]]
    counts = {"moments": place - 1, "random_deaths": deaths, "random_runs": runs}
    about = {"schema": 1, **provenance(), "command": command, **counts}
    save_text(Path(out), to_json({**about, "differing": differing}))
    print(json.dumps({"moments": place - 1, "random_deaths": deaths, "differing": differing}))


def main():
    torch.set_num_threads(1)
    if BEHIND:
        sys.argv.remove("--behind")
        write_behind()
    if "--every" in sys.argv:
        open_data("sklearn:digits", "train")
        every(sys.argv[1], *sys.argv[3:])
        return
    root, rng, ends = sys.argv[1], random.Random(0), []
    open_data("sklearn:digits", "train")
    assert end(begin(f"{root}/unbroken")) == 0
    for chain in range(3):
        while not ends or ends[-1] or not os.path.exists(f"{root}/broken{chain}/encoder.safetensors"):
            ends.append(end(begin(f"{root}/broken{chain}", rng.randrange(1, 50))))
    report = {"ends": ends, "first": begin(f"{root}/locked", more=["--epochs", "100000"])}
    while not os.path.exists(f"{root}/locked/resume.pt"):
        time.sleep(0.02)
    report["second"] = end(begin(f"{root}/locked", more=["--epochs", "100000"], errors=f"{root}/refusal"))
    with open(f"{root}/refusal") as file:
        report["refusal"] = "".join(line for line in file if line.startswith("collapse:"))
    os.kill(report["first"], signal.SIGTERM)
    report["stopped"] = end(report["first"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
