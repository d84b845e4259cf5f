"""How fast the spectrum is, and how much memory it takes, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/spectrum.py --out benchmarks/results/spectrum.json    # 15 minutes on one core

Every round times, in an order that alternates, on the same float32 rows (n, d):
    covariance    collapse.Covariance, update by blocks of 32 MiB and spectrum
    qr            the same by method qr
    bare          one dsyrk a block on its float64 copy, and one eigvalsh: what cannot be saved
    official      numpy.cov of all rows and its SVD, as the paper's script does
    pca           scikit-learn's PCA;  incremental  its IncrementalPCA, whose every batch is an SVD
and gives the medians, and those of the ratios within a round.  Peak memory is that of a process of its own that reads
the rows from a memory map, above one that reads nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collapse.files.rows import blocks
from collapse.results import provenance, save_text, to_json
from collapse.spectra.covariance import Covariance

# (n, d, rounds, cases): the slow ones where they end in minutes.
FAST = ("covariance", "bare", "qr", "official", "pca")
SETTINGS = (
    (50_000, 128, 5, (*FAST, "incremental")),
    (50_000, 512, 5, FAST),
    (50_000, 2048, 3, FAST),
    (6_000, 2048, 1, ("covariance", "incremental")),
    (10_000, 8192, 1, ("covariance", "bare")),
)


def streamed(z: NDArray, method: str) -> None:
    total = Covariance(z.shape[1], method, False)
    for block in blocks(z):
        total.update(block)
    total.spectrum()


def bare(z: NDArray) -> None:
    from scipy.linalg.blas import dsyrk

    gram = np.zeros((z.shape[1],) * 2, order="F")
    for block in blocks(z):
        gram = dsyrk(1.0, block.astype(np.float64).T, beta=1.0, c=gram, lower=1, overwrite_c=1)
    np.linalg.eigvalsh(gram)


def official(z: NDArray) -> None:
    np.linalg.svd(np.cov(z.T), compute_uv=False)


def pca(z: NDArray) -> None:
    from sklearn.decomposition import PCA

    PCA().fit(np.asarray(z))


def incremental(z: NDArray) -> None:
    from sklearn.decomposition import IncrementalPCA

    IncrementalPCA().fit(z)


CASES: dict[str, Callable[[NDArray], None]] = {
    "covariance": lambda z: streamed(z, "covariance"),
    "qr": lambda z: streamed(z, "qr"),
    "bare": bare,
    "official": official,
    "pca": pca,
    "incremental": incremental,
}


def measure(n: int, d: int, rounds: int, names: tuple[str, ...], seed: int) -> dict:
    """Seconds of each case, (rounds,) each, and the median ratio of every other case to covariance."""
    z = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm = 1 if rounds > 1 else 0
    for round_ in range(rounds + warm):
        for name in names[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            CASES[name](z)
            if round_ >= warm:
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        f"{name} / covariance": float(np.median(np.divide(seconds[name], seconds["covariance"]))) for name in names[1:]
    }
    return {"n": n, "d": d, "seconds": seconds, "ratios": ratios}


def memory(n: int, d: int, seed: int) -> dict:
    """Peak memory in MiB of a process for each case, above that of one that only imports."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "z.npy"
        np.save(path, np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32))
        for name in ("nothing", "covariance", "qr", "official"):
            call = [sys.executable, __file__, "--peak", name, str(path)]
            peaks[name] = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    above = {name: (peak - peaks["nothing"]) / 1024 for name, peak in peaks.items() if name != "nothing"}
    return {"n": n, "d": d, "peak_mib": above}


def peak(name: str, path: str) -> None:
    """In a process of its own: run a case on the rows read block by block, print the peak of private memory in KiB."""
    import scipy.linalg.blas  # noqa: F401  every case imports it

    z = np.load(path, mmap_mode="r")
    if name == "official":
        official(np.array(z))
    elif name != "nothing":
        total = Covariance(z.shape[1], name, False)
        with open(path, "rb") as file:  # read, not mapped: mapped pages count, though they are only cache
            file.seek(z.offset)
            step = (1 << 22) // z.shape[1]
            while chunk := file.read(4 * step * z.shape[1]):
                total.update(np.frombuffer(chunk, np.float32).reshape(-1, z.shape[1]))
        total.spectrum()
    # Not ru_maxrss, which begins at the parent's.
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="d = 128 and 512 only, a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(*options.peak)
        return
    result = {
        "schema": 2,
        **provenance(),
        "date": str(date.today()),
        "load": os.getloadavg(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cases": [],
        "memory": [],
    }
    for n, d, rounds, names in SETTINGS[:2] if options.quick else SETTINGS:
        case = measure(n, d, rounds, names, options.seed)
        print(json.dumps({"n": n, "d": d, **case["ratios"]}), flush=True)
        result["cases"].append(case)
    for n in (10_000,) if options.quick else (10_000, 50_000, 100_000):
        case = memory(n, 512 if options.quick else 2048, options.seed)
        print(json.dumps(case), flush=True)
        result["memory"].append(case)
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
