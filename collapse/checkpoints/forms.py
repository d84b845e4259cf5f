"""Weights kept in another form than plain numbers under plain names: refused by name, with what to do."""

import re
from collections.abc import Collection

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


def refuse(root: str, keys: Collection[str]) -> None:
    """Raise InputError if tensors under the root are adapters, quantised, pruned or parametrised; it names one."""
    mine = dict.fromkeys(key for key in keys if key.startswith(root) and not PROTOTYPES.search(key))
    for pattern, sibling, what, remedy in FORMS:
        ends = re.compile(rf"(^|\.)({pattern})$")
        for key in mine:
            if ends.search(key) and (not sibling or f"{key.rpartition('_')[0]}{sibling}" in mine):
                raise InputError(f"holds {what} ({shown(key)}); {remedy}")
