"""The projector that belongs to an encoder: found by its name and its input width, read as a chain of layers.

A chain is Linear and BatchNorm1d in the order of the numbers in their keys.  What has no tensors does not show: an
activation is assumed where an index is skipped or two linear maps would follow each other, ReLU unless the layout
(DINO, MSN) is known for GELU; nothing is assumed behind the last layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.accounts import DROPPED
from collapse.checkpoints.keys import named
from collapse.checkpoints.plan import unusable
from collapse.checkpoints.settings import listed, shown

NAMES = re.compile(r"proj|\w*projector|\w*projection(_head)?|\w*_head|head|heads|neck|g|mlp|l\d|fc")
NEVER = re.compile("|".join((DROPPED["probe"], DROPPED["predictor"], DROPPED["prototypes"], DROPPED["decoder"],
                             r"classifier.*|criterion.*|ibot_head|embed_head|visual|text.*")))  # fmt: skip
QUALIFIERS = re.compile(r"teacher|student|online|target|momentum|key|query|ema")


COUNTERS = re.compile(r"(^|\.)total_(ops|params)$")  # a profiler (thop) leaves them in every part
CLASSIFIER = re.compile(r"(^|\.)(fc|head|heads|linear)\.$")


@dataclass
class Projector:
    """A projector's layers, its keys in the file and their common prefix; or, where it cannot be read, the problem."""

    prefix: str
    keys: set[str]
    chain: nn.Sequential | None = None
    problem: str = ""
    dims: list[int] = field(default_factory=list)


def find(
    tensors: Mapping[str, Tensor], taken: set[str], root: str, width: int, wanted: str | None, layers: int | None
) -> Projector | None:
    """The projector of the encoder at `root`, whose output has `width` entries; None if the file has none.

    wanted: its prefix, "none", or None for the one there is.  layers: 2 leaves out the second of three.
    Raises InputError if there are several, or not the one that is wanted, or that cannot be read.
    """
    if wanted == "none":
        return None
    free = {key: tensor for key, tensor in tensors.items() if key not in taken and not COUNTERS.search(key)}
    if wanted is not None:
        keys = {key for key in free if key.startswith(wanted.rstrip(".") + ".")}
        if not keys:
            raise InputError(
                f"no projector at {shown(wanted)}; there are {listed(sorted(_groups(free, root))) or 'none'}"
            )
        projector = read({key: free[key] for key in keys}, wanted.rstrip(".") + ".", width, layers, tensors)
        if projector.problem:
            raise InputError(f"projector {listed([projector.prefix])}: {projector.problem}")
        return projector
    groups = _groups(free, root)
    # A projector that no branch's name is on belongs to the branch for which there is none.
    mine = {prefix: group for prefix, group in groups.items() if _branch(prefix) == _branch(root)} or groups
    read_all = [read(group, prefix, width, layers, tensors) for prefix, group in mine.items()]
    fitting = [p for p in read_all if p.dims[:1] == [width] or p.problem]
    good = [p for p in fitting if not p.problem]
    if len(good) > 1:
        names = listed([named(p.prefix) for p in good])
        raise InputError(f"holds {len(good)} projectors, {names}; choose one with projector=, or none")
    return next(iter(good or fitting), None)


def _groups(free: Mapping[str, Tensor], root: str) -> dict[str, dict[str, Tensor]]:
    """Candidates, prefix -> tensors: a head only if it is more than what a classifier is, one linear map."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in free.items():
        prefix = _prefix(key.split("."), root)
        if prefix is not None:
            groups.setdefault(prefix, {})[key] = tensor
    contrastive = re.search(r"encoder_q|query", root) is not None
    return {p: g for p, g in groups.items() if contrastive or (_linear_maps(g) > 1 and not _side_by_side(g))
            or not CLASSIFIER.search(p)}  # fmt: skip


def _side_by_side(group: Mapping[str, Tensor]) -> bool:
    """Whether they are classifiers of as many classes, of which none takes what another gives (CrossViT's two)."""
    maps = [tuple(tensor.shape) for tensor in group.values() if tensor.ndim == 2]
    return len({classes for classes, _ in maps}) == 1 and all(taken != given for given, taken in maps)


def _linear_maps(group: Mapping[str, Tensor]) -> int:
    return sum(tensor.ndim == 2 for tensor in group.values())


CONTRASTIVE = re.compile(r"encoder_q|base_encoder|query")


def _prefix(parts: Sequence[str], root: str) -> str | None:
    """The prefix of the projector that a key may belong to: a known name beside or in the encoder, in its branch."""
    classifier = f"{root}classifier."  # what MoCo replaces by its projector in a DenseNet or MobileNet
    if CONTRASTIVE.search(root) and ".".join(parts).startswith(classifier):
        return classifier
    names = [index for index, part in enumerate(parts[:-1]) if NAMES.fullmatch(part)]
    if not names or any(NEVER.fullmatch(part) for part in parts):
        return None
    above, end = ".".join([*parts[: names[0]], ""]), names[0] + 1
    while QUALIFIERS.fullmatch(parts[end]) and end < len(parts) - 1:
        end += 1
    prefix = ".".join([*parts[:end], ""])
    if not root.startswith(above) or _branch(prefix) not in (_branch(root), set()):
        return None
    return above if re.fullmatch(r"l\d", parts[names[0]]) else prefix  # l1 and l2 are two layers of one


def _branch(path: str) -> set[str]:
    return set(QUALIFIERS.findall(path))


def read(
    parts: Mapping[str, Tensor], prefix: str, width: int, layers: int | None, everything: Mapping[str, Tensor]
) -> Projector:
    """Read a chain; `problem` says why it cannot be, in the place of an InputError."""
    projector = Projector(prefix, set(parts))
    try:
        modules = _modules(parts, prefix, layers)
        dino, msn = (
            any("last_layer" in key for key in everything),
            any(key.startswith(f"{prefix}fc3.") for key in parts),
        )
        projector.chain = _chain(modules, nn.GELU if dino or msn else nn.ReLU, prefix).eval()
        linear = [layer for layer in projector.chain if isinstance(layer, nn.Linear)]
        projector.dims = [linear[0].in_features, *(layer.out_features for layer in linear)]
        if projector.dims[0] != width:
            projector.problem = f"takes {projector.dims[0]}, the encoder gives {width}"
            projector.dims = []
    except InputError as error:
        projector.problem = str(error)
    return projector


Named = list[tuple[str, dict[str, Tensor]]]


def _modules(parts: Mapping[str, Tensor], prefix: str, layers: int | None) -> Named:
    """[(a module's name, its tensors)] in the order of the numbers in the names, a norm after its linear map."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in parts.items():
        name, _, leaf = key.removeprefix(prefix).rpartition(".")
        modules.setdefault(name, {})[leaf] = tensor
    if layers == 2:
        modules = {name: tensors for name, tensors in modules.items() if not re.match(r"layer2(\.|$)", name)}
    ordered = sorted(modules.items(), key=lambda item: (_place(item[0]), "running_mean" in item[1]))
    # OpenMMLab's SwAV names one norm twice.
    ordered = [item for item in ordered if not (item[0] == "norm" and len(modules) > 1)]
    outer = {name.split(".")[0] for name in modules if re.fullmatch(r"\d+\.\d+", name)}
    if len(outer) > 1:
        raise InputError("is made of several sequences, between which something without weights may lie (a softmax)")
    return ordered


def _place(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))


def _chain(modules: Named, activation: type[nn.Module], prefix: str) -> nn.Sequential:
    chain: list[nn.Module] = []
    size = None
    for index, (name, tensors) in enumerate(modules):
        layer = _layer(tensors, prefix)
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.num_features
        if size not in (None, inputs):
            raise InputError(f"a layer gives {size}, the next takes {inputs}")
        if isinstance(layer, nn.Linear):
            if index and not _adjacent(modules[index - 1][0], name):
                chain.append(activation())
            size = layer.out_features
        chain.append(layer)
    if not chain or not isinstance(chain[0], nn.Linear):
        raise InputError("does not begin with a linear layer")
    return nn.Sequential(*chain)


def _adjacent(before: str, name: str) -> bool:
    """Whether two modules follow each other in one sequence, without room for an activation."""
    (above, _, last), (other, _, first) = before.rpartition("."), name.rpartition(".")
    return above == other and last.isdigit() and first.isdigit() and int(first) == int(last) + 1


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> nn.Linear | nn.BatchNorm1d:
    layer: nn.Linear | nn.BatchNorm1d
    if "running_mean" in tensors:
        layer = nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors)
    elif "weight" in tensors and tensors["weight"].ndim == 2:
        layer = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], bias="bias" in tensors)
    else:
        raise InputError(f"{listed(tensors)} of {listed([prefix])} is neither linear nor batch norm")
    for name, tensor in tensors.items():
        if problem := unusable(name, tensor, torch.int64 if name == "num_batches_tracked" else torch.float32):
            raise InputError(f"{shown(name)} {problem}")
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    try:
        layer.load_state_dict({**layer.state_dict(), **state})
    except RuntimeError as error:
        raise InputError(f"does not fit: {str(error).splitlines()[-1].strip()[:120]}") from error
    return layer
