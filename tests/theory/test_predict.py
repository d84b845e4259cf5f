"""The closed forms against integrators of the matrices, quadrature, sampled batches and exact rational arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import solve_ivp
from scipy.special import logsumexp
from scipy.stats import ortho_group

from collapse import InputError
from collapse.theory import (
    alignment,
    balanced_grams,
    collapse_line,
    collapsed_modes,
    conserved_split,
    cosine_modes,
    deep_modes,
    escape_time,
    euclidean_modes,
    infonce,
    matrix_flow,
    one_layer,
    population_gradient,
    population_loss,
    population_modes,
    stationary_modes,
    two_layer_modes,
    water_level,
)

EPS = np.finfo(np.float64).eps
RTOL = 1e-10

seeds = st.integers(0, 2**32 - 1)
# Of six decimals: solve_ivp squares its errors, and those of a rate near 1e-157 are not even that.
three = lambda low, high: st.lists(st.floats(low, high), min_size=3, max_size=3).map(lambda v: np.round(v, 6))


def integrate(t, layers, X):
    """Lemma 3 at a fixed X, each velocity written out as a product of all other layers: (T, rows, columns) a layer."""
    shapes, cuts = [W.shape for W in layers], np.cumsum([W.size for W in layers])[:-1]
    unpack = lambda flat: [part.reshape(s) for part, s in zip(np.split(flat, cuts), shapes, strict=True)]

    def product(matrices, size):
        result = np.eye(size)
        for W in matrices:
            result = W @ result
        return result

    def rate(_, flat):
        Ws = unpack(flat)
        W = product(Ws, shapes[0][1])
        after = [product(Ws[k + 1 :], shapes[k][0]) for k in range(len(Ws))]
        before = [product(Ws[:k], shapes[0][1]) for k in range(len(Ws))]
        return np.concatenate([(A.T @ W @ X @ B.T).ravel() for A, B in zip(after, before, strict=True)])

    start = np.concatenate([W.ravel() for W in layers])
    flow = solve_ivp(rate, (t[0], t[-1]), start, "DOP853", t_eval=t, rtol=RTOL, atol=RTOL * np.abs(start).max())
    return [np.stack(series) for series in zip(*map(unpack, flow.y.T), strict=True)]


@settings(max_examples=25, deadline=None)
@given(three(-3, 2), seeds, st.booleans())
def test_theorem_1_the_matrix_flow_of_one_layer_follows_the_exponential(lam, seed, symmetric):
    rng = np.random.default_rng(seed)
    V = ortho_group.rvs(3, random_state=rng)
    X = V * lam @ V.T + (0 if symmetric else 1) * np.triu(rng.uniform(-1, 1, (3, 3)), 1)
    W0, t = rng.standard_normal((2, 3)), np.linspace(0, 1.5, 5)
    # An error made at time s has grown by at most |exp(X (t - s))| <= exp(mu t), mu the largest of (X + X^T) / 2.
    growth = math.exp(1.5 * max(0, np.linalg.eigvalsh(X + X.T)[-1] / 2))
    (expected,) = integrate(t, [W0], X)
    np.testing.assert_allclose(one_layer(t, W0, X), expected, rtol=0, atol=100 * RTOL * growth * np.abs(W0).max())


@settings(max_examples=25, deadline=None)
@given(three(0.02, 0.5), three(0.02, 0.5), three(-2, 1), seeds)
@example(np.full(3, 0.3), np.full(3, 0.3), np.array([1.0, 0.0, -2.0]), 0)  # c = 0, and lam = 0
@example(np.full(3, 0.3), np.full(3, 0.3 + 1e-9), np.array([1.0, 0.5, -2.0]), 0)
@example(np.array([0.5, 0.1, 0.0]), np.array([0.1, 0.5, 0.2]), np.array([1.0, 1.0, 1.0]), 0)
def test_theorem_3_the_matrix_flow_of_two_layers_follows_the_closed_form(sigma1, sigma2, lam, seed):
    U, V, Q = ortho_group.rvs(3, size=3, random_state=seed)
    t = np.linspace(0, 1, 5)
    W1, W2 = integrate(t, [U * sigma1 @ V.T, Q * sigma2 @ U.T], V * lam @ V.T)
    measured = np.einsum("ak,tab,bk->tk", Q, W2 @ W1, V)
    s = two_layer_modes(t, lam, sigma1, sigma2)
    c2 = (sigma1**2 - sigma2**2) ** 2
    # d ln s(t) / d ln s(0): how an error grows.
    growth = np.sqrt((c2 + 4 * s**2 + 1e-300) / (c2 + 4 * s[0] ** 2 + 1e-300))
    atol = 100 * RTOL * max((growth * s).max(), s.max(), (sigma1 * sigma2).max())
    np.testing.assert_allclose(measured, s, rtol=0, atol=atol)


@pytest.mark.parametrize("depth", range(1, 7))
@settings(max_examples=8, deadline=None)
@given(three(0.05, 0.5), three(-2, 1), seeds)
@example(np.array([0.5, 0.3, 0.1]), np.array([0.9, 0.0, -2.0]), 0)
def test_the_matrix_flow_of_balanced_layers_of_any_depth_follows_the_closed_form(depth, w0, lam, seed):
    b = 2 - 2 / depth
    t = np.linspace(0, 0.6 / max(1, (depth * b * w0**b * lam).max()), 4)  # 40 % short of the first blow-up
    bases = ortho_group.rvs(3, size=depth + 1, random_state=seed)
    layers = [bases[k + 1] * w0 ** (1 / depth) @ bases[k].T for k in range(depth)]
    product = np.broadcast_to(np.eye(3), (4, 3, 3))
    for W in integrate(t, layers, bases[0] * lam @ bases[0].T):
        product = W @ product
    measured = np.einsum("ak,tab,bk->tk", bases[-1], product, bases[0])
    w = deep_modes(t, lam, w0, depth)
    growth = np.maximum(1, w / w0) ** b  # d ln w(t) / d ln w(0); each layer brings an error of its own
    np.testing.assert_allclose(measured, w, rtol=0, atol=100 * depth * RTOL * (growth * np.maximum(w, w0)).max())


@settings(max_examples=40, deadline=None)
@given(three(1e-3, 0.5), three(-2, 0.9))
def test_two_balanced_layers_are_depth_two(w0, lam):
    t = np.linspace(0, 1, 6)
    s = two_layer_modes(t, lam, np.sqrt(w0), np.sqrt(w0))
    # 1 - 2 lam s0 t >= 0.1 keeps 1 / 0.1 of the relative rounding.
    np.testing.assert_allclose(deep_modes(t, lam, w0, 2), s, rtol=200 * EPS)


def test_depth_one_is_theorem_1_along_a_mode():
    t, lam, w0 = np.linspace(0, 2, 5), np.array([1.0, 0.0, -3.0]), np.array([0.3, 0.2, 0.1])
    W = one_layer(t, np.diag(w0), np.diag(lam))
    np.testing.assert_allclose(deep_modes(t, lam, w0, 1), np.einsum("tkk->tk", W), rtol=1e-14)


@pytest.mark.parametrize("c", [1e-8, 1e-12, 1e-40, 1e-160, 0.0])
def test_the_limit_of_equal_layers_is_reached_to_the_last_digits(c):
    t, lam, s0 = np.array([0.0, 0.5, 1.0, 1.5]), np.array([1.0, -2.0, 0.0]), 0.3
    sigma1 = np.full(3, math.sqrt(s0 * math.sqrt(1 + (c / (2 * s0)) ** 2) + c / 2))
    limit = s0 / (1 - 2 * lam * s0 * t[:, None])
    # s depends on c^2 / 4 s^2 alone; and by 1 - 2 lam s0 t >= 0.1 rounding grows tenfold.
    np.testing.assert_allclose(two_layer_modes(t, lam, sigma1, s0 / sigma1), limit, rtol=100 * EPS + c**2)


def test_a_mode_that_is_zero_stays_zero():
    t, lam, zero = np.array([0.0, 1.0, 9.0]), np.array([1.0, -1.0]), np.zeros(2)
    assert not two_layer_modes(t, lam, zero, np.array([0.5, 1.0])).any()
    assert not two_layer_modes(t, lam, zero, zero).any()
    for depth in (1, 2, 5):
        assert not deep_modes(t, lam, zero, depth).any()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.01, 5))
@example(0.4, 0.4, 1.0)
def test_two_layers_blow_up_at_their_time_not_before(sigma1, sigma2, lam):
    c, s0 = abs(sigma1 - sigma2) * (sigma1 + sigma2), sigma1 * sigma2
    x = c / (2 * s0)
    blow_up = math.asinh(x) / (c * lam) if x > 1e-9 else 1 / (2 * lam * s0)
    modes = lambda t: two_layer_modes([0.0, t], [-1.0, lam], [1.0, sigma1], [1.0, sigma2])
    assert np.isfinite(modes(blow_up * (1 - 1e-12))).all()
    with pytest.raises(InputError, match=r"mode 1 \(lam = .*\) has blown up before t = .*; shorten t"):
        modes(blow_up * (1 + 1e-12))


def test_two_layers_are_infinite_at_the_very_moment_of_their_blow_up():
    t = torch.asinh(torch.tensor([0.75], dtype=torch.float64)) / 3  # c = 3, s(0) = 2: 3 t is asinh(3 / 4) to the bit
    with pytest.raises(InputError, match="has blown up before t"):
        two_layer_modes(t, [1.0], [2.0], [1.0])


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 2), st.floats(0.01, 5), st.integers(2, 6))
def test_deep_layers_blow_up_at_their_time_with_their_power(w0, lam, depth):
    b = 2 - 2 / depth
    blow_up = 1 / (depth * b * lam * w0**b)
    short = 1e-6
    w = deep_modes([blow_up * (1 - short)], [lam], [w0], depth)[0, 0]
    # 1 - t / blow_up = 1e-6 is known to a few EPS of one.
    np.testing.assert_allclose(w, w0 * short ** (-1 / b), rtol=16 * EPS / short)
    assert np.isfinite(deep_modes([blow_up * (1 - 1e-12)], [lam], [w0], depth)).all()
    with pytest.raises(InputError, match=r"mode 0 .* has blown up before t"):
        deep_modes([blow_up * (1 + 1e-12)], [lam], [w0], depth)


def test_predictions_let_gradients_through_and_keep_the_kind():
    t = torch.linspace(0, 0.5, 3, dtype=torch.float64)
    lam, one, two = (
        torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in ([1.0, -1], [0.3, 0.4], [0.5, 1])
    )
    X = torch.tensor([[1.0, 0.5], [0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, c: two_layer_modes(t, a, b, c), (lam, one, two))
    assert torch.autograd.gradcheck(lambda a, b: deep_modes(t, a, b, 3), (lam, one))
    assert torch.autograd.gradcheck(lambda a: one_layer(t, a, a), (X,))
    assert isinstance(two_layer_modes([0.0], [1.0], [1.0], [1.0]), np.ndarray)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_matrix_flow_at_a_fixed_X_in_an_aligned_basis_is_the_closed_form(depth):
    t, w0, lam = np.linspace(0, 0.8, 5), np.array([0.5, 0.3, 0.1]), np.array([0.5, -1.0, 0.3])
    bases = ortho_group.rvs(3, size=depth + 1, random_state=1)
    layers = [bases[k + 1] * w0 ** (1 / depth) @ bases[k].T for k in range(depth)]
    X = bases[0] * lam @ bases[0].T
    product = np.eye(3)
    for W in matrix_flow(t, layers, lambda W: -W @ X, rtol=1e-9, method="DOP853"):
        product = W @ product
    w = deep_modes(t, lam, w0, depth)
    growth = np.maximum(1, w / w0) ** (3 - 2 / depth)
    expected = np.einsum("ak,tk,bk->tab", bases[-1], w, bases[0])
    np.testing.assert_allclose(product, expected, rtol=0, atol=100 * depth * 1e-9 * growth.max())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), seeds)
@example([3, 3], 0)
@example([4, 1, 3, 2, 4, 2], 0)
def test_the_balance_of_adjacent_layers_is_conserved_whatever_drives_the_flow(widths, seed):
    """W_l+1^T W_l+1 - W_l W_l^T, while the gradient, any function of W, is replaced by another one twice."""
    rng, rtol = np.random.default_rng(seed), 1e-8
    layers = [0.5 * rng.standard_normal((m, d)) for d, m in pairwise(widths)]
    balances = lambda Ws: [below - above for below, above in zip(_inner(Ws[1:]), _outer(Ws[:-1]), strict=True)]
    before, size, drift = balances(layers), sum(W.size for W in layers), 0.0
    for _ in range(3):
        A, B = rng.standard_normal((2, widths[-1], widths[0]))
        calls = []
        gradient = lambda W, A=A, B=B, calls=calls: calls.append(1) or W + A * np.tanh(W) + B
        flow = matrix_flow(np.array([0.0, 0.1, 0.3]), layers, gradient, rtol, "DOP853")
        # The flow conserves the balance exactly, so the errors of steps, size^(1/2) rtol |W| each at most, add up
        # without growing; there are fewer steps than calls.
        largest = max(np.abs(W).max() for W in flow)
        drift += len(calls) * 4 * max(widths) * size**0.5 * 2 * rtol * largest**2
        layers = [W[-1] for W in flow]
        for got, want in zip(balances(layers), before, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=drift)
    assert drift < 1e-2


def _inner(Ws):
    return [W.T @ W for W in Ws]


def _outer(Ws):
    return [W @ W.T for W in Ws]


@settings(max_examples=40, deadline=None)
@given(seeds, st.booleans())
def test_alignment_is_the_identity_for_aligned_layers_whatever_their_outer_bases(seed, reverse):
    U, V, Q = ortho_group.rvs(4, size=3, random_state=seed)
    first, second = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1.0, 0.7, 0.4, 0.1])
    A = alignment(U * first @ V.T, Q * second[:: -1 if reverse else 1] @ U.T)
    expected = np.eye(4)[::-1] if reverse else np.eye(4)
    np.testing.assert_allclose(A, expected, atol=4 * 16 * EPS * 4 / 0.3)  # singular vectors: n EPS |W| / gap


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_alignment_is_the_overlap_of_eigenvectors_and_does_not_see_rotations(seed):
    rng = np.random.default_rng(seed)
    W1, W2 = rng.standard_normal((4, 5)), rng.standard_normal((3, 4))
    (value1, U), (value2, V) = np.linalg.eigh(W1 @ W1.T), np.linalg.eigh(W2.T @ W2)
    gap = min(np.diff(value1).min(), np.diff(value2).min())
    assume(gap > 1e-3)
    A, atol = alignment(W1, W2), 1000 * EPS * max(value1[-1], value2[-1]) / gap
    assert A.shape == (3, 4)
    np.testing.assert_allclose(A, np.abs(V[:, :0:-1].T @ U[:, ::-1]), rtol=0, atol=atol)
    outer, inner, hidden = (ortho_group.rvs(n, random_state=rng) for n in (3, 5, 4))
    np.testing.assert_allclose(alignment(hidden @ W1 @ inner, outer @ W2 @ hidden.T), A, rtol=0, atol=atol)


def covariances(seed, d, clean=1.0, noise=0.5):
    """Two that do not commute."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((2, d, d)) / d**0.5
    return clean * A @ A.T, noise * B @ B.T


def gaussian_grid(S, order):
    """Points and weights of the quadrature of N(0, S)."""
    x, w = hermegauss(order)
    grid = np.stack(np.meshgrid(*[x] * len(S), indexing="ij"), axis=-1).reshape(-1, len(S))
    weights = np.stack(np.meshgrid(*[w / w.sum()] * len(S), indexing="ij")).reshape(len(S), -1).prod(0)
    return grid @ np.linalg.cholesky(S).T, weights


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("similarity", ["euclidean", "dot"])
def test_the_population_loss_is_its_definition_by_quadrature(similarity, temperature):
    """-E[positive logit] + E_z log E_z' e^logit, nested Gauss-Hermite; the pair in joint coordinates."""
    C0, Ce = covariances(0, 3)
    W = 0.6 * np.random.default_rng(1).standard_normal((2, 3))
    S, S0 = W @ (C0 + Ce) @ W.T, W @ C0 @ W.T
    logit = {
        "euclidean": lambda a, b: -((a - b) ** 2).sum(-1) / (2 * temperature),
        "dot": lambda a, b: (a * b).sum(-1) / temperature,
    }[similarity]
    z, w = gaussian_grid(S, 40)
    negatives = w @ logsumexp(logit(z[:, None], z), b=w, axis=1)
    joint, v = gaussian_grid(np.block([[S, S0], [S0, S]]), 4)  # the positive logit is quadratic: exact
    positive = v @ logit(joint[:, :2], joint[:, 2:])
    found = population_loss(W, C0, Ce, similarity, temperature)
    np.testing.assert_allclose(found, negatives - positive, rtol=0, atol=1e-10)


@pytest.mark.parametrize("similarity", ["euclidean", "dot"])
def test_the_mean_loss_of_large_batches_tends_to_the_population_loss(similarity):
    C0, Ce = covariances(2, 4)
    W, tau, batch, rng = 0.1 * np.random.default_rng(3).standard_normal((3, 4)), 0.8, 1000, np.random.default_rng(4)
    roots = [np.linalg.cholesky(C).T for C in (C0, Ce)]
    losses = []
    for _ in range(60):
        clean, noise = rng.standard_normal((batch, 4)) @ roots[0], rng.standard_normal((2, batch, 4)) @ roots[1]
        z, z_prime = (clean + noise) @ W.T
        losses.append(infonce(z, z_prime, similarity, tau) / batch - math.log(batch - 1))
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    # To first order a batch is off by (E[e^positive / m] - E[Var / (2 m^2)]) / (N - 1), m the mean over negatives of
    # e^logit and Var its variance: each is below e^2 / N where S / tau has no eigenvalue above 0.6.
    assert np.linalg.eigvalsh(W @ (C0 + Ce) @ W.T / tau)[-1] < 0.6
    bias = math.exp(2) / batch
    found = population_loss(W, C0, Ce, similarity, tau)
    assert error < 0.002
    assert abs(np.mean(losses) - found) < 5 * error + bias


@settings(max_examples=40, deadline=None)
@given(three(1e-6, 4), three(1e-3, 4), st.floats(0.05, 5), st.sampled_from(["euclidean", "dot"]))
@example(np.array([1e-12, 1.0, 1e6]), np.array([1.0, 1e-6, 1.0]), 1.0, "euclidean")
def test_the_gradient_of_the_population_loss_vanishes_where_the_flow_stops(c0, ce, temperature, similarity):
    W = torch.tensor(np.diag(np.sqrt(stationary_modes(c0, ce, similarity, temperature))), requires_grad=True)
    C0, Ce = torch.tensor(np.diag(c0)), torch.tensor(np.diag(ce))
    (gradient,) = torch.autograd.grad(population_loss(W, C0, Ce, similarity, temperature), W)
    # Of two terms, 2 sigma c (1 or s) / tau, that cancel.
    sigma = W.diagonal().detach().numpy()
    s = sigma**2 * (c0 + ce) / temperature
    terms = 4 * sigma * (c0 + ce) / temperature * (1 + (s if similarity == "dot" else 0))
    np.testing.assert_allclose(gradient, np.zeros((3, 3)), rtol=0, atol=200 * EPS * terms.max())


variance = st.one_of(st.floats(1e-12, 1e12), st.floats(0.1, 10))


@settings(max_examples=200, deadline=None)
@given(variance, variance, st.floats(0.01, 100))
@example(1e-12, 1.0, 1.0)
@example(1.0, 1e-12, 1.0)
def test_stationary_modes_are_roots_to_the_last_digits_in_exact_arithmetic(c0, ce, temperature):
    """The polynomial changes sign within 32 EPS of the root given, also where signal or noise is tiny."""
    c, tau = Fraction(c0) + Fraction(ce), Fraction(temperature)
    excess = lambda s: 2 * Fraction(ce) * (1 + s) ** 2 - c * (2 + s)
    s = Fraction(stationary_modes([c0], [ce], temperature=temperature)[0].item()) * c / tau
    width = Fraction(32 * EPS)
    assert excess(s * (1 - width)) < 0 < excess(s * (1 + width))
    dot = Fraction(stationary_modes([c0], [ce], "dot", temperature)[0].item())
    assert abs(dot * c**2 / (tau * Fraction(c0)) - 1) < width


def test_a_direction_vanishes_only_without_signal_and_shrinks_as_two_thirds_of_it():
    assert stationary_modes([0.0], [1.0]) == stationary_modes([0.0], [1.0], "dot") == 0
    assert stationary_modes([1.0], [0.0]) == math.inf
    c0 = np.array([1e-6, 1e-9])
    np.testing.assert_allclose(stationary_modes(c0, np.ones(2)), 2 / 3 * c0, rtol=3e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.1, 3), st.integers(1, 5))
def test_the_population_gradient_is_the_gradient_of_the_population_loss(seed, temperature, m):
    C0, Ce = covariances(seed, 4)
    W = torch.tensor(np.random.default_rng(seed).standard_normal((m, 4)), requires_grad=True)
    (expected,) = torch.autograd.grad(population_loss(W, C0, Ce, "dot", temperature), W)
    found = population_gradient(W.detach().numpy(), C0, Ce, temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected.abs().max())


MODES = {
    "w0": np.array([0.5, 0.2, 0.05, 0.3, 0.25]),
    "c0": np.array([1.0, 2.0, 1.0, 0.5, 0.0]),
    "ce": np.array([0.0, 1.0, 3.0, 2.0, 1.0]),
}


def test_one_layer_of_an_infinite_batch_is_logistic():
    t, tau = np.linspace(0.3, 1.5, 7), 0.1
    w0, c0, ce = (MODES[name][:4] for name in ("w0", "c0", "ce"))
    stop = tau * c0 / (c0 + ce) ** 2
    m = stop / (1 + (stop / w0**2 - 1) * np.exp(-4 * c0 / tau * (t[:, None] - 0.3)))
    np.testing.assert_allclose(population_modes(t, w0, c0, ce, 1, tau), np.sqrt(m), rtol=1e-13)


@pytest.mark.parametrize("depth", range(1, 6))
def test_balanced_layers_of_an_infinite_batch_follow_the_matrix_flow_of_the_population_loss(depth):
    t, tau = np.linspace(0.3, 1.5, 7), 0.2
    C0, Ce = np.diag(MODES["c0"]), np.diag(MODES["ce"])
    layers = [np.diag(MODES["w0"] ** (1 / depth))] * depth
    flow = matrix_flow(t, layers, lambda W: population_gradient(W, C0, Ce, tau), RTOL, "DOP853")
    product = np.eye(5)
    for W in flow:
        product = W @ product
    w = population_modes(t, **MODES, depth=depth, temperature=tau)
    assert (w[-1] / w[0]).max() > 1.5
    # ln w is known to 1e-8 |ln w| < 3e-8 a step; growth multiplies an early error by (w / w0)^b at most.
    growth = max(1, (w / w[0]).max()) ** (2 - 2 / depth)
    np.testing.assert_allclose(np.einsum("tkk->tk", product), w, rtol=100 * 3e-8 * growth)


def test_two_layers_of_an_infinite_batch_reach_w_at_the_time_in_closed_form():
    tau, w0, c0, ce = 0.1, 0.02, 1.5, 0.5
    t = np.linspace(0, 1.2, 25)
    w = population_modes(t, np.array([w0]), np.array([c0]), np.array([ce]), 2, tau)[:, 0]
    stop = math.sqrt(tau * c0) / (c0 + ce)
    assert w[-1] > 0.9 * stop
    at = lambda w: -1 / w + np.arctanh(w / stop) / stop
    # A relative error of w moves the time by w / (dw/dt), and 1e-6 of it is the integrator's, as above.
    slack = 1e-6 * w / (4 / tau * w**2 * (c0 - (c0 + ce) ** 2 * w**2 / tau)) * (w / w0)
    assert (np.abs(tau / (4 * c0) * (at(w) - at(w0)) - t) <= slack).all()


@pytest.mark.parametrize("depth", range(1, 7))
def test_balanced_layers_of_an_infinite_batch_stop_at_the_stationary_modes(depth):
    w0, c0, ce = (MODES[name][:4] for name in ("w0", "c0", "ce"))
    w = population_modes(np.array([0.0, 400.0]), w0, c0, ce, depth, 0.1)[-1]
    np.testing.assert_allclose(w**2, stationary_modes(c0, ce, "dot", 0.1), rtol=1e-5)


def test_one_layer_of_the_euclidean_loss_follows_the_flow_of_its_population_loss():
    m0, c0, ce = np.array([0.5, 0.02, 3.0, 0.3]), np.array([1.0, 2.0, 0.5, 0.0]), np.array([0.5, 0.3, 2.0, 0.7])

    def gradient(W):
        W = torch.tensor(W, requires_grad=True)
        loss = population_loss(W, torch.tensor(np.diag(c0)), torch.tensor(np.diag(ce)))
        return torch.autograd.grad(loss, W)[0].numpy()

    t = np.linspace(0.1, 1.5, 6)
    (W,) = matrix_flow(t, [np.diag(np.sqrt(m0))], gradient, RTOL, "DOP853")
    m = np.einsum("tkk->tk", W) ** 2
    # d ln m / dt is bounded, so that an error of ln m does not grow by more than e^(slope t); 1e-8 |ln m| a step.
    np.testing.assert_allclose(euclidean_modes(t, m0, c0, ce), m, rtol=1e-5)
    late = euclidean_modes([0.0, 300.0], m0[:3], c0[:3], ce[:3])[-1]
    np.testing.assert_allclose(late, stationary_modes(c0[:3], ce[:3]), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0.01, 4)), min_size=1, max_size=8), st.floats(0.02, 5))
@example([(1.0, 0.5)] * 3, 0.1)
def test_the_cosine_modes_are_the_least_of_a_quadratic_on_the_simplex(variances, tau):
    """-sum rho t / tau + sum t^2 / (2 tau^2): its slope is one number where t > 0 and no less where t = 0."""
    c0, ce = np.array(variances).T
    t = cosine_modes(c0, ce, tau)
    np.testing.assert_allclose(t.sum(), 1, rtol=0, atol=100 * EPS * max(1, tau))
    assert (t >= 0).all()
    slope = t / tau - c0 / (c0 + ce)
    level = slope[t > 0].max()
    np.testing.assert_allclose(slope[t > 0], level, rtol=0, atol=100 * EPS * max(1, 1 / tau))
    assert (slope[t == 0] >= level - 100 * EPS * max(1, 1 / tau)).all()
    mu, shares = water_level(c0 / (c0 + ce), tau)
    np.testing.assert_array_equal(shares, t)
    np.testing.assert_allclose(mu, level, rtol=0, atol=100 * EPS * max(1, 1 / tau))


@given(
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6), st.floats(1e-4, 0.5), st.floats(0.05, 2),
    st.sampled_from(["cosine", "dot", "euclidean"]),
)  # fmt: skip
def test_a_line_parts_what_a_loss_at_rest_leaves_below_a_threshold(fractions, threshold, tau, similarity):
    """Of the variances c sigma^2 of the stationary modes, a little above and below the line too."""
    line = float(collapse_line(fractions, threshold, similarity, tau))
    beside = [line * factor for factor in (0.5, 1 - 1e-6, 1 + 1e-6) if 0 < line * factor < max(fractions)]
    # What stands beside the line must not move it: of the cosine the level is that of the fractions alone.
    mu, largest = water_level(fractions, tau)[0], max(fractions)
    for rho in [*fractions, *beside]:
        if similarity == "cosine":
            variance, most = (tau * max(0.0, value + mu) for value in (rho, largest))
        else:
            variance, most = stationary_modes([rho, largest], [1 - rho, 1 - largest], similarity, tau)
        if abs(rho - line) > 1e-9:
            assert (variance < threshold * most) == (rho < line)


@pytest.mark.parametrize("depth", range(1, 6))
def test_a_mode_reaches_a_level_at_its_escape_time(depth):
    """Far below where it stops a mode grows as at a fixed X of lam = 2 c0 / tau."""
    w0, w, c0, tau = np.array([0.01, 0.2, 0.5]), np.array([0.3, 0.21, 0.1]), np.array([1.0, 2.0, 0.5]), 0.3
    times = escape_time(w0, w, c0, depth, tau)
    assert (times > 0).tolist() == [True, True, False]
    for k, time in enumerate(times):
        np.testing.assert_allclose(deep_modes([time], [2 * c0[k] / tau], [w0[k]], depth), [[w[k]]], rtol=1e-11)


def test_collapsed_modes_count_those_shrunk_by_augmentation_and_those_too_slow():
    """Noise growing linearly from 0 to a over 16 modes: derived by hand from the two boundaries."""
    k, expected = np.arange(16), {0.0: [0, 3, 6, 6, 7, 7], 3.0: [0, 3, 6, 6, 7, 7], 4.0: [4, 4, 6, 6, 7, 7]}
    for amplitude, counts in expected.items():
        ce = (amplitude * k / 15) ** 2
        collapsed = [collapsed_modes(0.3 * np.exp(-0.4 * k), np.ones(16), ce, L, 10.0) for L in (1, 2, 3, 4, 6, 8)]
        assert [int(which.sum()) for which in collapsed] == counts
        assert all((np.diff(which.astype(int)) >= 0).all() for which in collapsed)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 10), st.one_of(st.floats(-10, 10), st.sampled_from([0.0, -1e8, 1e8])))
def test_the_split_of_a_product_keeps_the_difference_and_the_product(m, kappa):
    squared = conserved_split([m], [kappa])[0]
    s, exact_kappa, exact_m = Fraction(squared.item()), Fraction(kappa), Fraction(m)
    excess = lambda s: s**2 - exact_kappa * s - exact_m  # sigma_W^2 - sigma_P^2 = kappa, sigma_P^2 = m / sigma_W^2
    width = Fraction(32 * EPS)
    assert excess(s * (1 - width)) < 0 < excess(s * (1 + width))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5), st.floats(0.01, 10))
def test_balanced_layers_of_an_orthogonal_product_have_these_grams_in_opposite_order(seed, size, m):
    """W1 W1^T = B and W2^T W2 = B + K with W2 W1 = sqrt(m) Q: for W1 = B^(1/2), W2 = sqrt(m) Q B^(-1/2)."""
    A = np.random.default_rng(seed).standard_normal((size, size))
    K = A + A.T
    first, second = balanced_grams(K, m)
    largest = np.abs(K).sum() + math.sqrt(m)
    np.testing.assert_allclose(second - first, K, rtol=0, atol=16 * size * EPS * largest)
    np.testing.assert_allclose(first @ second, m * np.eye(size), rtol=0, atol=100 * size * EPS * largest**2)
    values = np.linalg.eigvalsh(first)
    assert (values > -100 * EPS * largest).all()
    np.testing.assert_allclose(np.linalg.eigvalsh(second) * values[::-1], m, rtol=0, atol=200 * size * EPS * largest**2)


def test_masked_entries_of_a_flow_stay_and_a_fixed_layer_is_a_fixed_head():
    rng = np.random.default_rng(0)
    W1, W2, target = rng.standard_normal((3, 3, 3)) / 2
    t, gradient = np.array([0.0, 0.5, 1.0]), lambda W: W - target
    free, fixed = matrix_flow(t, [W1, W2], gradient, 1e-9, "DOP853", [None, np.zeros((3, 3))])
    np.testing.assert_array_equal(fixed, np.broadcast_to(W2, (3, 3, 3)))
    (alone,) = matrix_flow(t, [W1], lambda W: W2.T @ gradient(W2 @ W), 1e-9, "DOP853")
    np.testing.assert_allclose(free, alone, rtol=0, atol=1e-7)
    mask = np.eye(3)
    part, _ = matrix_flow(t, [W1, W2], gradient, 1e-9, "DOP853", [mask, None])
    np.testing.assert_array_equal(part[-1][mask == 0], W1[mask == 0])
    assert (part[-1][mask == 1] != W1[mask == 1]).all()


SQUARE, VECTOR = np.eye(2), np.ones(2)
NAN = np.array([1.0, np.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_layer(VECTOR, SQUARE, np.ones((2, 3))), r"X: got shape \(2, 3\), but d = 2 in W0"),
        (lambda: one_layer(0.5, SQUARE, SQUARE), r"t: got shape \(\), expected \(T\)"),
        (lambda: one_layer(np.ones((1, 1)), SQUARE, SQUARE), r"t: got shape \(1, 1\), expected \(T\)"),
        (lambda: one_layer(NAN, SQUARE, SQUARE), r"t: entry \[1\]"),
        (lambda: one_layer([1.0, 800.0], SQUARE, SQUARE), r"W\(t\) overflows float64 at t = 800"),
        (lambda: two_layer_modes(VECTOR, VECTOR, VECTOR, np.ones(3)), r"sigma2: got shape \(3,\), but K = 2 in lam"),
        (lambda: two_layer_modes(VECTOR, VECTOR, -VECTOR, VECTOR), "sigma1: entry 0 is -1, below zero"),
        (lambda: two_layer_modes(VECTOR, VECTOR, VECTOR, [1, -2]), "sigma2: entry 1 is -2, below zero"),
        (lambda: deep_modes(VECTOR, VECTOR, [1, -2], 2), "w0: entry 1 is -2, below zero"),
        (lambda: deep_modes(VECTOR, VECTOR, np.ones(3), 2), r"w0: got shape \(3,\), but K = 2 in lam"),
        (lambda: deep_modes(VECTOR, VECTOR, VECTOR, 0), "depth: got 0, expected a whole number"),
        (lambda: deep_modes(VECTOR, VECTOR, VECTOR, 1.5), "depth: got 1.5, expected a whole number"),
        (lambda: population_modes(VECTOR, VECTOR, VECTOR, VECTOR, 0), "depth: got 0, expected a whole number"),
        (lambda: cosine_modes([1, -1], VECTOR), "c0: entry 1 is -1, below zero"),
        (lambda: cosine_modes(VECTOR, np.ones(3)), r"ce: got shape \(3,\), but K = 2 in c0"),
        (lambda: cosine_modes(VECTOR, VECTOR, 0.0), "temperature: got 0.0"),
        (lambda: water_level([]), "fractions: is empty"),
        (lambda: collapse_line([]), "fractions: is empty"),
        (lambda: collapse_line(VECTOR, 1.0), "threshold: got 1.0, expected a share"),
        (lambda: collapse_line(VECTOR, 0.1, "cosines"), "similarity: got 'cosines', expected one of euclidean, dot"),
        (lambda: water_level(VECTOR, -1.0), "temperature: got -1"),
        (lambda: escape_time(VECTOR, VECTOR, VECTOR, 0), "depth: got 0"),
        (lambda: escape_time(VECTOR, np.ones(3), VECTOR, 2), r"w: got shape \(3,\), but K = 2 in w0"),
        (lambda: escape_time(VECTOR, VECTOR, np.ones(3), 2), r"c0: got shape \(3,\), but K = 2 in w0"),
        (lambda: escape_time(VECTOR, VECTOR, VECTOR, 2, -1.0), "temperature: got -1.0"),
        (lambda: euclidean_modes(VECTOR, VECTOR, VECTOR, np.ones(3)), r"ce: got shape \(3,\), but K = 2 in m0"),
        (lambda: alignment(np.ones((3, 2)), np.ones((2, 2))), r"W2: got shape \(2, 2\), but h = 3 in W1"),
        (lambda: alignment(VECTOR, SQUARE), r"W1: got shape \(2,\), expected \(h, d\)"),
        (lambda: population_loss(SQUARE, SQUARE, np.eye(3)), r"Ce: got shape \(3, 3\), but d = 2 in W"),
        (lambda: population_loss(SQUARE, SQUARE, SQUARE, "cosine"), "similarity: got 'cosine', expected one of"),
        (lambda: population_loss(SQUARE, SQUARE, SQUARE, "dot", 0.0), "temperature: got 0.0"),
        (lambda: stationary_modes(VECTOR, np.ones(3)), r"ce: got shape \(3,\), but K = 2 in c0"),
        (lambda: stationary_modes([1, -1], VECTOR), "c0: entry 1 is -1, below zero"),
        (lambda: stationary_modes(VECTOR, [-1, 1]), "ce: entry 0 is -1, below zero"),
        (lambda: stationary_modes([1, 0], [1, 0]), "c0, ce: direction 1 has no variance at all"),
        (lambda: stationary_modes(VECTOR, VECTOR, "l1"), "similarity: got 'l1'"),
        (lambda: stationary_modes(VECTOR, VECTOR, "dot", math.inf), "temperature: got inf"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
