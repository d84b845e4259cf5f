"""Where and why a network collapses: every block's spectrum, split into signal and augmentation, and what took it.

Several augmented views of each image pass the network once.  For each block two streaming covariances are kept, of
all rows and of the images' means; their difference is the covariance within images.  metrics/attribution.py
says which directions are called alive, augmentation, implicit, rounding or dead.  Rows are not divided by their norms
here: what is constant would vary, and the layers would not be linear in what went before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from collapse import InputError
from collapse.arguments import known, positive, share, whole
from collapse.checkpoints import Encoder, Overrides
from collapse.checkpoints.encoder import INPUT
from collapse.diagnosis.result import Block, Diagnosis
from collapse.diagnosis.wording import verdict
from collapse.encoders.batches import views_of
from collapse.encoders.networks import How, ImageBatches, Watch, borrowed, encoder_of, errors_of
from collapse.encoders.passes import embed_layers, readable
from collapse.errors import warn
from collapse.images import Preprocessing
from collapse.metrics import lidar_of
from collapse.metrics.attribution import (
    LINE,
    Attribution,
    attribute,
    signal_and_augmentation,
    signal_fractions,
    through,
)
from collapse.spectra import Spectrum
from collapse.spectra.covariance import Covariance
from collapse.theory import water_level
from collapse.training.config import Config, make_config
from collapse.training.views import uniforms

ROWS = 512  # rows that wait for one product: with fewer, reading and writing the (d, d) sums is most of the work


class Augment(Protocol):
    """One random view of images: a function of the images (n, ...) and of draws (n, DRAWS) in [0, 1)."""

    @property
    def DRAWS(self) -> int: ...

    def __call__(self, images: Tensor, u: Tensor) -> Tensor: ...


KEYWORDS = (*How.__dataclass_fields__, *Overrides.__dataclass_fields__)


def diagnose(
    source: Any,
    images: Any = None,
    *,
    views: int = 4,
    threshold: float = 1e-6,
    temperature: float | None = None,
    augmentations: Any = None,
    views_file: Any = None,
    watch: Watch = iter,
    **options: Any,
) -> Diagnosis:
    """Where and why a network collapses, from `views` augmented views of each image, in one pass; see attribution.py.

    Args:
        source: a checkpoint's path, what `collapse.load` gives, or any module from a batch to (n, d), whose children
            are then the blocks; those that give no one vector an image are left out with a warning.  A module comes
            back as it was.
        images: a folder, zip or list; (n, 3, h, w) uint8, or float in 0..1; or an iterable of such batches, or of
            tuples that begin with one.  With `augmentations` of your own, whatever these take.
        views: of each image, 2 or more.
        threshold: collapsed is below it times the largest variance.
        temperature: of the cosine loss that the network was trained with, if it is known: augmentation is then what
            lies below that loss's own line instead of a signal fraction of 1/2.
        augmentations: view v of an image is the v-th of these, and again from the first; or a trainer's preset, by name
            or as a JSON file; default: `paper_augmentations` at the network's image size, before its mean and std.
            Of texts or sounds: a function of one and a numpy.random.Generator that gives a view of it, or several.
        views_file: of texts or sounds, in the place of images: a file of JSON lines, a list of the views of one text
            each, or of the paths of the views of one sound; or such lists themselves.
        watch: gets the batches of images and passes them on, as a progress bar does.
        options: limit, sample, seed (of the views too; a view depends on it, the number of the image and that of the
            view alone), device, batch_size (rows a forward pass, at least one image's views), workers, precision,
            strict, max_pixels and the fields of `Overrides`, as for `collapse.layer_spectra`.

    Raises:
        InputError: fewer than two views or images, no 3 channels for the paper's augmentations, NaN in a layer, an
            impossible value; as `collapse.layer_spectra` does.
        TypeError: an unknown keyword.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        >>> found = diagnose(net, torch.rand(60, 3, 4, 4), views=2)
        >>> [(block.layer, sum(block.found.counts().values())) for block in found.blocks]
        [('1', 4), ('representation', 4)]
    """
    known("diagnose", options, KEYWORDS, ("views", "threshold", "temperature", "augmentations", "views_file"))
    whole("views", views, 2)
    share("threshold", threshold)
    if temperature is not None:
        positive("temperature", temperature)
    how, overrides = How.of(source, options)
    net = encoder_of(source, overrides)
    if net.takes == "images":
        pixels = _images(images, how, views, views_file)
        prepare = before_crop(net.preprocess)
    else:
        pixels, recipe = views_of(net, images, views_file, augmentations, views, how)
        prepare, views = net.preprocess, pixels.views
    with borrowed(net, how.device):
        batches = iter(watch(pixels.of(prepare)))
        first = next(batches, None)
        if first is None:
            raise InputError(f"{pixels.name}: {pixels.unread() or 'no images; a diagnosis needs at least 2'}")
        seen: Iterator[Tensor] = chain([first], batches)
        if net.takes == "images":
            chosen, recipe = _augmentations(net, first, pixels.path, augmentations)
            seen = _views(seen, views, chosen, how.seed, how.device)
        measured = _Measured(net, next(seen), views, {"device": how.device, "precision": how.precision})
        measured.add(seen)
    if measured.images < 2:
        unread = f"; {pixels.unread()}" if pixels.skipped else ""
        needed = f"a diagnosis needs at least 2, to tell {pixels.unit} from their views"
        raise InputError(f"{pixels.name}: 1 {pixels.unit[:-1]}; {needed}{unread}")
    about = {
        "views": views,
        "seed": how.seed,
        "threshold": threshold,
        "temperature": temperature,
        "augmentation": recipe,
    }
    result = _diagnosis(measured, pixels, about)
    warn(result.about["warnings"])
    return result


def _images(images: Any, how: How, views: int, views_file: Any) -> Any:
    if views_file is not None:
        raise InputError("views_file= is for encoders of texts; of images leave it out, or give augmentations=")
    return ImageBatches(images, how, max(1, (how.batch_size or views) // views))


def _augmentations(
    net: Encoder, first: Tensor, path: str | None, given: str | Sequence[Augment] | None
) -> tuple[Sequence[Augment], dict[str, Any]]:
    """(augmentations, their description) for the images of a first batch."""
    if given is not None and not isinstance(given, str):
        if not given or not all(callable(one) and hasattr(one, "DRAWS") for one in given):
            raise InputError("augmentations= is no list of functions of images and draws, with their number DRAWS")
        return given, {"recipe": "given"}
    if first.ndim != 4 or first.shape[1] != 3:
        shape = tuple(first.shape)
        raise InputError(f"images: a batch of shape {shape}; the paper's views take (b, 3, h, w): give augmentations=")
    size = net.preprocess.crop or net.preprocess.resize
    if size is None and path is not None:
        raise InputError(
            f"{net.report['path'] or 'source'}: does not say how large its images are; give resize= and crop="
        )
    found = paper_augmentations(int(size or first.shape[-1]), given)
    return found, describe(found, given or "the paper's")


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


class _Measured:
    """The streaming covariances of all layers, and what one batch tells of rounding and of the last linear maps."""

    def __init__(self, net: Encoder, start: Tensor, views: int, how: dict[str, Any]) -> None:
        last = ["representation", *(["projector"] if net.projector is not None else [])]
        fit = readable(net, start[:2], **how)
        left = [name for name in net.blocks if name not in fit]
        self.notes = [f"layer {name}: gives no one vector an image, left out" for name in left]
        self.net, self.names, self.views, self.how = net, [*(n for n in net.blocks if n in fit), *last], views, how
        self.maps = {name: found for name in last if (found := last_map(net, name, start[:2], how))}
        self.taps = [*self.names, *(INPUT + name for name, _ in self.maps.values())]
        self.errors, more = errors_of(net, self.names, start[:16], False, how)
        self.notes += more
        self.on = None if how["device"] == "cpu" else how["device"]
        self.totals: dict[str, Covariance] = {}
        self.means: dict[str, Covariance] = {}
        self.waiting: dict[str, list[Tensor]] = {}
        self.images, self.start = 0, start

    def add(self, batches: Iterable[Tensor]) -> None:
        """Add the start and all further batches, the views of an image one after another."""
        for rows in embed_layers(self.net, self.taps, chain([self.start], batches), **self.how):
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
        """(S, A) of what was tapped under a name."""
        matrices = self.totals[name].matrix(), self.means[name].matrix()
        return signal_and_augmentation(*matrices, self.images, self.views)

    def block(self, name: str, threshold: float, images: dict[str, Any], line: float = LINE) -> Block:
        """The result at one layer."""
        total, errors = self.totals[name], self.errors.get(name)
        spectrum = total.measured(threshold, rounding=errors, source=self.net.source(name), images=images)
        S, A = self.parts(name)
        dead = total.constant(errors)
        found = attribute(total.matrix(), S, A, dead, spectrum.floor, threshold, self.images, self.views, line)
        held = found.directions[:, np.isin(found.causes, ("alive", "augmentation", "implicit"))]
        fractions = np.full(len(dead), np.nan)
        fractions[: held.shape[1]] = signal_fractions(S, S + A, held)
        return Block(spectrum, found, fractions, lidar_of(S + A / self.views, A), self._through(name, found, spectrum))

    def _through(self, name: str, found: Attribution, spectrum: Spectrum) -> dict[str, Any] | None:
        if name not in self.maps:
            return None
        module, weight = self.maps[name]
        S, A = self.parts(INPUT + module)
        if weight.shape != (len(found.causes), len(S)):
            return None
        return {"module": module, **through(weight, S, A, spectrum.floor, found)}


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


def _diagnosis(measured: _Measured, pixels: Any, how: dict[str, Any]) -> Diagnosis:
    images, threshold, line = pixels.about(), how["threshold"], LINE
    if how["temperature"] is not None:  # the loss sees the last layer; linear maps carry its line to the others
        seen = measured.block(measured.names[-1], threshold, images).signal_fraction
        line = _line(seen[~np.isnan(seen)], how["temperature"])
    names = tqdm(measured.names, desc="spectra", unit=" layers", dynamic_ncols=True, delay=1, disable=None)
    blocks = [measured.block(name, threshold, images, line) for name in names]
    widest = max(block.spectrum.dim for block in blocks)
    notes = [*measured.net.report["warnings"], *measured.notes, *pixels.notes()]
    if measured.images < 10 * widest:
        notes.append(
            f"{measured.images} {pixels.unit} for up to {widest} dimensions: attributions are rough, 10 d advised"
        )
    source = {name: value for name, value in measured.net.source("all").items() if name != "layer"}
    about = {"source": source, "images": images, **how, "line": line, "warnings": notes}
    return Diagnosis(blocks, about, verdict(blocks, about))


def _line(fractions: NDArray, temperature: float) -> float:
    """The signal fraction below which a cosine loss lets no direction live; see theory.water_level."""
    return float(np.clip(-water_level(fractions, temperature)[0], 0, 1)) if len(fractions) else LINE
