"""Residual networks of every project under torchvision's names, their shape read from tensors."""

import re
from dataclasses import replace
from functools import partial

from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

from collapse import InputError
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.preprocessing import CIFAR, CLIP_PIXELS, at_size
from collapse.checkpoints.selective import plan_selective
from collapse.checkpoints.settings import flag, shown
from collapse.data.preprocessing import Preprocessing
from collapse.models.resnet import ResNet, ResNetShape

CIFAR_PLANES = (16, 32, 64)  # the three stages of the 6n + 2 networks for CIFAR (arXiv 1512.03385)
DEPTHS = {(2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3), (1, 1, 1, 1)}
TORCHVISION = ((r"\bshortcut\.", "downsample."),)
SEQUENTIAL = {True: 4, False: 3}  # index of layer1 among torchvision's children, with and without max-pool
HUGGINGFACE = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"layer#\1.\2."),
    (r"\blayer\.(\d)\.convolution\.", r"conv#\1."),
    (r"\blayer\.(\d)\.normalization\.", r"bn#\1."),
    (r"\bshortcut\.convolution\.", "downsample.0."),
    (r"\bshortcut\.normalization\.", "downsample.1."),
)
# Separius/SimCLRv2-Pytorch: a block is net.{0,1.0,2,3.0,4,5.0}.
SIMCLRV2 = (
    (r"^net\.0\.0\.", "conv1."),
    (r"^net\.0\.1\.0\.", "bn1."),
    (r"^net\.(\d+)\.blocks\.(\d+)\.", r"layer\1.\2."),
    (r"\bnet\.0\.", "conv1."),
    (r"\bnet\.1\.0\.", "bn1."),
    (r"\bnet\.2\.", "conv2."),
    (r"\bnet\.3\.0\.", "bn2."),
    (r"\bnet\.4\.", "conv3."),
    (r"\bnet\.5\.0\.", "bn3."),
    (r"\bprojection\.shortcut\.", "downsample.0."),
    (r"\bprojection\.bn\.0\.", "downsample.1."),
)
CLIP = (
    (r"^conv(\d)\.", r"stem.conv\1.conv."),
    (r"^bn(\d)\.", r"stem.conv\1.bn."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", r"stages#\1.\2.shortcut.conv.conv."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", r"stages#\1.\2.shortcut.conv.bn."),
    (r"^layer(\d)\.(\d+)\.(conv|bn)1\.", r"stages#\1.\2.conv1_1x1.\3."),
    (r"^layer(\d)\.(\d+)\.(conv|bn)2\.", r"stages#\1.\2.conv2_kxk.\3."),
    (r"^layer(\d)\.(\d+)\.(conv|bn)3\.", r"stages#\1.\2.conv3_1x1.\3."),
    (r"^attnpool\.positional_embedding$", "head.pos_embed"),
    (r"^attnpool\.([qkv])_proj\.", r"head.\1."),
    (r"^attnpool\.c_proj\.", "head.proj."),
)


def counted(weights: Weights, rules: tuple[tuple[str, str], ...], change: int) -> Weights:
    """Rename, with every number after a # moved by `change`: projects count stages and layers from 0 or from 1.

    Raises InputError: two tensors get one name.
    """
    names = {}
    for name in weights.tensors:
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        names[name] = re.sub(r"(\w)#(\d+)", lambda m: _moved(m, change), new)
    if len(set(names.values())) < len(names):
        raise InputError("two tensors get the same name; is the file one network?")
    return Weights({names[n]: t for n, t in weights.tensors.items()}, {names[n]: k for n, k in weights.keys.items()})


def _moved(match: re.Match[str], change: int) -> str:
    dot = "." if match[1] == "s" else ""  # stages.0, but layer1 and conv1
    return f"{match[1]}{dot}{int(match[2]) + change}"


def plan_torchvision(weights: Weights, clues: Clues) -> Plan:
    """torchvision's names, as most projects have them; shortcut is another name of downsample.

    Raises InputError: as `plan`.
    """
    return plan(weights.renamed(TORCHVISION), clues)


def plan_sequential(weights: Weights, clues: Clues) -> Plan:
    """The children of torchvision's network in a Sequential: conv1 is 0, and layer1 is 3 if max-pool was left out.

    Raises InputError: as `plan`.
    """
    pooled = "3.0.conv1.weight" not in weights.tensors
    first = SEQUENTIAL[pooled]
    stages = [(rf"^{first + stage}\.", f"layer{stage + 1}.") for stage in range(4)]
    renamed = weights.renamed([*stages, (r"^0\.", "conv1."), (r"^1\.", "bn1."), *TORCHVISION])
    return plan(renamed, clues, maxpool=pooled)


def plan_huggingface(weights: Weights, clues: Clues) -> Plan:
    """transformers' ResNet. Raises InputError: a stride or an activation of its config that is not read."""
    if flag(*clues.hint("downsample_in_bottleneck")):
        raise InputError(
            "its config puts the stride on the first 1 x 1 convolution (downsample_in_bottleneck); not read"
        )
    if clues.word("hidden_act") not in (None, "relu"):
        raise InputError(f"its config has the activation {shown(clues.word('hidden_act'))}; relu is known")
    return plan(counted(weights, HUGGINGFACE, 1), clues)


def plan_simclrv2(weights: Weights, clues: Clues) -> Plan:
    """SimCLRv2 (arXiv 2006.10029), with selective kernels where the file has them. Raises InputError: as `plan`."""
    if any(".mixing_conv." in name for name in weights.tensors):
        return plan_selective(weights)
    return plan(weights.renamed(SIMCLRV2), clues)


def plan(weights: Weights, clues: Clues, maxpool: bool | None = None) -> Plan:
    """The network under torchvision's names.

    Raises InputError: not four stages, or another network than the one that is named.
    """
    shape = infer_shape(weights)
    given = clues.given
    if len(shape.blocks) != 4 and shape.planes != CIFAR_PLANES and "architecture" not in clues.hints:
        raise InputError(f"{len(shape.blocks)} residual stages of {shape.planes}; 4 expected: is the file whole?")
    named = flag(*clues.hint("maxpool1"))  # lightning-bolts
    pooled = next((v for v in (given.maxpool, maxpool, named) if isinstance(v, bool)), None)
    shape = replace(shape, stem_padding=given.stem_padding, maxpool=pooled)
    unsaid = shape.stem == 3 and given.stem_padding is None and "architecture" not in clues.hints  # our header says it
    if unsaid and "args.json" in clues.configs:
        shape = replace(shape, stem_padding=2)
        clues.notes.append("args.json beside it: solo-learn's padding of 2 before the first convolution assumed")
    elif unsaid and len(shape.blocks) == 4:
        clues.notes.append("a 3 x 3 stem: padding 1 and, unless the layout shows it, no max-pool assumed; solo-learn "
                           "pads by 2 (stem_padding=2)")  # fmt: skip
    if given.arch is not None and given.arch != name_of(shape).partition(",")[0]:
        raise InputError(f"holds {name_of(shape)}, not {given.arch}; leave arch= out or check the file")
    if len(shape.blocks) == 4 and shape.blocks not in DEPTHS:
        clues.notes.append(f"{'-'.join(map(str, shape.blocks))} residual blocks are no usual depth; is the file whole?")
    width = shape.planes[-1] * (4 if shape.bottleneck else 1)
    pixels = Preprocessing() if shape.stem == 7 else CIFAR
    return Plan(name_of(shape), partial(ResNet, shape), weights, width, pixels, stem="maxpool")


def infer_shape(weights: Weights) -> ResNetShape:
    """Read depth, widths, stem and kind of block from the tensors' shapes.

    Raises InputError: stages with a gap, or an unknown first convolution.
    """
    stages: dict[int, set[int]] = {}
    for name in weights.tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    if sorted(stages) != list(range(1, len(stages) + 1)):
        raise InputError(f"residual stages {sorted(stages)}, expected 1, 2, ... without a gap")
    bottleneck = "layer1.0.conv3.weight" in weights.tensors
    last = "conv3" if bottleneck else "conv2"
    planes = [weights.shape(f"layer{s}.0.{last}.weight", 4)[0] // (4 if bottleneck else 1) for s in sorted(stages)]
    stem, inner = weights.shape("conv1.weight", 4), weights.shape("layer1.0.conv1.weight", 4)[0]
    groups = inner // weights.shape("layer1.0.conv2.weight", 4)[1] if bottleneck else 1
    if stem[-1] not in (3, 7):
        raise InputError(f"a first convolution of {stem[-1]} x {stem[-1]}; 3 and 7 are known")
    return ResNetShape(
        blocks=tuple(len(stages[stage]) for stage in sorted(stages)),
        planes=tuple(planes),
        bottleneck=bottleneck,
        stem=stem[-1],
        stem_planes=stem[0],
        groups=groups,
        base_width=inner * 64 // (groups * planes[0]) if bottleneck else 64,
        pad_shortcut=not any(".downsample." in name for name in weights.tensors),
    )


def name_of(shape: ResNetShape) -> str:
    """The usual name of an architecture, or its numbers."""
    layers = sum(shape.blocks) * (3 if shape.bottleneck else 2) + 2
    standard = shape.planes == (64, 128, 256, 512)[: len(shape.planes)] and len(shape.planes) == 4
    name = f"resnet{layers}"
    if shape.groups > 1:
        name = f"resnext{layers}_{shape.groups}x{shape.base_width}d"
    elif shape.base_width == 128:
        name = f"wide_resnet{layers}_2"
    if not standard and shape.planes != CIFAR_PLANES:
        name += f" ({'-'.join(map(str, shape.planes))} planes)"
    return name if shape.stem == 7 else f"{name}, 3x3 stem"


def plan_clip(weights: Weights, clues: Clues) -> Plan:
    """CLIP's ModifiedResNet (arXiv 2103.00020), built by timm; its output is that of the attention pool.

    Raises InputError: a tensor is missing or misshapen, or two get one name.
    """
    renamed = counted(weights, CLIP, -1)
    shapes = infer_clip(weights)
    blocks = tuple(
        ByoBlockCfg(type="bottle", d=depth, c=width, s=2 if stage else 1, br=0.25)
        for stage, (depth, width) in enumerate(shapes)
    )
    stem = tuple(weights.shape(f"conv{i}.weight", 4)[0] for i in (1, 2, 3))
    config = ByoModelCfg(blocks=blocks, stem_chs=stem, stem_type="", stem_pool="avg2", downsample="avg",
                         aa_layer="avg", head_type="attn_abs")  # fmt: skip
    side = round((weights.shape("attnpool.positional_embedding", 2)[0] - 1) ** 0.5)
    width = weights.shape("attnpool.c_proj.weight", 2)[0]
    make = partial(ByobNet, config, num_classes=width, img_size=side * 32)
    name = f"CLIP resnet, {'-'.join(str(depth) for depth, _ in shapes)} blocks of {shapes[0][1]}"
    return Plan(name, make, renamed, width, at_size(CLIP_PIXELS, side * 32), stem="stem")


def infer_clip(weights: Weights) -> list[tuple[int, int]]:
    """(blocks, output width) of each stage."""
    stages = []
    for stage in range(1, 5):
        indices = {m[1] for n in weights.tensors if (m := re.match(rf"layer{stage}\.(\d+)\.", n))}
        stages.append((len(indices), weights.shape(f"layer{stage}.0.conv3.weight", 4)[0]))
    return stages
