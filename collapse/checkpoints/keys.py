"""Nested trees of a checkpoint -> tensors under plain dotted keys, their encoders, and the reason for all the rest."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse import InputError
from collapse.checkpoints.settings import listed, printable, shown
from collapse.files import limits
from collapse.files.containers import state_of

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_feature_blocks"}
STATE_OF_TRAINING = re.compile(
    r"optimizer.*|opt|scaler|amp|.*schedulers?|loops|callbacks|contrast|queue.*|monitors?|.*history|.*rng.*|metrics"
)
ROOT_LIMIT = 64  # encoders

# Where a weight norm keeps its two halves since torch 2.0.
RENAMED = (
    (re.compile(r"parametrizations\.(\w+)\.original0$"), r"\1_g"),
    (re.compile(r"parametrizations\.(\w+)\.original1$"), r"\1_v"),
)
CHUNKS = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.(?=(norm[12]|attn|ls[12]|mlp)\.)")  # of DINOv2, arXiv 2304.07193

PLAIN = r"^(?!.*(teacher|student|query_|momentum|(^|\.)key_|target|encoder_k|(^|[._])ema([._]|$)))"

# Branch by the names in a root: the first pattern that matches one root, while the second matches all others, wins.
BRANCHES = (
    (r"student_embedding_model", r"teacher_embedding_model.*\+teacher_queue"),  # a distilled network and its teacher
    (r"(^|\.)(teacher|teacher_\w+)(\.|$)", r"(^|\.)(student|student_\w+)(\.|$)"),
    (r"encoder_q|base_encoder|online", r"encoder_k|momentum|key_|target"),
    (r"(^|\.)query_\w+", r"(^|\.)key_\w+"),
    (r"target_encoder", r"encoder"),
    # mmengine keeps the averaged weights in state_dict and the last ones in ema_state_dict.
    (PLAIN, r"momentum_(?!teacher)|_momentum|(^|\.)key_|target|encoder_k|ema_state_dict"),
    (PLAIN, r"(^|\.)teacher_\w+"),
)


@dataclass
class Weights:
    """Tensors under an architecture's names; keys: the keys of the file that each was made of."""

    tensors: dict[str, Tensor]
    keys: dict[str, tuple[str, ...]]

    def renamed(self, rules: Sequence[tuple[str, str]]) -> "Weights":
        """Under other names: each rule a pattern and its replacement, in order.

        Tensors that get the same name but for a suffix #0, #1, ... are joined along their first axis in that order.

        Raises InputError: two tensors get one name.
        """
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            stem, _, order = new.partition("#")
            if order in parts.setdefault(stem, {}):
                both = f"{shown(parts[stem][order])} and {shown(name)}"
                raise InputError(f"tensors {both} both stand for {shown(stem)}")
            parts[stem][order] = name
        ordered = {stem: [names[order] for order in sorted(names)] for stem, names in parts.items()}
        return Weights(
            {stem: _join(stem, [self.tensors[n] for n in names]) for stem, names in ordered.items()},
            {stem: tuple(key for n in names for key in self.keys[n]) for stem, names in ordered.items()},
        )

    def shape(self, name: str, *axes: int) -> tuple[int, ...]:
        """The shape of a tensor that an architecture cannot be without; axes: how many it may have.

        Raises InputError: there is no such tensor, or it has another number of axes.
        """
        if name not in self.tensors:
            raise InputError(f"no {shown(name)}; is the file whole?")
        shape = tuple(self.tensors[name].shape)
        if axes and (len(shape) not in axes or 0 in shape):
            raise InputError(f"{shown(name)} is {shape}, expected {' or '.join(map(str, axes))} axes")
        return shape


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise InputError(f"the {len(parts)} parts of {shown(name)} do not fit together") from error


def flatten(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted key, tensor of any shape) of all in nested mappings, lists and pickled modules; no state of training.

    Raises InputError for a tree of more than `limits.PARTS` mappings, as one that holds itself has.
    """
    waiting, seen = [("", tree)], 0
    while waiting:
        prefix, value = waiting.pop()
        seen += 1
        if seen > limits.PARTS or len(prefix) > limits.KEY:
            raise InputError("nested without end; refused")
        if isinstance(value, Tensor):
            yield prefix.rstrip("."), value
            continue
        waiting += [(f"{prefix}{_component(key)}.", part) for key, part in reversed(_parts(value))]


def _component(key: Any) -> str:
    """A key of a mapping as a part of a name; one that is neither text nor a number has only its type's name."""
    if isinstance(key, str):
        return printable(key)
    return str(key) if isinstance(key, int) and abs(key) < 10**18 else f"<{type(key).__name__}>"


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """What may hold tensors in a mapping, a list of mappings, or a pickled module."""
    value = state_of(value) or value
    if isinstance(value, Mapping):
        candidates = [(k, v) for k, v in value.items() if isinstance(v, (Tensor, Mapping, list, tuple)) or state_of(v)]
        return [
            (k, v) for k, v in candidates if isinstance(v, Tensor) or not STATE_OF_TRAINING.fullmatch(_component(k))
        ]
    if isinstance(value, (list, tuple)):
        return [(index, part) for index, part in enumerate(value) if isinstance(part, Mapping)]
    return []


def plain(key: str) -> str:
    """A key without the names of wrappers (module, _orig_mod, ...), wherever in it these stand."""
    short = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    for pattern, replacement in RENAMED:
        short = pattern.sub(replacement, short)
    return short


def clean(tree: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a file by plain key. Raises InputError for two of one name, and one that lies about its size."""
    tensors: dict[str, Tensor] = {}
    read = list(flatten(tree))
    chunked = len({CHUNKS.sub(r"\1blocks.\2.", key) for key, _ in read}) == len({key for key, _ in read})
    for key, tensor in read:
        short = CHUNKS.sub(r"\1blocks.\2.", plain(key)) if chunked else plain(key)
        if short in tensors and not same(tensors[short], tensor):
            raise InputError(f"{path}: two different tensors are called {shown(short)} without their wrappers' names")
        if hasattr(tensor, "__tensor_flatten__"):
            kind = type(tensor).__name__
            raise InputError(f"{path}: tensor {shown(key)} is a {kind}, expected the whole of it in plain numbers")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{path}: tensor {shown(key)} is sparse or quantised, expected plain numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            what = f"{shown(key)} {tuple(tensor.shape)}"
            raise InputError(f"{path}: tensor {what} is larger than what the file stores for it")
        tensors[short] = tensor.detach()
        if len(tensors) > limits.TENSORS:
            raise InputError(f"{path}: holds more than {limits.TENSORS} tensors; refused")
    return tensors


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, of any shape, are one, or equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    bits = a.element_size() == 1  # torch compares no numbers of 8 bits with a point
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if bits else torch.equal(a, b)


def merge_roots(roots: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Roots without those that hold the same tensors as another; kept is the one beside which a projector lies."""
    kept: list[str] = []
    for root in sorted(roots, key=lambda r: (not beside(r, tensors), roots.index(r))):
        mine = {key.removeprefix(root) for key in tensors if key.startswith(root)}
        if not any(_same_encoder(root, other, mine, tensors) for other in kept):
            kept.append(root)
    return sorted(kept, key=list(roots).index)


def _same_encoder(root: str, other: str, names: Collection[str], tensors: Mapping[str, Tensor]) -> bool:
    shared = [name for name in names if other + name in tensors]
    return len(shared) > 0.9 * len(names) and all(same(tensors[root + n], tensors[other + n]) for n in shared)


def beside(root: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a projector has the same parent as a root."""
    start = f"{parent(root)}proj"
    return any(key.startswith(start) and re.match(r"\w*\.", key[len(start) :]) for key in tensors)


def parent(root: str) -> str:
    """The root without its last component: "a.b." -> "a."."""
    return root[: -len(root.split(".")[-2]) - 1] if root else ""


def choose_branch(roots: Sequence[str], tensors: Collection[str] = ()) -> str:
    """The root of the encoder that the file's authors evaluate; an error that lists all where that is unclear.

    Raises InputError: it is unclear.
    """
    if len(roots) == 1:
        return roots[0]
    distilled = "+teacher_queue" if any("teacher_queue" in key for key in tensors) else ""
    for mine, theirs in BRANCHES:
        first = [root for root in roots if re.search(mine, root.rstrip(".") + ".")]
        rest = [root for root in roots if root not in first]
        if len(first) == 1 and all(re.search(theirs, root + distilled) for root in rest):
            return first[0]
    raise InputError(f"holds {len(roots)} encoders, {listed(list(map(named, roots)))}; choose one with branch=")


def branch_named(wanted: str, roots: Sequence[str], aliases: Sequence[str] = ()) -> str:
    """The root that the caller names, in whole or by a part that only one has. aliases: roots of the same tensors.

    Raises InputError: no root has the name, or several have the part.
    """
    for of_all in ([*roots, *aliases], roots, aliases):
        exact = [root for root in of_all if named(root) == wanted.rstrip(".")]
        matches = exact or ([root for root in of_all if wanted in named(root)] if of_all in (roots, aliases) else [])
        if len(matches) > 1:
            names = listed(list(map(named, matches)))
            raise InputError(f"branch={shown(wanted)} is in the names of {len(matches)} encoders, {names}")
        if matches:
            return matches[0]
    raise InputError(f"no encoder at {shown(wanted)}; there are {listed(list(map(named, roots)))}")


def named(root: str) -> str:
    """A root as it is shown."""
    return root.rstrip(".") or "(top)"
