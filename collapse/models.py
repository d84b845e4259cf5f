"""Networks: residual networks of any depth and width under torchvision's names, and the heads of tables 1 and 2.

A backbone maps images (n, 3, h, w) to the representation r (n, d); a head maps r to the embedding z (n, m) that the
contrastive loss sees.  The paper: arXiv 2110.09348.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
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


class MLP(nn.Module):
    """Three layers for arrays and small images: (n, 3, h, w) -> (n, d), each layer linear, batch norm, ReLU."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        self.layers, self.width = nn.Sequential(*layers), widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, d)."""
        return self.layers(x)


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def make_backbone(
    arch: str, image_size: int, blocks: tuple[int, ...] = (), planes: tuple[int, ...] = (), stem: int = 7
) -> nn.Module:
    """A network with attribute `width`, d.

    arch: "mlp"; a residual network ("resnet18" ... "resnet152"), whose blocks, planes and stem (7, or 3 for small
    images) may be changed; "torchvision:NAME" or "timm:NAME", whose classifier is taken off.

    Raises InputError: none of these.
    """
    if arch == "mlp":
        return MLP(3 * image_size**2, planes or (512, 512, 512))
    if arch in RESNETS:
        usual, bottleneck = RESNETS[arch]
        planes = planes or (64, 128, 256, 512)[: len(blocks or usual)]
        if len(planes) != len(blocks or usual):
            raise InputError(
                f"planes: {len(planes)} stages, but {len(blocks or usual)} of blocks; give as many of both"
            )
        if stem not in (3, 7):
            raise InputError(f"stem: got {stem}, expected 7 or 3")
        return ResNet(ResNetShape(blocks or usual, planes, bottleneck, stem, planes[0]))
    library, _, name = arch.partition(":")
    if library not in ("timm", "torchvision") or not name:
        raise InputError(f"arch: got {arch!r}, expected mlp, {', '.join(RESNETS)}, torchvision:NAME or timm:NAME")
    try:
        return without_classifier(library, name)
    except (LookupError, RuntimeError, ValueError) as error:
        raise InputError(f"arch {library}:{name}: {library} has no such network") from error


CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision calls them
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # Inception's classifiers of earlier layers, for training alone


def without_classifier(library: str, name: str, **options: Any) -> nn.Module:
    """timm's or torchvision's network with random weights, whose output (n, d) is its representation.

    The representation is what its classifier's last linear map takes, hidden layers of the classifier before it
    included: 1,280 entries of mobilenet_v3_large.  It is the same whether a network is trained, loaded, or named.
    Attribute: width, d.  options: further arguments of timm's network.

    Raises what the library raises: ValueError or RuntimeError for an unknown name or impossible arguments.
    """
    if library == "timm":
        from timm import create_model

        net = create_model(name, pretrained=False, **{**options, "num_classes": 0})
        net.width = getattr(net, "head_hidden_size", net.num_features)  # some have a layer after the pool
        return net
    net = _of_torchvision(name)
    for part in filter(partial(hasattr, net), AUXILIARY):
        setattr(net, part, None)
        setattr(net, "aux_logits", False)  # noqa: B010 - the representation alone in training too
    classifier = next(c for c in CLASSIFIERS if hasattr(net, c))
    last, width = _before_last(getattr(net, classifier))
    setattr(net, classifier, last)
    net.width = width  # type: ignore[assignment]
    return net


def _of_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a change of initial values
        try:
            return get_model(name, weights=None)
        except NotImplementedError:  # RegNet computes its widths with tensors, which have none on "meta"
            device = torch.get_default_device()
            with torch.device("cpu"):
                return get_model(name, weights=None).to(device)


def _before_last(classifier: nn.Module) -> tuple[nn.Module, int]:
    """(a classifier without its last linear map, how many numbers that takes)."""
    if isinstance(classifier, nn.Linear):
        return nn.Identity(), classifier.in_features
    assert isinstance(classifier, nn.Sequential)
    last = classifier[-1]
    if isinstance(last, nn.Linear):
        classifier[-1] = nn.Identity()
        return classifier, last.in_features
    width = next(layer.in_channels for layer in classifier if isinstance(layer, nn.Conv2d))
    return nn.Sequential(last), width  # SqueezeNet's linear map is a convolution before the mean


def zero_last_norms(net: nn.Module) -> None:
    """Start every residual block as the identity: the last batch norm's weight is zero (arXiv 1706.02677)."""
    for module in net.modules():
        last = getattr(module, "bn3", None) if isinstance(module, Bottleneck) else getattr(module, "bn2", None)
        if isinstance(module, (BasicBlock, Bottleneck)) and last is not None:
            nn.init.zeros_(last.weight)


class Subvector(nn.Module):
    """DirectCLR's head (section 6): the first d0 entries of r are the embedding; it has no parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, dim)."""
        return r[:, : self.dim]


class Diagonal(nn.Module):
    """A trainable factor for each entry of r (proposition 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return r * self.scale


class Groups(nn.Module):
    """r in 8 groups of entries, at random but fixed, each with a loss of its own: (n, d) -> (n, 8, d / 8)."""

    COUNT = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % self.COUNT:
            raise InputError(f"head group: {width} dimensions do not make {self.COUNT} equal groups")
        self.register_buffer("order", torch.randperm(width))

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, groups, d / groups)."""
        return r[:, self.get_buffer("order")].unflatten(1, (self.COUNT, -1))


HEADS = ("none", "linear", "mlp", "orthogonal", "diagonal", "lowrank", "lowrank-diagonal", "group")


def default_dim(head: str, width: int) -> int:
    """The paper's width of the embedding: 128 of a trained head, 360 of 2048 of a fixed low-rank one, else d."""
    if head in ("linear", "mlp"):
        return 128
    return max(1, round(width * 360 / 2048)) if head.startswith("lowrank") else width


def make_head(name: str, width: int, dim: int, depth: int = 1) -> nn.Module:
    """A projector of tables 1 and 2, from a representation of `width` to an embedding of `dim`.

    none: the loss sees r itself.  linear: `depth` linear layers without bias or activation.
    mlp: Linear, BatchNorm, ReLU, Linear, BatchNorm; the linear maps without bias, the hidden width that of r.
    orthogonal: a fixed random rotation of r.  diagonal: a trainable factor an entry.
    lowrank: fixed, `dim` random orthonormal directions of r.  lowrank-diagonal: fixed, its first `dim` entries, which
    is DirectCLR.  group: 8 groups of entries, see `Groups`.
    Random ones draw from torch's global generator.

    Raises InputError: an unknown name, or a dim that the head cannot have.
    """
    if name not in HEADS:
        raise InputError(f"head: got {name!r}, expected one of {', '.join(HEADS)}")
    if name.startswith("lowrank") and not 1 <= dim <= width:
        raise InputError(f"dim: d0 = {dim}, expected 1..{width}, the representation's width; give dim=")
    if name in ("none", "orthogonal", "diagonal", "group") and dim != width:
        raise InputError(f"head {name}: its embedding has the representation's {width} dimensions; leave dim= out")
    if depth < 1 or (depth > 1 and name != "linear"):
        raise InputError(f"head {name}: depth {depth}; only linear takes more than one layer")
    return _BUILDERS[name](width, dim, depth)


def _linear(width: int, dim: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, dim if last else width, bias=False) for last in [0] * (depth - 1) + [1]))


def _mlp(width: int, dim: int, depth: int) -> nn.Module:
    hidden = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim))


def _fixed(width: int, dim: int, depth: int) -> nn.Module:
    layer = nn.Linear(width, dim, bias=False).requires_grad_(False)
    nn.init.orthogonal_(layer.weight)
    return nn.Sequential(layer)


_BUILDERS: dict[str, Any] = {
    "none": lambda width, dim, depth: nn.Identity(),
    "linear": _linear,
    "mlp": _mlp,
    "orthogonal": _fixed,
    "lowrank": _fixed,
    "diagonal": lambda width, dim, depth: Diagonal(width),
    "lowrank-diagonal": lambda width, dim, depth: Subvector(dim),
    "group": lambda width, dim, depth: Groups(width),
}


def head_tensors(head: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a head: its state; a diagonal as the matrix that any reader of linear layers knows."""
    if isinstance(head, Diagonal):
        return {"0.weight": torch.diag(head.scale.detach())}
    return {} if isinstance(head, Groups) else dict(head.state_dict())
