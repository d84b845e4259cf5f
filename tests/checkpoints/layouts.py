"""What the tests of checkpoint layouts share: one case a layout, and small networks as the projects declare them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


@dataclass
class Case:
    """A checkpoint as a project writes it, and what the project's own modules make of images."""

    tree: Any  # to be saved, or the path of what is saved already
    reference: Callable[[Tensor], Tensor]
    branch: str
    projector: nn.Module | None = None
    known: dict[str, Any] = field(default_factory=dict)
    size: int = 64
    pixels: dict[str, Any] = field(default_factory=dict)  # parts of the preprocessing that the file or layout decides
    neighbours: dict[str, str] = field(default_factory=dict)  # JSON files beside it


@dataclass(frozen=True)
class Layout:
    """A row of docs/checkpoints.md and the function that writes such a checkpoint."""

    project: str
    taken: str
    branch: str
    flags: str
    write: Callable[[Path], Any]  # gives a Case; of texts, sounds and clips the reference alone


LAYOUTS: list[Layout] = []
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}  # transformers'


def layout(project: str, taken: str, branch: str = "the only one", flags: str = "-", rows: list[Layout] = LAYOUTS):
    """Register the function below as the writer of a project's layout, a row of docs/checkpoints.md."""

    def register(write: Callable[[Path], Any]) -> Callable[[Path], Any]:
        rows.append(Layout(project, taken, branch, flags, write))
        return write

    return register


def folder_of(folder: Path, net: Any, *parts: Any) -> Any:
    """A network of transformers in a folder, with its processor or tokeniser; norms and biases are not the initial."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.rand_like(parameter) if parameter.ndim == 1 else 0
    for part in (net, *parts):
        part.save_pretrained(folder)
    return net.eval()


def trained(net: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are not the initial ones, so that a lost one shows."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net.eval()


class Network(nn.Module):
    """A residual network of torchvision's blocks and names, small, with whatever `fc` a project puts on it."""

    def __init__(self, widths=(8, 16, 24, 32), depths=(1, 2, 1, 1), stem=7, bottleneck=False, fc=None, maxpool=None,
                 padding=None, inner=64):  # fmt: skip
        super().__init__()
        large = stem == 7
        self.conv1 = nn.Conv2d(
            3, widths[0], stem, 2 if large else 1, stem // 2 if padding is None else padding, bias=False
        )
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if (large if maxpool is None else maxpool) else nn.Identity()
        block, inputs = Bottleneck if bottleneck else BasicBlock, widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                outputs = width * block.expansion
                short = None
                if stride > 1 or inputs != outputs:
                    short = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                blocks.append(block(inputs, width, stride, short, base_width=inner))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc, self.width = nn.AdaptiveAvgPool2d(1), fc or nn.Identity(), inputs
        trained(self)

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return self.avgpool(x).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


def mlp(*dims: int, bias=True, last_bias=True, norm=False, last_norm=None, act=nn.ReLU) -> nn.Sequential:
    """Linear [BN] act ... Linear [BN]; last_norm: None, or whether the last norm is affine."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(dims)):
        last = index == len(dims) - 2
        layers.append(nn.Linear(inputs, outputs, bias=last_bias if last else bias))
        if (norm and not last) or (last and last_norm is not None):
            layers.append(nn.BatchNorm1d(outputs, affine=not last or bool(last_norm)))
        if not last:
            layers.append(act())
    return trained(nn.Sequential(*layers))


def put(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under a prefix."""
    return {prefix + key: value for key, value in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the branch that must not be taken."""
    return {key: value + 1 for key, value in state.items()}


def exclude_bias_and_norm(parameter: Tensor) -> bool:
    """What VICReg, Barlow Twins and directCLR pickle into their optimizer's groups."""
    return parameter.ndim == 1


def optimizer(*extra: Any) -> dict[str, Any]:
    """The state of an optimizer, as it lies beside the weights."""
    groups = [{"params": [0], "lr": 0.1, "extra": list(extra)}]
    return {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": groups}


class Tree(nn.Module):
    """Modules under the attribute names that a project gives them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
