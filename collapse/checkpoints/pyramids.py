"""ConvNeXt (arXiv 2201.03545, 2301.00808) and Swin (2103.14030) of every project, built by timm."""

import re
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.preprocessing import BICUBIC, at_size
from collapse.checkpoints.settings import shown

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
    """ConvNeXt and ConvNeXt-V2 under timm's names or their authors', who leave the last norm out of pre-training.

    Raises InputError: a tensor is missing or misshapen, a kernel is not square, or stages have a gap.
    """
    original = not any(name.startswith("stem.") for name in weights.tensors)
    renamed = dense(weights).renamed(CONVNEXT) if original else weights
    if original and "head.norm.weight" not in renamed.tensors:
        clues.notes.append("has no last norm, as pre-training (FCMAE) leaves it: the mean of the map as it is")
    if not original:
        clues.notes.append("layer norms with epsilon 1e-6 and GELU assumed, as most of timm's ConvNeXts have them")
    return _convnext(renamed, None)


def dense(weights: Weights) -> Weights:
    """The sparse convolutions of ConvNeXt-V2's pre-training (MinkowskiEngine) as usual ones; others as they are.

    A kernel (k^2, width) or (k^2, inputs, outputs), its columns before its rows -> (outputs, inputs or 1, k, k).

    Raises InputError: a kernel that is not square.
    """
    if not any(name.endswith(".kernel") for name in weights.tensors):
        return weights
    renamed = weights.renamed(((r"\.kernel$", ".weight"), (r"\.(ln|linear)\.(weight|bias)$", r".\2")))
    for name in [name for name in weights.tensors if name.endswith(".kernel")]:
        tensor = weights.tensors[name] if weights.tensors[name].ndim == 3 else weights.tensors[name][:, None]
        side = isqrt(len(tensor))
        if side * side != len(tensor) or tensor.ndim != 3:
            raise InputError(f"{shown(name)} is {tuple(tensor.shape)}, no square kernel")
        usual = tensor.unflatten(0, (side, side)).permute(3, 2, 1, 0)
        renamed.tensors[f"{name.removesuffix('kernel')}weight"] = usual
        bias = f"{name.removesuffix('kernel')}bias"
        if bias in renamed.tensors:
            renamed.tensors[bias] = renamed.tensors[bias].flatten()
    return renamed


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
    normed = "head.norm.weight" in weights.tensors or "norm_pre.weight" in weights.tensors
    name = f"convnext {'-'.join(map(str, depths))} blocks of {'-'.join(map(str, dims))}"
    return Plan(name, partial(_make_convnext, options, last_eps, normed), weights, dims[-1], BICUBIC)


def _make_convnext(options: dict, last_eps: float | None, normed: bool) -> nn.Module:
    module = ConvNeXt(**options)
    if not normed:
        module.head.norm = nn.Identity()
    if last_eps is not None:
        module.get_submodule("head.norm").eps = last_eps  # type: ignore[assignment]
    return module


class ConvPatches(nn.Module):
    """CTransPath's patch embedding: 3 x 3 convolutions of stride 2, then 1 x 1 and a layer norm.

    forward: (n, 3, h, w) -> (n, h / patch, w / patch, d).
    """

    def __init__(self, widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, h / patch, w / patch, d)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def _make_swin(widths: tuple[int, ...], **options: Any) -> nn.Module:
    module = SwinTransformer(**options)
    if widths:
        module.patch_embed = ConvPatches(widths, options["embed_dim"])
    return module


def plan_swin(weights: Weights, clues: Clues) -> Plan:
    """Swin under timm's names or its authors', who downsample at a stage's end and not at the next's start.

    Raises InputError: a Swin V2, a tensor is missing or misshapen, stages have a gap, or its images are too large.
    """
    return _swin(weights, clues, 1e-5)


def plan_huggingface_swin(weights: Weights, clues: Clues) -> Plan:
    """transformers' Swin. Raises InputError: as `plan_swin`."""
    return _swin(weights.renamed(HUGGINGFACE_SWIN), clues, clues.epsilon() or 1e-5)


def _swin(weights: Weights, clues: Clues, eps: float) -> Plan:
    if any("logit_scale" in name or "cpb_mlp" in name for name in weights.tensors):
        raise InputError("a Swin V2, whose attention is another; give its name in timm with arch=")
    if "layers.0.downsample.reduction.weight" in weights.tensors:
        moved = {name: re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
                 for name in weights.tensors}  # fmt: skip
        weights = Weights({moved[n]: t for n, t in weights.tensors.items()},
                          {moved[n]: k for n, k in weights.keys.items()})  # fmt: skip
    depths = _depths(weights, r"layers\.(\d+)\.blocks\.(\d+)\.")
    tables = [
        weights.shape(f"layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(len(depths))
    ]
    strided = [f"patch_embed.proj.{i}.weight" for i in (0, 3) if f"patch_embed.proj.{i}.weight" in weights.tensors]
    widths = tuple(weights.shape(name, 4)[0] for name in strided)  # of CTransPath's convolutions
    last = weights.shape(f"patch_embed.proj.{3 * len(widths)}.weight" if widths else "patch_embed.proj.weight", 4)
    dim, patch = last[0], 2 ** len(widths) if widths else last[-1]
    windows = [(isqrt(table[0]) + 1) // 2 for table in tables]
    # The largest window is the first stage's; seven patches of the last stage make 224 pixels.
    size = windows[0] * patch * 2 ** (len(depths) - 1)
    if size > SIZE_LIMIT:
        raise InputError(f"a Swin for images of {size} pixels; at most {SIZE_LIMIT} are known")
    make = partial(
        _make_swin,
        widths,
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
        norm_layer=partial(nn.LayerNorm, eps=eps),
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
