"""Exact identities of the InfoNCE loss and its gradient for linear networks (paper section 4, lemmas 1 and 2).

Notation, the paper's:  x, x_prime (n, d) two views;  z = x W^T, z_prime = x_prime W^T (n, m) their embeddings;
alpha (n, n) softmax weights: row i is anchor i, alpha[i, i] the weight of its positive z_prime_i, alpha[i, j] that of
the negative z_j;  X (d, d) = Sigma0 - Sigma1, symmetric, so that the gradient flow is dW/dt = W X.
The lemmas are for the Euclidean similarity -|z - z'|^2 / 2; the dot-product and cosine losses take their negatives
from the other view, as the official code does. Losses are summed over anchors.
All of it holds for any finite batch, to rounding; limits and approximations are in predict.py and meanfield.py.
Arguments are numpy arrays or torch tensors, results of the same kind, in float64; gradients flow through tensors.
An array that is not of real numbers, or holds NaN or infinity, raises InputError with its name.
"""

import torch
from torch import Tensor

from collapse import InputError
from collapse.theory.arrays import Array, check_choice, check_positive, same_kind

SIMILARITIES = ("euclidean", "dot", "cosine")


@same_kind
def infonce(z: Array, z_prime: Array, similarity: str = "euclidean", temperature: float = 1.0) -> Array:
    """The InfoNCE loss summed over anchors (paper equation 1; section 4 for the Euclidean form).

    euclidean: -sum_i log of the weight of z_prime_i among z_prime_i and z_j (j != i), logits -|z_i - .|^2 / (2 tau).
    dot, cosine: the cross-entropy of the logits z_i . z_prime_j / tau with target i; cosine normalises rows first.

    Args:
        z, z_prime: (n, m) embeddings of the two views.
        similarity: "euclidean", "dot" or "cosine".
        temperature: tau > 0.

    Returns:
        The loss, a float64 number (a tensor without dimensions for tensors).

    Raises:
        InputError: shapes differ, an entry is NaN or infinite, a similarity is unknown, a temperature not positive,
            a row of zeros has no cosine, or the embeddings are so large that their products overflow.

    Examples:
        >>> round(float(infonce([[1, 0], [0, 1]], [[1, 0], [0, 1]], "dot")), 6)  # 2 ln(1 + 1 / e)
        0.626523
    """
    _check_views("z", z, "z_prime", z_prime)
    check_choice("similarity", similarity, SIMILARITIES)
    check_positive("temperature", temperature)
    logits = (_euclidean(z, z_prime) if similarity == "euclidean" else _cross(z, z_prime, similarity)) / temperature
    margin = logits - logits.diagonal()[:, None]
    _check_overflow(margin, z)
    # The positive is kept out of the sum, so that a loss far below the rounding of 1 keeps its digits.
    margin = margin.masked_fill(_diagonal(margin), torch.finfo(torch.float64).min)
    negatives = torch.logsumexp(margin, dim=1)
    return torch.logaddexp(negatives, torch.zeros_like(negatives)).sum()


@same_kind
def infonce_gradients(z: Array, z_prime: Array) -> tuple[Array, Array]:
    """Gradients of the Euclidean loss, temperature 1, with respect to the embeddings (paper lemma 1).

    g_z_i = sum_{j != i} alpha_ij (z_j - z_prime_i) + alpha_ji (z_j - z_i),
    g_z_prime_i = sum_{j != i} alpha_ij (z_prime_i - z_i).

    Args:
        z, z_prime: (n, m) embeddings of the two views.

    Returns:
        (g_z, g_z_prime), each (n, m) float64.

    Raises:
        InputError: as for `infonce`.

    Examples:
        >>> g_z, g_z_prime = infonce_gradients([[1, 0], [0, 1]], [[1, 0], [0, 1]])
        >>> g_z.round(3).tolist(), g_z_prime.round(3).tolist()
        ([[-0.538, 0.538], [0.538, -0.538]], [[0.0, 0.0], [0.0, 0.0]])
    """
    _check_views("z", z, "z_prime", z_prime)
    z, z_prime = _centred(z, z_prime)
    negatives = _negative_weights(z, z_prime)
    rows, columns = negatives.sum(1, keepdim=True), negatives.sum(0)[:, None]
    g_z = (negatives + negatives.T) @ z - rows * z_prime - columns * z
    return g_z, rows * (z_prime - z)


@same_kind
def gram_difference(
    x: Array, x_prime: Array, W: Array, similarity: str = "euclidean", temperature: float = 1.0
) -> Array:
    """X = Sigma0 - Sigma1, so that dL/dW = -W X for L = `infonce` of x W^T and x_prime W^T (paper lemma 2).

    euclidean (temperature 1): Sigma0 = sum_{i,j} alpha_ij (x_i - x_j)(x_i - x_j)^T,
    Sigma1 = sum_i (1 - alpha_ii)(x_prime_i - x_i)(...)^T.
    dot: tau X = sum_i x_prime_i x_i^T - sum_{i,j} alpha_ij x_prime_j x_i^T + the same transposed.
    cosine: that of the rows over the length of their embeddings, x_i / |W x_i|, less what would only lengthen an
    embedding, sum_i c_i x_i x_i^T and its like for x_prime, c_i = z_i . (z_prime_i - sum_j alpha_ij z_prime_j).
    The last two are ours; they hold exactly for any batch, as the lemma does.

    Args:
        x, x_prime: (n, d) the two views.
        W: (m, d) the product of all layers.
        similarity, temperature: as for `infonce`.

    Returns:
        (d, d) float64, symmetric.

    Raises:
        InputError: as for `infonce`, W has another number of columns than x, or a Euclidean temperature is not 1.

    Examples:
        >>> gram_difference([[1, 0], [0, 1]], [[1, 0], [0, 1]], W=[[0, 0]]).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    _check_views("x", x, "x_prime", x_prime)
    check_choice("similarity", similarity, SIMILARITIES)
    check_positive("temperature", temperature)
    if W.ndim != 2 or W.shape[1] != x.shape[1]:
        raise InputError(f"W: got shape {tuple(W.shape)}, expected (m, {x.shape[1]}) for x of shape {tuple(x.shape)}")
    if similarity != "euclidean":
        return _product_difference(x, x_prime, W, similarity == "cosine", temperature)
    if temperature != 1:
        raise InputError(f"temperature: got {temperature}, expected 1: the lemma's; scale x by 1 / sqrt(temperature)")
    x, x_prime = _centred(x, x_prime)
    negatives = _negative_weights(x @ W.T, x_prime @ W.T)
    rows, columns = negatives.sum(1), negatives.sum(0)
    sigma0 = x.T @ ((rows + columns)[:, None] * x - (negatives + negatives.T) @ x)
    step = x_prime - x
    difference = sigma0 - step.T @ (rows[:, None] * step)
    return (difference + difference.T) / 2


def _product_difference(x: Tensor, x_prime: Tensor, W: Tensor, cosine: bool, temperature: float) -> Tensor:
    z, z_prime = x @ W.T, x_prime @ W.T
    if cosine:
        unit, unit_prime = _unit("x W^T", z), _unit("x_prime W^T", z_prime)
        x, x_prime = x / z.norm(dim=1, keepdim=True), x_prime / z_prime.norm(dim=1, keepdim=True)
        z, z_prime = unit, unit_prime
    logits = _cross(z, z_prime, "dot") / temperature
    _check_overflow(logits, z)
    pull = _diagonal(logits).double() - torch.softmax(logits, dim=1)
    difference = x_prime.T @ pull.T @ x
    difference = difference + difference.T
    if cosine:
        along = (z * (pull @ z_prime)).sum(1, keepdim=True)
        along_prime = (z_prime * (pull.T @ z)).sum(1, keepdim=True)
        difference = difference - x.T @ (along * x) - x_prime.T @ (along_prime * x_prime)
    return difference / temperature


def _check_views(name: str, first: Array, other: str, second: Array) -> None:
    if first.ndim != 2 or 0 in first.shape or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise InputError(f"{name}, {other}: got shapes {shapes}, expected the same (rows, columns), neither of them 0")


def _check_overflow(logits: Tensor, z: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise InputError(
            f"z: entries up to {float(z.abs().max()):.1e} overflow float64 when multiplied; scale them down"
        )


def _centred(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both minus one common shift, which no difference sees: digits are not spent on the distance from the origin."""
    shift = first.mean(0)
    return first - shift, second - shift


def _euclidean(z: Tensor, z_prime: Tensor) -> Tensor:
    """(n, n) logits: -|z_i - z_j|^2 / 2, on the diagonal the positive's -|z_i - z_prime_i|^2 / 2."""
    # Differences, not |a|^2 + |b|^2 - 2 a.b, which cancels when distances are small beside the norms.
    squares = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    positive = ((z - z_prime) ** 2).sum(1)
    return -torch.where(_diagonal(squares), positive[:, None], squares) / 2


def _cross(z: Tensor, z_prime: Tensor, similarity: str) -> Tensor:
    """(n, n) logits z_i . z_prime_j, up to a constant in each row."""
    if similarity == "cosine":
        z, z_prime = _unit("z", z), _unit("z_prime", z_prime)
    return z @ (z_prime - z_prime.mean(0)).T


def _unit(name: str, z: Tensor) -> Tensor:
    largest = z.abs().amax(1, keepdim=True)
    if not largest.all():
        raise InputError(f"{name}: row {int((largest == 0).nonzero()[0, 0])} is zero and has no cosine similarity")
    # Dividing by the largest entry first keeps the squares of huge and tiny rows in range.
    z = z / largest.detach()
    return z / z.norm(dim=1, keepdim=True)


def _negative_weights(z: Tensor, z_prime: Tensor) -> Tensor:
    """alpha with its diagonal, the weight of the positive, set to zero: (n, n)."""
    logits = _euclidean(z, z_prime)
    _check_overflow(logits, z)
    alpha = torch.softmax(logits, dim=1)
    return alpha.masked_fill(_diagonal(alpha), 0.0)


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)
