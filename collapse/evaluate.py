"""Embeddings of a set of images, and what they are worth: nearest neighbours and a linear probe."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse.checkpoints import Encoder, Taps
from collapse.images import Preprocessing

PRECISIONS = ("float32", "bf16")


@torch.inference_mode()
def embed(
    net: nn.Module,
    batches: Iterable[Tensor],
    preprocess: Preprocessing,
    device: str = "cpu",
    precision: str = "float32",
) -> Iterator[Tensor]:
    """Outputs of `net` in eval mode, (b, d) float32 on `device`, for batches of pixels (b, 3, h, w) uint8, in order.

    precision: "float32", or "bf16" for autocast and channels_last: faster on a GPU, and three digits instead of seven.
    """
    net = _ready(net, device, precision)
    for pixels in batches:
        x = preprocess.normalize(pixels.to(device, non_blocking=True))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            rows = net(x)
        yield rows.float()


def _ready(net: Any, device: str, precision: str) -> Any:
    layout = torch.channels_last if precision == "bf16" else torch.preserve_format
    return net.to(device, memory_format=layout).eval()


@torch.inference_mode()
def embed_layers(
    net: Encoder,
    names: Sequence[str],
    batches: Iterable[Tensor],
    device: str = "cpu",
    positions: int = 0,
    seed: int = 0,
    precision: str = "float32",
) -> Iterator[dict[str, Tensor]]:
    """Rows of several layers, {name: (n, d)} on `device`, for batches of pixels (b, 3, h, w) uint8; one pass for all.

    names: "representation", "projector" and modules of the backbone.
    """
    net = _ready(net, device, precision)
    taps = Taps(net, [n for n in names if n not in ("representation", "projector")], positions, seed)
    for pixels in batches:
        x = net.preprocess.normalize(pixels.to(device, non_blocking=True)).to(next(net.parameters()).dtype)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            rows = {"representation": net(x)}
            if "projector" in names and net.projector is not None:
                rows["projector"] = net.projector(rows["representation"])
        rows |= taps.rows
        yield {name: rows[name] for name in names}
    taps.remove()


def rounding(net: Encoder, names: Sequence[str], pixels: Tensor, normalize: bool, **options: Any) -> dict[str, NDArray]:
    """The rounding errors of some rows of each layer, {name: (n, d)} float64.

    A network adds up millions of roundings, of which the dtype of its output does not tell; so `pixels` go through
    twice, in the precision of `options` (those of `embed_layers`) and in float64.
    """
    single = next(embed_layers(net, names, [pixels], **options))
    net.double()
    double = next(embed_layers(net, names, [pixels], **{**options, "precision": "float32"}))
    net.float()  # the weights were float32: exact both ways
    found = {}
    for name in names:
        pair = [z[name].double() for z in (single, double)]
        if normalize:
            pair = [torch.nn.functional.normalize(z) for z in pair]
        found[name] = (pair[0] - pair[1]).cpu().numpy()
    return found


def knn_top1(
    train: NDArray, train_labels: NDArray, test: NDArray, test_labels: NDArray, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test rows whose weighted vote of the k nearest training rows is right.

    Cosine similarity; each neighbour votes with exp(similarity / temperature) (Wu et al., arXiv 1805.01978).
    Rows (n, d); labels (n,) integers from 0.
    """
    keys, queries = (torch.nn.functional.normalize(torch.as_tensor(z, dtype=torch.float32)) for z in (train, test))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    labels, right = torch.as_tensor(train_labels), 0
    for start in range(0, len(queries), 1024):
        similarity, nearest = (queries[start : start + 1024] @ keys.T).topk(min(k, len(keys)))
        votes = torch.zeros(len(nearest), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == torch.as_tensor(test_labels[start : start + 1024])).sum())
    return right / len(test)


def probe_top1(train: NDArray, train_labels: NDArray, test: NDArray, test_labels: NDArray) -> float:
    """Share of test rows that a linear classifier gets right: logistic regression (L-BFGS, L2 with C = 1) on features
    standardised with the training rows' mean and deviation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(
        probe.fit(np.asarray(train, np.float64), train_labels).score(np.asarray(test, np.float64), test_labels)
    )
