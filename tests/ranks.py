"""Run by test_parallel.py in a process of its own: one step on the whole batch by 1, 2 and 4 forked processes."""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

from collapse.training import parallel
from collapse.training.config import make_config
from collapse.training.data import open_data
from collapse.training.network import Network, backward
from collapse.training.train import Options, train

CASES = {
    "mlp": {"head": "mlp"},
    "mlp, all negatives": {"head": "mlp", "negatives": "all"},
    "linear, no batch norm, in chunks": {"head": "linear", "arch": "mlp", "planes": (24, 16), "chunks": 2},
    "directclr": {"method": "directclr", "dim": 24},
    "group": {"head": "group"},
}


SMALL = make_config("digits", blocks=(1, 1), planes=(8, 16), epochs=2, batch_size=64, lr=1e-3)


def digits():
    return (open_data("sklearn:digits", split).subset(np.arange(200)) for split in ("train", "val"))


def without_norms(net):
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.Identity())


def step(rank, world, folder, port):
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        parallel.start("cpu")
    results = {}
    for name, options in CASES.items():
        net = Network(make_config("digits", **options), 10)
        if "no batch norm" in name:
            without_norms(net)
        net = parallel.synchronise(net.double(), "cpu", False).train()
        wrapped = parallel.distributed(net)
        views = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        part = slice(rank * 16 // world, (rank + 1) * 16 // world)
        loss = backward(wrapped, net, (views[0, part], views[1, part]), torch.arange(16)[part] % 10, "cpu")
        grads = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        results[name] = {"loss": parallel.mean(loss), "grads": grads, "buffers": dict(net.named_buffers())}
    log = list(train(Path(folder) / f"run{world}", SMALL, *digits(), Options(log_every=1, knn_every=1)))
    if rank == 0:
        results["log"] = log
        torch.save(results, f"{folder}/{world}.pt")
    parallel.stop()


def main():
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            mp.start_processes(step, (world, folder, int(sys.argv[1]) + world), world, start_method="fork")
        one, *others = (torch.load(f"{folder}/{world}.pt") for world in (1, 2, 4))
    log = one.pop("log")
    report = {"logs": []}
    for world, other in zip((2, 4), others, strict=True):
        for mine, whole in zip(other.pop("log"), log, strict=True):
            report["logs"].append(
                [abs(mine[key] / whole[key] - 1) for key in ("loss", "effective_rank") if key in whole]
            )
        for name, mine in other.items():
            whole = one[name]
            error = lambda part, mine=mine, whole=whole: max(
                float((mine[part][key] - value).double().norm() / value.double().norm().clamp(min=1e-30))
                for key, value in whole[part].items()
            )
            loss = float((mine["loss"] - whole["loss"]).abs())
            report[f"{name}, {world}"] = [loss, error("grads"), error("buffers") if whole["buffers"] else 0.0]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
