"""How fast the toy simulator and the predictions are, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/toy.py --out benchmarks/results/toy.json      # a minute on one core

The two-layer toy of figure 6 (16 x 16, batch 128), microseconds for one step of one run, in an order that alternates:
    batched    collapse.theory.sgd, 64 runs as one batch of tensors, closed-form gradient
    autograd   a plain loop of one run: matrices, cross-entropy, backward, torch.optim.SGD
    official   the way of the official script: modules, an optimizer, data indexed from a pool by numpy, and the
               spectrum of 1,000 embeddings computed every ten steps
and the time to predict a whole trajectory of figure 3's setting (8 amplitudes, aligned) against simulating it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from collapse.results import provenance, save_text, to_json
from collapse.theory import Descent, GaussianViews, MeanField, population_modes, sgd

DIM, BATCH, TAU, NOISE, LR, RUNS = 16, 128, 0.1, 1e-3, 0.0025, 64


def layers(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((DIM, DIM)) / 4 for _ in range(2)]


def batched(steps: int) -> float:
    """Seconds a run-step."""
    weights = [np.tile(W, (RUNS, 1, 1)) for W in layers(0)]
    start = time.perf_counter()
    sgd(weights, GaussianViews(np.ones(DIM), np.full(DIM, NOISE)), range(RUNS), Descent(LR, steps, BATCH, TAU), [steps])
    return (time.perf_counter() - start) / (steps * RUNS)


def autograd(steps: int) -> float:
    """Seconds a step of one run, as one would first write it."""
    weights = [nn.Parameter(torch.tensor(W, dtype=torch.float32)) for W in layers(0)]
    optimizer, labels = torch.optim.SGD(weights, lr=LR), torch.arange(BATCH)
    start = time.perf_counter()
    for _ in range(steps):
        x = torch.randn(BATCH, DIM)
        z, z_prime = ((x + NOISE * torch.randn_like(x)) @ weights[0].T @ weights[1].T for _ in range(2))
        optimizer.zero_grad()
        F.cross_entropy(z @ z_prime.T / TAU, labels).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def official(steps: int) -> float:
    """Seconds a step of one run, with what the official script does around it."""
    linear = [nn.Linear(DIM, DIM, bias=False) for _ in range(2)]
    net = nn.Sequential(*linear)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    pool, labels, rng = torch.randn(10_000, DIM), torch.arange(BATCH), np.random.RandomState(0)
    start = time.perf_counter()
    for step in range(steps):
        x = pool[rng.choice(len(pool), BATCH, replace=False)]
        z, z_prime = (net(x + torch.randn_like(x) * NOISE) for _ in range(2))
        optimizer.zero_grad()
        F.cross_entropy(z @ z_prime.T / TAU, labels).backward()
        optimizer.step()
        if step % 10 == 0:
            np.linalg.svd(np.cov(net(torch.randn(1000, DIM)).detach().numpy().T))
            for layer in linear:
                np.linalg.svd(layer.weight.detach().numpy())
    return (time.perf_counter() - start) / steps


AMPLITUDES = np.array([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3])
SIGMA = 0.3 * np.exp(-0.15 * (np.arange(DIM) % 8))
TIMES = np.linspace(0, 10, 51)


def noise(amplitude: float) -> np.ndarray:
    return np.repeat([0.0, amplitude], DIM // 2)


def simulation() -> None:
    runs = np.tile(np.diag(SIGMA), (len(AMPLITUDES), 1, 1))
    views = GaussianViews(np.ones((len(AMPLITUDES), DIM)), np.array([noise(a) for a in AMPLITUDES]))
    sgd([runs], views, range(len(AMPLITUDES)), Descent(1e-3, 10_000), list(range(0, 10_001, 200)))


def mean_field() -> None:
    for amplitude in AMPLITUDES:
        MeanField(np.eye(DIM), np.diag(noise(amplitude) ** 2)).modes(TIMES, SIGMA[None])


def population() -> None:
    for amplitude in AMPLITUDES:
        population_modes(TIMES, SIGMA, np.ones(DIM), noise(amplitude) ** 2)


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, the order reversed every other round; the first round warms up."""
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name in list(cases)[:: 1 if round_ % 2 else -1]:
            value = cases[name]()
            if round_:
                measured[name].append(value)
    return measured


def ratio(measured: dict[str, list[float]], slow: str, fast: str) -> float:
    return float(np.median(np.divide(measured[slow], measured[fast])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = options.steps
    step = interleaved(
        {
            "batched": lambda: batched(steps // 5),
            "autograd": lambda: autograd(steps),
            "official": lambda: official(steps),
        },
        options.rounds,
    )
    whole = interleaved(
        {name: lambda f=f: seconds(f) for name, f in (("mean_field", mean_field), ("population", population))},  # type: ignore[misc]
        options.rounds,
    )
    whole["simulation"] = [seconds(simulation) for _ in range(options.rounds)]
    ratios = {
        "autograd / batched": ratio(step, "autograd", "batched"),
        "official / batched": ratio(step, "official", "batched"),
        "simulation / mean_field": ratio(whole, "simulation", "mean_field"),
        "simulation / population": ratio(whole, "simulation", "population"),
    }
    about = {
        "schema": 1,
        **provenance(),
        "date": str(date.today()),
        "load": os.getloadavg(),
        "threads": 1,
        "runs": RUNS,
    }
    result = {**about, "seconds_a_run_step": step, "seconds_a_trajectory": whole, "ratios": ratios}
    print(json.dumps(ratios))
    if options.out:
        save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
