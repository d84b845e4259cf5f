"""What decides a training run's result: the paper's recipe as defaults, presets as plain JSON, any value by flag.

The defaults are those of the paper's trainer for ResNet-50 on ImageNet (arXiv 2110.09348, section 6): batch 4096, LARS,
peak learning rate 4.8, 10 epochs of warm-up, a cosine to a thousandth of the peak, and an asymmetric pair of views.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from collapse import InputError
from collapse.results import load_json

if TYPE_CHECKING:  # the command line asks for the flags: without torch, which takes a second
    from collapse.data.preprocessing import Preprocessing
    from collapse.recipes.views import Augmentation

PRESETS = Path(__file__).with_name("presets")
CONTRASTIVE, PREDICTED = ("simclr", "directclr"), ("simsiam", "byol")  # the second have a predictor
METHODS = (*CONTRASTIVE, "barlow-twins", "vicreg", *PREDICTED)
OPTIMIZERS, PRECISIONS = ("lars", "sgd"), ("bf16", "float32")
NEGATIVES = ("other", "all")
OWN = {
    "temperature": CONTRASTIVE, "negatives": CONTRASTIVE, "redundancy": ("barlow-twins",),
    "vicreg_weights": ("vicreg",), "predictor_dim": PREDICTED, "target_momentum": ("byol",),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All that decides a run's result; the comments say what a value means."""

    method: str = "simclr"  # one of METHODS: their losses see head(r); directclr: the first dim entries of r
    head: str = ""  # one of models.HEADS; empty: none for directclr, expander for barlow-twins and vicreg, else mlp
    dim: int = 0  # width of the embedding, d0 of a low-rank one; 0: the paper's share of the width
    depth: int = 1  # layers of a linear head
    arch: str = "resnet50"  # see models.make_backbone; of a resnet, these change:
    blocks: tuple[int, ...] = ()  # residual blocks a stage
    planes: tuple[int, ...] = ()  # width a stage; of an mlp, its layers' widths
    stem: int = 7  # first convolution: 7, or 3 for small images
    zero_init: bool = True  # residual blocks start as the identity

    image_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: float = 4 / 3
    degrees: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float] = (1.0, 0.1)  # probability in the first and in the second view
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float] = (0.0, 0.2)  # likewise
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    temperature: float = 0.1
    negatives: str = "other"  # other: of the other view, the paper's; all: of both (NT-Xent)
    redundancy: float = 5e-3  # barlow-twins: lambda, weight of what is beside the diagonal
    vicreg_weights: tuple[float, float, float] = (25.0, 25.0, 1.0)  # of invariance, variance, covariance
    predictor_dim: int = 0  # simsiam, byol: hidden width of the predictor; 0: the paper's share
    target_momentum: float = 0.996  # byol: share of itself that the target keeps a step, at the start; at the end 1

    optimizer: str = "lars"
    epochs: int = 100
    batch_size: int = 4096  # images a step, of all processes together
    lr: float = 4.8  # at the peak; when a batch size is given without it, it is scaled in proportion
    final_lr: float = 0.001  # share of the peak at the end
    warmup: float = 10  # epochs
    momentum: float = 0.9
    weight_decay: float = 1e-6
    eta: float = 0.001  # LARS: length of a step as a share of the weights
    classifier_lr: float = 0.1  # peak for the online classifier
    chunks: int = 1  # gradient caching: batch norm sees 1 / chunks of the batch, which changes the result
    precision: str = "bf16"  # bf16: autocast, the loss in float32
    seed: int = 0

    def augmentation(self, view: int) -> "Augmentation":
        """The random views of place `view`, 0 or 1."""
        from collapse.recipes.views import Augmentation

        same = ("scale", "ratio", "degrees", "flip", "jitter", "brightness", "contrast", "saturation", "hue")
        values = {name: getattr(self, name) for name in (*same, "grayscale", "sigma")}
        return Augmentation(self.image_size, blur=self.blur[view], solarize=self.solarize[view], **values)

    def preprocessing(self) -> "Preprocessing":
        """How images are seen when the network is evaluated: the paper's resize and centre crop; small ones whole."""
        from collapse.data.preprocessing import Preprocessing

        resize = round(self.image_size * 256 / 224) if self.image_size > 96 else self.image_size
        return Preprocessing(resize, self.image_size, "bilinear", self.mean, self.std)

    def check(self) -> "Config":
        """Itself; raises InputError for a value that means nothing."""
        for name, kind, many in flags():
            value = getattr(self, name)
            wanted = (int, float) if kind is float else kind
            if not isinstance(value, tuple) if many else not isinstance(value, wanted):
                raise InputError(f"{name}: got {_short(value)}, expected {'a list of ' if many else ''}{kind.__name__}")
            if many and (not all(isinstance(v, wanted) for v in value) or many not in ("*", len(value))):
                raise InputError(f"{name}: got {_short(list(value))}, expected {many} of {kind.__name__}")
        for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: got {_short(getattr(self, name))}, expected {' or '.join(known)}")
        if self.negatives not in NEGATIVES:
            raise InputError(f"negatives: got {_short(self.negatives)}, expected {' or '.join(NEGATIVES)}")
        if self.method == "directclr" and self.head not in ("", "none", "lowrank-diagonal"):
            raise InputError(f'directclr has no projector: give head="none", not {self.head}')
        for name in ("image_size", "epochs", "batch_size", "lr", "temperature", "chunks", "ratio"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("seed", "warmup", "momentum", "weight_decay", "eta", "final_lr", "classifier_lr", "dim"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        self._check_method()
        if self.batch_size % self.chunks:
            raise InputError(f"chunks: {self.chunks} do not divide the batch of {self.batch_size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale: got {self.scale}, expected two shares of the area in rising order")
        return self

    def _check_method(self) -> None:
        if self.method not in CONTRASTIVE and self.head == "group":
            raise InputError(f"head group: each group has an InfoNCE of its own; {self.method} takes another head")
        if self.method in ("barlow-twins", "vicreg") and self.batch_size < 2:
            raise InputError(f"batch_size: got {self.batch_size}, {self.method} has statistics of 2 images or more")
        if min(self.redundancy, *self.vicreg_weights, self.predictor_dim) < 0:
            raise InputError("redundancy, vicreg_weights, predictor_dim: expected 0 or more")
        if not 0 <= self.target_momentum <= 1:
            raise InputError(f"target_momentum: got {self.target_momentum}, expected a share, 0 to 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as config.json holds them: those that the method has."""
        names = [name for name in asdict(self) if self.method in OWN.get(name, METHODS)]
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}


def refuse_unused(method: str, names: Iterable[str]) -> None:
    """Raise InputError if one of the values named is of other methods."""
    for name in names:
        if method in METHODS and method not in OWN.get(name, METHODS):
            raise InputError(f"{name}: {method} has none, {' and '.join(OWN[name])} only; leave it out")


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def presets() -> list[str]:
    """The names that `load_preset` knows."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str) -> dict[str, Any]:
    """The values of a preset, by its name or the path of a JSON file.

    Raises InputError: no such preset, or a value that Config does not have.
    """
    path = PRESETS / f"{name}.json" if name in presets() else Path(name)
    if not os.path.lexists(path):
        raise InputError(f"preset: no {name!r}; there are {', '.join(presets())}, or give a JSON file")
    values = load_json(path)
    known = {field.name for field in fields(Config)}
    unknown = sorted(values.keys() - known) if isinstance(values, dict) else ["(no object)"]
    if unknown:
        raise InputError(f"{path}: unknown value {unknown[0]!r:.80}; known are {', '.join(sorted(known))}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        if "method" in values:
            refuse_unused(values["method"], values)
        Config(**values).check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return values


def make_config(preset: str, **given: Any) -> Config:
    """The preset with what is given changed; a new batch size without `lr` scales the preset's rate in proportion.

    Raises InputError: no such preset, a value out of range, or one that the method does not use.
    """
    values = load_preset(preset)
    usual = Config(**values)
    refuse_unused(given.get("method", usual.method), given)
    if "batch_size" in given and "lr" not in given:
        given["lr"] = usual.lr * given["batch_size"] / usual.batch_size
    return Config(**{**values, **given}).check()


def flags() -> list[tuple[str, type, int | str | None]]:
    """(name, type of one value, number of values: None for one, "*" for any) of each field of Config."""
    options: list[tuple[str, type, int | str | None]] = []
    for name, hint in get_type_hints(Config).items():
        inner = getattr(hint, "__args__", None)
        if inner is None:
            options.append((name, hint, None))
        else:
            options.append((name, inner[0], "*" if inner[-1] is Ellipsis else len(inner)))
    return options
