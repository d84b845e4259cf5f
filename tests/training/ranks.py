"""Run by test_parallel.py in a process of its own: one step on the whole batch by 1, 2 and 4 forked processes.

Then gradients and statistics of two processes, compiled and not.  What is imported before the forks is imported once.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torch.multiprocessing as mp
from torch import nn

from collapse.data.labelled import open_data
from collapse.encoders import processes
from collapse.models.backbones import make_backbone
from collapse.recipes.config import make_config
from collapse.training import parallel
from collapse.training.network import Network, backward
from collapse.training.train import Options, train

CASES = {
    "mlp": {"head": "mlp"},
    "mlp, all negatives": {"head": "mlp", "negatives": "all"},
    "linear, no batch norm, in chunks": {"head": "linear", "arch": "mlp", "planes": (24, 16), "chunks": 2},
    "directclr": {"method": "directclr", "dim": 24},
    "group": {"head": "group"},
    "barlow-twins": {"method": "barlow-twins", "dim": 8},
    "vicreg, no batch norm, in chunks": {"method": "vicreg", "head": "linear", "arch": "mlp", "planes": (24, 16),
                                         "chunks": 2},
    "byol": {"method": "byol", "head": "linear", "dim": 8, "predictor_dim": 16},
}  # fmt: skip


SMALL = make_config("digits", blocks=(1, 1), planes=(8, 16), epochs=2, batch_size=64, lr=1e-3)


def meet(rank, world, port):
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.start("cpu")


def without_norms(net):
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.Identity())


def step(rank, world, folder, port, digits):
    meet(rank, world, port)
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
    log = list(train(Path(folder) / f"run{world}", SMALL, *digits, Options(log_every=1, knn_every=1)))
    if rank == 0:
        results["log"] = log
        torch.save(results, f"{folder}/{world}.pt")
    processes.stop()


def made(rank, compiled):
    """Gradients and buffers of a small network over both processes' rows, in float64."""
    torch.manual_seed(0)
    net = parallel.synchronise(make_backbone("resnet18", 16, (1,), (8,), 3).double(), "cpu", True).train()
    if compiled:
        net.compile(backend="aot_eager", fullgraph=True)
    wrapped = parallel.distributed(net)
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    (wrapped(x[0]) * wrapped(x[1])).sum().backward()
    return [p.grad.clone() for p in net.parameters()] + [buffer.double().clone() for buffer in net.buffers()]


def compare(rank, world, folder, port):
    meet(rank, world, port)
    eager, compiled = made(rank, False), made(rank, True)
    largest = max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True))
    (found,) = processes.largest([largest])
    Path(folder, "compiled").write_text(str(found))
    processes.stop()


def main():
    port = int(sys.argv[1])
    torch.compile(lambda x: x, backend="aot_eager")(torch.ones(1))  # for its imports
    digits = [open_data("sklearn:digits", split).subset(np.arange(200)) for split in ("train", "val")]
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            mp.start_processes(step, (world, folder, port + world, digits), world, start_method="fork")
        mp.start_processes(compare, (2, folder, port + 5), 2, start_method="fork")
        compiled = float(Path(folder, "compiled").read_text())
        one, *others = (torch.load(f"{folder}/{world}.pt") for world in (1, 2, 4))
    log = one.pop("log")
    report = {"compiled": compiled, "logs": []}
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
