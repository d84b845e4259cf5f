"""The finite-batch averages against sampling, quadrature of other integrals, and the flows they drive."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import chi2, norm, ortho_group

from collapse import InputError
from collapse.theory import MeanField, matrix_flow, negative_weights
from collapse.theory.meanfield import gaussian_pool

ACCURACY, AT_EDGES = 1e-5, 3e-4  # what negative_weights promises


def by_laplace(p, q, batch):
    """(f, 1 - pi, D) at one p and q from 1 / a = int e^(-a v) dv, R the sum of the negatives' exponentials.

    With phi(v) = E exp(-v e^(sqrt(q) g)): f = int (e^-v - e^(-v e^p) phi^(N-1)) dv / v, pi = e^p int e^(-v e^p)
    phi^(N-1) dv, and E sum alpha^2 = (N-1) int v e^(-v e^p) phi^(N-2) phi'' dv. Trapezoids in ln v and g, whose
    integrands are analytic and decay on both sides, converge faster than any power of the spacing.
    """
    root = math.sqrt(q)
    log_v = np.arange(-40 - max(p, 0) - 9 * root - math.log(batch), 5 + max(-p, 0), step := 0.125)
    g = np.arange(-9, 9, spacing := 0.15 / max(root, 1.5))
    ratio, exponent = np.exp(np.minimum(p + log_v, 6.5)), log_v[:, None] + root * g  # exp(-e^6.5) is zero
    decay = np.exp(-np.exp(np.minimum(exponent, 6.5)))
    weight, v, positive = spacing * norm.pdf(g), np.exp(log_v), np.exp(-ratio)
    phi, squared = np.minimum(decay @ weight, 1), (decay * np.exp(2 * np.minimum(exponent, 6.5))) @ weight
    f = step * (np.exp(-v) - positive * phi ** (batch - 1)).sum()
    pi = step * (ratio * positive * phi ** (batch - 1)).sum()
    squares = step * (batch - 1) * (positive * phi ** (batch - 2) * squared).sum()
    return f, 1 - pi, 1 - pi - squares


@pytest.mark.parametrize("batch", [2, 3, 8, 128, 1024])
def test_negative_weights_are_the_averages_of_sampled_softmax_weights(batch):
    rng = np.random.default_rng(batch)
    normal = rng.standard_normal((2_000_000 // (batch - 1) // 10, batch - 1))
    for p, q in [(0.0, 0.5), (2.0, 4.0), (-3.0, 2.0), (6.0, 9.0), (10.0, 30.0)]:
        e = np.exp(math.sqrt(q) * normal - p)
        alpha = e / (1 + e.sum(1, keepdims=True))
        for found, sampled in zip(
            negative_weights(p, q, batch), (alpha.sum(1), (alpha * (1 - alpha)).sum(1)), strict=True
        ):
            error = sampled.std() / math.sqrt(len(sampled))
            assert abs(found - sampled.mean()) < 4.5 * error + ACCURACY


@settings(max_examples=60, deadline=None)
@given(st.floats(-40, 100), st.floats(0, 40))
@example(0.0, 0.07)
@example(0.0, 39.9)
@example(-39.9, 39.0)
def test_one_negative_is_an_integral_of_the_logistic_function(p, s):
    """N = 2: E sigmoid(s g - p) and E sigmoid (1 - sigmoid), anywhere between the nodes of the tables."""
    # The kink of a steep logistic lies at g = p / s.
    kink = [p / s] if s > 0 and abs(p) < 9 * s else None
    average = lambda f: quad(lambda g: norm.pdf(g) * f(s * g - p), -9, 9, points=kink, epsabs=1e-10, limit=500)[0]
    one_minus_pi, D = negative_weights(p, s**2, 2)
    atol = ACCURACY if p > -38 and s < 38 else AT_EDGES
    np.testing.assert_allclose(one_minus_pi, average(expit), rtol=0, atol=atol)
    np.testing.assert_allclose(D, average(lambda x: expit(x) * expit(-x)), rtol=0, atol=atol)


@pytest.mark.parametrize("batch", [2, 3, 16, 128, 4096, 2**20])
@pytest.mark.parametrize(("p", "q"), [(0.1, 0.01), (1.3, 0.7), (-8.0, 3.0), (5.1, 6.3), (14.2, 30.1), (30.0, 90.0)])
def test_any_number_of_negatives_agrees_with_laplace_transforms(p, q, batch):
    _, one_minus_pi, D = by_laplace(p, q, batch)
    np.testing.assert_allclose(negative_weights(p, q, batch), (one_minus_pi, D), rtol=0, atol=ACCURACY)


@pytest.mark.parametrize("batch", [2, 7, 128, 4096])
def test_equal_negatives_share_the_softmax_of_constants(batch):
    p = np.linspace(-40, 40, 1234)
    share = 1 / (batch - 1 + np.exp(p))
    one_minus_pi, D = negative_weights(p, np.zeros_like(p), batch)
    np.testing.assert_allclose(one_minus_pi, (batch - 1) * share, rtol=0, atol=ACCURACY)
    np.testing.assert_allclose(D, (batch - 1) * share * (1 - share), rtol=0, atol=ACCURACY)


def test_the_positive_takes_all_weight_far_above_the_negatives_and_none_far_below():
    q = np.linspace(0, 25, 7)
    np.testing.assert_allclose(negative_weights(np.full(7, 80.0), q, 128), np.zeros((2, 7)), rtol=0, atol=ACCURACY)
    np.testing.assert_allclose(negative_weights(np.full(7, -40.0), q, 128)[0], np.ones(7), rtol=0, atol=ACCURACY)
    one_minus_pi, D = negative_weights(np.full(7, 79.0), q, 2)
    assert (one_minus_pi >= -ACCURACY).all()
    assert (D >= -ACCURACY).all()


@pytest.mark.parametrize(("p", "q"), [(0.0, 0.2), (1.0, 1.0), (2.0, 0.5)])
def test_large_batches_share_the_weight_among_negatives(p, q):
    """pi ~ e^(p - q/2) / N and D ~ 1 - pi - e^q / N: the next order is N^-2 with moments up to e^(3 q)."""
    batch = 4096
    one_minus_pi, D = negative_weights(p, q, batch)
    pi, pairs = math.exp(p - q / 2) / (batch - 1), math.exp(q) / (batch - 1)
    second_order = ACCURACY + 10 * math.exp(2 * p + 3 * q) / batch**2
    assert abs(1 - one_minus_pi - pi) < second_order < pi / 4
    assert abs(1 - D - pi - pairs) < 2 * second_order


@pytest.mark.parametrize("batch", [2, 16, 128])
@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (4.0, 6.0), (9.0, 20.0)])
def test_pi_and_D_are_the_derivatives_of_one_function(p, q, batch):
    """pi = df/dp and D = 2 df/dq, with f by another integral; central differences err by h^2 f''' / 6 < h^2."""
    h = 1e-3
    f = lambda dp, dq: by_laplace(p + dp, q + dq, batch)[0]
    one_minus_pi, D = negative_weights(p, q, batch)
    np.testing.assert_allclose(1 - one_minus_pi, (f(h, 0) - f(-h, 0)) / (2 * h), rtol=0, atol=2 * ACCURACY)
    np.testing.assert_allclose(D, (f(0, h) - f(0, -h)) / h, rtol=0, atol=2 * ACCURACY)


def test_beyond_the_tables_the_edge_is_taken():
    at_edge = negative_weights(np.array([-40.0, 160.0, 5.0]), np.array([1.0, 1.0, 1600.0]), 8)
    beyond = negative_weights(np.array([-99.0, 999.0, 5.0]), np.array([1.0, 1.0, 1e9]), 8)
    np.testing.assert_array_equal(beyond, at_edge)


@pytest.mark.parametrize("batch", [1, 0, -3])
def test_a_batch_without_negatives_is_named(batch):
    with pytest.raises(InputError, match=f"batch: got {batch}, expected at least 2"):
        negative_weights(np.zeros(1), np.ones(1), batch)


@cache
def stationary_factor(dim, batch):
    """u, W^T W = u tau I, at which the mean loss of isotropic data without augmentation is stationary."""
    field = MeanField(np.eye(dim), np.zeros((dim, dim)), batch)
    return brentq(lambda u: field.mode_gradient(np.full(dim, 0.1 * u)).mean(), 0.8, 2.5, xtol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_one_negative_without_augmentation_stops_at_u_two_in_any_dimension(dim):
    # Gradients near u are of order E[(1 - pi) |x|^2], 0.08 and more up to eight dimensions; their error is 1e-6.
    assert abs(stationary_factor(dim, 2) - 2) < 2e-3


@pytest.mark.parametrize(
    ("dim", "batch", "descent"),
    [
        *[(16, 32, 1.925), (16, 64, 1.858), (16, 128, 1.795), (16, 256, 1.700), (16, 512, 1.617), (16, 1024, 1.534)],
        *[(4, 32, 1.397), (4, 128, 1.214), (4, 512, 1.112)],
    ],
)
def test_larger_batches_stop_where_stochastic_gradient_descent_does(dim, batch, descent):
    """u of one SGD run each (lr 4e-3, mean of its last half), good to about 1 %."""
    assert abs(stationary_factor(dim, batch) / descent - 1) < 0.009


@pytest.mark.parametrize(("dim", "batch"), [(1, 2), (4, 2), (4, 32), (4, 512), (16, 32), (16, 128), (16, 1024)])
def test_the_stationary_factor_is_the_root_of_a_radial_integral(dim, batch):
    """u E[r D(u r, u^2 r)] = E[r (1 - pi)] over r = |x|^2 ~ chi^2 alone: the pool errs by less than 0.04 %."""
    s = np.linspace(0, 10, 4001)[1:]  # s^2 = r, so that the density is smooth at zero
    r, weight = s**2, s**3 * chi2.pdf(s**2, dim)

    def gradient(u):
        pull, spread = negative_weights(u * r, u**2 * r, batch)
        return (weight * (u * spread - pull)).sum()

    assert abs(stationary_factor(dim, batch) / brentq(gradient, 0.8, 2.5) - 1) < 4e-4


def covariances(seed, d):
    A, B = np.random.default_rng(seed).standard_normal((2, d, d)) / d**0.5
    return A @ A.T, B @ B.T / 2


@pytest.mark.parametrize("rank", [3, 5])
def test_the_second_moments_of_the_pool_are_those_of_the_data(rank):
    C0, Ce = covariances(rank, 5)
    keep = np.diag(np.arange(5) < rank).astype(float)  # also where some directions have no variance at all
    C0, Ce = keep @ C0 @ keep, keep @ Ce @ keep
    field = MeanField(C0, Ce, points=512)
    for a, b, expected in [
        (field.x, field.x, C0 + Ce),
        (field.x_prime, field.x_prime, C0 + Ce),
        (field.x, field.x_prime, C0),
        (field.x_prime, field.x, C0),
    ]:
        np.testing.assert_allclose(a.T @ b / 512, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(field.C, C0 + Ce, rtol=1e-15)


def test_the_radii_of_the_pool_are_quantiles_of_chi():
    first, _ = gaussian_pool(3, 1024, 5)
    sorted_squares = np.sort((first**2).sum(1))
    # Whitening moves them by the sampling error of second moments, at most 1024^-1/2 each way.
    expected = chi2.ppf((np.arange(1024) + 0.5) / 1024, 3)
    np.testing.assert_allclose(sorted_squares, expected, rtol=2 / 32)


@pytest.mark.parametrize("width", [3, 4, 6])
def test_the_gradient_of_diagonal_layers_is_that_of_the_modes(width):
    """On one pool the two are the same sums: dL/dW_kk = 2 sigma_k dL/dm_k to rounding."""
    rng = np.random.default_rng(0)
    field = MeanField(np.diag(rng.uniform(0.2, 2, 4)), np.diag(rng.uniform(0, 1, 4)), batch=32, points=1024)
    sigma = np.zeros(4)
    sigma[: min(width, 4)] = np.sort(rng.uniform(0.1, 0.6, min(width, 4)))[::-1]
    W = np.zeros((width, 4))
    np.fill_diagonal(W, sigma[: min(width, 4)])
    found = np.diagonal(field.gradient(W))
    expected = (2 * sigma * field.mode_gradient(sigma**2))[: len(found)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_isotropic_data_see_the_singular_values_alone():
    rng = np.random.default_rng(1)
    field = MeanField(np.eye(4), 0.3 * np.eye(4), batch=32, points=4096)
    sigma = np.array([0.7, 0.5, 0.2, 0.05])
    aligned = field.isotropic_gradient(np.diag(sigma))
    np.testing.assert_allclose(aligned, np.diag(2 * sigma * field.mode_gradient(sigma**2)), rtol=0, atol=1e-14)
    U, V = ortho_group.rvs(4, size=2, random_state=rng)
    W = U * sigma @ V.T
    exact = field.isotropic_gradient(W)
    np.testing.assert_allclose(exact, U @ aligned @ V.T, rtol=0, atol=1e-12)
    # The pool's points are not isotropic beyond second moments; the error of 4096 is below 4096^-1/2 of the terms.
    terms = 2 * np.abs(W).max() / 0.1
    np.testing.assert_allclose(field.gradient(W), exact, rtol=0, atol=terms / 64)
    tall, wide = (
        field.isotropic_gradient(W[:, :4][:3]),
        MeanField(np.eye(3), np.eye(3), 32).isotropic_gradient(W[:, :3]),
    )
    assert (tall.shape, wide.shape) == ((3, 4), (4, 3))


@pytest.mark.parametrize(("batch", "tau", "bias"), [(2, 0.5, 0), (8, 0.5, 0), (64, 1.0, 0), (2, 0.5, 1), (16, 0.7, 1)])
def test_the_gradient_is_the_mean_of_the_gradients_of_sampled_batches(batch, tau, bias):
    """With a bias, the last column of the layer, both views have an entry more that is 1."""
    C0, Ce = covariances(3, 4)
    rng = np.random.default_rng(4)
    W = 0.4 * rng.standard_normal((3, 4 + bias))
    roots, count = [np.linalg.cholesky(C).T for C in (C0, Ce)], 160_000 // batch
    sampled = []
    for _ in range(10):
        clean, noise = rng.standard_normal((count // 10, batch, 4)), rng.standard_normal((2, count // 10, batch, 4))
        views = clean @ roots[0] + noise @ roots[1]
        x, x_prime = np.concatenate([views, np.ones((*views.shape[:-1], bias))], -1)
        z, z_prime = x @ W.T, x_prime @ W.T
        e = np.exp(z @ z_prime.mT / tau)
        error = e / e.sum(2, keepdims=True) - np.eye(batch)
        # The cross-entropy's closed form: dL/dz = error z' / (tau N), dL/dz' = error^T z / (tau N).
        sampled.append(((error @ z_prime).mT @ x + (error.mT @ z).mT @ x_prime) / (tau * batch))
    sampled = np.concatenate(sampled)
    standard = sampled.std(0) / math.sqrt(len(sampled))
    pools = np.array([MeanField(C0, Ce, batch, tau, 4096, s, bool(bias)).gradient(W) for s in range(4)])
    of_pools = pools.std(0, ddof=1).max() / 2
    assert standard.max() < 0.02 * np.abs(sampled.mean(0)).max()
    assert (np.abs(pools.mean(0) - sampled.mean(0)) < 4.5 * standard + 4.5 * of_pools).all()


def pool_loss(field, p, q):
    """The mean loss over the pool, without the tables."""
    return np.mean([by_laplace(a, b, field.batch)[0] - a for a, b in zip(p, q, strict=True)])


def difference(loss, at, direction):
    """Derivative along a direction; an error of h^2 times the third derivative."""
    h = 1e-4
    return (loss(at + h * direction) - loss(at - h * direction)) / (2 * h)


@pytest.mark.parametrize("width", [2, 4])
def test_the_gradient_is_the_derivative_of_the_mean_loss_over_the_pool(width):
    field = MeanField(*covariances(3, 3), batch=16, temperature=0.5, points=16)
    W, direction = 0.25 * np.random.default_rng(width).standard_normal((2, width, 3))

    def loss(W):
        z, z_prime = field.x @ W.T, field.x_prime @ W.T
        S = W @ field.C @ W.T
        return pool_loss(field, (z * z_prime).sum(1) / 0.5, np.einsum("ia,ab,ib->i", z, S, z) / 0.25)

    found = (field.gradient(W) * direction).sum()
    # 1 - pi and D err by ACCURACY, and multiply |x|^2 |W| |direction| / tau.
    np.testing.assert_allclose(found, difference(loss, W, direction), rtol=0, atol=20 * ACCURACY)
    assert abs(found) > 0.1


def test_the_cosine_gradient_is_the_derivative_of_the_mean_loss_over_the_pool():
    field = MeanField(np.diag([2.0, 1.0, 0.5]), np.diag([0.1, 1.0, 0.3]), batch=16, temperature=0.5, points=16)
    m = np.array([0.3, 0.2, 0.6])

    def loss(m):
        u, v = (x * np.sqrt(m) / np.linalg.norm(x * np.sqrt(m), axis=1)[:, None] for x in (field.x, field.x_prime))
        return pool_loss(field, (u * v).sum(1) / 0.5, u**2 @ (u**2).mean(0) / 0.25)

    found = field.cosine_mode_gradient(m)
    expected = [difference(loss, m, direction) for direction in np.eye(3)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=20 * ACCURACY)
    assert np.abs(found).min() > 0.02
    assert abs(m @ found) < 1e-14  # the length of an embedding does not matter
    dead, dying = (field.cosine_mode_gradient(np.array([0.3, 0.2, size])) for size in (0.0, 1e-12))
    np.testing.assert_allclose(dead, dying, rtol=1e-9)


def test_modes_of_the_cosine_loss_descend_its_gradient():
    field = MeanField(np.diag([2.0, 1.0, 0.5]), np.diag([0.1, 1.0, 0.3]), batch=16, temperature=0.5, points=256)
    sigma, t = np.array([[0.5, 0.4, 0.8], [0.7, 0.6, 0.5]]), np.linspace(0, 0.5, 3)

    def gradient(W):
        w = np.diagonal(W)
        return np.diag(2 * w * field.cosine_mode_gradient(w**2))

    flow = matrix_flow(t, [np.diag(s) for s in sigma], gradient, 1e-7, "DOP853")
    found = np.stack([np.einsum("tkk->tk", W) for W in flow], axis=1)
    np.testing.assert_allclose(field.modes(t, sigma, "cosine"), found, rtol=0, atol=3e-4)
    assert np.abs(found[-1] / found[0] - 1).max() > 0.1
    with pytest.raises(InputError, match="similarity: got 'euclidean', expected one of dot, cosine"):
        field.modes(t, sigma, "euclidean")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_modes_of_layers_follow_the_matrix_flow(depth):
    """Unbalanced aligned layers in random bases, against lemma 3 with the gradient of the product alone."""
    rng = np.random.default_rng(depth)
    field = MeanField(np.eye(4), 0.5 * np.eye(4), batch=16, temperature=0.5, points=512)
    sigma = np.sort(rng.uniform(0.2, 0.9, (depth, 4)), axis=1)[:, ::-1]
    bases = ortho_group.rvs(4, size=depth + 1, random_state=rng)
    t = np.linspace(0.2, 0.5, 4)  # later, modes of one size would swap points of the pool
    layers = [bases[k + 1] * sigma[k] @ bases[k].T for k in range(depth)]
    flow = matrix_flow(t, layers, field.isotropic_gradient, 1e-7, "DOP853")
    modes = field.modes(t, sigma)
    assert np.abs(np.log(modes[-1] / modes[0])).max() > 0.1
    for k in range(depth):
        found = np.einsum("ai,tab,bj->tij", bases[k + 1], flow[k], bases[k])
        expected = modes[:, k, :, None] * np.eye(4)
        # The modes' steps err by 1e-5 in ln sigma, some tens of them.
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4)


def test_modes_of_anisotropic_data_follow_the_gradient_of_the_whole_matrix():
    rng = np.random.default_rng(9)
    field = MeanField(np.diag([2.0, 1.0, 0.5]), np.diag([0.1, 1.0, 0.3]), batch=16, temperature=0.5, points=1024)
    sigma, t = rng.uniform(0.2, 0.8, (2, 3)), np.linspace(0, 1.5, 4)
    # The pool's moments leave the diagonal, the exact gradient does not.
    along = lambda W: np.diag(np.diagonal(field.gradient(np.diag(np.diagonal(W)))))
    flow = matrix_flow(t, [np.diag(s) for s in sigma], along, 1e-7, "DOP853")
    found = np.stack([np.einsum("tkk->tk", W) for W in flow], axis=1)
    np.testing.assert_allclose(field.modes(t, sigma), found, rtol=0, atol=3e-4)


def test_modes_of_very_different_speed_take_few_evaluations(monkeypatch):
    field, calls = MeanField(np.eye(8), np.diag(np.geomspace(1e-2, 100, 8))), []
    gradient = field.mode_gradient
    monkeypatch.setattr(field, "mode_gradient", lambda m: calls.append(1) or gradient(m))
    field.modes(np.array([0.0, 50.0]), np.full((1, 8), 0.3))
    assert len(calls) < 1000  # 200 by an implicit method, 4,500 by an explicit one


def test_the_defaults_are_the_official_toy_scripts():
    field = MeanField(np.eye(2), np.eye(2))
    assert (field.batch, field.temperature, len(field.x)) == (128, 0.1, 2048)
    again = MeanField(np.eye(2), np.eye(2), 128, 0.1, 2048, 0)
    np.testing.assert_array_equal(field.x, again.x)
