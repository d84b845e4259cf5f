"""What a network's representation is worth on labelled images: a linear probe, and nearest neighbours."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError
from collapse.arguments import choice, known, positive, whole
from collapse.checkpoints import Overrides
from collapse.data.labelled import Labelled, open_data, same_classes
from collapse.encoders import accuracy
from collapse.encoders.accuracy import Accuracy
from collapse.encoders.networks import How, Watch, borrowed, encoder_of
from collapse.encoders.passes import features
from collapse.encoders.processes import in_turn, own_batches
from collapse.errors import warn
from collapse.models.encoder import Encoder
from collapse.probes.paper import probe_paper

RECIPES = ("fast", "paper")
OPTIONS = ("device", "batch_size", "workers", "seed", "max_pixels", "pixel_range", "distributed",
           *Overrides.__dataclass_fields__)  # fmt: skip
BATCH = 256


def probe(
    source: Any, data: str | PathLike, *, recipe: str = "fast", epochs: int = 100, watch: Watch = iter, **options: Any
) -> Accuracy:
    """A linear classifier on the representation, trained on the data's train part and counted on its val part.

    Args:
        source: a checkpoint's path, what `collapse.load` gave, or any torch.nn.Module, which comes back as it was.
        data: a folder or zip of train/CLASS/* and val/CLASS/*, or what else `collapse.data.labelled.open_data` takes.
        recipe: "fast", L-BFGS on features of the centre crops; "paper", SGD for `epochs` on random crops and flips.
        watch: gets the batches of images and passes them on, as a progress bar does.
        options: device, batch_size (256), workers, seed, max_pixels, pixel_range, distributed, and the fields of
            `Overrides`.

    Raises:
        InputError: no such data, classes that differ, an impossible value; as `collapse.load` does.
        TypeError: an unknown keyword.

    Examples:
        >>> import torch
        >>> counts = probe(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8)), "sklearn:digits")
        >>> 0.5 < counts.top1 <= counts.top5 <= 1
        True
    """
    known("probe", options, OPTIONS, ("recipe", "epochs"))
    choice("recipe", recipe, RECIPES)
    whole("epochs", epochs, 1)
    task = _Task.of(source, data, watch, options)
    if recipe == "paper" and task.how.distributed:
        raise InputError('recipe="paper" trains in one process; leave distributed= out, or give recipe="fast"')
    how = {"recipe": recipe, "epochs": epochs if recipe == "paper" else None}
    with borrowed(task.net, task.how.device):
        if recipe == "paper":
            size = {"batch_size": task.how.batch_size or BATCH, "seed": task.how.seed}
            counts = probe_paper(task.net, task.train, task.val, task.how.device, task.how.workers, epochs, **size)
        else:
            counts = accuracy.probe(*task.features(task.train), *task.features(task.val))
    return task.result("probe", counts, how)


def knn(
    source: Any, data: str | PathLike, *, k: int = 20, temperature: float = 0.07, watch: Watch = iter, **options: Any
) -> Accuracy:
    """A vote of the k nearest training images by cosine similarity, weight exp(similarity / temperature).

    source, data, watch, options: as for `probe`.

    Raises: InputError, TypeError as `probe` does.

    Examples:
        >>> import torch
        >>> counts = knn(torch.nn.Flatten(), "sklearn:digits")
        >>> counts.n, counts.top1 > 0.95
        (600, True)
    """
    known("knn", options, OPTIONS, ("k", "temperature"))
    whole("k", k, 1)
    positive("temperature", temperature)
    task = _Task.of(source, data, watch, options)
    with borrowed(task.net, task.how.device):
        pairs = (*task.features(task.train), *task.features(task.val))
    counts = accuracy.knn(*pairs, k=k, temperature=temperature, distributed=task.how.distributed)
    return task.result("knn", counts, {"k": k, "temperature": temperature})


@dataclass
class _Counted:
    """Batches, and how many images they hold."""

    batches: Iterable[Tensor]
    total: int
    unit: ClassVar[str] = "images"

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


@dataclass
class _Task:
    """A network and the two parts of a data set."""

    net: Encoder
    train: Labelled
    val: Labelled
    data: str
    how: How
    watch: Watch

    @classmethod
    def of(cls, source: Any, data: str | PathLike, watch: Watch, options: Mapping[str, Any]) -> "_Task":
        how, overrides = How.of(source, {"batch_size": BATCH, **options})
        text = fspath(data)
        train, val = (open_data(text, split, how.max_pixels, how.pixel_range) for split in ("train", "val"))
        same_classes(train, val, text)
        return cls(encoder_of(source, overrides), train, val, text, how, watch)

    def features(self, part: Labelled) -> tuple[NDArray, NDArray]:
        """(rows (n, d), labels (n,)) of a part."""
        size, shared = self.how.batch_size or BATCH, self.how.distributed
        images = part.subset(own_batches(len(part), size)) if shared else part
        batches = images.batches(self.net.preprocess, size, self.how.workers)
        watched = self.watch(_Counted(in_turn(batches, len(part), size) if shared else batches, len(part)))
        return features(self.net, watched, self.net.preprocess, self.how.device, shared), part.labels

    def result(self, kind: str, counts: Accuracy, how: Mapping[str, Any]) -> Accuracy:
        """The counts with what they are of."""
        notes = [*dict.fromkeys([*self.net.report["warnings"], *self.train.warnings, *self.val.warnings])]
        header = {"schema": f"collapse.{kind}/1", "source": self.net.source("representation"), "data": self.data}
        warn(notes)
        return replace(counts, provenance={**header, **how, "warnings": notes})
