"""Vision transformers of every project, built by timm: their names put into timm's, their shape read from tensors.

timm's names: cls_token, reg_token, pos_embed, patch_embed.proj, norm_pre, blocks.N.{norm1, attn.qkv, attn.proj, ls1,
norm2, mlp.fc1, mlp.fc2, ls2}, norm, fc_norm, head.  Heads, epsilon, activation and pooling are in no tensor: they come
from a config, else from the layout, with a warning that says so.
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU, SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints import coca
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import MOST, Clues, Plan
from collapse.checkpoints.preprocessing import BICUBIC, CLIP_PIXELS, HALVES, at_size
from collapse.checkpoints.settings import shown, side, whole_number
from collapse.checkpoints.vit_names import CLIP, HUGGINGFACE, HUGGINGFACE_CLIP, OPENMMLAB, SIGLIP, TIMM, TORCHVISION
from collapse.data.preprocessing import Preprocessing

# Heads of the published networks of a width, from ViT-Ti to ViT-bigG; any other width may have any number.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


class ConvStem(nn.Module):
    """MoCo-v3's patch embedding (arXiv 2104.02057, after 2106.14881): 3 x 3 convolutions of stride 2, then 1 x 1."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, widths: tuple[int, ...] = (),
                 **rest: Any) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((in_chans, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.patch = 2 ** len(widths)
        self.set_input_size((img_size, img_size))

    def set_input_size(self, size: tuple[int, int]) -> None:
        """Take images of another size, (height, width) in pixels."""
        self.img_size = size
        self.grid_size = (size[0] // self.patch, size[1] // self.patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> tokens (n, h w / patch^2, d)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class AnySizeViT(VisionTransformer):
    """timm's transformer for images of any size: positions are resampled as their project does it.

    forward: (n, 3, h, w) float, h and w multiples of the patch -> (n, d).
    """

    def __init__(self, *args: Any, resampling: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resampling, self.native = resampling, self.patch_embed.grid_size
        self.learned: Tensor | None = None

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """(n, 3, h, w) of any size that the patches tile -> (n, d); positions are interpolated."""
        self._fit((x.shape[-2], x.shape[-1]))
        return super().forward(x, *masks, **options)

    def _fit(self, size: tuple[int, int]) -> None:
        embed = self.patch_embed
        if size == tuple(embed.img_size) or self.pos_embed is None:
            return
        patch = embed.img_size[0] // embed.grid_size[0]
        if size[0] % patch or size[1] % patch or self.resampling == "fixed":
            expected = f"{embed.img_size[0]} x {embed.img_size[1]}" if self.resampling == "fixed" else "multiples"
            raise InputError(f"images of {size[0]} x {size[1]} pixels for patches of {patch}: expected {expected}")
        if self.learned is None:
            self.learned = self.pos_embed.detach()
        embed.set_input_size(size)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        learned = self.learned.to(self.pos_embed.device)
        grid = resample_positions(learned, self.native, embed.grid_size, prefix, self.resampling)
        self.pos_embed = nn.Parameter(grid, requires_grad=False)


def resample_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, resampling: str
) -> Tensor:
    """(1, prefix + old, d) -> (1, prefix + new, d), bicubic.

    resampling: "antialias" (timm; DINOv2 with registers), "offset" (DINO and DINOv2: a scale of (new + 0.1) / old) or
    "plain" (transformers).
    """
    if tuple(old) == tuple(new):
        return positions
    if resampling == "antialias":
        return resample_abs_pos_embed(positions, list(new), list(old), prefix)
    grid = positions[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    if resampling == "offset":
        scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=tuple(new), mode="bicubic")
    return torch.cat([positions[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def plan_timm(weights: Weights, clues: Clues) -> Plan:
    """timm, DINO, DINOv2, MoCo-v3, MAE, I-JEPA, MSN and what else uses timm's names.

    Raises InputError: rotary positions.
    """
    if any("rope" in name or "storage_tokens" in name for name in weights.tensors):
        raise InputError("has rotary positions (DINOv3, EVA), which plain ViTs lack; give its name in timm as arch=")
    if coca.QUERY in weights.tensors:
        tower, pooler = coca.split(weights, "ln_contrast", "")
        return coca.plan(plan(tower.renamed(TIMM), clues), pooler, clues, final_norm=True)
    swiglu = weights.renamed(TIMM)
    first_party = "mask_token" in weights.tensors or clues.has(r"(^|\.)teacher\.backbone\.")
    resampling = "offset" if first_party and "reg_token" not in swiglu.tensors else "antialias"
    if "norm_pre.weight" in swiglu.tensors:  # CLIP's image tower in timm
        return plan(swiglu, clues, eps=1e-5, act=clip_activation(clues), pixels=CLIP_PIXELS, resampling=resampling)
    return plan(swiglu, clues, resampling=resampling)


def plan_torchvision(weights: Weights, clues: Clues) -> Plan:
    """torchvision's ViTs, whose positions are for one size. Raises InputError: as `plan`."""
    return plan(weights.renamed(TORCHVISION), clues, resampling="fixed", pixels=Preprocessing())


def plan_huggingface(weights: Weights, clues: Clues) -> Plan:
    """transformers' ViT, ViTMAE, ViTMSN, I-JEPA, DINOv2 with and without registers. Raises InputError: as `plan`."""
    renamed = weights.renamed(HUGGINGFACE)
    dinov2 = "blocks.0.ls1.gamma" in renamed.tensors
    eps = clues.epsilon()
    if eps is None and not dinov2:
        clues.notes.append("no config.json: layer norms with epsilon 1e-12 assumed, as ViTConfig has it")
    return plan(renamed, clues, eps=eps or (1e-6 if dinov2 else 1e-12), resampling="plain")


def plan_openmmlab(weights: Weights, clues: Clues) -> Plan:
    """mmpretrain's and mmselfsup's VisionTransformer. Raises InputError: as `plan`."""
    return plan(weights.renamed(OPENMMLAB), clues)


def plan_clip(weights: Weights, clues: Clues) -> Plan:
    """The image tower of CLIP and open_clip (arXiv 2103.00020), with its projection: what encode_image gives.

    Raises InputError: nothing says which activation it has; or as `plan` and `coca.split`.
    """
    if coca.QUERY in weights.tensors:
        tower, pooler = coca.split(weights, "ln_post", "proj")
        act = clip_activation(clues)
        base = plan(tower.renamed(CLIP), clues, eps=1e-5, act=act, pre_norm=True, resampling="fixed")
        return coca.plan(base, pooler, clues, final_norm=False)
    renamed = weights.renamed(CLIP)
    if "proj" in renamed.tensors:
        renamed.tensors["head.weight"] = renamed.tensors.pop("proj").T
        renamed.keys["head.weight"] = renamed.keys.pop("proj")
    act = clip_activation(clues)
    return plan(renamed, clues, eps=1e-5, act=act, pixels=CLIP_PIXELS, pre_norm=True, resampling="fixed")


def plan_huggingface_clip(weights: Weights, clues: Clues) -> Plan:
    """transformers' CLIP image tower, with its projection where the file has one; SigLIP's, whose pool is attention.

    Raises InputError: no config says which activation CLIP has.
    """
    if "head.probe" in weights.tensors:
        return plan(
            weights.renamed(SIGLIP).renamed(HUGGINGFACE_CLIP),
            clues,
            eps=clues.epsilon() or 1e-6,
            pixels=HALVES,
            resampling="fixed",
        )
    act = clues.given.activation or (clues.word("hidden_act") or "")
    if not act:
        raise InputError('no config.json says which activation this CLIP has; give activation="quick_gelu" or gelu')
    eps = clues.epsilon() or 1e-5
    renamed = weights.renamed(HUGGINGFACE_CLIP)
    return plan(renamed, clues, eps=eps, act=act, pixels=CLIP_PIXELS, pre_norm=True, resampling="fixed")


def clip_activation(clues: Clues) -> str:
    """GELU or QuickGELU: by the flag, open_clip's config, its model's name, or the archive that only OpenAI wrote.

    Raises InputError: none of these says it.
    """
    if clues.given.activation:
        return clues.given.activation
    if clues.container.startswith("TorchScript"):
        return "quick_gelu"
    config = clues.configs.get("open_clip_config.json", {}).get("model_cfg")
    if isinstance(config, Mapping):
        return "quick_gelu" if config.get("quick_gelu") else "gelu"
    name = clues.word("name") or ""
    if name:
        return "quick_gelu" if "quickgelu" in name.lower() else "gelu"
    raise InputError('nothing says which activation this CLIP has; give activation="quick_gelu" (OpenAI) or gelu')


TANH = partial(nn.GELU, approximate="tanh")
ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU, "gelu_new": TANH,
               "gelu_tanh": TANH, "gelu_pytorch_tanh": TANH}  # fmt: skip


def plan(
    weights: Weights,
    clues: Clues,
    eps: float = 1e-6,
    act: str | None = None,
    resampling: str = "antialias",
    pixels: Preprocessing | None = None,
    pre_norm: bool = False,
) -> Plan:
    """The transformer under timm's names.

    Raises InputError: fewer tensors than its blocks need, or an unknown activation.
    """
    tensors = _batched(weights)
    if "attn_pool.latent" in tensors:
        act = _attention_pool(weights, clues)
    depth = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name)))
    if depth > len(tensors):
        raise InputError(f"a block {depth - 1} among {len(tensors)} tensors; is the file whole?")
    conv = "patch_embed.proj.0.weight" in tensors
    widths = tuple(tensors[f"patch_embed.proj.{3 * i}.weight"].shape[0] for i in range(4)) if conv else ()
    dim = weights.shape("blocks.0.attn.qkv.weight", 2)[1]
    patch = 2 ** len(widths) if conv else weights.shape("patch_embed.proj.weight", 4)[-1]
    grid, tokens = _positions(weights)
    place, size = clues.hint("image_size")
    if not place.startswith("config.json") or side(place, size) is None:  # which refuses an oblong one
        clues.notes.append(f"the {grid * grid} positions are taken as a square grid, {grid} x {grid}")
    hidden = weights.shape("blocks.0.mlp.fc1.weight", 2)[0]
    swiglu = weights.shape("blocks.0.mlp.fc2.weight", 2)[1] * 2 == hidden
    projection = tensors.get("head.weight") if clues.head_is_embedding or pre_norm else None
    if projection is not None:
        weights.shape("head.weight", 2)
    heads, act = _heads(dim, clues), act or clues.word("hidden_act") or "gelu"
    if act not in ACTIVATIONS and not swiglu:
        raise InputError(f"an activation {shown(act)}; {', '.join(ACTIVATIONS)} are known")
    options = _tokens_and_blocks(weights, clues, eps, swiglu) | tokens
    make = partial(
        AnySizeViT,
        img_size=grid * patch,
        patch_size=patch,
        num_classes=0 if projection is None else len(projection),
        depth=depth,
        num_heads=heads,
        pre_norm=pre_norm or "norm_pre.weight" in tensors,
        embed_layer=partial(ConvStem, widths=widths) if conv else _default_embed(),
        act_layer=nn.SiLU if swiglu else ACTIVATIONS[act],
        resampling=resampling,
        **options,
    )
    name = f"vit {dim} x {depth}, patch {patch}, {heads} heads"
    pixels = pixels or (HALVES if "attn_pool.latent" in tensors else BICUBIC)
    if grid * patch < 448:  # larger grids (DINOv2: 518) are evaluated at 224
        pixels = at_size(pixels, grid * patch)
    constants = {} if projection is None else {"head.bias": torch.zeros(len(projection))}
    width = dim if projection is None else len(projection)
    return Plan(name, make, weights, width, pixels, "tokens", constants=constants)


def _tokens_and_blocks(weights: Weights, clues: Clues, eps: float, swiglu: bool) -> dict[str, Any]:
    """timm's options that follow from the tensors of the tokens and of the first block."""
    tensors, dim = weights.tensors, weights.shape("blocks.0.attn.qkv.weight", 2)[1]
    return {
        "global_pool": "map" if "attn_pool.latent" in tensors else "avg" if _mean_pooled(tensors, clues) else "token",
        "embed_dim": dim,
        "mlp_ratio": _exact_ratio(weights.shape("blocks.0.mlp.fc1.weight", 2)[0], dim),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "class_token": "cls_token" in tensors,
        "reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "fc_norm": "fc_norm.weight" in tensors,
        "weight_init": "skip",
        "norm_layer": partial(nn.LayerNorm, eps=eps),
    } | ({"mlp_layer": SwiGLUPacked} if swiglu else {})


def _attention_pool(weights: Weights, clues: Clues) -> str:
    """The activation of a SigLIP (arXiv 2303.15343), which pools by attention; its one matrix becomes timm's two."""
    for kind in ("weight", "bias"):
        if (fused := weights.tensors.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
            dim, keys = len(fused) // 3, weights.keys.pop(f"attn_pool.in_proj.{kind}")
            weights.tensors |= {f"attn_pool.q.{kind}": fused[:dim], f"attn_pool.kv.{kind}": fused[dim:]}
            weights.keys |= {f"attn_pool.{part}.{kind}": keys for part in ("q", "kv")}
    if clues.given.activation or clues.given.pool:
        raise InputError("a SigLIP, which has one activation and pools by attention; leave activation= and pool= out")
    if clues.word("hidden_act") is None:
        clues.notes.append("no config.json: the activation gelu_tanh assumed, as SigLIP has it")
    return clues.word("hidden_act") or "gelu_tanh"


def _default_embed() -> type[nn.Module]:
    from timm.layers import PatchEmbed

    return PatchEmbed


def _exact_ratio(hidden: int, dim: int) -> float:
    """The ratio from which int(dim * ratio) gives `hidden` (giants have 48 / 11)."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _batched(weights: Weights) -> dict[str, Tensor]:
    """The tensors, those tokens that a project keeps without leading axes given theirs."""
    for name in ("cls_token", "pos_embed", "reg_token"):
        if name in weights.tensors:
            tensor = weights.tensors[name]
            weights.tensors[name] = tensor.reshape((1,) * (3 - tensor.ndim) + tuple(tensor.shape))
    return weights.tensors


def _positions(weights: Weights) -> tuple[int, dict[str, Any]]:
    """(side of the grid, how the class token takes part in the positions); register positions are resolved."""
    tensors = weights.tensors
    length = weights.shape("pos_embed", 3)[1]
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = int("cls_token" in tensors)
    if registers and _square(length - 1) and prefix:  # DINOv2: only the class token has a position
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
        return isqrt(length - 1), {"no_embed_class": True}
    if _square(length - prefix - registers):
        return isqrt(length - prefix - registers), {}
    if _square(length):
        return isqrt(length), {"no_embed_class": True}
    raise InputError(f"{length} positions, which are no square grid with {prefix} class token; not read")


def _square(n: int) -> bool:
    return n > 0 and isqrt(n) ** 2 == n


def _mean_pooled(tensors: Mapping[str, Tensor], clues: Clues) -> bool:
    if clues.given.pool is not None:
        if clues.given.pool == "cls" and "cls_token" not in tensors:
            raise InputError('has no class token; leave pool= out or give pool="mean"')
        return clues.given.pool == "mean"
    return "fc_norm.weight" in tensors or "cls_token" not in tensors


def _heads(dim: int, clues: Clues) -> int:
    """The number of attention heads: the caller's, the config's, the layout's, else that of a published width."""
    given = clues.given.heads or whole_number(*clues.hint("num_attention_heads"), 1, MOST["heads"])
    if given is None and dim == 384 and clues.has(r"(^|\.)base_encoder\.") and clues.has(r"(^|\.)momentum_encoder\."):
        given = 12  # MoCo-v3's ViT-S (arXiv 2104.02057), unlike everybody else's
    if given is None and dim in (192, 384) and "mocov3" in (clues.word("method") or ""):
        given = 12  # solo-learn's, by its args.json
    heads = int(given or HEADS.get(dim, 0))
    if heads < 1 or dim % heads:
        what = f"{heads} heads do not divide" if heads else "nothing says how many heads go into"
        raise InputError(f"{what} a width of {dim}; give heads=")
    if given is None:
        more = "; MoCo-v3's ViT-S would have 12: give heads=" if dim == 384 else ""
        clues.notes.append(f"the number of heads is not in the file: {heads} assumed, from the width {dim}{more}")
    return heads
