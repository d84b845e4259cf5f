"""Any network as an encoder: a module that gives representations, and its layers by name."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.data.preprocessing import Preprocessing
from collapse.moved import Renamed, renamed

# The main blocks of residual networks, transformers and pyramids, as their modules are called.
BLOCK = re.compile(r"(.+\.)?(layer\d+\.\d+|blocks\.\d+|stages\.\d+\.\d+|encoder_layer_\d+|features\.\d+\.\d+)")

INPUT = "input:"


class Encoder(nn.Module):
    """A network, loaded or given: images (n, 3, h, w), preprocessed -> representation (n, d).

    Attributes:
        backbone: the network.
        projector: its projector, (n, d) -> (n, m), or None.
        preprocess: PIL image -> (3, h, w) float32, as the network wants it; or `Words`, `Waves`, `Frames`.
        takes: "images", "texts", "sounds" or "clips".
        blocks: names for `layer` of the main blocks in forward order, the stem of a residual network first.
        report: what was loaded and what was not: path, sha256, container, architecture, feature_dim, branch,
            branches_left, projector, preprocessing, keys, foreign, warnings (schema collapse.checkpoint/1).

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from collapse import load
        >>> net = load(resnet18().state_dict())
        >>> tuple(net(torch.zeros(2, 3, 32, 32)).shape), net.blocks[:2]
        ((2, 512), ['maxpool', 'layer1.0'])
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module | None,
        preprocess: Any,
        report: dict[str, Any],
        axes: str = "nchw",
        stem: str = "",
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.preprocess, self.report = backbone, projector, preprocess, report
        self.axes, self.takes = axes, getattr(preprocess, "takes", "images")
        self.blocks = block_names(backbone, stem)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) float32, preprocessed -> representation (n, d). Raises InputError, which names the file."""
        try:
            return self.backbone(images)
        except InputError as error:
            path = self.report["path"]
            raise InputError(f"{path}: {error}" if path else str(error)) from None

    def source(self, layer: str) -> dict[str, Any]:
        """What a result says of the network and layer it is of: the JSON document's `source`."""
        names = ("path", "sha256", "architecture", "branch", "keys", "preprocessing", "foreign")
        return {"kind": "checkpoint", "layer": layer, **{name: self.report[name] for name in names}}

    def layer(self, name: str) -> "Layer":
        """The network up to a layer: "representation", "projector" or a module's name; feature maps are averaged.

        Of a transformer's tokens those are taken that its representation takes: the class token, or the mean of
        the patches.  Raises InputError, which lists the names, for a wrong one.
        """
        return Layer(self, name)


class Module(Encoder):
    """Any module as an encoder that takes its input as it is; a feature map is averaged over its positions.

    pool: "cls" or "mean", which of the tokens (n, t, d) are the representation; None refuses tokens.
    """

    def __init__(
        self,
        net: nn.Module,
        preprocess: Preprocessing | None = None,
        report: Mapping[str, Any] | None = None,
        pool: str | None = None,
    ) -> None:
        empty = dict.fromkeys(("path", "sha256", "branch", "keys", "preprocessing"))
        facts = {"architecture": type(net).__name__, "foreign": [], "warnings": []}
        bare = preprocess or Preprocessing(None, None, mean=None, std=None)
        super().__init__(net, None, bare, {**empty, **facts, **(report or {})})
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """(n, ...) -> (n, d). Raises InputError: the module gives no one vector an input, or fails."""
        try:
            out = self.backbone(images)
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, (InputError, torch.OutOfMemoryError)):
                raise
            line = str(error).partition("\n")[0][:200]
            raise InputError(f"source: the network fails on a batch of shape {tuple(images.shape)} ({line})") from error
        what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        if isinstance(out, Tensor) and out.ndim == 4:
            out = out.mean((2, 3))
        if isinstance(out, Tensor) and out.ndim == 3 and self.pool:
            out = out.mean(1) if self.pool == "mean" else out[:, 0]
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
            tokens = isinstance(out, Tensor) and out.ndim == 3
            hint = "give pool=cls or pool=mean, or wrap" if tokens else "wrap"
            raise InputError(f"source: the network gives {what}, expected (n, d); {hint} it in a module that does")
        return out


def block_names(backbone: nn.Module, stem: str = "") -> list[str]:
    """The names of the main blocks, in forward order, after the stem; a block within a block is not one."""
    if main := getattr(backbone, "main_blocks", None):
        return list(main)
    names = [stem] if stem else []
    for name, module in backbone.named_modules():
        if "features." in name and "Block" not in type(module).__name__:  # torchvision's stems and downsamplings
            continue
        # What is inside of a module comes right behind it.
        if BLOCK.fullmatch(name) and not name.startswith(tuple(f"{outer}." for outer in (*names[-1:], stem) if outer)):
            names.append(name)
    # An architecture that calls its blocks otherwise: its parts.
    return names or [name for name, part in backbone.named_children() if next(part.parameters(), None) is not None]


def given_by(net: Encoder, output: Any) -> Any:
    """What a block gives, of a network of transformers without its attention."""
    if isinstance(output, tuple) and output and hasattr(net.backbone, "main_blocks"):
        return output[0]
    return output


class LayerHooks:
    """Hooks on inner layers of an encoder that keep the rows (n, d) of its last forward pass, until `remove`.

    Feature maps become their mean over positions; of a transformer's tokens those are taken that its representation
    takes, the class token or the mean of the patches.  With `positions` K, both become K of their positions (of the
    patches), drawn at random, as rows of their own, which see what the mean hides.

    names: of modules of the backbone, or projector.NAME; with "input:" before it, what goes into the module.
    rows: name -> (n, d), or (n K, d).

    Raises InputError: a name that no module has; the error lists those there are.
    """

    def __init__(self, net: Encoder, names: Sequence[str], positions: int = 0, seed: int = 0) -> None:
        modules = dict(net.backbone.named_modules())
        if net.projector is not None:
            modules |= {f"projector.{name}": module for name, module in net.projector.named_modules() if name}
        for name in names:
            if not name.removeprefix(INPUT) or name.removeprefix(INPUT) not in modules:
                inner = ", ".join(_offered(net))
                raise InputError(f"layer: no {name!r}; there are representation, projector, {inner}")
        self.net, self.rows, self.positions = net, dict[str, Tensor](), positions
        self.generator = torch.Generator().manual_seed(seed)
        self._hooks = [
            modules[name.removeprefix(INPUT)].register_forward_hook(partial(self._see, name)) for name in names
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._keep(name, inputs[0] if name.startswith(INPUT) else output)

    def _keep(self, name: str, output: Any) -> None:
        output = given_by(self.net, output)
        # Pooled at once, since what follows may change a feature map in place.
        wrong = f"layer {name}: gives no one vector an image"
        if not isinstance(output, Tensor):
            raise InputError(f"{wrong}, but a {type(output).__name__}; there are {', '.join(self.net.blocks)}")
        if output.ndim == 2:
            self.rows[name] = output.clone()
            return
        if output.ndim not in (3, 4):
            raise InputError(f"{wrong}, but shape {tuple(output.shape)}; there are {', '.join(self.net.blocks)}")
        places, summary = self._places(name, output)
        self.rows[name] = self._sampled(places) if self.positions else summary

    def _places(self, name: str, output: Tensor) -> tuple[Tensor, Tensor]:
        """(n, positions, d) and (n, d) of a feature map or tokens."""
        if output.ndim == 4:
            tokens_first = self.net.axes == "nhwc"
            places = output.flatten(1, 2) if tokens_first else output.flatten(2).mT
            return places, output.mean((1, 2) if tokens_first else (2, 3))
        if self.net.axes != "tokens" or name.startswith("patch_embed"):
            return output, output.mean(1)
        backbone = self.net.backbone
        summary: Any = getattr(backbone, "summary", None)
        if summary is not None:
            return output, summary(output)
        patches = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
        by_class = getattr(backbone, "global_pool", "token") == "token"
        return patches, output[:, 0].clone() if by_class else patches.mean(1)

    def _sampled(self, places: Tensor) -> Tensor:
        mask = getattr(self.net.backbone, "mask", None)  # 1 where a text has a piece
        real = torch.ones(places.shape[:2]) if mask is None else mask.cpu()
        order = torch.rand(places.shape[:2], generator=self.generator) + 2 * (real == 0)
        drawn = order.argsort(1)[:, : self.positions]
        rows = torch.take_along_dim(places, drawn.to(places.device)[..., None], 1)
        return rows[(torch.take_along_dim(real, drawn, 1) > 0).to(places.device)]


class Layer(nn.Module):
    """Images -> (n, d) at one layer of an encoder.

    Raises InputError: the projector is asked for and there is none, or it is not read.
    """

    taps = Renamed("hooks")

    def __init__(self, net: Encoder, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        if name == "projector" and net.projector is None:
            projector = net.report.get("projector_problem")
            why = f"its projector is not read: {projector}" if projector else "has no projector"
            raise InputError(f'{net.report["path"]}: {why}; use layer="representation"')
        self.hooks = LayerHooks(net, [] if name in ("representation", "projector") else [name])

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, d). Raises InputError if the layer gives no one vector an image."""
        self.hooks.rows.clear()
        r = self.net(images)
        if self.name == "representation":
            return r
        if self.name == "projector" and self.net.projector is not None:
            return self.net.projector(r)
        seen = self.hooks.rows.pop(self.name, None)
        if seen is None or len(seen) != len(images):
            raise InputError(f"layer {self.name}: gives no one vector an image; there are {', '.join(self.net.blocks)}")
        return seen


def _offered(net: Encoder) -> list[str]:
    parts = [name for name, _ in net.backbone.named_children()]
    return [*parts, *(name for name in net.blocks if name not in parts)]


__getattr__ = renamed(__name__)
