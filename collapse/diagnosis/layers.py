"""The covariances of every layer, streamed from one pass over views, and from them each layer's block of a diagnosis.

Two covariances a layer are kept, of all rows and of the images' means; their difference is the covariance within
images.  Rows are not divided by their norms: what is constant would vary, and the layers would not be linear in what
went before.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse.diagnosis.result import Block
from collapse.encoders.passes import embed_layers, errors_of, readable
from collapse.encoders.processes import in_order
from collapse.metrics import lidar_of
from collapse.metrics.attribution import (
    LINE,
    Attribution,
    attribute,
    examine_map,
    signal_and_augmentation,
    signal_modes,
)
from collapse.models.encoder import INPUT, Encoder
from collapse.spectra import Spectrum
from collapse.spectra.covariance import Covariance

ROWS = 512  # rows that wait for one product: with fewer, reading and writing the (d, d) sums is most of the work


class LayerCovariances:
    """The streaming covariances of all layers, and what one batch tells of rounding and of the last linear maps.

    start: (b, ...), the first batch as the network takes it, its views one after another.
    """

    def __init__(self, net: Encoder, start: Tensor, views: int, how: dict[str, Any]) -> None:
        last = ["representation", *(["projector"] if net.projector is not None else [])]
        fit = readable(net, start[:2], **how)
        left = [name for name in net.blocks if name not in fit]
        self.notes = [f"layer {name}: gives no one vector an image, left out" for name in left]
        self.net, self.names, self.views, self.how = net, [*(n for n in net.blocks if n in fit), *last], views, how
        self.maps = {name: linear for name in last if (linear := last_map(net, name, start[:2], how))}
        self.places = [*self.names, *(INPUT + name for name, _ in self.maps.values())]
        self.errors, more = errors_of(net, self.names, start[:16], False, how)
        self.notes += more
        self.on = None if how["device"] == "cpu" else how["device"]
        self.totals: dict[str, Covariance] = {}
        self.means: dict[str, Covariance] = {}
        self.waiting: dict[str, list[Tensor]] = {}
        self.images = 0

    def add(self, batches: Iterable[Tensor], distributed: bool = False) -> None:
        """Add all batches, (b, ...) each, the views of an image one after another; of every process, if shared."""
        for rows in in_order(embed_layers(self.net, self.places, batches, **self.how), distributed):
            for name, z in rows.items():
                self.waiting.setdefault(name, []).append(z)
            self.images += len(z) // self.views
            if sum(map(len, self.waiting[name])) >= ROWS:
                self.flush()
        self.flush()

    def flush(self) -> None:
        """Add what waits to the covariances."""
        for name, parts in self.waiting.items():
            z = torch.cat(parts)
            if name not in self.totals:
                self.totals[name] = Covariance(z.shape[1], normalize=False, device=self.on)
                self.means[name] = Covariance(z.shape[1], normalize=False, device=self.on)
            self.totals[name].update(z)
            self.means[name].update(z.double().unflatten(0, (-1, self.views)).mean(1))
        self.waiting.clear()

    def parts(self, name: str) -> tuple[NDArray, NDArray]:
        """(S, A) of what was seen under a name: (d, d) each, float64. Raises InputError: fewer than 2 images."""
        matrices = self.totals[name].matrix(), self.means[name].matrix()
        return signal_and_augmentation(*matrices, self.images, self.views)

    def block(self, name: str, threshold: float, images: dict[str, Any], line: float = LINE) -> Block:
        """The result at one layer."""
        total, errors = self.totals[name], self.errors.get(name)
        spectrum = total.measured(threshold, rounding=errors, source=self.net.source(name), images=images)
        S, A = self.parts(name)
        dead = total.constant(errors)
        attribution = attribute(total.matrix(), S, A, dead, spectrum.floor, threshold, self.images, self.views, line)
        resolved = attribution.directions[:, np.isin(attribution.causes, ("alive", "augmentation", "implicit"))]
        fractions, shares = np.full((2, len(dead)), np.nan)
        fractions[: resolved.shape[1]], shares[: resolved.shape[1]] = signal_modes(S, S + A, resolved)
        return Block(
            spectrum,
            attribution,
            fractions,
            lidar_of(S + A / self.views, A),
            self._through(name, attribution, spectrum),
            shares,
        )

    def _through(self, name: str, attribution: Attribution, spectrum: Spectrum) -> dict[str, Any] | None:
        if name not in self.maps:
            return None
        module, weight = self.maps[name]
        S, A = self.parts(INPUT + module)
        if weight.shape != (len(attribution.causes), len(S)):
            return None
        return {"module": module, **examine_map(weight, S, A, spectrum.floor, attribution)}


@torch.no_grad()
def last_map(net: Encoder, layer: str, rows: Tensor, how: dict[str, Any]) -> tuple[str, NDArray] | None:
    """(name, weight (d, h) float64) of the last linear map or convolution that runs before a layer.

    rows: (b, ...), some images as the network takes them.
    A batch norm of its output is folded in; a kernel is summed over its positions, which is exact for means over a
    feature map without edges.  None if there is none, or if it has groups.
    """
    prefix, part = ("projector.", net.projector) if layer == "projector" else ("", net.backbone)
    ran: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
    named = [(prefix + name, module) for name, module in (part or nn.Identity()).named_modules() if name]
    hooks = [
        module.register_forward_hook(lambda module, inputs, out, name=name: ran.append((name, module, inputs[0], out)))
        for name, module in named
        if isinstance(module, kinds)
    ]
    try:
        for _ in embed_layers(net, [layer], [rows], **how):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    places = [at for at, (_, module, _, _) in enumerate(ran) if isinstance(module, kinds[:2])]
    if not places or getattr(ran[places[-1]][1], "groups", 1) != 1:
        return None
    name, module, _, made = ran[places[-1]]
    weight = module.get_parameter("weight").double()
    weight = weight.sum((2, 3)) if weight.ndim == 4 else weight
    after = next((norm for _, norm, taken, _ in ran[places[-1] + 1 :] if taken is made), None)
    if isinstance(after, (nn.BatchNorm1d, nn.BatchNorm2d)) and after.running_var is not None:
        scale = (after.running_var.double() + after.eps).rsqrt()
        weight = weight * (scale * after.weight.double() if after.affine else scale)[:, None]
    return name, weight.cpu().numpy()
