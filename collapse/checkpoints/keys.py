"""Nested trees of a checkpoint -> tensors under plain dotted keys, their encoders, and the reason for all the rest."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collapse import InputError
from collapse.files.containers import state_of

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_feature_blocks"}
STATE_OF_TRAINING = re.compile(r"optimizer.*|opt|scaler|amp|.*schedulers?|loops|callbacks|contrast|queue.*")
# What may lie deep in an encoder without being part of it: what a counter of operations (thop) leaves, buffers that
# follow from the sizes, the token of masked training.
LEAVES = re.compile(r"total_ops|total_params|relative_position_index|attn_mask|position_ids|mask_token")
TENSOR_LIMIT = 100_000  # real files have below 5,000
PART_LIMIT, KEY_LIMIT = 1_000_000, 2_000
ROOT_LIMIT = 64

# Where a weight norm keeps its two halves since torch 2.0, and the chunks of DINOv2's blocks (arXiv 2304.07193).
RENAMED = (
    (re.compile(r"parametrizations\.(\w+)\.original0$"), r"\1_g"),
    (re.compile(r"parametrizations\.(\w+)\.original1$"), r"\1_v"),
    (re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.(?=(norm[12]|attn|ls[12]|mlp)\.)"), r"\1blocks.\2."),
)

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

# Parts of a file that are known not to be the encoder, and why: patterns of whole components of a key.
DROPPED = {
    "state of training": r"optim(izer)?.*|ema_coefficient|\w+_ema_coefficient|_extra_state|loss_fn|criterion.*|meters",
    "classifier": r"fc|linear|head|heads|classifier.*|pre_logits|pooler|lm_head",
    "probe": r".*online_(head|classifier).*|.*probe.*|callbacks_.*|knn_classifier.*|.*evaluator.*",
    "predictor": r".*pred.*",
    "prototypes": r".*prototypes.*|last_layer.*",
    "queue": r".*queue.*|memory_bank.*",
    "decoder": r"decoder.*",
    "mask token": r"mask_token.*",
    "text tower": r"transformer|text|text_model|text_projection|token_embedding|positional_embedding|ln_final"
    r"|logit_(scale|bias)|input_resolution|context_length|vocab_size",
    "loss": r"loss|dino_loss|ibot_loss|.*_loss|center|mean_teacher",
    "counters": r"total_ops|total_params|.*_coefficient|steps|num_updates|step",
    "buffers": r"relative_position_index|attn_mask|position_ids",
    "another branch": r"(encoder_k|.*momentum.*|key_.*|target.*|student|teacher|student_.*|teacher_.*|query_.*|ema_.*)",
    "projector": r"proj.*|neck|g|l1|l2|mlp|bn|embed_head|dino_head|ibot_head",
}


@dataclass
class Weights:
    """Tensors under an architecture's names; keys: the keys of the file that each was made of."""

    tensors: dict[str, Tensor]
    keys: dict[str, tuple[str, ...]]

    def renamed(self, rules: Sequence[tuple[str, str]]) -> "Weights":
        """Under other names: each rule a pattern and its replacement, in order.

        Tensors that get the same name but for a suffix #0, #1, ... are joined along their first axis in that order.
        """
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            stem, _, order = new.partition("#")
            if order in parts.setdefault(stem, {}):
                raise InputError(f"tensors {parts[stem][order]!r} and {name!r} both stand for {stem!r}")
            parts[stem][order] = name
        ordered = {stem: [names[order] for order in sorted(names)] for stem, names in parts.items()}
        return Weights(
            {stem: _join(stem, [self.tensors[n] for n in names]) for stem, names in ordered.items()},
            {stem: tuple(key for n in names for key in self.keys[n]) for stem, names in ordered.items()},
        )

    def shape(self, name: str, *axes: int) -> tuple[int, ...]:
        """The shape of a tensor that an architecture cannot be without; axes: how many it may have."""
        if name not in self.tensors:
            raise InputError(f"no {name!r}; is the file whole?")
        shape = tuple(self.tensors[name].shape)
        if axes and (len(shape) not in axes or 0 in shape):
            raise InputError(f"{name!r} is {shape}, expected {' or '.join(map(str, axes))} axes")
        return shape


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise InputError(f"the {len(parts)} parts of {name!r} do not fit together") from error


def flatten(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """(dotted key, tensor) of every tensor in nested mappings, lists and pickled modules, without state of training.

    Raises InputError for a tree of more than a million parts, as one that holds itself has.
    """
    waiting, seen = [("", tree)], 0
    while waiting:
        prefix, value = waiting.pop()
        seen += 1
        if seen > PART_LIMIT or len(prefix) > KEY_LIMIT:
            raise InputError("nested without end; refused")
        if isinstance(value, Tensor):
            yield prefix.rstrip("."), value
            continue
        parts = _parts(value)
        waiting += [(f"{prefix}{key}.", part) for key, part in reversed(parts)]


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """What may hold tensors in a mapping, a list of mappings, or a pickled module."""
    value = state_of(value) or value
    if isinstance(value, Mapping):
        items = value.items()
        return [(k, v) for k, v in items if isinstance(v, Tensor) or not STATE_OF_TRAINING.fullmatch(str(k))]
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
    for key, tensor in flatten(tree):
        short = plain(key)
        if short in tensors and not same(tensors[short], tensor):
            raise InputError(f"{path}: two different tensors are called {short!r} without their wrappers' names")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{path}: tensor {key!r} is sparse or quantised, expected plain numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: tensor {key!r} {tuple(tensor.shape)} is larger than what the file stores for it")
        tensors[short] = tensor.detach()
        if len(tensors) > TENSOR_LIMIT:
            raise InputError(f"{path}: holds more than {TENSOR_LIMIT} tensors; refused")
    return tensors


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


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
    return any(re.match(rf"{re.escape(parent(root))}proj\w*\.", key) for key in tensors)


def parent(root: str) -> str:
    """The root without its last component: "a.b." -> "a."."""
    return root[: -len(root.split(".")[-2]) - 1] if root else ""


def choose_branch(path: str, roots: Sequence[str], wanted: str | None, tensors: Collection[str] = ()) -> str:
    """The root of the encoder that the file's authors evaluate; an error that lists all where that is unclear."""
    listed = ", ".join(named(root) for root in roots)
    if wanted is not None:
        matching = [root for root in roots if named(root) == wanted.rstrip(".")]
        if len(matching) != 1:
            raise InputError(f"{path}: no encoder at {wanted!r}; there are {listed}")
        return matching[0]
    if len(roots) == 1:
        return roots[0]
    distilled = "+teacher_queue" if any("teacher_queue" in key for key in tensors) else ""
    for mine, theirs in BRANCHES:
        first = [root for root in roots if re.search(mine, root.rstrip(".") + ".")]
        rest = [root for root in roots if root not in first]
        if len(first) == 1 and all(re.search(theirs, root + distilled) for root in rest):
            return first[0]
    raise InputError(f"{path}: holds {len(roots)} encoders, {listed}; choose one with --branch")


def named(root: str) -> str:
    """A root as it is shown."""
    return root.rstrip(".") or "(top)"


def explain(
    keys: Sequence[str], root: str, others: Sequence[str], again: Collection[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """({rule: keys it drops}, keys that no rule knows) of the tensors that are not the encoder or its projector.

    others: the roots of other encoders.  again: keys of tensors that the encoder or projector has under other keys.
    """
    dropped: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        rule = "the same tensor again" if key in again else _rule(key, root, others)
        if rule is None:
            unknown.append(key)
        else:
            dropped.setdefault(rule, []).append(key)
    return dropped, unknown


def _rule(key: str, root: str, others: Sequence[str]) -> str | None:
    if any(other and key.startswith(other) for other in others):
        return "another branch"
    # Only the part after what a key shares with the root says what it is: the root may be called teacher itself.
    inside = key.startswith(root)
    parts = key.removeprefix(root if inside else _shared(key, root)).split(".")
    if inside:  # a head at the top; deeper nothing is left over but what is derived
        parts = [parts[0], *(part for part in parts[-1:] if LEAVES.fullmatch(part))]
    return next((rule for rule, pattern in DROPPED.items() if any(re.fullmatch(pattern, p) for p in parts)), None)


def _shared(key: str, root: str) -> str:
    shared = ""
    for part in root.split(".")[:-1]:
        if not key.startswith(f"{shared}{part}."):
            break
        shared += f"{part}."
    return shared
