"""Weights kept in another form than plain numbers under plain names: refused by name, with what to do."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from collapse import InputError
from collapse.checkpoints.settings import shown

PROTOTYPES = re.compile(r"(^|\.)(last_layer|\w*prototypes\w*)\.")  # DINO norms their weights, and they are not loaded

# (what a key ends in, what a sibling of the same parameter must end in, what it is, what to do); in this order.
FORMS = (
    (r"(lora|hada|lokr|oft|boft|vera)_\w+(\.\w+)*|base_layer\.\w+", "", "LoRA adapters beside their base",
     "merge them (peft: merge_and_unload) and save the result"),
    (r"qweight|qzeros|g_idx|SCB|weight_(format|scale|scale_inv|packed|zero_point)|weight\.(absmax|quant_map|quant_state.*"
     r"|nested_\w+)|_packed_params.*", "", "quantised weights", "dequantise them and save float32"),
    (r"(\w+)_orig", "_mask", "pruned weights", "make it permanent (torch.nn.utils.prune.remove) and save again"),
    (r"(\w+)_orig", "_u", "a spectral norm", "remove it (torch.nn.utils.remove_spectral_norm) and save again"),
    (r"(\w+)_g", "_v", "a weight norm", "remove it (torch.nn.utils.remove_weight_norm) and save again"),
    (r"parametrizations\.\w+\..+", "", "parametrised weights",
     "remove it (torch.nn.utils.parametrize.remove_parametrizations) and save again"),
)  # fmt: skip


# Classes of tensors that a pickle keeps as more than their numbers: (name, what it is, what to do).
CLASSES = (
    (r"\.(DTensor|ShardedTensor)$", "tensors of which each process keeps a part",
     "save the whole state dict (torch.distributed.checkpoint, full_state_dict=True) or give the DCP folder"),
    (r"\.(\w*Quantized\w*|NF4\w*|Params4bit|Int8Params|Int\dTensor|Float8Tensor|LinearActivation\w+)$",
     "quantised weights", "dequantise them and save float32"),
)  # fmt: skip


@contextmanager
def classes_named(foreign: Collection[str]) -> Iterator[None]:
    """Where a file cannot be read, say that it keeps its tensors in a class of their own, if it names one.

    Raises InputError: the file names such a class.
    """
    try:
        yield
    except InputError as error:
        for pattern, what, remedy in CLASSES:
            for name in foreign:
                if re.search(pattern, name):
                    raise InputError(f"holds {what} ({shown(name)}); {remedy}") from error
        raise


def refuse(root: str, keys: Collection[str]) -> None:
    """Raise InputError if tensors under the root are adapters, quantised, pruned or parametrised; it names one."""
    mine = dict.fromkeys(key for key in keys if key.startswith(root) and not PROTOTYPES.search(key))
    for pattern, sibling, what, remedy in FORMS:
        ends = re.compile(rf"(^|\.)({pattern})$")
        for key in mine:
            if ends.search(key) and (not sibling or f"{key.rpartition('_')[0]}{sibling}" in mine):
                raise InputError(f"holds {what} ({shown(key)}); {remedy}")
