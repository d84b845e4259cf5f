"""The same work by this package and by what one would take instead, interleaved in one process.

    make peers                                            # installs the peers beside the package, half an hour
    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --only spectrum ranks      # some of the work

Seconds are processor time of one thread, so that other programs on the machine count little.  What is compared is the
median of the ratios, round by round; a call of over 10 seconds is made once.  Memory is what a call adds at its peak,
in a process of its own.  Wall time on two threads is taken at the end, by a process a case, and only where others keep
less than a tenth of a core busy: elsewhere it would be wrong.  The file is written after each call, and a case that is
whole in it is not measured again.  A peer that is not installed, or left out, is named with the reason.  The same work
is not always the same result: `NOTES` says what a peer leaves out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from peers_work import LEFT_OUT, NAMED, NOTES, OURS, WORK, Call

from collapse.results import provenance, save_text, to_json

PEERS = ("lightly", "lightly-train", "reptrix", "scikit-learn", "timm", "transformers")
SLOW = 10.0  # seconds of a call that is made once
QUIET = 0.1  # cores that other programs keep busy


def calls_of(case: dict[str, Any], seed: int) -> dict[str, Call]:
    """The calls of a case; who is absent or left out is noted in it."""
    calls: dict[str, Call] = {}
    for name, make in NAMED[case["work"]](np.random.default_rng(seed), case["width"], case["count"]).items():
        if (why := LEFT_OUT.get((case["work"], case["width"]), {}).get(name)) is not None:
            case["absent"][name] = f"left out: {why}"
            continue
        try:
            calls[name] = make()
        except ImportError as error:
            case["absent"][name] = f"not installed: {error}"
    case["notes"] = {name: NOTES[name] for name in calls if name in NOTES}
    return calls


def measure(case: dict[str, Any], rounds: int, seed: int, save: Callable[[], None]) -> None:
    """Processor seconds of each call, and the median of each peer's over this package's."""
    calls = calls_of(case, seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    case["seconds"], case["load"] = seconds, os.getloadavg()
    for round_ in range(rounds + 1):
        told(case, f"round {round_} of {rounds}" if round_ else "once, to warm up")
        for name in list(calls)[:: 1 if round_ % 2 else -1]:
            if max(seconds[name], default=0) > SLOW:
                continue
            start = time.process_time()
            calls[name]()
            taken = time.process_time() - start
            if round_ or taken > SLOW:
                seconds[name].append(taken)
                save()
    case["ratios"] = {name: ratio(taken, seconds[OURS]) for name, taken in seconds.items()}
    save()


def ratio(taken: list[float], ours: list[float]) -> float:
    """The median ratio of the rounds; of a slow call that of the medians."""
    if len(taken) != len(ours):
        taken, ours = [float(np.median(taken))], [float(np.median(ours))]
    return float(np.median(np.divide(taken, ours)))


def child(kind: str, case: dict[str, Any], threads: int, *names: str) -> Any:
    """What `in_child` finds in a process of its own."""
    asked = json.dumps({"kind": kind, "names": names, **{key: case[key] for key in ("work", "width", "count")}})
    # Threads of one library that spin after its call would slow the next library's.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", asked], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{case['work']}, {', '.join(names)}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_child(asked: dict[str, Any], seed: int) -> Any:
    """Memory in MiB that the one call adds at its peak, or three wall times of each call."""
    calls = calls_of({**asked, "absent": {}}, seed)
    if asked["kind"] == "memory":
        (name,) = asked["names"]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = status("VmRSS")
        calls[name]()
        return (status("VmHWM") - before) / 1024
    walls: dict[str, list[float]] = {name: [] for name in asked["names"]}
    for round_ in range(4):
        for name in list(walls)[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            if round_:
                walls[name].append(time.perf_counter() - start)
    return walls


def status(name: str) -> int:
    """KiB of this process, by Linux's name of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def add_memory(case: dict[str, Any], save: Callable[[], None]) -> None:
    """MiB that each call adds, for those that have none yet."""
    for name in case["seconds"]:
        if name not in case["memory"]:
            told(case, f"memory of {name}")
            case["memory"][name] = child("memory", case, 1, name)
            save()


def add_wall(case: dict[str, Any], save: Callable[[], None]) -> None:
    """Wall seconds on two threads of what is not slow, where the machine is quiet and there are none yet."""
    if "seconds" not in case["wall"]:
        load = busy()
        quick = [name for name, taken in case["seconds"].items() if max(taken) <= SLOW]
        why = f"other programs kept {load:.1f} cores busy" if quick else f"each call takes more than {SLOW:.0f} s"
        case["wall"] = {"threads": 2, "busy": load, "left_out": why}
        if load < QUIET and quick:
            told(case, "wall time on two threads")
            seconds = child("wall", case, 2, *quick)
            case["wall"] = {"threads": 2, "busy": load, "seconds": seconds}
        save()


def busy(seconds: float = 2.0) -> float:
    """Cores that other programs keep busy while this one sleeps; of Linux, in hundredths of a second."""
    before = _worked()
    time.sleep(seconds)
    return (_worked() - before) / 100 / seconds


def _worked() -> int:
    times = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    return sum(map(int, times)) - int(times[3]) - int(times[4])  # without idle and waiting


def told(case: dict[str, Any], what: str) -> None:
    """Say on stderr what is measured now."""
    print(f"{case['work']}, {case['width']} x {case['count']}: {what}", file=sys.stderr, flush=True)


def installed() -> dict[str, str]:
    """Versions of the peers that are there."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def begun(out: Path | None, seed: int) -> dict[str, Any]:
    """The document of this run, with the cases of the file that the same versions made."""
    result = {"schema": 2, **provenance(), "peers": installed(), "seed": seed,
              "clock": "processor time, one thread", "cases": []}  # fmt: skip
    if out and out.exists():
        before = json.loads(out.read_text())
        if all(before.get(key) == result[key] for key in ("schema", "versions", "peers", "seed")):
            result["cases"] = [case for case in before["cases"] if "ratios" in case]
    return {**result, "date": str(date.today())}


def stored(result: dict[str, Any], out: Path | None) -> None:
    """Write the document."""
    if out:
        save_text(out, to_json(result))


def cases_of(result: dict[str, Any], only: Collection[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """(case, rounds) of the work that was asked for, as the document has it, or new."""
    for work, width, count, rounds in WORK:
        if work.__name__ in only:
            empty = {"work": work.__name__, "width": width, "count": count}
            new = {**empty, "absent": {}, "memory": {}, "wall": {}}
            yield next((case for case in result["cases"] if empty.items() <= case.items()), new), rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMED, default=NAMED, metavar="WORK", help=", ".join(NAMED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(options.seed)
    if options.child:
        print(json.dumps(in_child(options.child, options.seed)))
        return
    result = begun(options.out, options.seed)
    save = partial(stored, result, options.out)
    chosen = list(cases_of(result, options.only))
    for case, rounds in chosen:
        if "ratios" not in case:
            result["cases"].append(case)
            measure(case, rounds, options.seed, save)
        print(to_json({name: case[name] for name in ("work", "width", "count", "ratios", "absent")}), flush=True)
    for add in (add_memory, add_wall):
        for case, _ in chosen:
            add(case, save)


if __name__ == "__main__":
    main()
