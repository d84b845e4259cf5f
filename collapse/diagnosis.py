"""Where and why a network collapses: every block's spectrum, split into signal and augmentation, and what took it.

Several augmented views of each image pass the network once.  For each block two streaming covariances are kept, of
all rows and of the images' means; their difference is the covariance within images.  attribution.py has the rule by
which directions are called alive, augmentation, implicit, rounding or dead.  Rows are not divided by their norms here:
what is constant would vary, and the layers would not be linear in what went before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from collapse import InputError
from collapse.attribution import (
    Attribution,
    at_other_lines,
    attribute,
    signal_and_augmentation,
    signal_fractions,
    through,
)
from collapse.checkpoints import Encoder
from collapse.checkpoints.encoder import INPUT
from collapse.covariance import Covariance
from collapse.evaluate import embed_layers, rounding
from collapse.images import Images, Preprocessing, pixel_batches
from collapse.metrics import lidar_of
from collapse.report import verdict
from collapse.results import command, to_json, versions
from collapse.spectra import Spectrum
from collapse.training.config import Config, make_config
from collapse.training.views import uniforms

ROWS = 512  # rows that wait for one product: with fewer, reading and writing the (d, d) sums is most of the work


class Augment(Protocol):
    """One random view of images: a function of the images (n, ...) and of draws (n, DRAWS) in [0, 1)."""

    @property
    def DRAWS(self) -> int: ...

    def __call__(self, images: Tensor, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """What was found at one layer.

    spectrum: of all rows, not normalised.  found: its directions by cause.  signal_fraction: (d,) generalised
    eigenvalues of S against T, descending; NaN for as many as lie at or below the floor.  lidar: LiDAR (arXiv
    2312.04000).  last_map: of the last layers, how their last linear map treats what is collapsed
    (attribution.through), or None.
    """

    spectrum: Spectrum
    found: Attribution
    signal_fraction: NDArray
    lidar: float
    last_map: dict[str, Any] | None = None

    @property
    def layer(self) -> str:
        """Its name."""
        return str(self.spectrum.source["layer"])

    def to_dict(self) -> dict[str, Any]:
        """Its part of the document collapse.diagnosis/1."""
        judged = self.found.judged()
        return {
            "layer": self.layer,
            "spectrum": self.spectrum.to_dict(),
            "signal_fraction": self.signal_fraction,
            "lidar": self.lidar,
            "rankme": self.spectrum.metrics()["rankme"],
            "attribution": self.found.counts(),
            "undecided": int(self.found.thin.sum()),
            "augmentation_at_line": at_other_lines(self.found),
            "alive": {"signal_fraction": self.found.fractions[self.found.of("alive")]},
            "collapsed": {
                "cause": self.found.causes[judged],
                "variance": self.found.variances[judged],
                "signal_fraction": self.found.fractions[judged],
                "undecided": self.found.thin[judged],
            },
            "last_map": self.last_map,
        }


@dataclass(frozen=True)
class Diagnosis:
    """The blocks in the order of the forward pass, and how they were measured.

    about: source, images, views, seed, threshold, augmentation, warnings, as in the document collapse.diagnosis/1.
    """

    blocks: list[Block]
    about: dict[str, Any]

    @property
    def verdict(self) -> str:
        """One paragraph with the numbers it rests on."""
        return verdict(self)

    def rank_lost(self) -> list[dict[str, Any]]:
        """Effective rank, alive directions and width before and after each block but the first."""
        rows = []
        for before, after in pairwise(self.blocks):
            pair = (before, after)
            rows.append(
                {
                    "from": before.layer,
                    "to": after.layer,
                    "effective_rank": [b.spectrum.metrics()["effective_rank"] for b in pair],
                    "alive": [b.found.counts()["alive"] for b in pair],
                    "width": [b.spectrum.dim for b in pair],
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.diagnosis/1, with values that may still be NaN."""
        return {
            "schema": "collapse.diagnosis/1",
            **self.about,
            "blocks": [block.to_dict() for block in self.blocks],
            "rank_lost": self.rank_lost(),
            "verdict": self.verdict,
            "command": command(),
            "versions": versions("numpy", "scipy", "torch", "torchvision"),
        }

    def to_json(self) -> str:
        """Strict JSON text of schema collapse.diagnosis/1."""
        return to_json(self.to_dict())


def diagnose(
    net: nn.Module,
    images: str | PathLike | Tensor | Iterable[Any],
    views: int = 4,
    *,
    augmentations: Sequence[Augment] | None = None,
    threshold: float = 1e-6,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    **about: Any,
) -> Diagnosis:
    """Where and why `net` collapses, from `views` augmented views of each image, in one pass; see attribution.py.

    Args:
        net: what `collapse.load` gives, or any module from a batch to (n, d), whose children are then the blocks;
            those that give no one vector an image are left out with a warning.  Its modes come back as they were.
        images: a folder, zip or list; (n, 3, h, w) uint8, or float in 0..1; or an iterable of such batches, or of
            tuples that begin with one.  With `augmentations` of your own, whatever these take.
        augmentations: view v of an image is the v-th of these, and again from the first; default: `paper_augmentations`
            at the network's image size, before its mean and std.
        threshold: collapsed is below it times the largest variance.
        seed: of the views; a view depends on it, the number of the image and that of the view alone.
        batch_size: rows a forward pass, at least one image's views.
        workers: processes that decode a path's images.
        precision: "float32" or "bf16".
        about: provenance for the document: path and skipped of the images, augmentation, warnings.

    Raises InputError: fewer than two views or images, an image that cannot be read, no 3 channels for the paper's
        augmentations, NaN in a layer.
    """
    if views < 2:
        raise InputError(f"views: {views}; the variance within an image wants 2 or more")
    encoder = net if isinstance(net, Encoder) else as_encoder(net)
    step = max(1, batch_size // views)
    batches = _pixels(images, encoder.preprocess, step, workers)
    first = next(batches, None)
    if first is None:
        raise InputError("no images; a diagnosis needs at least 2")
    if augmentations is None:
        if first.ndim != 4 or first.shape[1] != 3:
            shape = tuple(first.shape)
            raise InputError(
                f"images: a batch of shape {shape}; the paper's views take (b, 3, h, w): give augmentations"
            )
        size = encoder.preprocess.crop or encoder.preprocess.resize or first.shape[-1]
        augmentations = paper_augmentations(int(size))
        about.setdefault("augmentation", describe(augmentations, "the paper's"))
    seen = _views(chain([first], batches), views, augmentations, seed, device)
    start = next(seen)
    how: dict[str, Any] = {"device": device, "precision": precision}
    training = [module for module in encoder.modules() if module.training]
    try:
        measured = _Measured(encoder, start, how)
        for rows in embed_layers(encoder, measured.taps, chain([start], seen), **how):
            measured.update(rows, views)
        measured.flush(views)
    finally:
        for module in training:
            module.training = True
    if measured.images < 2:
        raise InputError("1 image; a diagnosis needs at least 2, to tell images from their views")
    about.setdefault("path", str(images) if isinstance(images, (str, PathLike)) else None)
    return _diagnosis(measured, {"views": views, "seed": seed, "threshold": threshold, **about})


def _pixels(images: Any, preprocess: Preprocessing, step: int, workers: int) -> Iterator[Tensor]:
    if isinstance(images, (str, PathLike)):
        yield from pixel_batches(Images(images), before_crop(preprocess), step, workers)
        return
    for batch in images.split(step) if isinstance(images, Tensor) else images:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield from torch.as_tensor(batch).split(step)


def before_crop(preprocess: Preprocessing) -> Preprocessing:
    """What images are decoded to before a random crop: the square on the shorter side, at the size of the resizing."""
    side = preprocess.resize or preprocess.crop
    return replace(preprocess, resize=side, crop=side)


def paper_augmentations(size: int, preset: str | None = None) -> tuple[Augment, Augment]:
    """The asymmetric pair of arXiv 2110.09348 at `size` pixels, its blur in proportion; or that of a trainer's preset.

    Raises InputError: no such preset.
    """
    share = size / 224
    recipe = make_config(preset, image_size=size) if preset else Config(
        image_size=size, sigma=(0.1 * share, 2.0 * share)
    )  # fmt: skip
    return recipe.augmentation(0), recipe.augmentation(1)


def describe(augmentations: Sequence[Any], recipe: str) -> dict[str, Any]:
    """The augmentations for the document."""
    return {"recipe": recipe, "views": [asdict(one) for one in augmentations]}


def _views(
    batches: Iterable[Tensor], views: int, augmentations: Sequence[Augment], seed: int, device: str
) -> Iterator[Tensor]:
    """Batches (b, ...) -> (b V, ...), the views of an image one after another."""
    start = 0
    for batch in batches:
        names, batch = np.arange(start, start + len(batch)), batch.to(device, non_blocking=True)
        made = []
        for view in range(views):
            augment = augmentations[view % len(augmentations)]
            made.append(augment(batch.clone(), uniforms(seed, 0, names, view, augment.DRAWS)))
        start += len(batch)
        yield torch.stack(made, 1).flatten(0, 1)


def as_encoder(net: nn.Module) -> Encoder:
    """Any module as an encoder that takes its input as it is."""
    report = dict.fromkeys(("path", "sha256", "branch", "keys", "preprocessing"))
    about = {"architecture": type(net).__name__, "foreign": [], "warnings": []}
    return Encoder(net, None, Preprocessing(None, None, mean=None, std=None), {**report, **about})


class _Measured:
    """The streaming covariances of all layers, and what one batch tells of rounding and of the last linear maps."""

    def __init__(self, net: Encoder, rows: Tensor, how: dict[str, Any]) -> None:
        last = ["representation", *(["projector"] if net.projector is not None else [])]
        net.to(how["device"]).eval()
        fit = readable(net, rows[:2], how)
        left = [name for name in net.blocks if name not in fit]
        self.notes = [f"layer {name}: gives no one vector an image, left out" for name in left]
        self.net, self.names = net, [*(name for name in net.blocks if name in fit), *last]
        self.maps = {name: found for name in last if (found := last_map(net, name, rows[:2], how))}
        self.taps = [*self.names, *(INPUT + name for name, _ in self.maps.values())]
        single = all(p.dtype == torch.float32 for p in net.parameters())
        self.errors = rounding(net, self.names, rows[:16], False, **how) if single else {}
        self.on = None if how["device"] == "cpu" else how["device"]
        self.totals: dict[str, Covariance] = {}
        self.means: dict[str, Covariance] = {}
        self.waiting: dict[str, list[Tensor]] = {}
        self.images = 0

    def update(self, rows: dict[str, Tensor], views: int) -> None:
        """Add the rows of a batch, the views of an image one after another."""
        for name, z in rows.items():
            self.waiting.setdefault(name, []).append(z)
        self.images += len(z) // views
        if sum(map(len, self.waiting[name])) >= ROWS:
            self.flush(views)

    def flush(self, views: int) -> None:
        """Add what waits to the covariances."""
        for name, parts in self.waiting.items():
            z = torch.cat(parts)
            if name not in self.totals:
                self.totals[name] = Covariance(z.shape[1], device=self.on)
                self.means[name] = Covariance(z.shape[1], device=self.on)
            self.totals[name].update(z)
            self.means[name].update(z.double().unflatten(0, (-1, views)).mean(1))
        self.waiting.clear()

    def parts(self, name: str, views: int) -> tuple[NDArray, NDArray]:
        """(S, A) of what was tapped under a name."""
        matrices = self.totals[name].matrix(), self.means[name].matrix()
        return signal_and_augmentation(*matrices, self.images, views)

    def block(self, name: str, views: int, threshold: float, **about: Any) -> Block:
        """The result at one layer."""
        total, errors = self.totals[name], self.errors.get(name)
        spectrum = total.spectrum(threshold, rounding=errors, source=self.net.source(name), **about)
        S, A = self.parts(name, views)
        dead = total.constant(errors)
        found = attribute(total.matrix(), S, A, dead, spectrum.floor, threshold, self.images, views)
        held = found.directions[:, np.isin(found.causes, ("alive", "augmentation", "implicit"))]
        fractions = np.full(len(dead), np.nan)
        fractions[: held.shape[1]] = signal_fractions(S, S + A, held)
        return Block(
            spectrum, found, fractions, lidar_of(S + A / views, A), self._through(name, views, found, spectrum)
        )

    def _through(self, name: str, views: int, found: Attribution, spectrum: Spectrum) -> dict[str, Any] | None:
        if name not in self.maps:
            return None
        module, weight = self.maps[name]
        S, A = self.parts(INPUT + module, views)
        if weight.shape != (len(found.causes), len(S)):
            return None
        return {"module": module, **through(weight, S, A, spectrum.floor, found)}


def readable(net: Encoder, rows: Tensor, how: dict[str, Any]) -> set[str]:
    """The blocks that run, once or more, and give features of each of the `rows` every time."""
    fit: dict[str, bool] = {}

    def see(module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        good = isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(output) == len(rows)
        fit[name] = good and fit.get(name, True)

    hooks = [net.backbone.get_submodule(name).register_forward_hook(partial(see, name=name)) for name in net.blocks]
    try:
        for _ in embed_layers(net, ["representation"], [rows], **how):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, good in fit.items() if good}


@torch.no_grad()
def last_map(net: Encoder, layer: str, rows: Tensor, how: dict[str, Any]) -> tuple[str, NDArray] | None:
    """(name, weight (d, h) float64) of the last linear map or convolution that runs before a layer.

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


def _diagnosis(measured: _Measured, about: dict[str, Any]) -> Diagnosis:
    images = {"path": about.pop("path"), "count": measured.images, "skipped": about.pop("skipped", [])}
    notes = [*measured.net.report["warnings"], *measured.notes, *about.pop("warnings", [])]
    views, threshold = about["views"], about["threshold"]
    names = tqdm(measured.names, desc="spectra", unit=" layers", dynamic_ncols=True, delay=1, disable=None)
    blocks = [measured.block(name, views, threshold, images=images) for name in names]
    widest = max(block.spectrum.dim for block in blocks)
    if measured.images < 10 * widest:
        notes.append(f"{measured.images} images for up to {widest} dimensions: attributions are rough, 10 d advised")
    source = {name: value for name, value in measured.net.source("all").items() if name != "layer"}
    about = {"augmentation": {"recipe": "given"}, **about, "warnings": notes}
    return Diagnosis(blocks, {"source": source, "images": images, **about})
