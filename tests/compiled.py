"""Run by test_parallel.py: gradients and statistics of two processes, compiled and not; prints how far they differ."""

import os
import sys

import torch
import torch.multiprocessing as mp

from collapse.models.backbones import make_backbone
from collapse.training import parallel


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


def compare(rank, world, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.start("cpu")
    eager, compiled = made(rank, False), made(rank, True)
    largest = max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True))
    (found,) = parallel.largest([largest])
    if rank == 0:
        print(found)
    parallel.stop()


if __name__ == "__main__":
    mp.start_processes(compare, (2, int(sys.argv[1])), 2, start_method="fork")
