"""SAM's image encoder, under the names of segment-anything (arXiv 2304.02643), built by timm.

All of its numbers follow from its tensors: a head is as wide as a row of relative positions, and a block attends in
windows of as many patches as its table says, or over the whole grid.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan, refuse_flags
from collapse.checkpoints.settings import SIDE_LIMIT
from collapse.data.preprocessing import Preprocessing

NAMES = ((r"\.mlp\.lin([12])\.", r".mlp.fc\1."),)
HEADS = r"prompt_encoder|mask_decoder|pixel_mean|pixel_std"


def plan(weights: Weights, clues: Clues) -> Plan:
    """The encoder; its vector is the mean of the map behind its neck.

    Raises InputError: tables of relative positions that belong to no window, or too many of anything.
    """
    refuse_flags("SAM's image encoder", clues)
    weights = weights.renamed(NAMES)
    depth = 1 + max(int(m[1]) for name in weights.tensors if (m := re.match(r"blocks\.(\d+)\.", name)))
    if depth > len(weights.tensors):
        raise InputError(f"a block {depth - 1} among {len(weights.tensors)} tensors; is the file whole?")
    _, high, wide, dim = weights.shape("pos_embed", 4)
    tables = [weights.shape(f"blocks.{block}.attn.rel_pos_h", 2) for block in range(depth)]
    patch, head = weights.shape("patch_embed.proj.weight", 4)[-1], tables[0][1]
    grids = [(rows + 1) // 2 for rows, _ in tables]
    windows = {grid for grid in grids if grid != high}
    if high != wide or high * patch > SIDE_LIMIT or len(windows) > 1 or not head or dim % head:
        raise InputError(f"a grid of {high} x {wide}, windows of {sorted(windows)}, heads of {head}: no encoder of SAM")
    neck = weights.shape("neck.0.weight", 4)[0]
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    make = partial(
        VisionTransformerSAM,
        img_size=high * patch,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // head,
        mlp_ratio=(weights.shape("blocks.0.mlp.fc1.weight", 2)[0] + 0.5) / dim,
        use_rel_pos=True,
        window_size=next(iter(windows), high),
        global_attn_indexes=tuple(block for block, grid in enumerate(grids) if grid == high),
        neck_chans=neck,
        num_classes=0,
        norm_layer=norm,
    )
    name = f"sam vit {dim} x {depth}, patch {patch}, {dim // head} heads"
    pixels = replace(Preprocessing(), resize=high * patch, crop=high * patch)  # the longer side, and none is cut
    return Plan(name, make, weights, neck, pixels, "nhwc", heads=HEADS)
