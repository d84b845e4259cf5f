"""What a checkpoint becomes: a module that gives representations, and its layers by name."""

import re
from typing import Any

from torch import Tensor, nn

from collapse import InputError
from collapse.images import Preprocessing

# The main blocks of residual networks, transformers and pyramids, as their modules are called.
BLOCK = re.compile(r"(.+\.)?(layer\d+\.\d+|blocks\.\d+|stages\.\d+\.\d+|encoder_layer_\d+|features\.\d+\.\d+)")


class Encoder(nn.Module):
    """A loaded network: images (n, 3, h, w), preprocessed -> representation (n, d).

    Attributes:
        backbone: the network.
        projector: its projector, (n, d) -> (n, m), or None.
        preprocess: PIL image -> (3, h, w) float32, as the network wants it.
        blocks: names for `layer` of the main blocks in forward order, the stem of a residual network first.
        report: what was loaded and what was not: path, sha256, container, architecture, feature_dim, branch,
            branches_left, projector, preprocessing, keys, foreign, warnings (schema collapse.checkpoint/1).
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module | None,
        preprocess: Preprocessing,
        report: dict[str, Any],
        axes: str = "nchw",
        stem: str = "",
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.preprocess, self.report = backbone, projector, preprocess, report
        self.axes = axes
        self.blocks = block_names(backbone, stem)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def layer(self, name: str) -> "Layer":
        """The network up to a layer: "representation", "projector" or a module's name; feature maps are averaged.

        Of a transformer's tokens those are taken that its representation takes: the class token, or the mean of
        the patches.  Raises InputError, which lists the names, for a wrong one.
        """
        return Layer(self, name)


def block_names(backbone: nn.Module, stem: str = "") -> list[str]:
    """The names of the main blocks, in forward order, after the stem; a block within a block is not one."""
    names = [stem] if stem else []
    for name, module in backbone.named_modules():
        if "features." in name and "Block" not in type(module).__name__:  # torchvision's stems and downsamplings
            continue
        if BLOCK.fullmatch(name) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    # An architecture that calls its blocks otherwise: its parts.
    return names or [name for name, part in backbone.named_children() if next(part.parameters(), None) is not None]


class Layer(nn.Module):
    """Images -> (n, d) at one layer of an encoder."""

    def __init__(self, net: Encoder, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        self._seen: Tensor | None = None
        if name == "projector" and net.projector is None:
            projector = net.report.get("projector_problem")
            why = f"its projector is not read: {projector}" if projector else "has no projector"
            raise InputError(f"{net.report['path']}: {why}; use --layer representation")
        if name not in ("representation", "projector"):
            modules = dict(net.backbone.named_modules())
            if not name or name not in modules:
                inner = ", ".join(_offered(net))
                raise InputError(f"layer: no {name!r}; there are representation, projector, {inner}")
            modules[name].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Averaged at once, since what follows may change a feature map in place.
        self._seen = self._pooled(output)

    def _pooled(self, output: Any) -> Tensor:
        wrong = f"layer {self.name}: gives no one vector an image"
        if not isinstance(output, Tensor):
            raise InputError(f"{wrong}, but a {type(output).__name__}; there are {', '.join(self.net.blocks)}")
        if output.ndim == 4 and (self.net.axes != "tokens" or self.name.startswith("patch_embed")):
            return output.mean((1, 2) if self.net.axes == "nhwc" else (2, 3))
        if output.ndim == 3:
            return self._tokens(output)
        if output.ndim == 2:
            return output.clone()
        raise InputError(f"{wrong}, but shape {tuple(output.shape)}; there are {', '.join(self.net.blocks)}")

    def _tokens(self, output: Tensor) -> Tensor:
        backbone = self.net.backbone
        if self.net.axes != "tokens" or self.name.startswith("patch_embed"):
            return output.mean(1)
        if getattr(backbone, "global_pool", "token") == "token":
            return output[:, 0].clone()
        return output[:, getattr(backbone, "num_prefix_tokens", 0) :].mean(1)

    def forward(self, images: Tensor) -> Tensor:
        self._seen = None
        r = self.net(images)
        if self.name == "representation":
            return r
        if self.name == "projector" and self.net.projector is not None:
            return self.net.projector(r)
        seen, self._seen = self._seen, None
        if seen is None or len(seen) != len(images):
            raise InputError(f"layer {self.name}: gives no one vector an image; there are {', '.join(self.net.blocks)}")
        return seen


def _offered(net: Encoder) -> list[str]:
    parts = [name for name, _ in net.backbone.named_children()]
    return [*parts, *(name for name in net.blocks if name not in parts)]
