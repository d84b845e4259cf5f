"""The contrastive loss of the trainer: cosine InfoNCE over the batch of all processes (arXiv 2110.09348, section 3).

z, z_prime (n, m): embeddings of the two views of this process's n images; N = world n rows in all.  The Euclidean loss
of the paper's theory is in theory/identities.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse import InputError
from collapse.moved import renamed
from collapse.recipes.config import NEGATIVES
from collapse.training.parallel import gather, rank


def contrastive_loss(z: Tensor, z_prime: Tensor, temperature: float, negatives: str = "other") -> Tensor:
    """Mean over this process's anchors and both directions of -ln softmax(cos / temperature)[positive]: a scalar.

    The mean over processes of what each returns is the loss of the whole batch, and so are gradients, as
    DistributedDataParallel averages them: the gathered rows carry gradients back to their owners.

    Args:
        z, z_prime: (n, m), or (n, g, m) for g groups of dimensions, each with a loss of its own, averaged; half
            precision is computed in float32, autocast or not.
        negatives: "other", the N - 1 other images in the other view, as in the paper; or "all", the 2 N - 2 other
            images in both views (NT-Xent, arXiv 2002.05709).

    Raises InputError: unknown negatives.
    """
    if negatives not in NEGATIVES:
        raise InputError(f"negatives: got {negatives!r}, expected one of {', '.join(NEGATIVES)}")
    with torch.autocast(z.device.type, enabled=False):
        wide = (a if a.dtype == torch.float64 else a.float() for a in (z, z_prime))
        a, b = (F.normalize(rows, dim=-1) for rows in wide)
        both = gather(torch.stack([a, b], 1))  # (N, 2, ...): one message
        keys = both.unbind(1)
        if z.ndim == 2:
            return _loss((a, b), keys, temperature, negatives)
        groups = [
            _loss((a[:, g], b[:, g]), (keys[0][:, g], keys[1][:, g]), temperature, negatives) for g in range(z.shape[1])
        ]
        return torch.stack(groups).mean()


def _loss(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, ...], temperature: float, negatives: str) -> Tensor:
    """Unit rows: queries (n, m) of this process, keys (N, m) of all, of both views."""
    positives = rank() * len(queries[0]) + torch.arange(len(queries[0]), device=queries[0].device)
    terms = []
    for view, query in enumerate(queries):
        logits = query @ keys[1 - view].T / temperature
        if negatives == "all":
            own = query @ keys[view].T / temperature
            logits = torch.cat([logits, own.scatter(1, positives[:, None], -torch.inf)], 1)
        terms.append(F.cross_entropy(logits, positives))
    return (terms[0] + terms[1]) / 2


__getattr__ = renamed(__name__)
