"""The embeddings themselves: a network, images, a layer -> rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.arguments import known
from collapse.encoders.batches import batches_of
from collapse.encoders.networks import READING, How, Watch, borrowed, encoder_of, require_batches
from collapse.encoders.passes import embed as passes
from collapse.encoders.processes import in_order
from collapse.errors import warn
from collapse.models.encoder import Encoder


def embed(source: Any, images: Any, *, layer: str = "representation", **options: Any) -> NDArray:
    """The embeddings of images, (n, d) float32, in their order; of a path without those that cannot be read.

    source, images, layer, options: as for `collapse.spectrum` of a network.

    Raises:
        InputError: as `collapse.spectrum` does; no image.
        TypeError: an unknown keyword.

    Examples:
        >>> import torch
        >>> embed(torch.nn.Flatten(), torch.zeros(4, 3, 2, 2, dtype=torch.uint8)).shape
        (4, 12)
    """
    known("embed", options, (*READING, "watch"))
    with rows_of(source, images, layer, **options) as (net, pixels, rows):
        batches = list(rows)
    if not batches:
        raise InputError(f"{pixels.name}: {pixels.unread() or 'no images to embed'}")
    warn([*net.report["warnings"], *pixels.notes()])
    return np.concatenate(batches)


@contextmanager
def rows_of(
    source: Any, images: Any, layer: str = "representation", watch: Watch = iter, **options: Any
) -> Iterator[tuple[Encoder, Any, Iterator[NDArray]]]:
    """(network, images, batches of rows (b, d) float32) as `embed` reads them; arguments and errors as for `embed`.

    Raises InputError: as `embed`, but not for want of an image.
    """
    how, overrides = How.of(source, options)
    require_batches(images)
    net = encoder_of(source, overrides)
    pixels = batches_of(net, images, how)
    part = net.layer(layer)
    try:
        with borrowed(net, how.device):
            batches = watch(pixels.of(net.preprocess))
            outputs = in_order(passes(part, batches, net.preprocess, how.device, how.precision), how.distributed)
            yield net, pixels, _watched((z.cpu().numpy() for z in outputs), pixels)
    finally:
        part.hooks.remove()


def _watched(rows: Iterator[NDArray], pixels: Any) -> Iterator[NDArray]:
    """The same batches; a warning of `pixels` names the first row that is no numbers."""
    count, first, bad = 0, 0, 0
    for batch in rows:
        lost = ~np.isfinite(batch).all(1)
        first = first if bad else count + int(lost.argmax()) + 1
        count, bad = count + len(batch), bad + int(lost.sum())
        yield batch
    if bad:
        pixels.warnings.append(f"{bad} of {count} embeddings hold NaN or infinity, the first is row {first}")
