"""Image towers whose tokens are pooled by attention: open_clip's CoCa (arXiv 2205.01917) and CONCH.

The vector of an image is what the first query sees, normed; CoCa's is projected too, as encode_image gives it.  CONCH's
is taken before its projection, as its authors evaluate it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import MOST, Clues, Plan
from collapse.checkpoints.preprocessing import CLIP_PIXELS, at_size
from collapse.checkpoints.settings import whole_number

QUERY = "attn_pool.query"
HEADS = r"(.+\.)?(text_decoder|attn_pool_caption|ln_caption|proj_contrast)"


class Attended(nn.Module):
    """A tower that gives all its tokens, and the attention that pools them: (n, 3, h, w) -> (n, d)."""

    def __init__(self, tower: nn.Module, sizes: tuple[int, int, int], heads: int, projected: int) -> None:
        super().__init__()
        queries, dim, width = sizes
        self.tower, self.attn_pool, self.norm = tower, nn.Module(), nn.LayerNorm(dim)
        self.attn_pool.query = nn.Parameter(torch.zeros(queries, dim))
        self.attn_pool.attn = nn.MultiheadAttention(dim, heads, kdim=width, vdim=width, batch_first=True)
        self.attn_pool.ln_q, self.attn_pool.ln_k = nn.LayerNorm(dim), nn.LayerNorm(width)
        self.proj = nn.Linear(dim, projected, bias=False) if projected else nn.Identity()
        self.num_prefix_tokens, self.global_pool = 1, "map"

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d)."""
        pool: Any = self.attn_pool
        tokens = pool.ln_k(self.tower(x))
        query = pool.ln_q(pool.query[:1]).expand(len(x), 1, -1)
        return self.proj(self.norm(pool.attn(query, tokens, tokens, need_weights=False)[0][:, 0]))


def split(weights: Weights, norm: str, proj: str) -> tuple[Weights, Weights]:
    """(the tower's tensors, attn_pool.*, norm.* and proj.weight of what pools); norm, proj: their names in the file.

    Raises InputError: two poolers, which open_clip has for another variant of CoCa.
    """
    if any(name.startswith("attn_pool_contrastive.") for name in weights.tensors):
        raise InputError("a CoCa with two poolers, which is not read; give the array of its embeddings")
    tower, pooler = Weights({}, {}), Weights({}, {})
    for name, tensor in weights.tensors.items():
        ends = name.rpartition(".")[2]
        new = f"norm.{ends}" if name == f"{norm}.{ends}" else name if name.startswith("attn_pool.") else ""
        if name == proj:
            new, tensor = "proj.weight", tensor.T
        (pooler if new else tower).tensors[new or name] = tensor
        (pooler if new else tower).keys[new or name] = weights.keys[name]
    return tower, pooler


def plan(tower: Plan, pooler: Weights, clues: Clues, final_norm: bool) -> Plan:
    """The plan of a tower with what pools its tokens; final_norm: whether the tower has a norm behind its blocks.

    Raises InputError: a tensor of the pooler is missing or misshapen, or its heads do not go into its width.
    """
    queries, dim = pooler.shape(QUERY, 2)
    width = pooler.shape("attn_pool.ln_k.weight", 1)[0]
    projected = len(pooler.tensors["proj.weight"]) if "proj.weight" in pooler.tensors else 0
    base: Any = tower.make
    make = partial(
        _made,
        partial(base, global_pool="", final_norm=final_norm),
        (queries, dim, width),
        _heads(dim, clues),
        projected,
    )
    tensors = {f"tower.{name}": tensor for name, tensor in tower.weights.tensors.items()} | pooler.tensors
    keys = {f"tower.{name}": key for name, key in tower.weights.keys.items()} | pooler.keys
    pixels = at_size(CLIP_PIXELS, base.keywords["img_size"])
    return replace(tower, architecture=f"{tower.architecture}, pooled by attention", make=make, pixels=pixels,
                   weights=Weights(tensors, keys), width=projected or dim, heads=HEADS)  # fmt: skip


def _made(tower: Any, sizes: tuple[int, int, int], heads: int, projected: int) -> Attended:
    return Attended(tower(), sizes, heads, projected)


def _heads(dim: int, clues: Clues) -> int:
    """Heads of the attention that pools: open_clip's config, else 8, as its networks have."""
    config: Any = clues.configs.get("open_clip_config.json", {}).get("model_cfg")
    vision = config.get("vision_cfg") if isinstance(config, Mapping) else None
    said = vision.get("attn_pooler_heads") if isinstance(vision, Mapping) else None
    heads = whole_number("open_clip_config.json: attn_pooler_heads", said, 1, MOST["heads"])
    if heads is None:
        clues.notes.append("the attention that pools: 8 heads assumed, as open_clip's CoCa and CONCH have")
    if dim % (heads or 8):
        raise InputError(f"{heads or 8} heads do not go into the {dim} of the attention that pools")
    return heads or 8
