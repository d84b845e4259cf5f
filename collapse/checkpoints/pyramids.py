"""ConvNeXt (arXiv 2201.03545, 2301.00808) and Swin (2103.14030) of every project, built by timm."""

import re
from functools import partial
from math import isqrt

from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.preprocessing import BICUBIC, at_size

SIZE_LIMIT = 1536  # pixels; the masks of larger images would not fit in memory

# The authors' code and mmpretrain's.
CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\b(dwconv|depthwise_conv)\.", "conv_dw."),
    (r"\b(pwconv|pointwise_conv)([12])\.", r"mlp.fc\2."),
    (r"\bgrn\.gamma$", "mlp.grn.weight"),
    (r"\bgrn\.beta$", "mlp.grn.bias"),
    (r"^(norm|norm3)\.", "head.norm."),
)
HUGGINGFACE_CONVNEXT = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"\bdwconv\.", "conv_dw."),
    (r"\bpwconv([12])\.", r"mlp.fc\1."),
    (r"\bgrn\.weight$", "mlp.grn.weight"),
    (r"\bgrn\.bias$", "mlp.grn.bias"),
    (r"\blayer_scale_parameter$", "gamma"),
    (r"(?<!embeddings\.)(?<!^)\blayernorm\.", "norm."),
    (r"^layernorm\.", "head.norm."),
)
HUGGINGFACE_SWIN = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\battention\.(self\.)?(query|q_proj)\.(\w+)$", r"attn.qkv.\3#0"),
    (r"\battention\.(self\.)?(key|k_proj)\.(\w+)$", r"attn.qkv.\3#1"),
    (r"\battention\.(self\.)?(value|v_proj)\.(\w+)$", r"attn.qkv.\3#2"),
    (r"\battention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"\battention\.(self|relative_position_bias)\.relative_position_bias_table$", "attn.relative_position_bias_table"),
    (r"\blayernorm_before\.", "norm1."),
    (r"\blayernorm_after\.", "norm2."),
    (r"\bintermediate\.dense\.", "mlp.fc1."),
    (r"\boutput\.dense\.", "mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def plan_convnext(weights: Weights, clues: Clues) -> Plan:
    """ConvNeXt and ConvNeXt-V2 under timm's names or their authors'."""
    original = not any(name.startswith("stem.") for name in weights.tensors)
    return _convnext(weights.renamed(CONVNEXT) if original else weights, None)


def plan_huggingface_convnext(weights: Weights, clues: Clues) -> Plan:
    """transformers' ConvNeXt and ConvNeXt-V2, whose last layer norm has an epsilon of its own."""
    return _convnext(weights.renamed(HUGGINGFACE_CONVNEXT), clues.epsilon() or 1e-12)


def _convnext(weights: Weights, last_eps: float | None) -> Plan:
    depths = _depths(weights, r"stages\.(\d+)\.blocks\.(\d+)\.")
    first = [f"stages.{stage}.blocks.0" for stage in range(len(depths))]
    dims = tuple(weights.shape(f"{block}.conv_dw.weight", 4)[0] for block in first)
    conv_mlp = len(weights.shape(f"{first[0]}.mlp.fc1.weight", 2, 4)) == 4
    for name in [n for n in weights.tensors if n.endswith(("mlp.grn.weight", "mlp.grn.bias"))]:
        weights.tensors[name] = weights.tensors[name].flatten()  # the authors keep (1, 1, 1, d)
    options = {
        "num_classes": 0,
        "depths": depths,
        "dims": dims,
        "kernel_sizes": tuple(weights.shape(f"{block}.conv_dw.weight", 4)[-1] for block in first),
        "ls_init_value": 1e-6 if f"{first[0]}.gamma" in weights.tensors else None,
        "patch_size": weights.shape("stem.0.weight", 4)[-1],
        "conv_mlp": conv_mlp,
        "conv_bias": f"{first[0]}.conv_dw.bias" in weights.tensors,
        "use_grn": f"{first[0]}.mlp.grn.weight" in weights.tensors,
        "head_norm_first": "norm_pre.weight" in weights.tensors,
    }
    name = f"convnext {'-'.join(map(str, depths))} blocks of {'-'.join(map(str, dims))}"
    return Plan(name, partial(_make_convnext, options, last_eps), weights, dims[-1], BICUBIC)


def _make_convnext(options: dict, last_eps: float | None) -> nn.Module:
    module = ConvNeXt(**options)
    if last_eps is not None:
        module.get_submodule("head.norm").eps = last_eps  # type: ignore[assignment]
    return module


def plan_swin(weights: Weights, clues: Clues) -> Plan:
    """Swin under timm's names or its authors', who downsample at a stage's end and not at the next's start."""
    return _swin(weights, clues, 1e-5)


def plan_huggingface_swin(weights: Weights, clues: Clues) -> Plan:
    """transformers' Swin."""
    return _swin(weights.renamed(HUGGINGFACE_SWIN), clues, clues.epsilon() or 1e-5)


def _swin(weights: Weights, clues: Clues, eps: float) -> Plan:
    if any("logit_scale" in name or "cpb_mlp" in name for name in weights.tensors):
        raise InputError("a Swin V2, whose attention is another; give its name in timm with --arch")
    if "layers.0.downsample.reduction.weight" in weights.tensors:
        moved = {name: re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
                 for name in weights.tensors}  # fmt: skip
        weights = Weights({moved[n]: t for n, t in weights.tensors.items()},
                          {moved[n]: k for n, k in weights.keys.items()})  # fmt: skip
    depths = _depths(weights, r"layers\.(\d+)\.blocks\.(\d+)\.")
    tables = [
        weights.shape(f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(len(depths))
    ]
    dim, patch = weights.shape("patch_embed.proj.weight", 4)[0], weights.shape("patch_embed.proj.weight", 4)[-1]
    windows = [(isqrt(table[0]) + 1) // 2 for table in tables]
    # The largest window is the first stage's; seven patches of the last stage make 224 pixels.
    size = windows[0] * patch * 2 ** (len(depths) - 1)
    if size > SIZE_LIMIT:
        raise InputError(f"a Swin for images of {size} pixels; at most {SIZE_LIMIT} are known")
    make = partial(
        SwinTransformer,
        img_size=size,
        patch_size=patch,
        num_classes=0,
        embed_dim=dim,
        depths=depths,
        num_heads=tuple(table[1] for table in tables),
        window_size=windows[0],
        strict_img_size=False,
        mlp_ratio=weights.shape("layers.0.blocks.0.mlp.fc1.weight", 2, 4)[0] / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in weights.tensors,
        norm_layer=partial(nn.LayerNorm, eps=eps),  # type: ignore[arg-type]
    )
    width = dim * 2 ** (len(depths) - 1)
    name = f"swin {dim}, {'-'.join(map(str, depths))} blocks, window {windows[0]}"
    return Plan(name, make, weights, width, at_size(BICUBIC, size), "nhwc")


def _depths(weights: Weights, pattern: str) -> tuple[int, ...]:
    """Blocks in each stage, by the two numbers that the pattern finds."""
    stages: dict[int, set[str]] = {}
    for name in weights.tensors:
        if match := re.match(pattern, name):
            stages.setdefault(int(match[1]), set()).add(match[2])
    if sorted(stages) != list(range(len(stages))):
        raise InputError(f"stages {sorted(stages)}, expected 0, 1, ... without a gap")
    return tuple(len(stages[stage]) for stage in sorted(stages))
