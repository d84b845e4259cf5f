"""What the tensors of an encoder say it is, and what else in the file helps to say it."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints import settings
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.settings import shown
from collapse.files.containers import first_line
from collapse.models.meta import on_meta

INTERPOLATIONS = ("bilinear", "bicubic")
POOLS = ("cls", "mean", "max", "last")
MOST = {"heads": 4096, "stem_padding": 64, "resize": settings.SIDE_LIMIT, "crop": settings.SIDE_LIMIT}


@dataclass(frozen=True)
class Overrides:
    """What the caller knows better than the file; None leaves the file's or the default value.

    arch: the architecture it must be, or timm's or torchvision's name of it where its tensors do not tell.
    branch: the root of the encoder; projector: the key prefix of its projector, or "none".
    heads: attention heads; activation: "gelu" or "quick_gelu"; pool: "cls" or "mean", of a transformer's tokens; of
        texts also "max" and "last".
    stem_padding, maxpool: of a residual network's 3 x 3 stem.  dim: DirectCLR's sub-vector becomes the projector.
    projector_layers: 2 leaves out the second of three layers (PatrickHua/SimSiam on CIFAR).
    resize, crop, interpolation, mean, std, no_normalize: preprocessing.
    allow_unknown: go on when some tensors belong to nothing known.
    weights: the file with the tensors of a network that FILE.py:NAME or PACKAGE.MODULE:NAME builds.

    Examples:
        >>> from torchvision.models import resnet18
        >>> from collapse import load
        >>> load(resnet18().state_dict(), resize=64, crop=56).preprocess.crop
        56
    """

    arch: str | None = None
    branch: str | None = None
    projector: str | None = None
    projector_layers: int | None = None
    heads: int | None = None
    activation: str | None = None
    pool: str | None = None
    dim: int | None = None
    stem_padding: int | None = None
    maxpool: bool | None = None
    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    no_normalize: bool = False
    allow_unknown: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        choices = {"pool": POOLS, "activation": ("gelu", "quick_gelu"), "interpolation": INTERPOLATIONS}
        lowest = {"heads": 1, "dim": 1, "projector_layers": 1, "stem_padding": 0, "resize": 1, "crop": 1}
        for name, allowed in choices.items():
            settings.choice(f"{name}=", getattr(self, name), allowed)
        for name, low in lowest.items():
            settings.whole_number(f"{name}=", getattr(self, name), low, MOST.get(name, 1 << 20))
        for name in ("arch", "branch", "projector", "weights"):
            settings.text(f"{name}=", getattr(self, name))
        for name in ("maxpool", "no_normalize", "allow_unknown"):
            settings.flag(f"{name}=", getattr(self, name))
        settings.channels("mean=", self.mean, settings.MEANS)
        settings.channels("std=", self.std, settings.STDS)
        if (mean := len(self.mean or (0, 0, 0))) != (std := len(self.std or (0, 0, 0))):
            raise InputError(f"mean= holds {mean} and std= {std} numbers; give both, one a channel of the images")


@dataclass
class Clues:
    """Everything but the tensors of the encoder: the caller's word, the configs, the other keys; and what was assumed.

    keys: all keys of the file.  hints: (place, value) of names in its config, arguments or hyper-parameters.
    folder: where it lies, None of what is no file.
    """

    given: Overrides
    keys: Collection[str]
    root: str
    container: str = ""
    configs: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    head_is_embedding: bool = False
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    @property
    def model_type(self) -> str | None:
        """The kind of network that a config.json of transformers names."""
        name = self.configs.get("config.json", {}).get("model_type")
        return name if isinstance(name, str) else None

    def has(self, pattern: str) -> bool:
        """Whether some key of the file matches."""
        return any(re.search(pattern, key) for key in self.keys)

    def hint(self, name: str) -> tuple[str, Any]:
        """(place, value) of a name in a config, the arguments or hyper-parameters; the value may be None."""
        return self.hints.get(name, ("", None))

    def word(self, name: str) -> str | None:
        """A text among the hints. Raises InputError: a config.json has another value, where only a text can stand."""
        place, value = self.hint(name)
        return settings.text(place, value) if place.startswith("config.json") or isinstance(value, str) else None

    def epsilon(self) -> float | None:
        """The epsilon of the layer norms by the config. Raises InputError: it is no number above 0, at most 1."""
        return settings.number(*self.hint("layer_norm_eps"), 1e-30, 1)


def refuse_flags(name: str, clues: Clues) -> None:
    """Raise InputError for the caller's word on what a library's network decides by itself: it would not be heard."""
    for flag in ("heads", "activation"):
        if getattr(clues.given, flag) is not None:
            raise InputError(f"{flag}=: {shown(name)[1:-1]} has its own; leave it out")


@dataclass
class Plan:
    """An architecture and the tensors that go into it.

    make: builds it, on whatever device is current.  weights: under the names of its state dict, and left-overs.
    width: d of its output (n, d).  pixels: the layout's `Preprocessing`, or that of texts.
    axes: how its feature maps lie: "nchw", "nhwc" or "tokens".  stem: the name of what comes before its blocks.
    constants: tensors of the state dict that no file has.  heads: a pattern of what may lie beside the encoder.
    """

    architecture: str
    make: Callable[[], nn.Module]
    weights: Weights
    width: int
    pixels: Any
    axes: str = "nchw"
    stem: str = ""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    heads: str = r"(?!)"


def build(plan: Plan) -> tuple[nn.Module, set[str], list[str]]:
    """(the network with all its weights, the file's keys in it, warnings); a missing or misshapen tensor is an error.

    First without memory, so that shapes are compared before anything of the size that a file claims is made.

    Raises InputError: a tensor is missing or misshapen, or such a network cannot be.
    """
    try:
        module = on_meta(plan.make)
    except Exception as error:  # the libraries' code refuses impossible sizes in many ways, all the file's fault
        raise InputError(f"not {plan.architecture}, such a network cannot be: {first_line(error)}") from error
    expected, given = module.state_dict(), {**plan.constants, **plan.weights.tensors}
    _compare(plan, expected, given)
    used = [name for name in expected if name in given]
    notes = _precision(used, given)
    state = {name: given[name].to(expected[name].dtype).contiguous() for name in used}
    absent = {name: torch.zeros_like(expected[name], device="cpu") for name in expected if name not in given}
    if any(name not in expected for name, _ in module.named_buffers()):  # those need real memory
        module = plan.make()
    _fill(module, state | absent)
    keys = {key for name in used if name in plan.weights.keys for key in plan.weights.keys[name]}
    return module, keys, notes


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put every tensor in its place; torch's own loading looks through all of them once a module."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in state.items():
        above, _, leaf = name.rpartition(".")
        old = parts[above].get_parameter(leaf) if leaf in parts[above]._parameters else None
        if old is None:
            parts[above].register_buffer(leaf, tensor)
        else:
            parts[above].register_parameter(leaf, nn.Parameter(tensor, old.requires_grad))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _compare(plan: Plan, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    # Batch norm counts its batches only since torch 0.4.
    missing = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(expected)} tensors of {plan.architecture} are missing, first {shown(missing[0])}"
        )
    wrong = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    if wrong:
        shapes = f"{tuple(given[wrong[0]].shape)}, expected {tuple(expected[wrong[0]].shape)}"
        raise InputError(f"not {plan.architecture}: {shown(wrong[0])} is {shapes} ({len(wrong)} such tensors)")
    for name in filter(given.__contains__, expected):
        if problem := unusable(name, given[name], expected[name].dtype):
            raise InputError(f"{shown(name)} {problem}")


def unusable(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """What makes a tensor of any shape no weights or statistics to compute with as `dtype`; None if nothing does."""
    stored = str(tensor.dtype).removeprefix("torch.")
    if dtype.is_floating_point and tensor.dtype not in FLOATS:
        eight = ", quantised: numbers that mean something only with their scale; dequantise it first"
        return f"is stored as {stored}, expected floating-point numbers" + (eight if tensor.element_size() == 1 else "")
    if not _finite(tensor) or (tensor.dtype != dtype and not _finite(tensor.to(dtype))):
        return "holds NaN or infinity, or numbers too large for float32"
    if name.split(".")[-1] == "running_var" and bool((tensor < 0).any()):
        return "is a variance and has negative numbers; the file is damaged"
    return None


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; the least and the largest say it in a fraction of the time, and NaN is both."""
    if tensor.dtype in FLOATS and tensor.numel():
        return all(math.isfinite(end.item()) for end in tensor.aminmax())
    return bool(torch.isfinite(tensor).all())


def _precision(used: Collection[str], given: Mapping[str, Tensor]) -> list[str]:
    kinds = {
        str(given[n].dtype).removeprefix("torch.") for n in used if given[n].dtype in (torch.float16, torch.bfloat16)
    }
    return [f"weights are stored as {' and '.join(sorted(kinds))}; computed in float32"] if kinds else []
