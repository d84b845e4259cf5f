"""Embeddings of a set of images, and what they are worth: nearest neighbours and a linear probe."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse.images import Preprocessing

if TYPE_CHECKING:
    from collapse.checkpoints import Encoder


@torch.inference_mode()
def embed(
    net: nn.Module, batches: Iterable[Tensor], preprocess: Preprocessing, device: str = "cpu"
) -> Iterator[Tensor]:
    """Outputs of `net` in eval mode, (b, d) float32 on `device`, for batches of pixels (b, 3, h, w) uint8, in order."""
    net = net.to(device).eval()
    for pixels in batches:
        yield net(preprocess.normalize(pixels.to(device))).float()


class Taps:
    """The outputs of a network's inner layers, in one pass: hooks on its modules, and rows from what they see.

    rows: name -> (n, d) of the last forward pass, after it: feature maps (n, d, h, w), and tokens (n, t, d), become
    their mean over positions, or `positions` of them drawn at random as rows of their own, which see what the mean
    hides.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], positions: int = 0, seed: int = 0) -> None:
        self.rows: dict[str, Tensor] = {}
        self.positions, self.generator = positions, torch.Generator().manual_seed(seed)
        modules = dict(net.named_modules())
        self._hooks = [modules[name].register_forward_hook(partial(self._keep, name)) for name in names]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.ndim == 2:
            self.rows[name] = output
            return
        tokens = output.flatten(2).mT if output.ndim == 4 else output
        if not self.positions:
            self.rows[name] = tokens.mean(1)
            return
        draw = torch.rand(tokens.shape[:2], generator=self.generator).argsort(1)[:, : self.positions]
        self.rows[name] = torch.take_along_dim(tokens, draw.to(tokens.device)[..., None], 1).flatten(0, 1)


@torch.inference_mode()
def embed_layers(
    net: "Encoder",
    names: Sequence[str],
    batches: Iterable[Tensor],
    device: str = "cpu",
    positions: int = 0,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Rows of several layers, {name: (n, d)} on `device`, for batches of pixels (b, 3, h, w) uint8; one pass for all.

    names: "representation", "projector" and modules of the backbone.
    """
    net = net.to(device).eval()
    taps = Taps(net.backbone, [n for n in names if n not in ("representation", "projector")], positions, seed)
    for pixels in batches:
        rows = {"representation": net(net.preprocess.normalize(pixels.to(device)).to(next(net.parameters()).dtype))}
        if "projector" in names and net.projector is not None:
            rows["projector"] = net.projector(rows["representation"])
        rows |= taps.rows
        yield {name: rows[name] for name in names}
    taps.remove()


def rounding(
    net: "Encoder", names: Sequence[str], pixels: Tensor, normalize: bool, **options: Any
) -> dict[str, NDArray]:
    """The float32 rounding errors of some rows of each layer, {name: (n, d)} float64.

    A network adds up millions of roundings, of which the dtype of its output does not tell; so `pixels` go through
    twice, in float32 and in float64.  options: as for `embed_layers`.
    """
    single = next(embed_layers(net, names, [pixels], **options))
    net.double()
    double = next(embed_layers(net, names, [pixels], **options))
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
