"""What embeddings are worth: nearest neighbours, logistic regression, and how sure their accuracy is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from collapse import InputError
from collapse.arguments import positive, whole
from collapse.encoders import processes
from collapse.moved import Renamed
from collapse.results import (
    Result,
    command,
    integer_of,
    list_of,
    number_of,
    require_schema,
    value_of,
    versions,
)

VOTES = 1024  # test rows whose neighbours are sought at a time


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share, of `right` successes in n. Raises InputError: n is 0, or `right` is no part.

    Examples:
        >>> [round(end, 3) for end in wilson(90, n=100)]
        [0.826, 0.945]
    """
    if not 0 <= right <= n or n < 1:
        raise InputError(f"right= is {right}, n= is {n}; expected a part of at least 1")
    from scipy.stats import binomtest  # a second to load

    interval = binomtest(right, n).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, eq=False, repr=False)
class Accuracy(Result):
    """How many of n images have their class among the k most likely, k = 1 and 5.

    correct1, correct5: counts.  provenance: what was measured, as in the documents collapse.probe/1 and collapse.knn/1.

    Examples:
        >>> accuracy = Accuracy(correct1=90, correct5=99, n=100)
        >>> accuracy.top1, accuracy.top5
        (0.9, 0.99)
        >>> print(accuracy.sentence())
        90.00 % of 100 images are right (95 %: 82.56 to 94.48), 99.00 % among the first five.
    """

    correct1: int
    correct5: int
    n: int
    about = Renamed("provenance")
    provenance: Mapping[str, Any] = field(default_factory=lambda: {"schema": "collapse.accuracy/1"})
    command: list[str] = field(default_factory=command)
    versions: Mapping[str, str] = field(default_factory=lambda: versions("torch", "torchvision"))

    @classmethod
    def of(cls, scores: Tensor, labels: Tensor) -> "Accuracy":
        """scores: (n, classes), higher is likelier, -inf of a class that is not among them; labels: (n,)."""
        top = scores.topk(min(5, scores.shape[1]), dim=1)
        best = (top.indices == labels[:, None]) & (top.values > -math.inf)
        return cls(int(best[:, 0].sum()), int(best.any(1).sum()), len(labels))

    def __add__(self, other: "Accuracy") -> "Accuracy":
        return replace(
            self, correct1=self.correct1 + other.correct1, correct5=self.correct5 + other.correct5, n=self.n + other.n
        )

    @property
    def top1(self) -> float:
        """The share of images whose most likely class is right."""
        return self.correct1 / self.n

    @property
    def top5(self) -> float:
        """The share of images whose class is among the five most likely."""
        return self.correct5 / self.n

    @property
    def top1_interval(self) -> tuple[float, float]:
        """Of `top1`, 95 % (Wilson). Raises InputError: there is no image."""
        return wilson(self.correct1, self.n)

    @property
    def top5_interval(self) -> tuple[float, float]:
        """Of `top5`, 95 % (Wilson). Raises InputError: there is no image."""
        return wilson(self.correct5, self.n)

    def as_dict(self) -> dict[str, Any]:
        """Shares, and their 95 % intervals (Wilson)."""
        names = ("top1", "top5", "top1_interval", "top5_interval", "n")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.probe/1 or collapse.knn/1."""
        return {**self.provenance, **self.as_dict(), "command": self.command, "versions": self.versions}

    def inputs(self) -> list[str]:
        """The network."""
        path = self.provenance.get("source", {}).get("path")
        return [path] if path else []

    def notes(self) -> list[str]:
        """The warnings."""
        return list(self.provenance.get("warnings", []))

    def sentence(self) -> str:
        """The share that is right, and how sure it is."""
        (low, high), name = self.top1_interval, Path(str(self.provenance.get("source", {}).get("path") or "")).name
        first = f"{100 * self.top1:.2f} % of {self.n} images are right (95 %: {100 * low:.2f} to {100 * high:.2f})"
        return f"{name}{', ' * bool(name)}{first}, {100 * self.top5:.2f} % among the first five."

    @classmethod
    def _of(cls, document: Any, where: str) -> "Accuracy":
        kinds = ("collapse.probe/1", "collapse.knn/1", "collapse.accuracy/1")
        schema = document.get("schema") if isinstance(document, dict) else None
        document = require_schema(document, schema if schema in kinds else kinds[0], where)
        n = integer_of(document, "n", 1, where)
        first, five = (round(number_of(document, name, where, 1 + 1e-9) * n) for name in ("top1", "top5"))
        fields = ("top1", "top5", "top1_interval", "top5_interval", "n", "command", "versions")
        provenance = {name: value for name, value in document.items() if name not in fields}
        value_of({"source": {}, **provenance}, "source", where, dict)
        told = list_of(document, "command", where, str), value_of(document, "versions", where, dict)
        return cls(first, five, n, provenance, *told)


def _parts(train: Any, train_labels: Any, test: Any, test_labels: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training rows and labels, test rows and labels, all on the rows' device; see `knn` for what is refused."""
    x, y = torch.as_tensor(train), torch.as_tensor(test)
    labels, wanted = (torch.as_tensor(classes).to(x.device) for classes in (train_labels, test_labels))
    for name, rows, classes in (("training", x, labels), ("test", y, wanted)):
        if rows.ndim != 2 or 0 in rows.shape or rows.shape[1] != x.shape[-1] or classes.shape != rows.shape[:1]:
            shapes = f"{tuple(rows.shape)} with labels {tuple(classes.shape)}"
            raise InputError(f"{name} rows: got shape {shapes}, expected (n, d) with (n,), of one d")
        if not (finite := rows.isfinite().all(1)).all():
            row = int((~finite).nonzero()[0, 0])
            raise InputError(f"{name} rows: row {row} is NaN or infinite; look at the network that made it")
        if classes.is_floating_point() or classes.min() < 0:
            raise InputError(f"{name} labels: expected whole numbers from 0, one a row")
    return x, labels.long(), y, wanted.long()


def knn(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, k: int = 20,
    temperature: float = 0.07, distributed: bool = False,
) -> Accuracy:  # fmt: skip
    """Weighted vote of the k nearest training rows: cosine similarity, weight exp(similarity / temperature).

    Wu et al., arXiv 1805.01978.  Rows (n, d); labels (n,) integers from 0; tensors stay on their device.  A class that
    none of the k neighbours has is not among the five most likely.  distributed: share the test rows over the processes
    of torch.distributed, each of which makes the same call and gets the whole result.

    Raises InputError: shapes do not fit, a row is NaN or infinite, a label is no whole number from 0, k is below 1, the
    temperature is not positive, or torch.distributed was not started.

    Examples:
        >>> train, labels = [[1.0, 0], [0.9, 0.1], [0, 1]], [0, 0, 1]
        >>> knn(train, labels, [[1.0, 0.2], [0.1, 1]], [0, 1], k=1).top1
        1.0
    """
    whole("k", k, 1)
    positive("temperature", temperature)
    processes.require(distributed)
    x, labels, y, wanted = _parts(train, train_labels, test, test_labels)
    keys, queries = F.normalize(x.float()), F.normalize(y.float())
    classes = int(max(labels.max(), wanted.max())) + 1
    total, parts = Accuracy(0, 0, 0), list(zip(queries.split(VOTES), wanted.split(VOTES), strict=True))
    for rows, truth in parts[processes.rank() :: processes.world()] if distributed else parts:
        similarity, nearest = (rows @ keys.T).topk(min(k, len(keys)))
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1, so that none overflows
        votes = torch.zeros(len(rows), classes, device=keys.device)
        votes.scatter_add_(1, labels[nearest], weights)
        voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels[nearest], True)
        total += Accuracy.of(votes.masked_fill(~voted, -math.inf), truth)
    return sum(processes.collect(total), Accuracy(0, 0, 0)) if distributed else total


def knn_top1(
    train: NDArray, train_labels: NDArray, test: NDArray, test_labels: NDArray, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test rows, (n, d), whose vote among the k nearest training rows is right; arguments as for `knn`.

    Raises InputError: as `knn`.

    Examples:
        >>> import numpy as np
        >>> knn_top1(np.eye(2), np.array([0, 1]), np.eye(2), np.array([0, 0]), k=1)
        0.5
    """
    accuracy = knn(train, train_labels, test, test_labels, k, temperature)
    return accuracy.top1


def logistic_regression(x: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Minimise mean cross-entropy + decay |W|^2 / 2 by L-BFGS; x (n, d) float64 -> [W b], (classes, d + 1).

    labels: (n,) int64 from 0.  The bias b is free.  decay 1 / n is scikit-learn's C = 1.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [1]]).double()
        >>> W = logistic_regression(x, torch.tensor([0, 1]), classes=2, decay=0.5)
        >>> (W[:, 0] > 0).tolist(), tuple(W.shape)
        ([False, True], (2, 2))
    """
    # In coordinates where the loss is about equally curved all ways: collapsed features take forever in their own.
    size, turn = torch.linalg.eigh(x.T @ x / len(x))
    scale = (size.clamp(min=0) / classes + decay).clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
    rows = x @ (turn * scale)
    weight = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=2000,
        tolerance_grad=2e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        size = (weight[:, :-1] * scale).square().sum()
        loss = F.cross_entropy(rows @ weight[:, :-1].T + weight[:, -1], labels) + decay / 2 * size
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    fitted = weight.detach()
    return torch.cat([fitted[:, :-1] * scale @ turn.T, fitted[:, -1:]], 1)


def probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, decay: float | None = None
) -> Accuracy:
    """Logistic regression on features standardised with the training rows' mean and deviation.

    Rows (n, d); labels (n,) integers from 0; decay None is 1 / n, see `logistic_regression`.

    Raises InputError: shapes do not fit, a row is NaN or infinite, a label is no whole number from 0, or the decay is
    negative.

    Examples:
        >>> x = [[-1.0], [-2], [1], [2]]
        >>> probe(x, [0, 0, 1, 1], x, [0, 0, 1, 1]).top1
        1.0
    """
    if decay is not None and not decay >= 0:
        raise InputError(f"decay= is {decay}, expected a number of at least 0")
    x, labels, y, wanted = _parts(train, train_labels, test, test_labels)
    x, y = x.double(), y.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    classes = int(max(labels.max(), wanted.max())) + 1
    weight = logistic_regression((x - mean) / deviation, labels, classes, 1 / len(x) if decay is None else decay)
    return Accuracy.of((y - mean) / deviation @ weight[:, :-1].T + weight[:, -1], wanted)


def probe_top1(train: NDArray, train_labels: NDArray, test: NDArray, test_labels: NDArray) -> float:
    """Share of test rows, (n, d), that `probe` gets right; arguments as for `probe`.

    Raises InputError: as `probe`.

    Examples:
        >>> import numpy as np
        >>> x = np.array([[-1.0], [-2], [1], [2]])
        >>> probe_top1(x, np.array([0, 0, 1, 1]), x, np.array([0, 0, 1, 0]))
        0.75
    """
    accuracy = probe(train, train_labels, test, test_labels)
    return accuracy.top1
