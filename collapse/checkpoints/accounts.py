"""Where every tensor of a file went that is neither the encoder's nor its projector's: dropped by a rule, or unknown.

A rule goes by names.  Beside the encoder a name is enough, since nothing there changes what the encoder gives.  Within
it, a tensor is dropped in silence only if it is what its name says: a head that takes what the encoder gives, a counter
of one number.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from collapse.checkpoints.settings import listed

# What may lie deep in an encoder without being part of it: what a counter of operations (thop) leaves, buffers that
# follow from the sizes, the token of masked training.
LEAVES = re.compile(r"total_ops|total_params|relative_position_index|attn_mask|position_ids|mask_token")

NETWORK = r"(encoder|backbone|embedding_model|model|network|net|projector|projection|projection_head|head|predictor" \
          r"|prediction_head|classifier|prototypes|queue|neck|trunk|state_dict|projection_mlp)"  # fmt: skip
WHOSE = r"(momentum|key|query|target|student|teacher|online|ema)"

# Parts of a file that are known not to be the encoder, and why: patterns of whole components of a key.
DROPPED = {
    "state of training": r"optim(izer)?.*|ema_coefficient|\w+_ema_coefficient|_extra_state|loss_fn|criterion.*|meters"
    r"|monitors?|.*history|.*rng.*|metrics|epoch|global_step",
    "classifier": r"fc|linear|head|heads|heads?_dist|last_linear|classif|classifier.*|pre_logits|pooler|lm_head",
    "auxiliary classifier": "aux1|aux2|AuxLogits|aux_head",
    "probe": r".*online_(head|classifier).*|.*probe.*|callbacks_.*|knn_classifier.*|.*evaluator.*",
    "predictor": r".*pred.*",
    "prototypes": r".*prototypes.*|last_layer.*",
    "queue": r".*queue.*|memory_bank.*",
    "decoder": r"decoder.*|mask_decoder|prompt_encoder|shared_image_embedding",
    "mask token": r"mask_token.*",
    "text tower": r"transformer|text|text_model|text_projection|token_embedding|positional_embedding|ln_final"
    r"|logit_(scale|bias)|input_resolution|context_length|vocab_size",
    "loss": r"loss|dino_loss|ibot_loss|.*_loss|center|mean_teacher",
    "counters": r"total_ops|total_params|.*_coefficient|steps|num_updates|step",
    "buffers": r"relative_position_index|attn_mask|position_ids",
    "another branch": rf"encoder_k|{WHOSE}|{WHOSE}_{NETWORK}|{NETWORK}_{WHOSE}",
    "another head": r"ibot_head",
    "projector": r"proj.*|neck|g|mlp|l1|l2|embed_head|dino_head",
}
# What inside of an encoder could as well be a part of it that this package does not know.
CORE = re.compile(
    r"blocks?|layers?\d*|stages?|features|encoder|resblocks|.*norm.*|ln.*|bn.*|.*pool.*|.*attn.*|.*attention.*|.*embed.*"
    r"|stem|conv\d*|downsample.*|trunk|base_model"
)


@dataclass
class Account:
    """dropped: rule -> keys; unknown: keys that no rule knows; notes: warnings about what was dropped."""

    dropped: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Place:
    """The encoder among the tensors.

    root: its root; others: the roots of other encoders; width: of its output; projector: the sizes of its projector's
    layers; chosen: whether the caller said which projector, or none.
    """

    root: str
    others: Sequence[str]
    width: int
    projector: Sequence[int] = ()
    chosen: bool = False


def account(keys: Sequence[str], tensors: Mapping[str, Tensor], place: Place, again: Collection[str] = ()) -> Account:
    """What became of the tensors that are not the encoder or its projector.

    again: keys of tensors that the encoder or projector has under other keys.
    """
    result, left_out = Account(), dict[str, None]()
    on_top = {head: takes(tensors, head, place.width) for head in {_top(key, place.root) for key in keys}}
    text = any(re.search(r"token_embedding|text_model|word_embeddings", key) for key in tensors)
    for key in keys:
        rule = "the same tensor again" if key in again else _rule(key, place)
        if (
            (rule == "projector" and key.startswith(place.root) and not on_top[_top(key, place.root)])
            or (rule == "text tower" and key.startswith(place.root) and tensors[key].ndim and not text)
            or (rule == "counters" and tensors[key].numel() > 1)
        ):
            rule = None  # it is only called so
        if rule is None and _norm_of_loss(key, tensors, place):
            rule = "loss"
        misfit = rule == "classifier" and key.startswith(place.root) and not on_top[_top(key, place.root)]
        if misfit or (rule == "projector" and not place.chosen) or "pre_logits" in key.split("."):
            left_out[key.rpartition(".")[0]] = None
        if rule is None:
            result.unknown.append(key)
        else:
            result.dropped.setdefault(rule, []).append(key)
    if left_out:
        result.notes.append(f"left out, though it may be near the embedding: {listed(list(left_out))}")
    return result


def _top(key: str, root: str) -> str:
    """The part right under the root that a key is in."""
    return root + key.removeprefix(root).split(".")[0]


def takes(tensors: Mapping[str, Tensor], head: str, width: int) -> bool:
    """Whether the first linear map of a head takes `width` numbers, as what sits on top of an encoder does."""
    keys = [key for key in tensors if key == head or key.startswith(f"{head}.")]
    maps = [tensors[key] for key in keys if tensors[key].ndim == 2 or tuple(tensors[key].shape[2:]) == (1, 1)]
    return any(tensor.shape[1] == width for tensor in maps[:1])


def _norm_of_loss(key: str, tensors: Mapping[str, Tensor], place: Place) -> bool:
    """Whether it is the batch norm without weights that Barlow Twins' loss puts behind the projector."""
    above, _, leaf = key.rpartition(".")
    mean = tensors.get(f"{above}.running_mean")
    if above.split(".")[-1] != "bn" or f"{above}.weight" in tensors or mean is None or not place.projector:
        return False
    beside = not place.root or not key.startswith(place.root)
    return (
        beside and leaf in ("running_mean", "running_var", "num_batches_tracked") and len(mean) == place.projector[-1]
    )


def near(keys: Collection[str], root: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The first of these keys whose tensor may well change what the encoder gives; None if none may.

    These are all within the encoder's blocks, norms, pools and embeddings, and everything of a second encoder.
    """
    for key in keys:
        inside = key.startswith(root)
        parts = key.removeprefix(root).split(".")[:-1] or key.removeprefix(root).split(".")
        if inside and any(CORE.fullmatch(part) for part in parts):
            return key
        if not inside and tensors[key].ndim == 4:
            return key
    return None


def _rule(key: str, place: Place) -> str | None:
    root = place.root
    if any(other and key.startswith(other) for other in place.others):
        return "another branch"
    # Only the part after what a key shares with the root says what it is: the root may be called teacher itself.
    inside = key.startswith(root)
    parts = key.removeprefix(root if inside else _shared(key, root)).split(".")
    if inside:  # a head at the top; deeper nothing is left over but what is derived
        parts = [parts[0], *(part for part in parts[-1:] if LEAVES.fullmatch(part))]
    elif any(re.fullmatch(DROPPED["another branch"], part) for part in parts):
        return "another branch"
    return next((rule for rule, pattern in DROPPED.items() if any(re.fullmatch(pattern, p) for p in parts)), None)


def _shared(key: str, root: str) -> str:
    shared = ""
    for part in root.split(".")[:-1]:
        if not key.startswith(f"{shared}{part}."):
            break
        shared += f"{part}."
    return shared
