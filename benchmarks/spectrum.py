"""How fast the streaming covariance is, as ratios within one run.

    python benchmarks/spectrum.py                 # d = 512 and 2048: a minute on 2 cores
    python benchmarks/spectrum.py --out benchmarks/results/spectrum.json

Every round times, in an order that alternates, on the same float32 rows:
    ours       collapse.Covariance (method covariance), update by blocks and spectrum
    product    the bare float64 products of the same blocks and one eigenvalue decomposition: what cannot be saved
    official   numpy.cov of all rows and its SVD, as the paper's script does
and the result is the median of each, and of the ratios.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collapse.covariance import Covariance, blocks
from collapse.results import provenance, save_text, to_json


def ours(z: NDArray) -> None:
    total = Covariance(z.shape[1])
    for block in blocks(z):
        total.update(block)
    total.spectrum()


def product(z: NDArray) -> None:
    gram = np.zeros((z.shape[1], z.shape[1]))
    for block in blocks(z):
        block = block.astype(np.float64)
        gram += block.T @ block
    np.linalg.eigvalsh(gram)


def official(z: NDArray) -> None:
    np.linalg.svd(np.cov(z.T), compute_uv=False)


CASES: dict[str, Callable[[NDArray], None]] = {"ours": ours, "product": product, "official": official}


def measure(n: int, d: int, rounds: int, seed: int) -> dict:
    """Seconds of each case, (rounds,) each, and the medians of the ratios of ours to the others."""
    z = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for round_ in range(rounds + 1):
        for name in list(CASES)[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            CASES[name](z)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        f"ours / {name}": float(np.median(np.divide(seconds["ours"], seconds[name])))
        for name in ("product", "official")
    }
    return {"n": n, "d": d, "seconds": seconds, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = [measure(options.rows, d, options.rounds, options.seed) for d in options.dims]
    result = {
        "schema": 1,
        **provenance(),
        "date": str(date.today()),
        "load": os.getloadavg(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cases": cases,
    }
    for case in cases:
        print(json.dumps({"n": case["n"], "d": case["d"], **case["ratios"]}))
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
