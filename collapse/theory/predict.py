"""Closed forms for a fixed X (paper theorems 1 to 3, and any depth), and what the layers' balance implies.

Notation:  X (d, d) the driving matrix of lemma 2, lam_k its eigenvalue along mode k;  W1, W2 layers;  sigma singular
values of a layer, w those of the product;  T times, K modes.  Time is learning rate x steps, of the loss summed over
anchors.  X depends on W in truth: where that matters, population.py and meanfield.py take over.
Arrays in and out as in identities.py.
"""

import torch
from torch import Tensor

from collapse import InputError
from collapse.theory.arrays import Array, check_depth, check_not_negative, check_positive, check_shapes, same_kind


@same_kind
def one_layer(t: Array, W0: Array, X: Array) -> Array:
    """W(t) = W0 exp(X t), the flow dW/dt = W X of a fixed X (paper theorem 1).

    Args:
        t: (T,) times.
        W0: (m, d) initial weights.
        X: (d, d), symmetric in lemma 2; any matrix is allowed.

    Returns:
        (T, m, d) float64.

    Raises:
        InputError: shapes do not fit, or W(t) leaves the range of float64.

    Examples:
        >>> one_layer([0, 1], W0=[[1, 1]], X=[[1, 0], [0, -1]]).round(3).tolist()  # exp(t), exp(-t)
        [[[1.0, 1.0]], [[2.718, 0.368]]]
    """
    check_shapes(t=(t, ("T",)), W0=(W0, ("m", "d")), X=(X, ("d", "d")))
    W = W0 @ torch.linalg.matrix_exp(X * t[:, None, None])
    overflow = (~torch.isfinite(W)).flatten(1).any(1).nonzero()
    if len(overflow):
        raise InputError(f"W(t) overflows float64 at t = {float(t[overflow[0, 0]]):g}; shorten t or scale X")
    return W


@same_kind
def two_layer_modes(t: Array, lam: Array, sigma1: Array, sigma2: Array) -> Array:
    """s_k(t) = sigma1_k sigma2_k of two aligned layers under a fixed X (paper theorem 3, solved).

    c = |sigma1^2 - sigma2^2| is conserved, so that ds/dt = lam s sqrt(c^2 + 4 s^2) and
    s(t) = c / (2 sinh(asinh(c / (2 s(0))) - c lam t)).

    Args:
        t: (T,) times.
        lam: (K,) v_k^T X v_k; negative where augmentation outweighs the data.
        sigma1, sigma2: (K,) initial singular values, >= 0.

    Returns:
        (T, K) float64.

    Raises:
        InputError: shapes do not fit, a singular value is negative, or a mode has blown up before some t.

    Examples:
        >>> two_layer_modes([0, 1], lam=[20, -20], sigma1=[0.1, 0.1], sigma2=[0.1, 0.1]).round(4).tolist()
        [[0.01, 0.01], [0.0167, 0.0071]]
    """
    check_shapes(t=(t, ("T",)), lam=(lam, ("K",)), sigma1=(sigma1, ("K",)), sigma2=(sigma2, ("K",)))
    check_not_negative(sigma1=sigma1, sigma2=sigma2)
    # c -> 0 is a limit; at 1e-150 every term equals it to the last digit, without a branch.
    c = ((sigma1 - sigma2) * (sigma1 + sigma2)).abs().clamp(min=1e-150)
    u = torch.asinh(c / (2 * sigma1 * sigma2)) - c * lam * t[:, None]
    _check_blow_up(u > 0, t, lam)
    return c / (2 * torch.sinh(u))


@same_kind
def deep_modes(t: Array, lam: Array, w0: Array, depth: int) -> Array:
    """w_k(t), the product of `depth` balanced aligned layers under a fixed X: dw/dt = L lam w^(3 - 2/L).

    Args:
        t: (T,) times.
        lam: (K,) v_k^T X v_k.
        w0: (K,) initial singular values of the product, >= 0; each layer has w0^(1/L).
        depth: L >= 1.

    Returns:
        (T, K) float64: w0 exp(lam t) for L = 1, else w0 (1 - L b lam w0^b t)^(-1/b) with b = 2 - 2/L.

    Raises:
        InputError: shapes do not fit, w0 is negative, depth is below 1, or a mode has blown up before some t.

    Examples:
        >>> [float(deep_modes([1], lam=[1], w0=[0.1], depth=depth)[0, 0].round(3)) for depth in (1, 2, 3)]
        [0.272, 0.125, 0.117]
    """
    check_shapes(t=(t, ("T",)), lam=(lam, ("K",)), w0=(w0, ("K",)))
    check_not_negative(w0=w0)
    check_depth(depth)
    if depth == 1:
        return w0 * torch.exp(lam * t[:, None])
    b = 2 - 2 / depth
    spent = depth * b * lam * w0**b * t[:, None]
    _check_blow_up(spent < 1, t, lam)
    return w0 * torch.exp(-torch.log1p(-spent) / b)


@same_kind
def alignment(W1: Array, W2: Array) -> Array:
    """|V2^T U1| of adjacent layers W1 = U1 S1 V1^T, W2 = U2 S2 V2^T, both sorted descending (paper theorem 2).

    Args:
        W1: (h, d) the layer that acts first.
        W2: (m, h) the layer that acts on its output.

    Returns:
        (min(m, h), min(h, d)) float64, entries in [0, 1]: row k is the k-th right singular vector of W2.

    Raises:
        InputError: shapes do not fit.

    Examples:
        >>> alignment(W1=[[2, 0], [0, 1]], W2=[[3, 0], [0, 1]]).round(6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> alignment(W1=[[2, 0], [0, 1]], W2=[[1, 0], [0, 3]]).round(6).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    check_shapes(W1=(W1, ("h", "d")), W2=(W2, ("m", "h")))
    U1 = torch.linalg.svd(W1, full_matrices=False).U
    V2h = torch.linalg.svd(W2, full_matrices=False).Vh
    return (V2h @ U1).abs()


@same_kind
def conserved_split(m: Array, kappa: Array) -> Array:
    """sigma_W^2 of the first of two aligned layers whose product has singular value sqrt(m).

    kappa = sigma_W^2 - sigma_P^2 is conserved by the flow, so sigma_W^2 = (kappa + sqrt(kappa^2 + 4 m)) / 2: with a
    balanced projector (kappa = 0) the representation collapses half as far as the embedding in logarithm, with
    kappa > 0 it keeps kappa, with kappa < 0 it shrinks as m / |kappa|.

    Args:
        m: (...) squared singular values of the product.
        kappa: (...) conserved differences.

    Returns:
        (...) float64.

    Raises:
        InputError: shapes do not broadcast, or m is negative.

    Examples:
        >>> conserved_split([1e-4, 1e-4, 1e-4], kappa=[0, 1, -1]).round(4).tolist()
        [0.01, 1.0001, 0.0001]
    """
    check_not_negative(m=m)
    try:
        torch.broadcast_shapes(m.shape, kappa.shape)
    except RuntimeError as error:
        shapes = f"{tuple(m.shape)} and {tuple(kappa.shape)}"
        raise InputError(f"m, kappa: got shapes {shapes}, expected the same, or such as broadcast") from error
    root = torch.sqrt(kappa**2 + 4 * m)
    # For kappa < 0 the sum cancels; its conjugate does not.
    return torch.where(kappa >= 0, (kappa + root) / 2, 2 * m / (root - kappa).clamp(min=torch.finfo(m.dtype).tiny))


@same_kind
def balanced_grams(K: Array, m: float) -> tuple[Array, Array]:
    """(W1 W1^T, W2^T W2) of two square layers whose product is sqrt(m) times an orthogonal matrix.

    K = W2^T W2 - W1 W1^T is conserved; with isotropic data the flow stops at such a product, where
    W1 W1^T = (-K + sqrt(K^2 + 4 m)) / 2.  Both have K's eigenvectors, in opposite order: the alignment matrix of
    theorem 2 tends to the anti-identity.  All modes must be alive; data whose modes stop at different sizes may end at
    the identity instead (alignment_index).

    Args:
        K: (h, h) symmetric.
        m: > 0.

    Returns:
        Two (h, h) float64.

    Raises:
        InputError: K is not square, or m is not positive.

    Examples:
        >>> first, second = balanced_grams([[1, 0], [0, -1]], m=1)
        >>> first.diagonal().round(3).tolist(), second.diagonal().round(3).tolist()
        ([0.618, 1.618], [1.618, 0.618])
    """
    check_shapes(K=(K, ("h", "h")))
    check_positive("m", m)
    values, vectors = torch.linalg.eigh(K)
    gram = (vectors * ((torch.sqrt(values**2 + 4 * m) - values) / 2)) @ vectors.T
    return gram, gram + K


@same_kind
def alignment_index(w: Array, K: Array) -> Array:
    """Towards which end the alignment matrix of two layers goes: above 0 the identity, below 0 the anti-identity.

    Put G = (W1 W1^T + W2^T W2) / 2.  The Gram matrices are G -+ K / 2 with the conserved K = W2^T W2 - W1 W1^T, so that
    the inner product of the centred Gram matrices is var(G) - var(K) / 4, variances over eigenvalues.  Where the layers
    have outgrown K the eigenvalues of G are the singular values w of the product, and the index
    (var(w) - var(K) / 4) / (var(w) + var(K) / 4) is the correlation of the two matrices.  A product whose modes differ
    aligns the layers; one whose modes are alike, as at the optimum for isotropic data, leaves them in opposite order.

    Args:
        w: (..., h) singular values of W2 W1, at any time; sqrt(m*) for the end.
        K: (h, h) symmetric.

    Returns:
        (...) float64 in [-1, 1]; 0 where neither has any spread.

    Raises:
        InputError: K is not square, or w has another number of entries.

    Examples:
        >>> K = [[1, 0], [0, -1]]
        >>> round(float(alignment_index([1, 1], K)), 3), round(float(alignment_index([3, 0], K)), 3)
        (-1.0, 0.8)
    """
    check_shapes(K=(K, ("h", "h")))
    if w.shape[-1:] != K.shape[:1]:
        raise InputError(f"w: got shape {tuple(w.shape)}, expected (..., {len(K)}) for K of shape {tuple(K.shape)}")
    product, conserved = w.var(-1, correction=0), torch.linalg.eigvalsh(K).var(correction=0) / 4
    return (product - conserved) / (product + conserved).clamp(min=torch.finfo(torch.float64).tiny)


def _check_blow_up(alive: Tensor, t: Tensor, lam: Tensor) -> None:
    if not alive.all():
        step, k = (~alive).nonzero()[0].tolist()
        raise InputError(f"mode {k} (lam = {float(lam[k]):g}) has blown up before t = {float(t[step]):g}; shorten t")
