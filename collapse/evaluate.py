"""Embeddings of a set of images, and what they are worth: nearest neighbours and a linear probe."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse.images import Preprocessing


@torch.inference_mode()
def embed(
    net: nn.Module, batches: Iterable[Tensor], preprocess: Preprocessing, device: str = "cpu"
) -> Iterator[Tensor]:
    """Outputs of `net` in eval mode, (b, d) float32 on `device`, for batches of pixels (b, 3, h, w) uint8, in order."""
    net = net.to(device).eval()
    for pixels in batches:
        yield net(preprocess.normalize(pixels.to(device))).float()


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
