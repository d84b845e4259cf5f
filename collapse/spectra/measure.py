"""From anything to its spectrum in one call: arrays, files, iterables of batches, networks and their images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError, arguments
from collapse.errors import warn
from collapse.files.rows import blocks, reservoir
from collapse.results import stale
from collapse.spectra.measurement import Measure, Measurement, choose_method, jackknife_errors
from collapse.spectra.result import Spectrum

__all__ = ["Measurement", "choose_method", "jackknife_errors", "layer_spectra", "spectrum"]

Watch = Callable[[Iterable[Any]], Iterable[Any]]


def spectrum(
    source: Any,
    images: Any = None,
    *,
    layer: str = "representation",
    normalize: bool = True,
    method: str = "auto",
    threshold: float = 1e-6,
    jackknife: int = 0,
    vectors: bool = False,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    device: str | None = "auto",
    rounding: NDArray | None = None,
    max_unpacked: float | None = None,
    distributed: bool = False,
    watch: Watch = iter,
    **options: Any,
) -> Spectrum:
    """Singular values of the covariance of embeddings (arXiv 2110.09348, section 3), in one pass.

    Args:
        source: (n, d) array, tensor or memmap of any real dtype; a path of an array file, FILE or FILE:KEY; or an
            iterable of (b, d) batches.  With images: a checkpoint's path, what `collapse.load` gave, or any
            torch.nn.Module, which comes back as it was.
        images: a folder, zip, list, shards, table or array file; a tensor or array (n, c, h, w), uint8 or float in
            0..1; or an iterable of such batches, or of tuples that begin with one.  Of an encoder of texts a file of
            them or a list of str; of sounds a folder, or arrays (t,); of clips a folder of folders of frames, or
            (n, frames, 3, h, w).
        layer: of a network: "representation", "projector" or a module's name.
        normalize: divide each row by its norm first, as the paper does.
        method: "covariance", "qr", "float32" or "auto"; see `Covariance` and `choose_method`.
        threshold: what counts as collapsed, as a share of the largest singular value.
        jackknife: standard errors from this many groups of rows, 2 or more; 0 for none. Memory and the time at the
            end grow by that factor.
        vectors: keep the singular vectors in the result.
        limit: use the first rows or images only, this many.
        sample: use this many of them at random, by `seed`, in their order; N rows are held in memory.
        seed: of `sample`, and of `positions`.
        device: "auto", "cpu" or "cuda[:i]".  "auto" is CUDA where it is, where a module is, and the CPU for rows.
        rounding: (b, d) errors that some rows are known to have, for the floor (encoders/passes.py).
        max_unpacked: GiB that a packed array file may unpack to although it is far smaller (a bomb is refused).
        distributed: share the images, or the blocks of rows, over the processes of torch.distributed, each of which
            makes the same call and gets the whole result.
        watch: gets the batches and passes them on, as a progress bar does; `batches.total` is their number of images.
        options: of images: batch_size, workers, precision, strict, max_pixels, pixel_range, positions, as for
            `layer_spectra`; and the fields of `Overrides`, how a checkpoint is read: branch, projector, resize, ...

    Raises:
        InputError: not two-dimensional, not numeric, fewer than two rows, NaN or infinity (the row is named), an
            impossible value, more memory needed than there is; for a file as `collapse.files.arrays.open_array` says,
            for a checkpoint as `collapse.load` does.
        TypeError: an unknown keyword.

    Examples:
        >>> z = np.random.default_rng(0).standard_normal((1000, 8)) * [1, 1, 1, 1, 1, 1, 0, 0]
        >>> s = spectrum(z.astype(np.float32))
        >>> s.n, s.dim, s.collapsed_dimensions, s.numerical_rank
        (1000, 8, 2, 6)
        >>> round(s.effective_rank, 1)
        6.0
    """
    measure = Measure(normalize, method, threshold, jackknife, vectors)
    if images is not None:
        if rounding is not None or max_unpacked is not None:
            raise InputError(
                f"{'max_unpacked' if rounding is None else 'rounding'}= is for rows; leave it or images out"
            )
        chosen = {"limit": limit, "sample": sample, "seed": seed, "device": device, "watch": watch, **options}
        chosen["distributed"] = distributed
        return _of_network("spectrum", source, images, [layer], measure, chosen)[layer]
    arguments.known("spectrum", options, reading() if options else (), KEYWORDS)
    if options or layer != "representation":
        what = next(iter(options), "layer")
        raise InputError(f"{name_of(source)}: {what}= wants a checkpoint or a module, and images")
    arguments.whole_or_none(2, limit=limit, sample=sample)
    arguments.whole("seed", seed, 0)
    on = None if device in (None, "auto", "cpu") else arguments.device_of(device)
    arguments.flag("distributed", distributed)
    if distributed and on is not None:
        raise InputError("distributed= shares the rows of arrays over processors alone; leave device= out")
    with _rows(source, max_unpacked, limit) as (provenance, batches):
        notes: list[str] = []
        batches = batches if sample is None else _drawn(batches, sample, seed, notes)
        rows = Measurement(measure, on, provenance.get("path") or "embeddings")
        if distributed:
            from collapse.spectra.shares import update_shared

            update_shared(rows, watch(batches))
        else:
            for batch in watch(batches):
                rows.update(batch)
    # The source is whole now, with the digest of the bytes that were read.
    notes += [*provenance.get("warnings", ()), *stale(str(provenance.get("path") or ""), provenance.get("sha256"))]
    result = rows.spectrum(rounding, source=provenance, warnings=notes)
    warn(note for note in result.warnings if note not in rows.notes)
    return result


def layer_spectra(
    source: Any,
    images: Any,
    *,
    layers: str | Sequence[str] = "all",
    normalize: bool = True,
    method: str = "auto",
    threshold: float = 1e-6,
    jackknife: int = 0,
    vectors: bool = False,
    **options: Any,
) -> dict[str, Spectrum]:
    """The spectra of several layers of a network in one pass: {name: Spectrum}, in the order of the forward pass.

    Args:
        source, images: as for `spectrum`.
        layers: "all", every block, the representation and the projector if there is one; or names.
        normalize, method, threshold, jackknife, vectors: as for `spectrum`.
        options: limit, sample, seed, device, distributed and watch, as for `spectrum`; batch_size (64, or 256 on CUDA);
            workers: processes that decode a path's images (0: this one); precision: "float32" or "bf16";
            positions: of inner layers, K positions of each feature map as rows, instead of its mean;
            strict: an image that cannot be read is an error, instead of being left out with a warning;
            max_pixels: a larger image is not decoded; pixel_range: black and white of images of floats or of more than
            8 bits; and the fields of `Overrides`.

    Raises: InputError, TypeError as `spectrum` does.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 9))
        >>> spectra = layer_spectra(net, torch.rand(100, 3, 2, 2))
        >>> [(name, s.dim) for name, s in spectra.items()]
        [('1', 5), ('2', 9), ('representation', 9)]
    """
    measure = Measure(normalize, method, threshold, jackknife, vectors)
    return _of_network("layer_spectra", source, images, layers, measure, options)


def reading() -> tuple[str, ...]:
    """The names of what says how a checkpoint and images are read."""
    from collapse.spectra.layers import READING

    return READING


def _of_network(
    function: str, source: Any, images: Any, layers: str | Sequence[str], measure: Measure, options: Mapping[str, Any]
) -> dict[str, Spectrum]:
    from collapse.spectra.layers import of_network

    arguments.known(function, options, reading(), KEYWORDS)
    spectra, notes = of_network(source, images, layers, measure, **options)
    warn(notes)
    return spectra


def name_of(source: Any) -> str:
    """What errors call a source of rows."""
    return str(source) if isinstance(source, (str, PathLike)) else "embeddings"


@contextmanager
def _rows(z: Any, max_unpacked: float | None, limit: int | None) -> Iterator[tuple[Mapping[str, Any], Iterable[Any]]]:
    """(source, batches) of anything that `spectrum` takes without images; the source is whole when the block ends."""
    if isinstance(z, (str, PathLike)):
        from collapse.files.arrays import open_array

        with open_array(Path(z), max_unpacked) as (source, rows):
            yield source, blocks(rows, limit)
        return
    if arguments.is_module(z):
        raise InputError("images: a network needs images to embed; give a path, a tensor, an array or batches")
    if isinstance(z, Mapping) or not (hasattr(z, "ndim") or hasattr(z, "__iter__")):
        raise InputError(f"source: a {type(z).__name__} is no embeddings; give an array (n, d), a path, or batches")
    if isinstance(z, (list, tuple)) and z and not hasattr(z[0], "ndim"):
        z = _array(z)
    yield {"kind": "array"}, blocks(z, limit)


def _array(rows: Sequence[Any]) -> NDArray:
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise InputError(f"source: is no array (n, d), since rows differ in length ({error})") from error


def _drawn(batches: Iterable[Any], size: int, seed: int, notes: list[str]) -> Iterator[Any]:
    """One batch of `size` rows at random, with a note of it."""
    rows, n = reservoir(batches, size, seed)
    if n > size:
        notes.append(f"{size} of {n} rows, drawn at random with seed {seed}")
    yield rows


# The keywords of `spectrum` itself.
KEYWORDS = tuple(name for name, of in signature(spectrum).parameters.items() if of.kind is of.KEYWORD_ONLY)
