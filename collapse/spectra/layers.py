"""A network and images to the spectra of its layers, in one pass."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError, arguments
from collapse.encoders import networks
from collapse.encoders.batches import batches_of
from collapse.encoders.networks import How, Watch, borrowed, encoder_of, require_batches
from collapse.encoders.passes import embed_layers, errors_of, readable
from collapse.encoders.processes import in_order
from collapse.models.encoder import Encoder
from collapse.spectra.measurement import Measure, Measurement
from collapse.spectra.result import Spectrum

ENDS = ("representation", "projector")
READING = (*networks.READING, "positions", "watch")


def of_network(
    source: Any,
    images: Any,
    layers: str | Sequence[str],
    measure: Measure,
    positions: int = 0,
    watch: Watch = iter,
    **reading: Any,
) -> tuple[dict[str, Spectrum], list[str]]:
    """({name: spectrum}, warnings) in the order of the forward pass; the arguments are those of `layer_spectra`.

    Raises InputError: fewer than two images can be read.
    """
    how, overrides = How.of(source, reading)
    arguments.whole_or_none(2, limit=how.limit, sample=how.sample)
    arguments.whole("positions", positions, 0)
    require_batches(images)
    net = encoder_of(source, overrides)
    pixels = batches_of(net, images, how)
    names = chosen(net, layers)
    if pixels.total is not None and pixels.total < 2:
        raise InputError(f"{pixels.name}: holds {_many(pixels)}; a covariance needs at least 2")
    on = None if how.device == "cpu" else how.device
    passes: dict[str, Any] = {
        "device": how.device,
        "positions": positions,
        "seed": how.seed,
        "precision": how.precision,
    }
    with borrowed(net, how.device):
        batches = iter(watch(pixels.of(net.preprocess)))
        first = next(batches, None)
        errors: Mapping[str, NDArray] = {}
        notes: list[str] = []
        if first is not None:
            shown = pixels.shown(first) if how.distributed else first
            names, errors, notes = _prepared(net, names, layers, shown, measure, passes)
        measured = {name: Measurement(measure, on) for name in names}
        every = chain([] if first is None else [first], batches)
        for rows in in_order(embed_layers(net, names, every, **passes), how.distributed):
            for name in names:
                measured[name].update(rows[name])
    if pixels.count < 2:
        raise InputError(f"{pixels.name}: {pixels.unread() or f'{_many(pixels)}; a covariance needs at least 2'}")
    notes = [*net.report["warnings"], *notes, *pixels.notes()]
    spectra = {
        name: rows.spectrum(
            errors.get(name), source=net.source(name), images=pixels.provenance(), warnings=notes
        )
        for name, rows in measured.items()
    }  # fmt: skip
    methods = [note for rows in measured.values() for note in rows.notes]
    return spectra, [
        n for n in dict.fromkeys(note for s in spectra.values() for note in s.warnings) if n not in methods
    ]


def _many(pixels: Any) -> str:
    count = pixels.count if pixels.total is None else pixels.total
    return f"{count} {pixels.unit if count != 1 else pixels.unit[:-1]}"


def chosen(net: Encoder, layers: str | Sequence[str]) -> list[str]:
    """The names of layers, each of which is there, in the order of the network; of "all", every block.

    Raises InputError: no such layer.
    """
    if layers == "all":
        return [*net.blocks, "representation", *(["projector"] if net.projector is not None else [])]
    if isinstance(layers, str) or not layers or not all(isinstance(name, str) for name in layers):
        raise InputError(f"layers= is {layers!r}, expected all, or a list of names")
    for name in layers:
        net.layer(name).hooks.remove()  # refuses an unknown name with the list of those that are
    order = [*(name for name, _ in net.backbone.named_modules() if name), *ENDS]
    return [name for name in order if name in layers]


def _prepared(
    net: Encoder, names: list[str], layers: Any, first: Tensor, measure: Measure, passes: Mapping[str, Any]
) -> tuple[list[str], Mapping[str, NDArray], list[str]]:
    """(names, errors, notes): the layers that can be read, the rounding of a few rows, and what is to be said."""
    notes = []
    if layers == "all":
        fit = {*readable(net, first[:2], device=passes["device"], precision=passes["precision"]), *ENDS}
        notes = [f"layer {name}: gives no one vector an image, left out" for name in names if name not in fit]
        names = [name for name in names if name in fit]
    errors, more = errors_of(net, names, first[:16], measure.normalize, passes)
    return names, errors, notes + more
