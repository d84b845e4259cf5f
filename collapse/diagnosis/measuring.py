"""Where and why a network collapses: every block's spectrum, split into signal and augmentation, and what took it.

Several augmented views of each image (views.py) pass the network once, into two covariances for each block (layers.py).
metrics/attribution.py says which directions are called alive, augmentation, implicit, rounding or dead.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from collapse import InputError
from collapse.arguments import known, positive, share, whole
from collapse.diagnosis.layers import LayerCovariances
from collapse.diagnosis.result import Diagnosis
from collapse.diagnosis.views import augmentations_of, augmented, before_crop
from collapse.diagnosis.wording import verdict
from collapse.encoders.batches import views_of
from collapse.encoders.networks import READING, How, ImageBatches, Watch, borrowed, encoder_of
from collapse.errors import warn
from collapse.metrics.attribution import LINE
from collapse.theory import collapse_line

SIMILARITIES = ("cosine", "dot", "euclidean")
TEMPERATURES = (0.05, 0.1, 0.2, 0.5)  # those of published contrastive losses; for one that is not known


def diagnose(
    source: Any,
    images: Any = None,
    *,
    views: int = 4,
    threshold: float = 1e-6,
    temperature: float | None = None,
    similarity: str = "cosine",
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
        temperature: of the cosine loss that the network was trained with; left out, what the checkpoint's file states.
            Augmentation is then what lies below that loss's own line (theory.collapse_line).  If neither says it, the
            line is a signal fraction of 1/2, and the result gives those of TEMPERATURES beside it.
        similarity: "cosine", or the "dot" or "euclidean" similarity that the network was trained with, whose lines do
            not depend on a temperature.
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
            impossible value, a temperature of another similarity than the cosine; as `collapse.layer_spectra` does.
        TypeError: an unknown keyword.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        >>> diagnosis = diagnose(net, torch.rand(60, 3, 4, 4), views=2)
        >>> [(block.layer, sum(block.attribution.counts().values())) for block in diagnosis.blocks]
        [('1', 4), ('representation', 4)]
    """
    known(
        "diagnose", options, READING, ("views", "threshold", "temperature", "similarity", "augmentations", "views_file")
    )
    whole("views", views, 2)
    share("threshold", threshold)
    if temperature is not None:
        positive("temperature", temperature)
    if similarity not in SIMILARITIES:
        raise InputError(f"similarity= is {similarity!r}; give one of {', '.join(SIMILARITIES)}")
    if temperature is not None and similarity != "cosine":
        raise InputError(
            f"temperature= moves the line of the cosine alone; leave it out with similarity={similarity!r}"
        )
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
            shown = pixels.shown(first) if how.distributed else first
            chosen, recipe = augmentations_of(net, shown, pixels.path, augmentations)
            seen = augmented(seen, views, chosen, how.seed, how.device, lambda: pixels.start)
        start = next(seen)
        shown = pixels.shown(start) if how.distributed else start
        measured = LayerCovariances(net, shown, views, {"device": how.device, "precision": how.precision})
        measured.add(chain([start], seen), how.distributed)
    if measured.images < 2:
        unread = f"; {pixels.unread()}" if pixels.skipped else ""
        needed = f"a diagnosis needs at least 2, to tell {pixels.unit} from their views"
        raise InputError(f"{pixels.name}: 1 {pixels.unit[:-1]}; {needed}{unread}")
    provenance = {
        "views": views,
        "seed": how.seed,
        "threshold": threshold,
        "similarity": similarity,
        "temperature": temperature,
        "augmentation": recipe,
    }
    result = _diagnosis(measured, pixels, provenance)
    warn(result.provenance["warnings"])
    return result


def _images(images: Any, how: How, views: int, views_file: Any) -> Any:
    if views_file is not None:
        raise InputError("views_file= is for encoders of texts; of images leave it out, or give augmentations=")
    return ImageBatches(images, how, max(1, (how.batch_size or views) // views))


def _diagnosis(measured: LayerCovariances, pixels: Any, how: dict[str, Any]) -> Diagnosis:
    images, threshold = pixels.provenance(), how["threshold"]
    if how["temperature"] is None and how["similarity"] == "cosine":
        how["temperature"] = measured.net.report.get("temperature")
    # The loss sees the last layer; linear maps carry its line to the others.
    seen = measured.block(measured.names[-1], threshold, images).signal_fraction
    line, lines = _lines(seen[np.isfinite(seen)], how)
    names = tqdm(measured.names, desc="spectra", unit=" layers", dynamic_ncols=True, delay=1, disable=None)
    blocks = [measured.block(name, threshold, images, line) for name in names]
    widest = max(block.spectrum.dim for block in blocks)
    notes = [*measured.net.report["warnings"], *measured.notes, *pixels.notes()]
    if measured.images < 10 * widest:
        notes.append(
            f"{measured.images} {pixels.unit} for up to {widest} dimensions: attributions are rough, 10 d advised"
        )
    source = {name: value for name, value in measured.net.source("all").items() if name != "layer"}
    provenance = {"source": source, "images": images, **how, "line": line, "lines": lines, "warnings": notes}
    return Diagnosis(blocks, provenance, verdict(blocks, provenance))


def _lines(fractions: NDArray, how: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The loss's line, and if nothing tells its temperature LINE and the lines by temperature; see collapse_line."""
    if not len(fractions):
        return LINE, {}

    def line(temperature: float) -> float:
        return float(np.clip(collapse_line(fractions, how["threshold"], how["similarity"], temperature), 0, 1))

    if how["temperature"] is None and how["similarity"] == "cosine":
        return LINE, {f"{temperature:g}": line(temperature) for temperature in TEMPERATURES}
    return line(how["temperature"] or 1.0), {}
