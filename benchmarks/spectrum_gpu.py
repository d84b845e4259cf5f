"""The spectrum on a GPU: rates and errors of the products behind it, 4 s on an H200.

    python benchmarks/spectrum_gpu.py --out benchmarks/results/spectrum_gpu.json

For d = 512, 2048, 8192 on random float32 rows that are on the device already, medians over rounds:
    update       collapse.Covariance(device="cuda"): float64 product of a block, with its checks
    float64      the bare float64 product of the same block, z^T z
    int8         the same from 3 or 4 slices of 7 bits, products exact in int32, with their error against float64
    eigenvalues  of the covariance, on the device
and the rates in TFLOP/s of the products (2 n d^2).  The result is saved after each case.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collapse import InputError
from collapse.results import provenance, save_text, to_json
from collapse.spectra.covariance import Covariance

CASES = ((512, 65_536), (2048, 16_384), (8192, 32_768))  # d and rows: whole blocks of `Covariance`
BITS = 7  # of a slice: entries within +-64, so that n < 2^19 products of two fit into int32


def seconds(function: Callable[[], object], rounds: int, device: str, warm: int = 2) -> float:
    """Median time of a call, the device's work included, after `warm` calls."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(rounds + warm):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def slices(z: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """z (n, d) = scale (d,) sum_k q_k 2^(1 - 7 k): scale and the q_k as (d, n) int8 within +-64, k from 1."""
    scale = z.double().abs().amax(0).clamp(min=1e-300).log2().ceil().exp2()
    rest, parts = z.double() / scale * 2 ** (BITS - 1), []
    for _ in range(count):
        whole = rest.round()
        parts.append(whole.to(torch.int8).T.contiguous())
        rest = (rest - whole) * 2**BITS
    return scale, parts


def int8_product(z: Tensor, count: int) -> Tensor:
    """z^T z (d, d) float64 from products of int8 slices, each exact."""
    scale, parts = slices(z, count)
    total = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64, device=z.device)
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[i:], i):
            product = torch._int_mm(left, right.T).double() * 2.0 ** (2 - BITS * (i + j + 2))
            total += product if i == j else product + product.T
    return total * scale[:, None] * scale


def measure(d: int, rows: int, rounds: int, device: str) -> dict[str, Any]:
    """Times, rates and errors of one width."""
    z = torch.randn(rows, d, device=device, generator=torch.Generator(device).manual_seed(0))
    total = Covariance(d, normalize=False, device=device)
    exact = z.double().mT @ z.double()
    ways: dict[str, Callable[[], object]] = {
        "update": lambda: total.update(z),
        "float64": lambda: z.double().mT @ z.double(),
        "int8, 3 slices": lambda: int8_product(z, 3),
        "int8, 4 slices": lambda: int8_product(z, 4),
    }
    taken = {name: seconds(way, rounds, device) for name, way in ways.items()}
    rates = {name: 2 * rows * d**2 / s / 1e12 for name, s in taken.items()}
    errors = {f"int8, {k} slices": float((int8_product(z, k) - exact).norm() / exact.norm()) for k in (3, 4)}
    torch.linalg.eigvalsh(exact[:64, :64])  # the library's start
    taken["eigenvalues"] = seconds(lambda: torch.linalg.eigvalsh(exact), 1, device, warm=0)
    return {"d": d, "rows": rows, "seconds": taken, "tflops": rates, "relative_errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(__file__).name}: {InputError('no CUDA device here; this script measures one')}")
    about = {"schema": 2, **provenance(), "date": str(date.today()), "card": torch.cuda.get_device_name()}
    cases: list[dict[str, Any]] = []
    for d, rows in CASES:
        cases.append(measure(d, rows, options.rounds, "cuda"))
        if options.out:
            save_text(options.out, to_json({**about, "cases": cases}))
    print(json.dumps({**about, "cases": cases}))


if __name__ == "__main__":
    main()
