"""Residual networks of any depth and width, under torchvision's names: images (n, 3, h, w) -> r (n, d)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


@dataclass(frozen=True)
class ResNetShape:
    """What the tensors of a residual network say about it.

    blocks: residual blocks a stage; planes: width a stage, before the expansion by 4 of a bottleneck;
    stem: kernel of the first convolution, 7 (stride 2 and max-pool follow) or 3 (neither);
    stem_planes: its width; pad_shortcut: shortcuts without weights (He et al. 2016, option A);
    stem_padding and maxpool: where they are not those of the stem's kernel.
    """

    blocks: tuple[int, ...]
    planes: tuple[int, ...]
    bottleneck: bool = False
    stem: int = 7
    stem_planes: int = 64
    groups: int = 1
    base_width: int = 64
    pad_shortcut: bool = False
    stem_padding: int | None = None
    maxpool: bool | None = None


class PadShortcut(nn.Module):
    """Shortcut without weights: every `stride`-th pixel, zero channels on both sides (option A of arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.pad, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c + 2 pad, h / stride, w / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class ResNet(nn.Module):
    """torchvision's residual blocks in any number of stages; keys are torchvision's, without the classifier `fc`.

    forward: (n, 3, h, w) float -> (n, d), the average-pooled output of the last stage.
    Attributes: width, d; shape.
    """

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
        self.shape = shape
        block = Bottleneck if shape.bottleneck else BasicBlock
        large = shape.stem == 7
        padding = shape.stem // 2 if shape.stem_padding is None else shape.stem_padding
        self.conv1 = nn.Conv2d(3, shape.stem_planes, shape.stem, 2 if large else 1, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.stem_planes)
        self.relu = nn.ReLU(inplace=True)
        pooled = large if shape.maxpool is None else shape.maxpool
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity()
        width = shape.stem_planes
        self.stages = [f"layer{stage + 1}" for stage in range(len(shape.blocks))]
        for stage, (name, count, planes) in enumerate(zip(self.stages, shape.blocks, shape.planes, strict=True)):
            strides = [2 if stage else 1] + [1] * (count - 1)
            layers = []
            for stride in strides:
                shortcut = _shortcut(width, planes * block.expansion, stride, shape.pad_shortcut)
                layers.append(block(width, planes, stride, shortcut, shape.groups, shape.base_width))
                width = planes * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        self.width = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) float -> (n, d), the average-pooled output of the last stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.avgpool(x).flatten(1)


def _shortcut(inputs: int, outputs: int, stride: int, pad: bool) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if pad:
        return PadShortcut(inputs, outputs, stride)
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def zero_last_norms(net: nn.Module) -> None:
    """Start every residual block as the identity: the last batch norm's weight is zero (arXiv 1706.02677)."""
    for module in net.modules():
        last = getattr(module, "bn3", None) if isinstance(module, Bottleneck) else getattr(module, "bn2", None)
        if isinstance(module, (BasicBlock, Bottleneck)) and last is not None:
            nn.init.zeros_(last.weight)
