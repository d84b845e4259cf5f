"""A network and images, however they are given: what every call that embeds images begins with.

A network is a checkpoint's path or state dict, what `collapse.load` gave, or any torch.nn.Module; a module of the
caller's comes back in its modes, on its device and in its precision.  Images are a path, a tensor or numpy array
(n, c, h, w), or an iterable of batches, or of tuples that begin with one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collapse import InputError, arguments
from collapse.checkpoints import Overrides, loaded
from collapse.data.batches import Skipped, decoded, pixel_batches, readable, refuse_unreadable
from collapse.data.images import Images
from collapse.data.preprocessing import Preprocessing
from collapse.encoders import processes
from collapse.encoders.passes import PRECISIONS
from collapse.files import limits
from collapse.files.rows import blocks, reservoir
from collapse.models.encoder import Encoder, Module

PIXELS = ("resize", "crop", "interpolation", "mean", "std", "no_normalize")  # what of `Overrides` fits any network
Watch = Callable[[Iterable[Any]], Iterable[Any]]


def as_encoder(net: nn.Module) -> Encoder:
    """A network as an encoder: itself if it is one."""
    return net if isinstance(net, Encoder) else Module(net)


def encoder_of(source: Any, reading: Mapping[str, Any]) -> Encoder:
    """The encoder that a source stands for.

    reading: fields of `Overrides`; of a module those that say what becomes of pixels.

    Raises InputError: as `load` does, or no network.
    """
    if isinstance(source, nn.Module):
        return _adapted(as_encoder(source), reading)
    if isinstance(source, (str, PathLike, Mapping)):
        return loaded(source, **reading)
    raise InputError(f"source: a {type(source).__name__} is no network; give a checkpoint's path or a torch.nn.Module")


def _adapted(net: Encoder, reading: Mapping[str, Any]) -> Encoder:
    """The same network with other preprocessing; the one given stays as it is."""
    chosen = {name: value for name, value in arguments.given(reading).items() if value is not False}
    odd = next((name for name in chosen if name not in PIXELS), None)
    if odd is not None:
        raise InputError(f"{odd}= says how a checkpoint is read, and the source is a network already; leave it out")
    Overrides(**chosen)
    if not chosen:
        return net
    if net.takes != "images":
        raise InputError(f"{next(iter(chosen))}= is for images, and the network takes {net.takes}; leave it out")
    pixels = {name: chosen[name] for name in PIXELS[:-1] if name in chosen}
    if "no_normalize" in chosen:
        pixels |= {"mean": None, "std": None}
    changed = copy(net)
    changed.preprocess = replace(net.preprocess, **pixels)
    changed.report = {**net.report, "preprocessing": changed.preprocess.as_dict()}
    return changed


@dataclass(frozen=True)
class How:
    """How images are read and embedded, checked; the arguments of `spectrum` and its like.

    device: "auto" is CUDA where it is, and where a module of the caller's already is.  batch_size: None is 64, or 256
    on CUDA.  workers: processes that decode a path's images.  limit: the first so many; sample: so many of them at
    random by `seed`.  strict: an image that cannot be read is an error.  pixel_range: black and white of deep images.
    distributed: the images are shared over the processes of torch.distributed, each of which makes the same call and
    gets the whole result.
    """

    device: str = "auto"
    batch_size: int | None = None
    workers: int = 0
    precision: str = "float32"
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    strict: bool = False
    max_pixels: int = limits.PIXELS
    pixel_range: tuple[float, float] | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        arguments.whole_or_none(1, batch_size=self.batch_size, limit=self.limit, sample=self.sample)
        arguments.whole("workers", self.workers, 0)
        arguments.whole("seed", self.seed, 0)
        arguments.whole("max_pixels", self.max_pixels, 1)
        arguments.pair("pixel_range", self.pixel_range)
        arguments.choice("precision", self.precision, PRECISIONS)
        arguments.flag("strict", self.strict)
        arguments.flag("distributed", self.distributed)
        processes.require(self.distributed)
        if self.device not in (None, "auto"):
            arguments.device_of(self.device)

    @classmethod
    def of(cls, source: Any, given: Mapping[str, Any]) -> tuple["How", dict[str, Any]]:
        """(how, overrides) for a source, with a device and a batch size; given: fields of both, each of them known.

        Raises InputError: a value that is impossible, or no such device.
        """
        how = cls(**{name: value for name, value in given.items() if name in cls.__dataclass_fields__})
        overrides = {name: value for name, value in given.items() if name not in cls.__dataclass_fields__}
        tensors = chain(source.parameters(), source.buffers()) if isinstance(source, nn.Module) else ()
        here = next(iter(tensors), None)
        stays = how.device in (None, "auto") and here is not None
        device = str(here.device) if stays and here is not None else arguments.device_of(how.device)
        size = how.batch_size or (256 if device.startswith("cuda") else 64)
        return replace(how, device=device, batch_size=size), overrides


READING = (*How.__dataclass_fields__, *Overrides.__dataclass_fields__)  # the options of each call on a network


class ImageBatches:
    """Batches of pixels from a path, a tensor, an array or an iterable, in order; and what became of the images.

    total: how many are to come at most; None if only the end tells.  count: how many came.
    start: the number of the first image of the batch that came last, among those that came.
    skipped: {"path", "why"} of those of a path that cannot be read.  plain: how many are of one colour.
    warnings: what a reader should know.

    Shared over N processes, each yields one in N of the batches, or an empty tensor while only others have one; all
    else is as it is without others, in every process.
    """

    unit = "images"

    def __init__(self, images: Any, how: How, step: int | None = None) -> None:
        self.preprocess, self.how, self.step = Preprocessing(None, None), how, step or how.batch_size or 64
        self.count, self.plain, self.skipped = 0, 0, list[dict[str, str]]()
        self.start, self.leader = 0, 0
        self.warnings: list[str] = []
        self.images = self._opened(images)
        sized = isinstance(self.images, (Images, Tensor, np.ndarray))
        self.total = len(self.images) if sized else None
        if sized and (how.limit or how.sample):
            self.images = self._chosen(len(self.images))
            self.total = len(self.images)

    def of(self, preprocess: Preprocessing) -> "ImageBatches":
        """Itself, its images decoded as a network wants them."""
        self.preprocess = preprocess
        return self

    def _opened(self, images: Any) -> Any:
        if isinstance(images, (str, PathLike)):
            opened = Images(images, self.how.max_pixels, self.how.pixel_range)
            self.warnings += opened.warnings
            return opened
        if isinstance(images, Tensor) or hasattr(images, "__array__"):
            images = images if isinstance(images, Tensor) else np.asarray(images)
            if images.ndim < 2:
                raise InputError(f"images: got shape {tuple(images.shape)}, expected (n, c, h, w)")
            return images
        require_batches(images)
        return images

    def _chosen(self, n: int) -> Any:
        """The first `limit`, or a sample of them in their order."""
        indices = np.arange(n)[: self.how.limit]
        if self.how.sample is not None and self.how.sample < len(indices):
            drawn = np.random.default_rng(self.how.seed).choice(indices, self.how.sample, replace=False)
            self._drawn(len(indices))
            indices = np.sort(drawn)
        if isinstance(self.images, Images):
            if self.how.sample is None and len(indices) < n:
                self.warnings.append(
                    f"the first {len(indices)} of {n} images; in folders by class, of the first classes alone"
                )
            return self.images.some(indices.tolist())
        return self.images[torch.from_numpy(indices)] if isinstance(self.images, Tensor) else self.images[indices]

    @property
    def path(self) -> str | None:
        """Where the images are, if that has a path."""
        return str(self.images.source) if isinstance(self.images, Images) else None

    @property
    def name(self) -> str:
        """What errors call them."""
        return self.path or "images"

    def read_names(self) -> list[str]:
        """The names of a path's images that could be read, in order."""
        lost = {entry["path"] for entry in self.skipped}
        return [name for k, name in enumerate(self.images.names) if self.images.path(k) not in lost]

    def provenance(self) -> dict[str, Any]:
        """The `images` of a document, when all have come."""
        return {"path": self.path, "count": self.count, "skipped": self.skipped}

    def notes(self) -> list[str]:
        """The warnings, when all have come."""
        lost = len(self.skipped)
        left = [f"{lost} of {self.count + lost} images were skipped"] if lost else []
        plain = [f"{self.plain} of {self.count} images are of one colour, without any contrast"] if self.plain else []
        return [*self.warnings, *left, *plain]

    def unread(self) -> str:
        """How many could not be read, and the first of them, for an error."""
        if not self.skipped:
            return ""
        first = self.skipped[0]
        return f"{len(self.skipped)} of {self.total} images cannot be read, first {first['path']} ({first['why']})"

    def shown(self, batch: Tensor) -> Tensor:
        """The first batch of all, (b, ...), in every process that holds one of the first; `batch` is its own."""
        return processes.collect(batch.cpu() if processes.rank() == self.leader else None)[self.leader]

    def __iter__(self) -> Iterator[Tensor]:
        if self.how.distributed:
            yield from self._shared()
            return
        for batch in self._batches():
            if not len(batch):
                continue
            if self.count == 0:
                self._look(batch)
            self.start = self.count
            self.count += len(batch)
            self.plain += plain(batch)
            yield batch

    def _shared(self) -> Iterator[Tensor]:
        batches, over = self._own(), False
        while not over:
            turn = self._turn(batches)
            turns = processes.collect(turn)
            processes.agreed([each.error for each in turns])
            counts = [each.count for each in turns]
            if self.count == 0 and any(counts):
                self.leader = next(place for place, count in enumerate(counts) if count)
            self.start = self.count + sum(counts[: processes.rank()])
            self.count += sum(counts)
            self.plain += sum(each.plain for each in turns)
            self.skipped += [lost for each in turns for lost in each.skipped]
            self.warnings = turns[0].warnings
            over = all(each.over for each in turns)
            if any(counts):
                yield torch.empty(0) if turn.batch is None else turn.batch
        if not self.count:
            refuse_unreadable(self.images, self.skipped)

    def _turn(self, batches: Iterator[tuple[Tensor | None, Skipped]]) -> "_Turn":
        """What this process has for the others of its next batch."""
        turn = _Turn()
        try:
            turn.batch, turn.skipped = next(batches, (None, None))
            turn.over, turn.skipped = turn.skipped is None, turn.skipped or []
            if turn.batch is not None:
                if processes.rank() == 0 and self.count == 0:
                    self._look(turn.batch)
                turn.count, turn.plain = len(turn.batch), plain(turn.batch)
        except InputError as error:
            turn.error = error
        turn.warnings = self.warnings
        return turn

    def _own(self) -> Iterator[tuple[Tensor | None, Skipped]]:
        """(batch, None if none of it can be read; what was skipped) of each of this process's batches."""
        if isinstance(self.images, Images):
            mine = self.images.some(processes.own_batches(len(self.images), self.step))
            for batch in decoded(mine, self.preprocess, self.step, self.how.workers) if len(mine) else ():
                lost: Skipped = []
                yield readable(batch, lost, self.how.strict), lost
        else:
            for place, pixels in enumerate(self._batches()):
                if place % processes.world() == processes.rank():
                    yield pixels, []

    def _batches(self) -> Iterator[Tensor]:
        if isinstance(self.images, Images):
            skipped = None if self.how.strict else self.skipped
            yield from pixel_batches(self.images, self.preprocess, self.step, self.how.workers, None, skipped)
        elif isinstance(self.images, (Tensor, np.ndarray)):
            for start in range(0, len(self.images), self.step):
                yield _tensor(self.images[start : start + self.step])
        else:
            batches: Iterable[Tensor] = blocks(map(_tensor, self.images), self.how.limit)
            if self.how.sample is not None:
                rows, n = reservoir(batches, self.how.sample, self.how.seed)
                batches = [rows]
                self._drawn(n)
            for batch in batches:
                yield from batch.split(self.step)

    def _drawn(self, n: int) -> None:
        if self.how.sample is not None and self.how.sample < n:
            self.warnings.append(f"{self.how.sample} of {n} {self.unit}, drawn at random with seed {self.how.seed}")

    def _look(self, batch: Tensor) -> None:
        """Refuse what is no batch, and say what seems normalised already."""
        if batch.ndim < 2 or batch.is_complex():
            raise InputError(f"images: a batch of shape {tuple(batch.shape)}, {batch.dtype}; expected (b, c, h, w)")
        if self.preprocess.mean is not None and batch.is_floating_point():
            low, high = (float(x) for x in torch.aminmax(batch))
            if low < -1e-3 or high > 1 + 1e-3:
                self.warnings.append(
                    f"images hold values from {low:.3g} to {high:.3g}, expected 0..1: the network's mean and std are "
                    "taken off; if that was done already, give no_normalize=True"
                )


@dataclass
class _Turn:
    """What a process tells the others of its next batch; the batch itself it keeps."""

    batch: Tensor | None = None
    count: int = 0
    plain: int = 0
    skipped: Any = None
    warnings: Any = None
    error: InputError | None = None
    over: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "batch": None}


def plain(batch: Tensor) -> int:
    """How many images of a batch (b, c, h, w) have one value a channel; other batches have none."""
    if batch.ndim != 4 or batch.shape[2] * batch.shape[3] < 2:
        return 0
    few = batch[..., ::8, ::8].flatten(2)  # most images differ here already
    alike = (few == few[..., :1]).all(2).all(1).nonzero().flatten()
    candidates = batch[alike].flatten(2)
    return int((candidates == candidates[..., :1]).all(2).all(1).sum()) if len(alike) else 0


def require_batches(images: Any) -> None:
    """Raise InputError unless something is a path, or has batches."""
    if isinstance(images, (str, PathLike)) or hasattr(images, "__array__"):
        return
    if isinstance(images, (nn.Module, Mapping)) or not hasattr(images, "__iter__"):
        wanted = "a path, (n, c, h, w) tensor or array, or an iterable of batches"
        raise InputError(f"images: got {f'a {type(images).__name__}' if images is not None else None}, give {wanted}")


def _tensor(batch: Any) -> Tensor:
    """The images of a batch as a tensor."""
    batch = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if isinstance(batch, Tensor):
        return batch.detach()
    if isinstance(batch, (Mapping, str)) or not hasattr(batch, "__array__"):
        raise InputError(f"images: a batch is a {type(batch).__name__}, expected a tensor or array, or a tuple of them")
    rows = np.asarray(batch)
    if rows.dtype.kind not in "fiub":
        raise InputError(f"images: dtype {rows.dtype} is not real numbers")
    return torch.from_numpy(rows.copy())  # of a file's own memory, which is read-only


@contextmanager
def borrowed(net: Encoder, device: str) -> Iterator[Encoder]:
    """The network in eval mode on a device, float32 exact; afterwards in its modes, and where it was."""
    modes = [module for module in net.modules() if module.training]
    places = {t.device for t in chain(net.parameters(), net.buffers())}
    exact = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    # float32 means float32: without this, convolutions on a GPU round to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield net.to(device).eval()
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = exact
        for module in modes:
            module.training = True
        if len(places) == 1:
            net.to(places.pop())
