"""How a network wants its images: the caller's word, then the file's and its configs', then the habit of its layout."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from collapse import InputError
from collapse.checkpoints.plan import INTERPOLATIONS, Clues, Overrides
from collapse.checkpoints.settings import (
    MEANS,
    NAME_LIMIT,
    SIDE_LIMIT,
    STDS,
    choice,
    flag,
    number,
    read_text,
    shown,
    side,
    triple,
    whole_number,
)
from collapse.data.preprocessing import IMAGENET_MEAN, Preprocessing
from collapse.files.containers import first_line
from collapse.files.pickles import Stub

BICUBIC = Preprocessing(interpolation="bicubic")
CIFAR = Preprocessing(resize=32, crop=32)
CLIP_PIXELS = Preprocessing(
    resize=224,
    crop=224,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
HALVES = Preprocessing(224, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # SigLIP's
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


HINTS = ("arch", "name", "model", "model_name", "method", "dataset", "mean", "std", "maxpool1", "layer_norm_eps",
         "hidden_act", "num_attention_heads", "downsample_in_bottleneck", "image_size", "patch_size",
         "temperature")  # fmt: skip
CONTRASTIVE = ("simclr", "directclr", "moco", "mocov2plus", "mocov3")  # methods with a cosine loss of two views


def hints(tree: Any, configs: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """{name: (place, value)} of a file's arguments and configs: the vision part of a nested config before the whole.

    Only names that somebody asks for are looked up, so that no tree of a stranger is walked.
    """
    sources = [(name, configs.get(name)) for name in ("args.json", "config.json")]
    if isinstance(tree, Mapping):
        sources.insert(0, ("the file", {name: tree.get(name) for name in ("arch", "name", "model_name")}))
        for name in ("args", "opt", "hyper_parameters", "config", "hparams"):
            value = tree.get(name)
            sources.append((f"the file's {name}", value.state if isinstance(value, Stub) else value))
        trained = tree.get("lightly_train")
        sources.append(("lightly_train", trained.get("normalize_args") if isinstance(trained, Mapping) else None))
    named: dict[str, tuple[str, Any]] = {}
    for place, source in sources:
        named |= _named(place, source)
    return named


def _named(place: str, source: Any) -> dict[str, tuple[str, Any]]:
    """The names of `HINTS` in one source; solo-learn keeps its data set's and its method's in parts of their own."""
    if not isinstance(source, Mapping):
        return {}
    vision, data, method = (source.get(name) for name in ("vision_config", "data", "method_kwargs"))
    if isinstance(vision, Mapping):
        return {name: (f"{place}: vision_config.{name}", vision[name]) for name in HINTS if name in vision}
    named = {name: (f"{place}: {name}", source[name]) for name in HINTS if source.get(name) is not None}
    if isinstance(data, Mapping) and "dataset" not in named:
        named |= {name: (f"{place}: data.{name}", data[name]) for name in ("dataset",) if name in data}
    if isinstance(method, Mapping) and "temperature" in method:
        named |= {"temperature": (f"{place}: method_kwargs.temperature", method["temperature"])}
    return named


def loss_temperature(facts: Mapping[str, Any], stated: Mapping[str, tuple[str, Any]]) -> float | None:
    """The temperature of the contrastive cosine loss that trained a network, where its file states loss and value.

    Raises InputError: it is no positive number.
    """
    training = facts.get("training")
    if isinstance(training, Mapping):
        method, value = training.get("method"), ("the header's training: temperature", training.get("temperature"))
    else:
        method, value = stated.get("method", ("", None))[1], stated.get("temperature", ("", None))
    return number(*value, 1e-6, 1e6) if method in CONTRASTIVE else None


def own_facts(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What the trainer of this package wrote into a file's header; empty for the files of others.

    Raises InputError: the entry is no JSON.
    """
    try:
        facts = json.loads(metadata.get("collapse", "{}"))
        if "preprocessing" in facts:
            facts["preprocessing"] = _own_pixels(dict(facts["preprocessing"]))
        return dict(facts)
    except InputError:
        raise
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header's entry 'collapse' cannot be read: {first_line(error)}") from error


def _own_pixels(values: dict[str, Any]) -> Preprocessing:
    place = "the header's preprocessing"
    checked: dict[str, Any] = {name: whole_number(f"{place}: {name}", values.pop(name, None), 1, SIDE_LIMIT)
                               for name in ("resize", "crop")}  # fmt: skip
    for name, limits in (("mean", MEANS), ("std", STDS)):
        checked[name] = triple(f"{place}: {name}", values.pop(name, None), limits)
    way = choice(f"{place}: interpolation", values.pop("interpolation", None), INTERPOLATIONS)
    return Preprocessing(**checked, interpolation=way or "bilinear", **values)


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
    return replace(base, **given), notes


def _from_file(layout: Preprocessing, clues: Clues) -> tuple[Preprocessing, list[str]]:
    notes: list[str] = []
    for name, reader in (("preprocessor_config.json", _huggingface), ("config.json", _timm),
                         ("open_clip_config.json", _open_clip)):  # fmt: skip
        config = clues.configs.get(name)
        pixels = reader(Sheet(name, config, clues.given, notes), layout) if isinstance(config, Mapping) else None
        if pixels is not None:
            return pixels, notes
    mean, std, where = _statistics(clues, notes)
    if mean is not None and std is not None:
        pixels = replace(layout, mean=mean, std=std)
        what = f"resizing is not in the file: {pixels.resize} px, crop {pixels.crop} assumed; mean and std {where}"
    else:
        habit = next((habit for habit in HABITS if clues.has(habit[0])), None)
        pixels = replace(layout, **habit[1]) if habit else layout
        what = habit[2] if habit else "ImageNet's mean and std"
        if not habit and pixels.mean != IMAGENET_MEAN:
            what = "the layout's mean and std"
        what = f"preprocessing is not in the file: {pixels.resize} px, crop {pixels.crop}, {what} assumed"
    given = any(getattr(clues.given, name) is not None for name in ("resize", "crop", "interpolation", "mean", "std"))
    return pixels, notes if given or clues.given.no_normalize else [*notes, what]


def _statistics(clues: Clues, notes: list[str]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, str]:
    """(mean, std, where they are from) as a file's arguments have them, as numbers or by the data set's name."""
    statistics = []
    for name, limits in (("mean", MEANS), ("std", STDS)):
        place, value = clues.hint(name)
        numbers = read_text(value)
        if isinstance(numbers, (list, tuple)) and len(numbers) == 3:
            statistics.append(triple(place, numbers, limits))
        elif value is not None:  # an argument of this name need not be about pixels
            notes.append(f"{place} is {shown(value)}, not 3 numbers, and was not used")
    if len(statistics) == 2:
        return statistics[0], statistics[1], "from the file"
    name = re.sub(r"[^a-z0-9]", "", (clues.word("dataset") or "")[:NAME_LIMIT].lower())
    if name in DATASETS:
        means, supcon, solo = DATASETS[name]
        return means, solo if "args.json" in clues.configs else supcon, f"those of {name}"
    return None, None, ""


@dataclass
class Sheet:
    """A config of preprocessing; what the caller gave is not looked for."""

    file: str
    values: Mapping[str, Any]
    given: Overrides
    notes: list[str]

    def part(self, name: str) -> "Sheet | None":
        """A nested part, or None."""
        inner = self.values.get(name)
        return Sheet(f"{self.file}: {name}", inner, self.given, self.notes) if isinstance(inner, Mapping) else None

    def __call__(self, check: Callable[..., Any], key: str, *limits: Any) -> Any:
        """The value of a key, checked."""
        return check(f"{self.file}: {key}", self.values.get(key), *limits)

    def statistics(self, mean: str, std: str, default: Preprocessing) -> dict[str, Any]:
        """Mean and std, or those of the default."""
        keys = {"mean": (mean, MEANS), "std": (std, STDS)}
        absent = self.given.no_normalize
        values = {name: None if absent or getattr(self.given, name) else self(triple, key, limits)
                 for name, (key, limits) in keys.items()}  # fmt: skip
        return {name: value or getattr(default, name) for name, value in values.items()}

    def side(self, key: str) -> int | None:
        """Pixels, unless the caller gave both sizes."""
        return None if self.given.resize and self.given.crop else self(side, key)

    def interpolation(self, key: str, ways: Mapping[Any, str], default: str) -> str:
        """The interpolation; another than those that are here is replaced by the default, and said."""
        way = self(choice, key, list(ways))
        if way is not None and ways[way] not in INTERPOLATIONS:
            self.notes.append(f"{self.file}: {key} is {ways[way]}; {default} is used instead")
        return ways[way] if way is not None and ways[way] in INTERPOLATIONS else default


PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
WAYS = {name: name for name in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "random")}


def _huggingface(sheet: Sheet, layout: Preprocessing) -> Preprocessing:
    size, crop, share = sheet.side("size"), sheet.side("crop_size"), sheet(number, "crop_pct", 0.1, 1)
    if size and share and not crop and size < 384:  # ConvNeXt's: of larger images everything is taken
        size, crop = int(size / share), size
    resize = (size or layout.resize) if sheet(flag, "do_resize") is not False else None
    pixels = replace(
        layout,
        resize=resize,
        crop=crop if crop and sheet(flag, "do_center_crop") is not False else resize or layout.crop,
        interpolation=sheet.interpolation("resample", PILLOW | WAYS, layout.interpolation
                                          if "resample" in sheet.values else "bilinear"),
    )  # fmt: skip
    if sheet(flag, "do_normalize") is False:
        return replace(pixels, mean=None, std=None)
    return replace(pixels, **sheet.statistics("image_mean", "image_std", Preprocessing()))


def _timm(sheet: Sheet, layout: Preprocessing) -> Preprocessing | None:
    trained = sheet.part("pretrained_cfg")
    if trained is None:
        return None
    size = trained.values.get("input_size")
    if isinstance(size, (list, tuple)) and len(size) == 3:
        trained.values = {**trained.values, "input_size": size[1:]}
    crop, share = trained.side("input_size") or layout.crop, trained(number, "crop_pct", 0.1, 1)
    return Preprocessing(
        resize=int(crop / share) if share and crop else crop,
        crop=crop,
        interpolation=trained.interpolation("interpolation", WAYS, layout.interpolation),
        **trained.statistics("mean", "std", Preprocessing()),
    )


def _open_clip(sheet: Sheet, layout: Preprocessing) -> Preprocessing | None:
    trained = sheet.part("preprocess_cfg")
    if trained is None:
        return None
    way = trained.interpolation("interpolation", WAYS, "bicubic")
    return replace(layout, interpolation=way, **trained.statistics("mean", "std", layout))
