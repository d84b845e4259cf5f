"""How a network wants its images: the caller's word, then the file's and its configs', then the habit of its layout."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from collapse import InputError
from collapse.checkpoints.plan import Clues
from collapse.files.pickles import Stub
from collapse.images import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

SIDE_LIMIT = 4096  # pixels that a config may ask for
BICUBIC = Preprocessing(interpolation="bicubic")
CIFAR = Preprocessing(resize=32, crop=32)
CLIP_PIXELS = Preprocessing(
    resize=224,
    crop=224,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)

# What some projects do otherwise, by keys that only they have, and what is said about it.
HABITS: tuple[tuple[str, dict[str, Any], str], ...] = (
    (r"(^|\.)prototypes\.(weight|prototypes\d)", {"std": (0.228, 0.224, 0.225)}, "SwAV's std of .228 in red"),
    (r"(^|\.)f\.3\.0\.conv1\.weight", {"mean": CIFAR10_MEAN, "std": (0.2023, 0.1994, 0.2010)}, "CIFAR's mean and std"),
    (r"(^|\.)resnet\.net\.0\.0\.weight", {"mean": None, "std": None}, "SimCLRv2's values in 0..1"),
    (r"(^|\.)projector\.layer1\.0\.weight", {"interpolation": "bicubic"}, "PatrickHua's bicubic resizing"),
    (r"^state_dict\.backbone\.fc\.0\.weight", {"mean": None, "std": None}, "sthalles/SimCLR's values in 0..1"),
    (r"(^|\.)l1\.weight", {"mean": None, "std": None}, "sthalles/SimCLR's values in 0..1"),
    (r"(^|\.)teacher\.backbone\.|(^|\.)teacher\.patch_embed", {"interpolation": "bicubic"}, "DINO's bicubic resizing"),
)
# Mean and std by the data set that a project's arguments name: HobbitLong/SupContrast in opt, solo-learn in args.json.
DATASETS = {
    "cifar10": (CIFAR10_MEAN, (0.2023, 0.1994, 0.2010), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261), (0.247, 0.243, 0.261)),
}


def at_size(pixels: Preprocessing, size: int) -> Preprocessing:
    """The same for another crop, the resizing in proportion."""
    if pixels.resize is None or pixels.crop is None:
        return pixels
    return replace(pixels, resize=round(size * pixels.resize / pixels.crop), crop=size)


def hints(tree: Any, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of a file's arguments and configs, flat: the vision part of a nested config first."""
    found: dict[str, Any] = {}
    sources = [configs.get("args.json"), configs.get("config.json")]
    if isinstance(tree, Mapping):
        found |= {k: tree[k] for k in ("arch", "name", "model_name") if isinstance(tree.get(k), str)}
        named = ("args", "opt", "hyper_parameters", "config", "hparams")
        sources += [tree[k].state if isinstance(tree.get(k), Stub) else tree.get(k) for k in named]
        trained = tree.get("lightly_train")
        sources.append(trained.get("normalize_args") if isinstance(trained, Mapping) else None)
    for source in sources:
        if isinstance(source, Mapping):
            inner = source.get("vision_config")
            found |= {str(k): v for k, v in (inner if isinstance(inner, Mapping) else source).items()}
    return found


def own_facts(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What the trainer of this package wrote into a file's header; empty for the files of others."""
    try:
        facts = json.loads(metadata.get("collapse", "{}"))
        if "preprocessing" in facts:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in facts["preprocessing"].items()
            }
            facts["preprocessing"] = Preprocessing(**values)
        return facts
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: the header's entry 'collapse' cannot be read: {error}") from error


def preprocessing(layout: Preprocessing, facts: Mapping[str, Any], clues: Clues) -> tuple[Preprocessing, list[str]]:
    """(preprocessing, warnings): the caller's word first, then the file's, then the layout's habit."""
    notes: list[str] = []
    base = facts.get("preprocessing")
    if base is None:
        base, notes = _from_file(layout, clues)
    given = {name: getattr(clues.given, name) for name in ("resize", "crop", "interpolation", "mean", "std")}
    given = {name: value for name, value in given.items() if value is not None}
    if clues.given.no_normalize:
        given |= {"mean": None, "std": None}
    for name in ("mean", "std"):
        if name in given and given[name] is not None and len(given[name]) != 3:
            raise InputError(f"--{name}: got {len(given[name])} numbers, expected 3")
    return replace(base, **given), notes if not given else []


def _from_file(layout: Preprocessing, clues: Clues) -> tuple[Preprocessing, list[str]]:
    for name, reader in (("preprocessor_config.json", _huggingface), ("config.json", _timm),
                         ("open_clip_config.json", _open_clip)):  # fmt: skip
        config = clues.configs.get(name)
        found = reader(config, layout) if isinstance(config, Mapping) else None
        if found is not None:
            return found, []
    mean, std, where = _statistics(clues)
    if mean is not None and std is not None:
        found = replace(layout, mean=mean, std=std)
        return found, [
            f"resizing is not in the file: {found.resize} px, crop {found.crop} assumed; mean and std {where}"
        ]
    habit = next((habit for habit in HABITS if clues.has(habit[0])), None)
    found = replace(layout, **habit[1]) if habit else layout
    what = habit[2] if habit else "ImageNet's mean and std"
    if not habit and found.mean != IMAGENET_MEAN:
        what = "the layout's mean and std"
    return found, [f"preprocessing is not in the file: {found.resize} px, crop {found.crop}, {what} assumed"]


def _statistics(clues: Clues) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, str]:
    """(mean, std, where they are from) as a file's arguments have them, as numbers or by the data set's name."""
    mean, std = _numbers(clues.hint("mean")), _numbers(clues.hint("std"))
    if mean and std:
        return mean, std, "from the file"
    name = re.sub(r"[^a-z0-9]", "", str(clues.hint("dataset") or "").lower())
    if name in DATASETS:
        means, supcon, solo = DATASETS[name]
        return means, solo if "args.json" in clues.configs else supcon, f"those of {name}"
    return None, None, ""


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Three numbers, be they a list or its text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(f"[{value.strip('()[] ')}]")
        except ValueError:
            return None
    usable = isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
    return tuple(float(v) for v in value) if usable else None


def _huggingface(config: Mapping[str, Any], layout: Preprocessing) -> Preprocessing:
    size, crop = _side(config.get("size")), _side(config.get("crop_size"))
    resize = (size or layout.resize) if config.get("do_resize", True) else None
    normalized = config.get("do_normalize", True)
    return replace(
        layout,
        resize=resize,
        crop=crop if crop and config.get("do_center_crop", True) else resize or layout.crop,
        interpolation={2: "bilinear", 3: "bicubic"}.get(config.get("resample", 2), layout.interpolation),
        mean=(_numbers(config.get("image_mean")) or IMAGENET_MEAN) if normalized else None,
        std=(_numbers(config.get("image_std")) or IMAGENET_STD) if normalized else None,
    )


def _side(size: Any) -> int | None:
    """Of {"shortest_edge": 224}, {"height": 224, "width": 224} or 224; None for what no image has."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and 0 < size <= SIDE_LIMIT else None


def _timm(config: Mapping[str, Any], layout: Preprocessing) -> Preprocessing | None:
    trained = config.get("pretrained_cfg")
    if not isinstance(trained, Mapping):
        return None
    size, share = trained.get("input_size"), trained.get("crop_pct")
    crop = (_side(size[-1]) if isinstance(size, list) and size else None) or layout.crop
    resize = int(crop / share) if isinstance(share, float) and 0.5 < share <= 1 and crop else crop
    way = trained.get("interpolation")
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=way if way in ("bilinear", "bicubic") else layout.interpolation,
        mean=_numbers(trained.get("mean")) or IMAGENET_MEAN,
        std=_numbers(trained.get("std")) or IMAGENET_STD,
    )


def _open_clip(config: Mapping[str, Any], layout: Preprocessing) -> Preprocessing | None:
    trained = config.get("preprocess_cfg")
    if not isinstance(trained, Mapping):
        return None
    mean, std = _numbers(trained.get("mean")) or layout.mean, _numbers(trained.get("std")) or layout.std
    way = trained.get("interpolation")
    return replace(layout, mean=mean, std=std, interpolation=way if way in ("bilinear", "bicubic") else "bicubic")
