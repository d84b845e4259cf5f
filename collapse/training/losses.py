"""The losses of the trainer, over the batch of all processes: cosine InfoNCE (arXiv 2110.09348, section 3) and others.

z, z_prime (n, m): embeddings of the two views of this process's n images; N = world n rows in all.  The mean over
processes of what each returns is the loss of the whole batch, and so are gradients, as DistributedDataParallel averages
them: the gathered rows carry gradients back to their owners.  Half precision is computed in float32, autocast or not.
The Euclidean loss of the paper's theory is in theory/identities.py, mean losses of linear networks in theory/losses.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from collapse import InputError
from collapse.encoders.processes import rank
from collapse.moved import renamed
from collapse.recipes.config import NEGATIVES
from collapse.theory.descent import VICREG_EPSILON
from collapse.training.parallel import gather


def contrastive_loss(z: Tensor, z_prime: Tensor, temperature: float, negatives: str = "other") -> Tensor:
    """Mean over this process's anchors and both directions of -ln softmax(cos / temperature)[positive]: a scalar.

    Args:
        z, z_prime: (n, m), or (n, g, m) for g groups of dimensions, each with a loss of its own, averaged.
        negatives: "other", the N - 1 other images in the other view, as in the paper; or "all", the 2 N - 2 other
            images in both views (NT-Xent, arXiv 2002.05709).

    Raises InputError: unknown negatives.
    """
    if negatives not in NEGATIVES:
        raise InputError(f"negatives: got {negatives!r}, expected one of {', '.join(NEGATIVES)}")
    with torch.autocast(z.device.type, enabled=False):
        a, b = (F.normalize(rows, dim=-1) for rows in _wide(z, z_prime))
        keys = _gathered(a, b)
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
            within = query @ keys[view].T / temperature
            logits = torch.cat([logits, within.scatter(1, positives[:, None], -torch.inf)], 1)
        terms.append(F.cross_entropy(logits, positives))
    return (terms[0] + terms[1]) / 2


def barlow_twins(z: Tensor, z_prime: Tensor, redundancy: float = 5e-3) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2, C (m, m) the cross-correlation of the views: a scalar.

    z, z_prime: (n, m).  Each view is centred and scaled by its own statistics of the whole batch (arXiv 2103.03230,
    algorithm 1).
    """
    with torch.autocast(z.device.type, enabled=False):
        a, b = (F.batch_norm(rows, None, None, training=True) for rows in _gathered(*_wide(z, z_prime)))
        C = a.T @ b / len(a)
        diagonal = C.diagonal()
        beside = C.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + redundancy * beside


def vicreg(z: Tensor, z_prime: Tensor, weights: Sequence[float] = (25.0, 25.0, 1.0)) -> Tensor:
    """Invariance |z - z'|^2 / m, variance and covariance of each view, times their weights: a scalar.

    z, z_prime: (n, m).
    variance: mean_j (1 - sqrt(Var_j + 1e-4))+, the mean of both views; covariance: sum_{i != j} Cov_ij^2 / m, the sum
    of both, as in the authors' code (arXiv 2105.04906).  Divisor N - 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        views = _gathered(*_wide(z, z_prime))
        variance, covariance = (sum(terms) for terms in zip(*(_spread(rows) for rows in views), strict=True))
        invariance = (views[0] - views[1]).square().mean()
        return weights[0] * invariance + weights[1] * variance / 2 + weights[2] * covariance


def _spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, covariance) terms of one view, rows (N, m)."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / (len(rows) - 1)
    diagonal = covariance.diagonal()
    hinge = F.relu(1 - torch.sqrt(diagonal + VICREG_EPSILON)).mean()
    return hinge, (covariance.square().sum() - diagonal.square().sum()) / len(diagonal)


def negative_cosine(p: Tensor, p_prime: Tensor, target: Tensor, target_prime: Tensor) -> Tensor:
    """-cos of each prediction (n, m) and the other view's target, mean over images and directions: SimSiam's loss.

    Targets carry no gradient (arXiv 2011.10566, algorithm 1).  BYOL's loss, |unit p - unit target|^2 in both
    directions (arXiv 2006.07733), is 4 + 4 times it.
    """
    with torch.autocast(p.device.type, enabled=False):
        p, p_prime, target, target_prime = _wide(p, p_prime, target.detach(), target_prime.detach())
        both = F.cosine_similarity(p, target_prime) + F.cosine_similarity(p_prime, target)
        return -both.mean() / 2


def _wide(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(a if a.dtype == torch.float64 else a.float() for a in rows)


def _gathered(*views: Tensor) -> tuple[Tensor, ...]:
    """Views (n, ...) of this process -> (N, ...) of all, by one message."""
    return gather(torch.stack(views, 1)).unbind(1)


__getattr__ = renamed(__name__)
