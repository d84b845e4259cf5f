"""What is measured while a network trains: spectra, the online classifier, nearest neighbours."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse.data.labelled import Labelled
from collapse.data.sources import Subset
from collapse.encoders import processes
from collapse.encoders.accuracy import Accuracy, knn
from collapse.spectra import Spectrum
from collapse.spectra.covariance import Covariance
from collapse.training import parallel
from collapse.training.network import Network

CACHED = 256 << 20  # bytes of pixels up to which an evaluation set is decoded once


class _Share:
    """This process's share of a fixed set of images, decoded once if it is small."""

    def __init__(self, data: Labelled, network: Network, batch: int, workers: int) -> None:
        self.data = data.subset(np.arange(processes.rank(), len(data), processes.world()))
        self.preprocess, self.batch, self.workers = network.config.preprocessing(), batch, workers
        self.kept: list[Tensor] | None = None
        if len(self.data) * 3 * network.config.image_size**2 <= CACHED:
            self.kept = list(self._read())

    def _read(self) -> Iterator[Tensor]:
        return self.data.batches(self.preprocess, self.batch, self.workers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels (b, 3, h, w) uint8, labels (b,)) in order."""
        labels = torch.from_numpy(self.data.labels).split(self.batch)
        yield from zip(self.kept if self.kept is not None else self._read(), labels, strict=True)


def _some(data: Labelled, count: int, seed: list[int]) -> Labelled:
    """Up to `count` images at random, in order; one that cannot be read is replaced by the next."""
    tolerant = replace(data, images=Subset(data.images, np.arange(len(data)), tolerant=True))
    return tolerant.subset(np.sort(np.random.default_rng(seed).permutation(len(data))[:count]))


class Evaluation:
    """Measures a network on fixed images: up to `count` of the held-out ones, and as many training ones as neighbours.

    In float32, with the running statistics of the batch norms; the work is shared by all processes.
    Attribute beat: called after each batch.
    """

    def __init__(self, network: Network, train: Labelled, val: Labelled, count: int, workers: int, device: str) -> None:
        seed = network.config.seed
        self.network, self.device = network, device
        self._exact = device if device.startswith("cuda") else None  # where covariances add up
        self.beat: Callable[[], None] = lambda: None
        self.held = _Share(_some(val, count, [seed, 1]), network, 256, workers)
        self.bank = _Share(_some(train, count, [seed, 2]), network, 256, workers)

    @torch.no_grad()
    def _pass(self, share: _Share) -> Iterator[tuple[Tensor, Tensor]]:
        """(representation, labels) of each batch, the network in eval mode for as long."""
        self.network.eval()
        try:
            for pixels, labels in share:
                x = share.preprocess.normalize(pixels.to(self.device))
                # forward: a compiled backbone would be compiled again, for evaluation and for the last, smaller batch.
                yield self.network.backbone.forward(x).float(), labels.to(self.device)
                self.beat()
        finally:
            self.network.train()

    @torch.no_grad()
    def spectra(self) -> tuple[dict[str, Spectrum], dict[str, float]]:
        """Spectra of the representation and the embedding, exact over the held images; top-1 of a classifier."""
        sums: dict[str, Covariance] = {}
        scores, truth = list[Tensor](), list[Tensor]()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # a spectrum sees TF32's rounding
            for r, labels in self._pass(self.held):
                z = self.network.projector(r).flatten(1)
                for name, rows in (("representation", r), ("embedding", z)):
                    if name not in sums:
                        sums[name] = Covariance(rows.shape[1], normalize=True, device=self._exact)
                    sums[name].update(rows)
                if self.network.classes:
                    scores.append(self.network.classifier(r))
                    truth.append(labels)
        if processes.world() > 1:
            for total in sums.values():
                total.all_reduce()
        mine = Accuracy.of(torch.cat(scores), torch.cat(truth)) if scores else Accuracy(0, 0, 0)
        accuracy = sum(processes.collect(mine), Accuracy(0, 0, 0))
        spectra = {name: total.measured(source={"kind": "run", "layer": name}) for name, total in sums.items()}
        return spectra, {"classifier_top1": accuracy.top1} if self.network.classes else {}

    def neighbours(self) -> dict[str, float]:
        """Top-1 of the held images' nearest training images, k = 20; nothing without labels."""
        if not self.network.classes:
            return {}
        (keys, key_labels), (queries, labels) = (self._all(share) for share in (self.bank, self.held))
        accuracy = knn(keys, key_labels, queries, labels)
        return {"knn_top1": accuracy.top1}

    def _all(self, share: _Share) -> list[Tensor]:
        """Representations and labels of all processes' images, on the device."""
        mine = [torch.cat(columns) for columns in zip(*self._pass(share), strict=True)]
        return [parallel.all_rows(column) for column in mine]


def rank_metrics(spectra: dict[str, Spectrum]) -> dict[str, Any]:
    """The representation's rank metrics by name, the embedding's with embedding_ before it."""
    line = dict(spectra["representation"].metrics())
    return {**line, **{f"embedding_{name}": value for name, value in spectra["embedding"].metrics().items()}}
