"""A backbone by its name, ours or a library's, without its classifier: the one rule for what a representation is."""

import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.models.resnet import RESNETS, ResNet, ResNetShape


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
