"""Which tensors are an encoder: each family by a pair of keys that only it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from collapse import InputError
from collapse.checkpoints import pyramids, resnet, sam, vit
from collapse.checkpoints.keys import ROOT_LIMIT, Weights, parent
from collapse.checkpoints.plan import Clues, Plan


@dataclass(frozen=True)
class Family:
    """Encoders with a first convolution `stem` (its weight 4-d, of 3 channels) and a tensor `block` under one root.

    unless: beginnings of keys under the root that make it something else, which timm or torchvision may know.
    beside: keys under the root's parent that belong to it.  original: False for a library's network that comes in
    variants of equal tensors, of which the library is asked for the one.
    """

    stem: str
    block: str
    plan: Callable[[Weights, Clues], Plan]
    unless: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    original: bool = True


NOT_PLAIN = ("layer1.0.se.", "layer1.0.attn", "layer1.0.conv2.conv", "maxpool.")
NOT_VIT = ("blocks.0.attn.q_bias", "blocks.0.attn.relative_position", "rel_pos_bias", "dist_token", "blocks.0.mlp.w1.",
           "blocks.0.attn.proj_l.", "blocks.0.attn.rel_pos_h")  # fmt: skip
PATCH, CONV_PATCH = "patch_embed.proj.weight", "patch_embed.proj.0.weight"
HF = "embeddings.patch_embeddings.projection.weight"
QKV, Q_SAVED, Q_MEMORY = "blocks.0.attn.qkv.weight", "attention.attention.query.weight", "attention.q_proj.weight"
POOLER = ("query", "attn.in_proj_weight", "attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight",
          "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "ln_q.weight", "ln_q.bias", "ln_k.weight",
          "ln_k.bias")  # fmt: skip
TIMM_HEAD = (
    ("head.proj.weight", "head.weight"),
    *((f"attn_pool_contrast.{leaf}", f"attn_pool.{leaf}") for leaf in POOLER),  # CONCH's
    ("ln_contrast.weight", "ln_contrast.weight"),
    ("ln_contrast.bias", "ln_contrast.bias"),
)

# In this order: CLIP's residual network also has torchvision's keys, and a sequence without max-pool has both indices.
FAMILIES = (
    Family("conv1.weight", "attnpool.positional_embedding", resnet.plan_clip),
    Family("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", vit.plan_clip),
    Family("conv1.weight", "layer1.0.conv1.weight", resnet.plan_torchvision, NOT_PLAIN),
    Family("0.weight", "3.0.conv1.weight", resnet.plan_sequential),
    Family("0.weight", "4.0.conv1.weight", resnet.plan_sequential),
    Family("net.0.0.weight", "net.1.blocks.0.net.0.weight", resnet.plan_simclrv2),
    Family("embedder.embedder.convolution.weight", "encoder.stages.0.layers.0.layer.0.convolution.weight",
           resnet.plan_huggingface),
    Family(PATCH, QKV, vit.plan_timm, NOT_VIT, TIMM_HEAD),
    Family(PATCH, "blocks.0.attn.rel_pos_h", sam.plan),
    Family(CONV_PATCH, QKV, vit.plan_timm, NOT_VIT),
    Family("conv_proj.weight", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", vit.plan_torchvision),
    Family(HF, f"encoder.layer.0.{Q_SAVED}", vit.plan_huggingface),
    Family(HF, f"encoder.layer.0.{Q_MEMORY}", vit.plan_huggingface),
    Family(HF, f"layers.0.{Q_MEMORY}", vit.plan_huggingface),
    Family("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight", vit.plan_huggingface_clip,
           (), (("visual_projection.weight", "visual_projection.weight"),)),
    Family("patch_embed.projection.weight", "layers.0.attn.qkv.weight", vit.plan_openmmlab),
    Family(PATCH, "layers.0.blocks.0.attn.relative_position_bias_table", pyramids.plan_swin, original=False),
    Family(CONV_PATCH, "layers.0.blocks.0.attn.relative_position_bias_table", pyramids.plan_swin),
    Family(HF, "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table", pyramids.plan_huggingface_swin),
    Family(HF, "encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table",
           pyramids.plan_huggingface_swin),
    Family("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", pyramids.plan_convnext, original=False),
    Family("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", pyramids.plan_convnext),
    Family("downsample_layers.0.0.weight", "stages.0.0.dwconv.kernel", pyramids.plan_convnext),
    Family("downsample_layers.0.0.weight", "stages.0.0.depthwise_conv.weight", pyramids.plan_convnext),
    Family("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight",
           pyramids.plan_huggingface_convnext),
)  # fmt: skip


def find_roots(tensors: Mapping[str, Tensor]) -> dict[str, Family]:
    """{root: family} of every encoder, in the order of the file. Raises InputError: more encoders than `ROOT_LIMIT`."""
    roots = {}
    for family in FAMILIES:
        for key, stem in tensors.items():
            root = key.removesuffix(family.stem)
            at_name = key.endswith(family.stem) and (not root or root.endswith("."))
            if (
                not at_name
                or root in roots
                or stem.ndim != 4
                or stem.shape[1] != 3
                or root + family.block not in tensors
            ):
                continue
            otherwise = tuple(root + name for name in family.unless)
            if not any(key.startswith(otherwise) for key in tensors):
                roots[root] = family
        if len(roots) > ROOT_LIMIT:
            raise InputError(f"holds more than {ROOT_LIMIT} encoders; refused")
    order = {key: index for index, key in enumerate(tensors)}
    return dict(sorted(roots.items(), key=lambda item: order[item[0] + item[1].stem]))


def weights_of(root: str, family: Family, tensors: Mapping[str, Tensor]) -> Weights:
    """The tensors under a root, by their names in the family, and those beside it that belong to it."""
    names = {key: key.removeprefix(root) for key in tensors if key.startswith(root)}
    for key, name in family.beside:
        if root and parent(root) + key in tensors:
            names[parent(root) + key] = name
    return Weights({name: tensors[key] for key, name in names.items()}, {name: (key,) for key, name in names.items()})
