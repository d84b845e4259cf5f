"""Networks: residual networks of any depth and width under torchvision's names, and the heads of tables 1 and 2.

A backbone maps images (n, 3, h, w) to the representation r (n, d); a head maps r to the embedding z (n, m) that the
contrastive loss sees.  The paper: arXiv 2110.09348.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from collapse import InputError


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
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class ResNet(nn.Module):
    """torchvision's residual blocks in any number of stages; keys are torchvision's, without the classifier `fc`.

    forward: (n, 3, h, w) float -> (n, d), the average-pooled output of the last stage.
    Attribute width: d.
    """

    def __init__(self, shape: ResNetShape) -> None:
        super().__init__()
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


class Subvector(nn.Module):
    """DirectCLR's head (section 6): the first d0 entries of r are the embedding; it has no parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, r: Tensor) -> Tensor:
        return r[:, : self.dim]


HEADS = ("none", "linear", "mlp")


def make_head(name: str, width: int, dim: int) -> nn.Module:
    """A projector of table 1, from a representation of `width` to an embedding of `dim`.

    none: the loss sees r itself.  linear: one layer, no bias.
    mlp: Linear, BatchNorm, ReLU, Linear, BatchNorm; the linear maps without bias, the hidden width that of r.
    """
    if name == "none":
        return nn.Identity()
    if name == "linear":
        return nn.Sequential(nn.Linear(width, dim, bias=False))
    if name == "mlp":
        hidden = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        return nn.Sequential(*hidden, nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim))
    raise InputError(f"head: got {name!r}, expected one of {', '.join(HEADS)}")
