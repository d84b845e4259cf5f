"""A checkpoint of anybody -> an encoder with every weight accounted for.

Rules instead of a registry of projects: read the tensors (containers.py), join nested keys with dots, drop wrapper
names, find each encoder by the pair of keys that only its family has, choose the branch its authors evaluate, read the
architecture from the shapes, load strictly, and report what every other tensor was.  What cannot be known from the file
takes a documented default with a warning, or a flag.  A partly loaded network is never returned.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError, containers
from collapse.images import Preprocessing
from collapse.models import ResNet, ResNetShape

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_feature_blocks"}
STATE_OF_TRAINING = re.compile(r"optimizer.*|opt|scaler|amp|.*schedulers?|loops|callbacks|contrast|queue.*")
STEM, FIRST_BLOCK = "conv1.weight", "layer1.0.conv1.weight"  # what every named residual network has, and nothing else
CIFAR_PLANES = (16, 32, 64)  # the three stages of the 6n + 2 networks for CIFAR (arXiv 1512.03385)
RENAMED = {"shortcut": "downsample", "linear": "fc"}

# Branch by the names in a root: the first pattern that matches some roots, while the second matches others, wins.
BRANCHES = (
    (r"encoder_q|base_encoder|online|query", r"encoder_k|momentum|key_|target"),
    (r"teacher", r"student"),
    (r"target_encoder", r"encoder"),
)

# Parts of a file that are known not to be the encoder, and why.
DROPPED = {
    "classifier": r"fc|linear|head|heads|classifier.*|.*online_head.*|.*probe.*|callbacks_.*",
    "predictor": r".*pred.*",
    "prototypes": r".*prototypes.*|last_layer.*",
    "queue": r"queue.*",
    "counters": r"total_ops|total_params|.*_coefficient|steps",
}


@dataclass(frozen=True)
class Overrides:
    """What the caller knows better than the file; None leaves the file's or the default value."""

    arch: str | None = None
    branch: str | None = None
    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    no_normalize: bool = False
    allow_unknown: bool = False


class Encoder(nn.Module):
    """A loaded network: images (n, 3, h, w), preprocessed -> representation (n, d).

    Attributes:
        backbone: the network.
        projector: its projector, (n, d) -> (n, m), or None.
        preprocess: PIL image -> (3, h, w) float32, as the network wants it.
        blocks: names of the stem and of each residual block, in the order of the forward pass.
        report: what was loaded and what was not: path, sha256, container, architecture, feature_dim, branch,
            branches_left, projector, preprocessing, keys, foreign, warnings (schema collapse.checkpoint/1).
    """

    def __init__(
        self, backbone: ResNet, projector: nn.Sequential | None, preprocess: Preprocessing, report: dict[str, Any]
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.preprocess, self.report = backbone, projector, preprocess, report
        inner = [name for name, _ in backbone.named_modules() if re.fullmatch(r"layer\d+\.\d+", name)]
        self.blocks = ["maxpool", *inner]

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def layer(self, name: str) -> "Layer":
        """The network up to a layer: "representation", "projector" or a module's name; feature maps are averaged."""
        return Layer(self, name)


class Layer(nn.Module):
    """Images -> (n, d) at one layer of an encoder."""

    def __init__(self, net: Encoder, name: str) -> None:
        super().__init__()
        self.net, self.name, self._seen = net, name, torch.empty(0)
        if name == "projector" and net.projector is None:
            raise InputError(f"{net.report['path']}: has no projector; use --layer representation")
        if name not in ("representation", "projector"):
            modules = dict(net.backbone.named_modules())
            if not name or name not in modules:
                inner = ", ".join(key for key in modules if re.fullmatch(r"layer\d(\.\d+)?|conv1|avgpool", key))
                raise InputError(f"layer: no {name!r}; there are representation, projector, {inner}")
            modules[name].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen = output.mean((2, 3)) if output.ndim == 4 else output

    def forward(self, images: Tensor) -> Tensor:
        r = self.net(images)
        if self.name == "projector" and self.net.projector is not None:
            return self.net.projector(r)
        return r if self.name == "representation" else self._seen


def load(path: str | PathLike, **known: Any) -> Encoder:
    """Read a checkpoint and return its encoder in eval mode, every weight loaded.

    known: fields of `Overrides`.

    Raises:
        InputError: no such file, not a checkpoint, no known layout, several encoders, a missing, superfluous or
            misshapen tensor; the message says which and what to do.
    """
    overrides = Overrides(**known)
    contents = containers.read(Path(path))
    tensors = clean(flatten(contents.tree), str(path))
    facts = own_facts(contents.metadata, str(path))
    roots = [key.removesuffix(STEM) for key in tensors if _is_root(key, tensors)]
    if not roots:
        prefixes = sorted({key.rpartition(".")[0] for key in tensors}, key=lambda k: (len(k), k))[:20]
        held = f"{len(tensors)} tensors under {', '.join(map(repr, prefixes))}" if tensors else "no tensors"
        raise InputError(f"{path}: no known layout: {held}; a residual network has {STEM} and {FIRST_BLOCK}")
    root = choose_branch(str(path), roots, overrides.branch)
    mine = {rename(key.removeprefix(root)): key for key in tensors if key.startswith(root)}
    weights = {name: tensors[key] for name, key in mine.items()}
    shape = infer_shape(weights, str(path))
    if len(shape.blocks) != 4 and shape.planes != CIFAR_PLANES and "architecture" not in facts:
        raise InputError(
            f"{path}: {len(shape.blocks)} residual stages of {shape.planes}; 4 expected: is the file whole?"
        )
    backbone, used = build(shape, weights, str(path), overrides)
    projector, projected = find_projector(tensors, root, backbone.width)
    rest = [key for key in tensors if key not in {mine[name] for name in used} | projected]
    dropped, unknown = explain(rest, root, [other for other in roots if other != root])
    if unknown and not overrides.allow_unknown:
        raise InputError(
            f"{path}: {len(unknown)} tensors belong to nothing known, first {unknown[0]!r}; "
            "if the encoder is right without them, give --allow-unknown"
        )
    preprocess, notes = preprocessing(shape, facts, overrides)
    report = {
        "path": str(path),
        "sha256": contents.sha256,
        "container": contents.container,
        "architecture": name_of(shape),
        "feature_dim": backbone.width,
        "branch": root.rstrip(".") or "(top)",
        "branches_left": sorted(other.rstrip(".") or "(top)" for other in set(roots) - {root}),
        "projector": projector and {"dims": _dims(projector), "prefix": _common(projected)},
        "preprocessing": preprocess.as_dict(),
        "keys": {
            "loaded": len(used),
            "projector": len(projected),
            "dropped": sum(map(len, dropped.values())),
            "unknown": len(unknown),
            "dropped_by": {rule: len(keys) for rule, keys in dropped.items()},
        },
        "foreign": contents.foreign,
        "warnings": notes + untrained(weights),
    }
    return Encoder(backbone, projector, preprocess, report).eval()


def _is_root(key: str, tensors: Mapping[str, Tensor]) -> bool:
    root, stem = key.removesuffix(STEM), tensors[key]
    at_name = key.endswith(STEM) and (not root or root.endswith("."))
    return at_name and stem.ndim == 4 and stem.shape[1] == 3 and root + FIRST_BLOCK in tensors


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted key, tensor) of every tensor in nested mappings and lists, the state of training left out."""
    if isinstance(tree, Tensor):
        yield prefix.rstrip("."), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(value, Tensor) or not STATE_OF_TRAINING.fullmatch(str(key)):
                yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{index}.")


def clean(pairs: Iterator[tuple[str, Tensor]], path: str) -> dict[str, Tensor]:
    """The tensors by key without wrapper names (module, _orig_mod, ...), wherever in a key these stand."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in pairs:
        short = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if short in tensors and not torch.equal(tensors[short], tensor):
            raise InputError(f"{path}: two different tensors are called {short!r} without their wrappers' names")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: tensor {key!r} {tuple(tensor.shape)} is larger than what the file stores for it")
        tensors[short] = tensor.detach()
    return tensors


def choose_branch(path: str, roots: list[str], wanted: str | None) -> str:
    """The root of the encoder that the file's authors evaluate; an error that lists all where that is unclear."""
    listed = ", ".join(root.rstrip(".") or "(top)" for root in roots)
    if wanted is not None:
        matching = [
            root for root in roots if root.rstrip(".") == wanted.rstrip(".") or (wanted == "(top)" and not root)
        ]
        if len(matching) != 1:
            raise InputError(f"{path}: no encoder at {wanted!r}; there are {listed}")
        return matching[0]
    if len(roots) == 1:
        return roots[0]
    for mine, theirs in BRANCHES:
        first = [root for root in roots if re.search(mine, root)]
        rest = [root for root in roots if root not in first]
        if len(first) == 1 and all(re.search(theirs, root) for root in rest):
            return first[0]
    raise InputError(f"{path}: holds {len(roots)} encoders, {listed}; choose one with --branch")


def rename(name: str) -> str:
    """A residual network's key under torchvision's names."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def infer_shape(weights: Mapping[str, Tensor], path: str) -> ResNetShape:
    """Read depth, widths, stem and kind of block from the tensors' shapes."""
    stages: dict[int, set[int]] = {}
    for name in weights:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    if sorted(stages) != list(range(1, len(stages) + 1)):
        raise InputError(f"{path}: residual stages {sorted(stages)}, expected 1, 2, ... without a gap")
    bottleneck = "layer1.0.conv3.weight" in weights
    last = "conv3" if bottleneck else "conv2"
    try:
        planes = [weights[f"layer{stage}.0.{last}.weight"].shape[0] // (4 if bottleneck else 1) for stage in stages]
        stem = weights["conv1.weight"]
        inner = weights["layer1.0.conv1.weight"].shape[0]
        groups = inner // weights["layer1.0.conv2.weight"].shape[1] if bottleneck else 1
    except KeyError as error:
        raise InputError(f"{path}: a residual network without {error.args[0]!r}; is the file whole?") from error
    shortcuts = any(".downsample." in name for name in weights)
    kernel = stem.shape[-1]
    if kernel not in (3, 7):
        raise InputError(f"{path}: a first convolution of {kernel} x {kernel}; 3 and 7 are known")
    return ResNetShape(
        blocks=tuple(len(stages[stage]) for stage in sorted(stages)),
        planes=tuple(planes),
        bottleneck=bottleneck,
        stem=kernel,
        stem_planes=stem.shape[0],
        groups=groups,
        base_width=inner * 64 // (groups * planes[0]) if bottleneck else 64,
        pad_shortcut=not shortcuts,
    )


def name_of(shape: ResNetShape) -> str:
    """The usual name of an architecture, or its numbers."""
    layers = sum(shape.blocks) * (3 if shape.bottleneck else 2) + 2
    standard = shape.planes == (64, 128, 256, 512)[: len(shape.planes)] and len(shape.planes) == 4
    name = f"resnet{layers}"
    if shape.groups > 1:
        name = f"resnext{layers}_{shape.groups}x{shape.base_width}d"
    elif shape.base_width == 128:
        name = f"wide_resnet{layers}_2"
    if not standard and shape.planes != CIFAR_PLANES:
        name += f" ({'-'.join(map(str, shape.planes))} planes)"
    return name if shape.stem == 7 else f"{name}, 3x3 stem"


def build(
    shape: ResNetShape, weights: Mapping[str, Tensor], path: str, overrides: Overrides
) -> tuple[ResNet, list[str]]:
    """The network with all its weights, and their names. A missing or misshapen tensor is an error."""
    if overrides.arch is not None and overrides.arch != name_of(shape).partition(",")[0]:
        raise InputError(f"{path}: holds {name_of(shape)}, not {overrides.arch}; leave --arch out or check the file")
    backbone = ResNet(shape)
    state = backbone.state_dict()
    missing = [
        k for k in state if k not in weights and not k.endswith("num_batches_tracked")
    ]  # absent before torch 0.4
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(state)} tensors of {name_of(shape)} are missing, first {missing[0]!r}"
        )
    wrong = [key for key in state if key in weights and weights[key].shape != state[key].shape]
    if wrong:
        shapes = f"{tuple(weights[wrong[0]].shape)}, expected {tuple(state[wrong[0]].shape)}"
        raise InputError(f"{path}: not {name_of(shape)}: {wrong[0]!r} is {shapes} ({len(wrong)} such tensors)")
    bad = [key for key in state if key in weights and not bool(torch.isfinite(weights[key]).all())]
    if bad:
        raise InputError(f"{path}: {bad[0]!r} holds NaN or infinity ({len(bad)} such tensors)")
    used = [key for key in state if key in weights]
    backbone.load_state_dict({**state, **{key: weights[key].to(state[key].dtype) for key in used}})
    return backbone, used


def find_projector(tensors: Mapping[str, Tensor], root: str, width: int) -> tuple[nn.Sequential | None, set[str]]:
    """The projector beside or below the encoder, and its keys: Linear, BatchNorm, ReLU where an index is skipped."""
    parent = root[: -len(root.split(".")[-2]) - 1] if root else ""
    for prefix in (f"{parent}projector.", f"{root}fc."):
        parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        sequential = any(name[0].isdigit() for name in parts)
        if parts and (sequential or prefix.endswith("projector.")):
            return _sequential(parts, width, prefix), {prefix + name for name in parts}
    return None, set()


def _sequential(parts: Mapping[str, Tensor], width: int, prefix: str) -> nn.Sequential:
    modules: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.items():
        position, _, leaf = name.rpartition(".")
        if position and not position.isdigit():
            raise InputError(f"projector: {prefix}{name} is no plain sequence of layers")
        modules.setdefault(int(position or 0), {})[leaf] = tensor
    layers: dict[str, nn.Module] = {}
    for index in range(max(modules) + 1):
        own = modules.get(index)
        if own is None:
            layers[str(index)] = nn.ReLU()
        elif "running_mean" in own:
            layers[str(index)] = nn.BatchNorm1d(len(own["running_mean"]), affine="weight" in own)
        elif "weight" in own and own["weight"].ndim == 2:
            layers[str(index)] = nn.Linear(own["weight"].shape[1], own["weight"].shape[0], bias="bias" in own)
        else:
            raise InputError(f"projector: {prefix}{index} ({', '.join(own)}) is neither linear nor batch norm")
    chain = nn.Sequential()
    for name, layer in layers.items():
        chain.add_module(name, layer)
    dims = _dims(chain)
    if not dims or dims[0] != width:
        raise InputError(f"projector: {prefix} takes {dims[0] if dims else 'nothing'}, the encoder gives {width}")
    try:
        named = {name if "." in name else f"0.{name}": tensor for name, tensor in parts.items()}
        chain.load_state_dict(named)
    except RuntimeError as error:
        raise InputError(f"projector: {prefix} does not fit: {str(error).splitlines()[-1].strip()}") from error
    return chain.eval()


def _dims(chain: nn.Sequential) -> list[int]:
    linear = [layer for layer in chain if isinstance(layer, nn.Linear)]
    return [linear[0].in_features, *(layer.out_features for layer in linear)] if linear else []


def _common(keys: set[str]) -> str:
    return re.sub(r"\d*\.?[^.]*$", "", min(keys))


def explain(keys: list[str], root: str, others: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({rule: keys it drops}, keys that no rule knows) of the tensors that are not the encoder or its projector."""
    dropped: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        name = rename(key.removeprefix(root) if key.startswith(root) else key)
        parts = name.split(".")
        rule = next((r for r, pattern in DROPPED.items() if any(re.fullmatch(pattern, p) for p in parts)), None)
        if any(other and key.startswith(other) for other in others):
            rule = "other branch"
        if rule is None:
            unknown.append(key)
        else:
            dropped.setdefault(rule, []).append(key)
    return dropped, unknown


def own_facts(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What the trainer of this package wrote into a file's header; empty for the files of others."""
    try:
        facts = json.loads(metadata.get("collapse", "{}"))
        if "preprocessing" in facts:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in facts["preprocessing"].items()
            }
            facts["preprocessing"] = Preprocessing(**values)
        return facts
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: the header's entry 'collapse' cannot be read: {error}") from error


def preprocessing(shape: ResNetShape, facts: Mapping[str, Any], known: Overrides) -> tuple[Preprocessing, list[str]]:
    """(preprocessing, warnings): the caller's word first, then the file's, then the usual one of the stem."""
    notes = []
    base = facts.get("preprocessing")
    if base is None:
        base = Preprocessing() if shape.stem == 7 else Preprocessing(resize=32, crop=32)
        notes.append(
            f"preprocessing is not in the file: {base.resize} px, crop {base.crop}, ImageNet's mean and std assumed"
        )
    given = {
        name: getattr(known, name)
        for name in ("resize", "crop", "interpolation", "mean", "std")
        if getattr(known, name) is not None
    }
    if known.no_normalize:
        given |= {"mean": None, "std": None}
    return replace(base, **given), notes if not given else []


def untrained(weights: Mapping[str, Tensor]) -> list[str]:
    """A warning if the running statistics of the batch norms were never updated."""
    means = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    if not means:
        return ["the file has no running statistics of batch norm"]
    if all(bool((mean == 0).all()) for mean in means):
        return ["all batch norms have running mean 0: the network looks untrained"]
    return []
