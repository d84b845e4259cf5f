"""SimCLRv2's residual networks with selective kernels (arXiv 1903.06586, 2006.10029), which no library has."""

import re
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Plan
from collapse.data.preprocessing import Preprocessing


class SelectiveKernel(nn.Module):
    """Two 3 x 3 convolutions, mixed per channel by a softmax of the pooled sum (arXiv 1903.06586, 2006.10029)."""

    def __init__(self, width: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.main_conv = nn.Sequential(_conv(width, 2 * width, 3, stride), _norm(2 * width, True))
        self.mixing_conv = nn.Sequential(_conv(width, hidden, 1), _norm(hidden, True), _conv(hidden, 2 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c_out, h, w)."""
        x = self.main_conv(x).unflatten(1, (2, -1))
        mix = self.mixing_conv(x.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, -1))
        return (x * mix.softmax(1)).sum(1)


class SelectiveBlock(nn.Module):
    """A bottleneck with selective kernels; the shortcut averages 2 x 2 pixels before its 1 x 1 convolution."""

    def __init__(self, inputs: int, width: int, hidden: int, stride: int, project: bool) -> None:
        super().__init__()
        self.projection = nn.Sequential()
        if project:
            pool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, stride), _conv(inputs, 4 * width, 1))
            self.projection.add_module("shortcut", pool)
            self.projection.add_module("bn", _norm(4 * width, False))
        self.net = nn.Sequential(
            _conv(inputs, width, 1),
            _norm(width, True),
            SelectiveKernel(width, hidden, stride),
            _conv(width, 4 * width, 1),
            _norm(4 * width, False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c_out, h, w)."""
        return F.relu(self.projection(x) + self.net(x))


class SelectiveResNet(nn.Module):
    """SimCLRv2's network with selective kernels (arXiv 2006.10029), under the names of Separius/SimCLRv2-Pytorch.

    stages: (blocks, width, hidden width of the mixing) each.  forward: (n, 3, h, w) -> (n, 4 * last width).
    """

    def __init__(self, stem: tuple[int, ...], stages: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        a, b, c = stem
        first = [_conv(3, a, 3, 2), _norm(a, True), _conv(a, b, 3), _norm(b, True), _conv(b, c, 3), _norm(c, True)]
        parts: list[nn.Module] = [nn.Sequential(*first, nn.MaxPool2d(3, 2, 1))]
        inputs = c
        for index, (depth, width, hidden) in enumerate(stages):
            blocks = []
            for block in range(depth):
                blocks.append(SelectiveBlock(inputs, width, hidden, 2 if index and not block else 1, not block))
                inputs = 4 * width
            stage = nn.Sequential()
            stage.add_module("blocks", nn.Sequential(*blocks))
            parts.append(stage)
        self.net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d)."""
        return self.net(x).mean((2, 3))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _norm(width: int, relu: bool) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU() if relu else nn.Identity())


def plan_selective(weights: Weights) -> Plan:
    """SimCLRv2 with selective kernels."""
    depths: dict[int, set[str]] = {}
    for name in weights.tensors:
        if match := re.match(r"net\.(\d+)\.blocks\.(\d+)\.", name):
            depths.setdefault(int(match[1]), set()).add(match[2])
    stages = tuple(
        (
            len(depths[stage]),
            weights.shape(f"net.{stage}.blocks.0.net.0.weight", 4)[0],
            weights.shape(f"net.{stage}.blocks.0.net.2.mixing_conv.0.weight", 4)[0],
        )
        for stage in sorted(depths)
    )
    stem = tuple(weights.shape(f"net.0.{i}.weight", 4)[0] for i in (0, 2, 4))
    layers = 3 * sum(depth for depth, _, _ in stages) + 2
    make = partial(SelectiveResNet, stem, stages)
    return Plan(
        f"sk-resnet{layers} ({stages[0][1]} planes)", make, weights, 4 * stages[-1][1], Preprocessing(), stem="net.0"
    )
