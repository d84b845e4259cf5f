"""Networks of timm and torchvision by name, and by their keys where no other rule knows a file."""

import contextlib
import hashlib
import io
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
import torchvision
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from torchvision import models as tv

from collapse import InputError
from collapse.checkpoints.keys import ROOT_LIMIT, Weights
from collapse.checkpoints.plan import Clues, Plan, refuse_flags
from collapse.checkpoints.preprocessing import BICUBIC, at_size
from collapse.checkpoints.settings import choice, flag, number, shown, whole_number
from collapse.data.preprocessing import Preprocessing
from collapse.files.containers import Contents, first_line
from collapse.models.backbones import AUXILIARY, CLASSIFIERS, without_classifier
from collapse.models.meta import on_meta

# What timm calls classifiers besides: a second for distillation, one of the patches, the older names.
ON_TOP = (*CLASSIFIERS, *AUXILIARY, "head_dist", "heads_dist", "aux_head", "last_linear", "classif")
INDEX = Path(__file__).with_name("networks.txt")
Options = Mapping[str, Any]


def known(name: Any) -> bool:
    """Whether timm or torchvision has a network of this name (timm's may end in a tag: vit_base_patch16_224.mae)."""
    return isinstance(name, str) and bool(_versions(name))


IN_A_ROW = (
    ", its children in a row"  # nn.Sequential(*list(net.children())[:-1]), as many projects take a classifier off
)


def _versions(name: str) -> list[str]:
    """The libraries' names for a name: timm's as it is, torchvision's with its library before it; then in a row."""
    bare = name.removeprefix("torchvision:")
    versions = [name] if timm.is_model(name.partition(".")[0]) else []
    versions += [f"torchvision:{bare}"] if bare in tv.list_models(tv) else []
    return versions + [f"{version}{IN_A_ROW}" for version in versions]


def pretrained(source: str) -> Contents:
    """The weights of "timm:NAME" or "torchvision:NAME" that the library has cached or can fetch.

    Raises InputError: an unknown library or name, or weights that are neither cached nor fetched.
    """
    library, _, name = source.partition(":")
    if library not in ("timm", "torchvision"):
        raise InputError(f"{source}: expected timm:NAME or torchvision:NAME")
    names = timm.list_models() if library == "timm" else tv.list_models(tv)
    if name.partition(".")[0] not in names:
        close = [n for n in names if name.partition(".")[0][:6] in n][:5]
        raise InputError(f"{source}: no such network in {library}{'; there are ' if close else ''}{', '.join(close)}")
    try:
        if library == "timm" and not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
            raise InputError("timm has no weights of this name; timm.list_pretrained() lists those that it has")
        with _silent():
            net = _fetched(library, name)
    except Exception as error:  # the library's network code fails in its own ways
        raise InputError(f"{source}: neither cached nor fetched ({first_line(error)})") from error
    known_as = name if library == "timm" else source
    version = timm.__version__ if library == "timm" else torchvision.__version__
    state = dict(net.state_dict())
    config = {"pretrained_cfg": _pixels(library, name, net), "architecture": known_as}
    return Contents(f"{library} {version}", state, _digest(state), configs={"config.json": config})


def _fetched(library: str, name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True) if library == "timm" else tv.get_model(name, weights="DEFAULT")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the libraries say of each attempt to fetch: the last failure becomes the error."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _digest(state: Mapping[str, Tensor]) -> str:
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
    rescales = bool(getattr(net, "transform_input", False))  # Inception's pixels in -1..1, which it makes by itself
    mean, std = ([0.5] * 3, [0.5] * 3) if rescales else (preset.mean, preset.std)
    return {"input_size": [3, crop, crop], "crop_pct": crop / resize, "mean": mean, "std": std,
            "interpolation": preset.interpolation.value}  # fmt: skip


def roots_of(name: str, tensors: Mapping[str, Tensor], options: Options = MappingProxyType({})) -> list[str]:
    """The roots, in the order of the file, under which it has every tensor of the network of this name.

    Raises InputError: no root has them.
    """
    roots = next(filter(None, (_roots(version, tensors, options) for version in _versions(name))), [])
    if not roots:
        raise InputError(f"its tensors are not those of {shown(name)[1:-1]}")
    return roots


def plan_named(name: str, tensors: Mapping[str, Tensor], root: str, options: Options = MappingProxyType({})) -> Plan:
    """The plan of the network of this name under a root where all its keys are. Raises InputError: no root has them."""
    version = next((v for v in _versions(name) if root in _roots(v, tensors, options)), None)
    if version is None:
        raise InputError(f"its tensors are not those of {shown(name)[1:-1]}")
    return plan(version, root, tensors, options)


def search(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """{root: names} of the networks of timm and torchvision with these names and shapes, a classifier's aside.

    networks.txt has the fingerprint of each; what it says is verified with the library.

    Raises InputError: there is none.
    """
    if not any(tensor.ndim == 4 and tensor.shape[1] == 3 for tensor in tensors.values()):
        raise InputError("no tensor is a convolution of 3 channels")
    every = {root: fitting(root, tensors) for root in _prefixes(tensors)}
    matches = {root: names for root, names in every.items() if names}
    if not matches:
        raise InputError(
            "no network of timm or torchvision has its tensors; if it is one under other names, give arch="
        )
    return matches


def fitting(root: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """The networks whose tensors, by name and shape, are those under a root."""
    mine = {key.removeprefix(root): tuple(t.shape) for key, t in tensors.items() if key.startswith(root)}
    names = [name for name in _index().get(fingerprint(mine), []) if _exact(name, root, tensors)]
    # torchvision's network of the same name and tensors as timm's is the same function.
    return [name for name in names if name.removeprefix("torchvision:") not in names or ":" not in name]


def identified(names: list[str], root: str, tensors: Mapping[str, Tensor], clues: Clues) -> Plan:
    """The plan of the one network that has the tensors under a root; raises InputError, with the names, for several."""
    if len(names) > 1:
        which = ", ".join(names[:8])
        raise InputError(f"{len(names)} networks of timm and torchvision have its tensors, {which}; give arch=")
    refuse_flags(names[0], clues)
    chosen = plan(names[0], root, tensors)
    clues.notes.append(f"identified as {chosen.architecture} by its tensors alone")
    return chosen


@cache
def _index() -> Mapping[str, list[str]]:
    index: dict[str, list[str]] = {}
    for line in INDEX.read_text().splitlines():
        fingerprint, name = line.split(" ", 1)
        index.setdefault(fingerprint, []).append(name)
    return index


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """ "" and the beginnings, of up to five components, of the keys of convolutions of 3 channels."""
    prefixes = {""}
    for key, tensor in tensors.items():
        if tensor.ndim == 4 and tensor.shape[1] == 3:
            parts = key.split(".")
            prefixes |= {".".join([*parts[:end], ""]) for end in range(1, min(6, len(parts)))}
    return sorted(prefixes)[:ROOT_LIMIT]


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A digest of names and shapes, those of classifiers aside."""
    kept = sorted((name, shape) for name, shape in shapes.items() if name.split(".")[0] not in ON_TOP)
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:12]


def _exact(name: str, root: str, tensors: Mapping[str, Tensor]) -> bool:
    if name not in _versions(name.removesuffix(IN_A_ROW)):
        return False
    net = on_meta(partial(make, name))
    state, keys = net.state_dict(), _keys(name, net)
    return all(root + keys[k] in tensors and tensors[root + keys[k]].shape == t.shape for k, t in state.items())


def write_index() -> None:
    """Write networks.txt anew, for another version of timm or torchvision (some minutes)."""
    lines = []
    of_tv = [f"torchvision:{name}" for name in tv.list_models(tv)]
    for name in [*timm.list_models(), *of_tv, *(f"{name}{IN_A_ROW}" for name in of_tv)]:
        net = on_meta(partial(make, name))
        shapes = {_keys(name, net)[key]: tuple(t.shape) for key, t in net.state_dict().items()}
        lines.append(f"{fingerprint(shapes)} {name}")
    INDEX.write_text("\n".join(lines) + "\n")


def make(name: str, options: Options = MappingProxyType({})) -> nn.Module:
    """The network with random weights and no classifier: its output is the representation (models.py)."""
    if name.endswith(IN_A_ROW):
        return Row(make(name.removesuffix(IN_A_ROW), options))
    if name.startswith("torchvision:"):
        return without_classifier("torchvision", name.partition(":")[2])
    return without_classifier("timm", name.partition(".")[0], **options)


class Row(nn.Sequential):
    """All children of a network but the last, its classifier, one after another, under their names.

    forward: (n, 3, h, w) -> (n, d).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(OrderedDict(list(net.named_children())[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d). Raises InputError where what follows its children makes the vector."""
        x = super().forward(x)
        if x.ndim == 4 and x.shape[2:] != (1, 1):
            raise InputError("the network's children in a row give a map and no vector; not read")
        return x.flatten(1)


def _keys(name: str, net: nn.Module) -> dict[str, str]:
    """{key of a network's state: its key in a file}, which has numbers for the names of children in a row."""
    number = {child: str(index) for index, (child, _) in enumerate(net.named_children())}
    parts = {key: key.partition(".") for key in net.state_dict()}
    row = name.endswith(IN_A_ROW)
    return {key: "".join((number.get(first, first) if row else first, *rest)) for key, (first, *rest) in parts.items()}


def _roots(name: str, tensors: Mapping[str, Tensor], options: Options) -> list[str]:
    """The roots under which the file has every tensor of a network."""
    try:
        net = on_meta(partial(make, name, options))
    except Exception as error:  # the library's code refuses arguments in many ways, all the config's fault
        raise InputError(f"config.json: model_args: no {name} has these ({first_line(error)})") from error
    state = list(_keys(name, net).values())
    start = state[0]
    roots = dict.fromkeys(key.removesuffix(start) for key in tensors if key.endswith(start))
    return [r for r in roots if (not r or r.endswith(".")) and all(r + key in tensors for key in state)]


def plan(name: str, root: str, tensors: Mapping[str, Tensor], options: Options = MappingProxyType({})) -> Plan:
    """The plan of a library's network for the tensors under a root.

    Raises InputError: a tensor is missing or misshapen, or the network gives no vector an image.
    """
    create = partial(make, name, options)
    light = on_meta(create)
    names = {root + file: target for target, file in _keys(name, light).items()}
    names = {key: names.get(key, key.removeprefix(root)) for key in tensors if key.startswith(root)}
    weights = Weights(
        {target: tensors[key] for key, target in names.items()}, {target: (key,) for key, target in names.items()}
    )
    _check_shapes(name, light, weights)
    net, pixels = create().eval(), _default_pixels(name)
    side = options.get("img_size") or pixels.crop or 224
    pixels = at_size(pixels, side) if "img_size" in options else pixels
    width = _width(name, net, side)
    stem = "maxpool" if hasattr(net, "maxpool") and hasattr(net, "layer1") else ""
    return Plan(name, create, weights, width, pixels, axes(net), stem)


def _width(name: str, net: nn.Module, side: int) -> int:
    """The width of its output; raises InputError if that is no vector an image."""
    try:
        with torch.no_grad():
            made = net(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # children that are not called in a row
        raise InputError(f"{name} takes no images of {side} x {side} pixels ({first_line(error)})") from error
    if not isinstance(made, Tensor) or made.ndim != 2:
        what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise InputError(f"{name} gives {what} an image, expected one vector")
    return made.shape[1]


# Arguments of timm's networks that a config may give, and what they may be; no other reaches timm.
ARGUMENTS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("img_size", "patch_size", "embed_dim", "num_heads"), partial(whole_number, low=1, high=1 << 14)),
    **dict.fromkeys(("depth", "reg_tokens"), partial(whole_number, low=0, high=1 << 14)),
    "num_classes": partial(whole_number, low=0, high=1 << 24),
    "in_chans": partial(whole_number, low=3, high=3),
    **dict.fromkeys(("init_values", "mlp_ratio"), partial(number, low=0, high=100)),
    **dict.fromkeys(("dynamic_img_size", "class_token", "no_embed_class", "qkv_bias", "qk_norm", "pre_norm", "fc_norm",
                     "dynamic_img_pad", "strict_img_size", "final_norm", "ls_init_value"), flag),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate",
                     "patch_drop_rate"), partial(number, low=0, high=1)),
    "global_pool": partial(choice, allowed=("", "token", "avg", "avgmax", "max", "map")),
    "act_layer": partial(choice, allowed=("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")),
}  # fmt: skip
WITHOUT_EFFECT = re.compile(r"\w*drop\w*_rate")  # a network that is evaluated drops nothing


def arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensor], root: str, pool: str | None,
              notes: list[str]) -> dict[str, Any]:  # fmt: skip
    """The arguments of timm's network that its config.json gives, checked; the kind of perceptron by the tensors.

    Raises InputError: model_args is no mapping, or holds an argument that is not known here.
    """
    given = config.get("model_args")
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"config.json: model_args is {shown(given)}, expected names and values")
    accepted: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if name not in ARGUMENTS:
            raise InputError(f"config.json: model_args.{shown(name)[1:-1]} is {shown(value)}, which is not known here")
        if value is not None and not WITHOUT_EFFECT.fullmatch(name):
            accepted[name] = ARGUMENTS[name](f"config.json: model_args.{name}", value)
    first, second = (tensors.get(f"{root}blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if given and first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]:
        accepted |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if accepted.get("global_pool") == "" or (pool and first is not None):
        accepted["global_pool"] = "avg" if pool == "mean" else "token"
        if not pool:
            notes.append('its config.json asks for all tokens: the class token is taken; pool="mean" takes the patches')
    return accepted


def _check_shapes(name: str, net: nn.Module, weights: Weights) -> None:
    """Before anything of the size of a network is made that a file only names."""
    for key, tensor in net.state_dict().items():
        if weights.shape(key) != tuple(tensor.shape):
            raise InputError(f"not {name}: {shown(key)} is {weights.shape(key)}, expected {tuple(tensor.shape)}")


def _default_pixels(name: str) -> Preprocessing:
    plain = name.removesuffix(IN_A_ROW)
    config = None if plain.startswith("torchvision:") else timm.get_pretrained_cfg(plain)
    if config is None:
        return Preprocessing()
    crop = config.input_size[-1]
    way = config.interpolation if config.interpolation in ("bilinear", "bicubic") else BICUBIC.interpolation
    return Preprocessing(int(crop / config.crop_pct), crop, way, tuple(config.mean), tuple(config.std))


def axes(net: nn.Module) -> str:
    """How its feature maps lie: "tokens", "nhwc" or "nchw"."""
    if getattr(net, "num_prefix_tokens", None) is not None or type(net).__name__ == "VisionTransformer":
        return "tokens"
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC" or type(net).__name__.startswith("SwinTransformer")
    return "nhwc" if channels_last else "nchw"
