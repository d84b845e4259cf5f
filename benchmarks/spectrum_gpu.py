"""The spectrum on a GPU: one script, one JSON, a few minutes on an H100 or H200.

    python benchmarks/spectrum_gpu.py --out benchmarks/results/spectrum_gpu.json

For d = 512, 2048, 8192 on random float32 rows that are on the device already, medians over rounds, CUDA events:
    update       collapse.Covariance(device="cuda"): float64 product of a block, with its checks
    syrk         the bare float64 product of the same block, z^T z
    split        the same product in three bfloat16 products of split rows (hi and lo), accumulated in float32
    spectrum     the eigenvalues, on the CPU, with the transfer
and the rates in TFLOP/s of the products (2 n d^2), against the card's own rate on a large square product of the same
dtype in the same run.  The last lines compare the singular values with those of the CPU: an accumulation that fell back
to TF32 or float32 would show there as 1e-4 or 1e-7.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from collapse import InputError
from collapse.covariance import Covariance
from collapse.results import provenance, save_text, to_json


def milliseconds(function: Callable[[], object], rounds: int) -> list[float]:
    """Times by CUDA events; the first two calls warm up."""
    times = []
    for round_ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if round_ >= 2:
            times.append(start.elapsed_time(end))
    return times


def split_product(z: torch.Tensor) -> torch.Tensor:
    """z^T z from bfloat16 halves: about float32's precision at the tensor cores' rate."""
    high = z.bfloat16()
    low = (z - high.float()).bfloat16()
    cross = high.mT @ low
    return (high.mT @ high).float() + cross.float() + cross.mT.float()


def card_rate(dtype: torch.dtype, rounds: int) -> float:
    """TFLOP/s of an 8192 x 8192 square product."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    return 2 * 8192**3 / float(np.median(milliseconds(lambda: a @ b, rounds))) / 1e9


def measure(d: int, rows: int, rounds: int) -> dict:
    z = torch.randn(rows, d, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    total = Covariance(d, device="cuda")
    times = {
        "update": milliseconds(lambda: total.update(z), rounds),
        "syrk": milliseconds(lambda: z.double().mT @ z.double(), rounds),
        "split": milliseconds(lambda: split_product(z), rounds),
    }
    spectrum = Covariance(d, device="cuda").update(z)
    times["spectrum"] = milliseconds(lambda: spectrum.spectrum(), 3)
    here = spectrum.spectrum().singular_values
    there = Covariance(d).update(z.cpu()).spectrum().singular_values
    rates = {name: 2 * rows * d**2 / float(np.median(times[name])) / 1e9 for name in ("update", "syrk", "split")}
    return {
        "d": d,
        "rows": rows,
        "milliseconds": times,
        "tflops": rates,
        "update / syrk": float(np.median(times["update"]) / np.median(times["syrk"])),
        "largest_relative_difference_to_cpu": float(np.abs(here / there - 1).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(__file__).name}: {InputError('no CUDA device here; this script measures one')}")
    result = {
        "schema": 1,
        **provenance(),
        "date": str(date.today()),
        "card": torch.cuda.get_device_name(),
        "card_tflops": {str(t): card_rate(t, options.rounds) for t in (torch.float64, torch.bfloat16)},
        "cases": [measure(d, rows, options.rounds) for d, rows in ((512, 65_536), (2048, 16_384), (8192, 16_384))],
    }
    print(json.dumps(result["cases"][-1] | {"card_tflops": result["card_tflops"]}))
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
