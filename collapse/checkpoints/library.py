"""Networks of timm and torchvision by name, and by their keys where no other rule knows a file."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision import models as tv

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Plan
from collapse.checkpoints.preprocessing import BICUBIC
from collapse.containers import Contents, first_line
from collapse.images import Preprocessing

CLASSIFIERS = ("fc", "head", "heads", "classifier")


def known(name: Any) -> bool:
    """Whether timm or torchvision has a network of this name (timm's may end in a tag: vit_base_patch16_224.mae)."""
    return isinstance(name, str) and bool(_versions(name))


def _versions(name: str) -> list[str]:
    """The libraries' names for a name: timm's as it is, torchvision's with its library before it."""
    bare = name.removeprefix("torchvision:")
    of_timm = [name] if timm.is_model(name.partition(".")[0]) else []
    return of_timm + ([f"torchvision:{bare}"] if bare in tv.list_models(tv) else [])


def pretrained(source: str) -> Contents:
    """The weights of "timm:NAME" or "torchvision:NAME" that the library has cached or can fetch."""
    library, _, name = source.partition(":")
    if library not in ("timm", "torchvision"):
        raise InputError(f"{source}: expected timm:NAME or torchvision:NAME")
    names = timm.list_models() if library == "timm" else tv.list_models(tv)
    if name.partition(".")[0] not in names:
        close = [n for n in names if name.partition(".")[0][:6] in n][:5]
        raise InputError(f"{source}: no such network in {library}{'; there are ' if close else ''}{', '.join(close)}")
    if library == "timm" and not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
        raise InputError(f"{source}: timm has no weights for it; names with weights: timm.list_pretrained()")
    try:
        net = timm.create_model(name, pretrained=True) if library == "timm" else tv.get_model(name, weights="DEFAULT")
    except Exception as error:  # the library's network code fails in its own ways
        raise InputError(f"{source}: neither cached nor fetched ({first_line(error)})") from error
    known_as = name if library == "timm" else source
    version = timm.__version__ if library == "timm" else torchvision.__version__
    state = dict(net.state_dict())
    config = {"pretrained_cfg": _pixels(library, name, net), "architecture": known_as}
    return Contents(f"{library} {version}", state, _digest(state), configs={"config.json": config})


def _digest(state: Mapping[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pixels(library: str, name: str, net: nn.Module) -> dict[str, Any]:
    """What timm calls a pretrained_cfg."""
    if library == "timm":
        config: dict[str, Any] = dict(net.pretrained_cfg)  # type: ignore[arg-type]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}
    preset = tv.get_model_weights(name).DEFAULT.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return {"input_size": [3, crop, crop], "crop_pct": crop / resize, "mean": preset.mean, "std": preset.std,
            "interpolation": preset.interpolation.value}  # fmt: skip


def plan_named(name: str, tensors: Mapping[str, Tensor], root: str | None = None) -> tuple[str, Plan]:
    """(root, plan) of the network of this name, under the root if one is given; all its keys must be there."""
    found = [(version, r) for version in _versions(name) for r in _fits(version, tensors, False) if root in (None, r)]
    if not found:
        raise InputError(f"its tensors are not those of {name}")
    version, shortest = min(found, key=lambda item: len(item[1]))
    return shortest, _plan(version, shortest, tensors)


def search(tensors: Mapping[str, Tensor]) -> tuple[str, Plan]:
    """(root, plan) of the one network of timm and torchvision with these names and shapes.

    The first network of each of timm's modules says how much its keys look like those of the file, the digits aside;
    the three best modules are looked through.
    """
    if not any(tensor.ndim == 4 and tensor.shape[1] == 3 for tensor in tensors.values()):
        raise InputError("no tensor is a convolution of 3 channels")
    wanted = _patterns(tensors)
    modules = {module: timm.list_models(module=module) for module in timm.list_modules()}
    scores = {m: _overlap(names[0], wanted) for m, names in modules.items() if names}
    best = sorted((m for m, score in scores.items() if score > 0.4), key=lambda m: -scores[m])[:3]
    candidates = [name for module in best for name in modules[module]]
    candidates += [f"torchvision:{name}" for name in tv.list_models(tv)]
    found = {(name, root) for name in candidates for root in _fits(name, tensors, exact=True)}
    if not found:
        raise InputError("no network of timm or torchvision has its tensors")
    if len({name for name, _ in found}) > 1:
        listed = ", ".join(sorted({name for name, _ in found})[:8])
        raise InputError(f"{len(found)} networks of timm and torchvision have its tensors, {listed}; give --arch")
    name, root = found.pop()
    return root, _plan(name, root, tensors)


def _overlap(name: str, wanted: set[str]) -> float:
    mine = _patterns(_frame(name).state_dict())
    prefixes = ("", *{w.split(".")[0] + "." for w in wanted})
    return max(len({p + m for m in mine} & wanted) for p in prefixes) / max(len(mine), 1)


def _patterns(keys: Mapping[str, Any]) -> set[str]:
    return {re.sub(r"\d+", "#", key) for key in keys}


def _frame(name: str) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return make(name)


def make(name: str) -> nn.Module:
    """The network with random weights and no classifier: its output is the representation."""
    if not name.startswith("torchvision:"):
        return timm.create_model(name.partition(".")[0], pretrained=False, num_classes=0)
    net = tv.get_model(name.partition(":")[2], weights=None)
    classifier = next(c for c in CLASSIFIERS if hasattr(net, c))
    last = getattr(net, classifier)
    if isinstance(last, nn.Sequential):
        last[-1] = nn.Identity()
    else:
        setattr(net, classifier, nn.Identity())
    return net


def _fits(name: str, tensors: Mapping[str, Tensor], exact: bool) -> Iterator[str]:
    """The roots under which the file has every tensor of a network, of its shape if `exact`."""
    try:
        state = _frame(name).state_dict()
    except Exception:  # a few of the libraries' networks cannot be made in this way
        return
    first = next(iter(state), None)
    if first is None:
        return
    for key in tensors:
        root = key.removesuffix(first)
        if not key.endswith(first) or (root and not root.endswith(".")):
            continue
        if all(root + k in tensors and (not exact or tensors[root + k].shape == v.shape) for k, v in state.items()):
            yield root


def _plan(name: str, root: str, tensors: Mapping[str, Tensor]) -> Plan:
    mine = [key for key in tensors if key.startswith(root)]
    weights = Weights(
        {key.removeprefix(root): tensors[key] for key in mine}, {key.removeprefix(root): (key,) for key in mine}
    )
    pixels = _default_pixels(name)
    frame, create = _frame(name), partial(make, name)
    return Plan(name, create, weights, _width(create, pixels.crop or 224), pixels, _axes(frame))


def _default_pixels(name: str) -> Preprocessing:
    config = None if name.startswith("torchvision:") else timm.get_pretrained_cfg(name)
    if config is None:
        return Preprocessing()
    crop = config.input_size[-1]
    way = config.interpolation if config.interpolation in ("bilinear", "bicubic") else BICUBIC.interpolation
    return Preprocessing(int(crop / config.crop_pct), crop, way, tuple(config.mean), tuple(config.std))


def _width(create: Callable[[], nn.Module], size: int) -> int:
    """The width of the output, which is run once to see it."""
    with torch.no_grad():
        return int(create().eval()(torch.zeros(1, 3, size, size)).shape[1])


def _axes(net: nn.Module) -> str:
    if getattr(net, "num_prefix_tokens", None) is not None or type(net).__name__ == "VisionTransformer":
        return "tokens"
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC" or type(net).__name__.startswith("SwinTransformer")
    return "nhwc" if channels_last else "nchw"
