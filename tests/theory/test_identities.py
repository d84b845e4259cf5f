"""Lemmas 1 and 2 against loops over pairs and against automatic differentiation, at asymmetric alpha."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from collapse import InputError
from collapse.theory import gram_difference, infonce, infonce_gradients

EPS = np.finfo(np.float64).eps
SIMILARITIES = ("euclidean", "dot", "cosine")

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 5))
scales = st.sampled_from([1e-3, 1.0, 30.0, 1e3])


def pair(seed, shape, scale=1.0, shift=0.0):
    """Two views and, exactly, the same two views moved by -+shift: what float64 holds at 1e6 is exact near 0."""
    shift = shift * np.resize([1.0, -1.0], shape[1])
    rng = np.random.default_rng(seed)
    first = scale * rng.standard_normal(shape) / np.arange(1, shape[1] + 1)
    second = first + scale * rng.standard_normal(shape) / 2
    first, second = first + shift, second + shift
    return first, second, first - shift, second - shift


def logit_table(z, z_prime, similarity, tau):
    """One logit at a time, with correctly rounded sums; and the largest sum of absolute products among them."""
    if similarity == "cosine":
        z, z_prime = ([row / math.hypot(*row) for row in rows] for rows in (z, z_prime))
    n, largest = len(z), 0.0
    table = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            if similarity == "euclidean":
                terms = [-((a - b) ** 2) / 2 for a, b in zip(z[i], z_prime[i] if i == j else z[j], strict=True)]
            else:
                terms = [a * b for a, b in zip(z[i], z_prime[j], strict=True)]
            table[i, j] = math.fsum(terms) / tau
            largest = max(largest, math.fsum(map(abs, terms)) / tau)
    return table, largest


def logit_error(m, largest):
    """How far a float64 logit may be off: m products and sums, and as much again for a common shift of a row."""
    return 4 * (m + 4) * EPS * largest


def loss_by_loops(table):
    margins = [[table[i, j] - table[i, i] for j in range(len(table)) if j != i] for i in range(len(table))]
    return math.fsum(np.logaddexp(0, logsumexp(row)) for row in margins if row)


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, scales, st.sampled_from(SIMILARITIES), st.floats(0.05, 5))
def test_infonce_is_the_loss_written_out_anchor_by_anchor(seed, shape, scale, similarity, tau):
    z, z_prime, _, _ = pair(seed, shape, scale)
    table, largest = logit_table(z, z_prime, similarity, tau)
    # d loss_i = sum_j alpha_ij d(margin_ij), and 1 - alpha_ii <= loss_i: the error is relative to the loss itself.
    rtol = 2 * logit_error(shape[1], largest) + 16 * (shape[0] + 4) * EPS
    np.testing.assert_allclose(infonce(z, z_prime, similarity, tau), loss_by_loops(table), rtol=rtol, atol=1e-300)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_loss_of_two_views_is_the_cross_entropy_of_the_official_script(similarity):
    z, z_prime, _, _ = (torch.tensor(a) for a in pair(3, (9, 4)))
    found = infonce(z, z_prime, similarity, 0.2)
    if similarity == "cosine":
        z, z_prime = (torch.nn.functional.normalize(a, dim=1) for a in (z, z_prime))
    logits = z @ z_prime.T / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(9), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_loss_far_below_the_rounding_of_one_keeps_its_digits():
    z = np.diag([10.0, 10.0])
    np.testing.assert_allclose(infonce(z, z), 2 * math.exp(-100), rtol=1e-13)
    np.testing.assert_allclose(infonce(z, z, "dot"), 2 * math.exp(-100), rtol=1e-13)
    assert infonce([[1.0, 2.0]], [[3.0, 4.0]]) == 0  # no negatives


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_cosine_does_not_see_the_length_of_a_row(size):
    z, z_prime, _, _ = pair(0, (6, 3))
    lengths = np.where(np.arange(6) % 2, size, 1.0)[:, None]
    expected = infonce(z, z_prime, "cosine", 0.1)
    np.testing.assert_allclose(infonce(z * lengths, z_prime / lengths, "cosine", 0.1), expected, rtol=1e-13)


def loss_of(z, z_prime):
    """The Euclidean loss for autograd, from differences of rows."""
    logits = -((z[:, None] - z[None]) ** 2).sum(2) / 2
    positive = -((z - z_prime) ** 2).sum(1) / 2
    logits = torch.where(torch.eye(len(z), dtype=torch.bool), positive[:, None], logits)
    return (torch.logsumexp(logits, 1) - positive).sum()


def weights_of(z, z_prime):
    table, largest = logit_table(z, z_prime, "euclidean", 1.0)
    return np.exp(table - logsumexp(table, axis=1, keepdims=True)), largest


def gradient_error(z, z_prime, columns):
    """Relative error of sum alpha_ij (a_i - a_j)(..): that of alpha, twice the logits', and of 2 n^2 sums.

    At embeddings of order one it is some 1e-14; at 1e3, where logits are of order 1e6, some 1e-9.
    """
    _, largest = weights_of(z, z_prime)
    return 4 * logit_error(z.shape[1], largest) + 16 * (2 * len(z) + columns) * EPS


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, scales, st.sampled_from([0.0, 1e6]))
@example(0, (6, 4), 1.0, 0.0)
@example(0, (6, 4), 1.0, 1e6)
@example(0, (6, 4), 1e3, 1e6)
def test_lemma_1_is_the_gradient_of_the_loss_wherever_the_rows_lie(seed, shape, scale, shift):
    z, z_prime, near, near_prime = pair(seed, shape, scale, shift)
    a, b = (torch.tensor(rows, requires_grad=True) for rows in (near, near_prime))
    expected = torch.autograd.grad(loss_of(a, b), (a, b))
    size = 2 * np.abs(near - near_prime).max() + 4 * np.abs(near - near.mean(0)).max()
    atol = shape[0] * size * gradient_error(near, near_prime, shape[1])
    if scale <= 1:
        assert atol < 1e-12 * max(1, shape[0] * size)
    for got, want in zip(infonce_gradients(z, z_prime), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def test_lemma_1_to_a_relative_1e_12_at_an_asymmetric_alpha():
    z, z_prime, _, _ = pair(1, (12, 5))
    alpha, _ = weights_of(z, z_prime)
    assert np.abs(alpha - alpha.T).max() > 0.05
    a, b = torch.tensor(z, requires_grad=True), torch.tensor(z_prime, requires_grad=True)
    expected = torch.autograd.grad(loss_of(a, b), (a, b))
    for got, want in zip(infonce_gradients(z, z_prime), expected, strict=True):
        assert np.abs(got - want.numpy()).max() < 1e-12 * want.abs().max()


@settings(max_examples=40, deadline=None)
@given(seeds, sizes, scales, st.sampled_from([0.0, 1e6]), st.integers(1, 4))
@example(0, (6, 4), 1.0, 1e6, 3)
@example(0, (6, 4), 1e3, 1e6, 4)
def test_lemma_2_the_gradient_of_W_is_minus_W_X_wherever_the_data_lie(seed, shape, scale, shift, m):
    x, x_prime, near, near_prime = pair(seed, shape, scale, shift)
    W = torch.tensor(np.random.default_rng(seed).standard_normal((m, shape[1])), requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(torch.tensor(near) @ W.T, torch.tensor(near_prime) @ W.T), W)
    W = W.detach().numpy()
    X = gram_difference(x, x_prime, W)
    assert (X == X.T).all()
    reach = np.abs(near).max() + np.abs(near_prime).max()
    # The entries of z are sums of d products, so their differences, and the logits, err by d eps |x| |W| more.
    spread = shape[1] * np.abs(W).max() * reach
    logits = 8 * m * (shape[1] + m + 4) * EPS * spread**2
    rtol = 4 * logits + 16 * (2 * shape[0] + shape[1] + m) * EPS
    atol = rtol * 4 * shape[0] * reach**2 * np.abs(W).sum(1).max()
    np.testing.assert_allclose(-W @ X, expected, rtol=0, atol=atol)


def test_lemma_2_to_a_relative_1e_12():
    x, x_prime, _, _ = pair(1, (12, 5))
    W = torch.tensor(np.random.default_rng(0).standard_normal((3, 5)), requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(torch.tensor(x) @ W.T, torch.tensor(x_prime) @ W.T), W)
    got = -W.detach().numpy() @ gram_difference(x, x_prime, W.detach().numpy())
    assert np.abs(got - expected.numpy()).max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(("n", "d", "m"), [(12, 5, 5), (30, 6, 2), (9, 3, 7)])
def test_lemma_2_holds_for_products_and_cosines(similarity, n, d, m):
    rng = np.random.default_rng([n, d, m])
    x, x_prime, start = (rng.normal(size=shape) for shape in ((n, d), (n, d), (m, d)))
    W = torch.tensor(start, requires_grad=True)
    loss = infonce(torch.tensor(x) @ W.T, torch.tensor(x_prime) @ W.T, similarity, 0.3)
    (gradient,) = torch.autograd.grad(loss, W)
    X = gram_difference(x, x_prime, start, similarity, 0.3)
    np.testing.assert_allclose(X, X.T, rtol=0, atol=1e-12 * np.abs(X).max())
    scale = float(gradient.abs().max())
    np.testing.assert_allclose(-start @ X, gradient.numpy(), rtol=0, atol=1e-12 * max(scale, np.abs(X).max()))


@settings(max_examples=30, deadline=None)
@given(seeds, sizes, st.integers(1, 4), st.sampled_from([0.0, 1e6]))
def test_X_is_the_weighted_covariance_of_pairs_less_that_of_views(seed, shape, m, shift):
    """dL/dW sees only W X; here all of X, also where W is not square."""
    x, x_prime, near, near_prime = pair(seed, shape, 1.0, shift)
    W = np.random.default_rng(seed).standard_normal((m, shape[1]))
    alpha, largest = weights_of(near @ W.T, near_prime @ W.T)
    expected = np.zeros((shape[1], shape[1]))
    for i in range(shape[0]):
        for j in range(shape[0]):
            step, weight = (near_prime[i] - near[i], alpha[i, i] - 1) if i == j else (near[i] - near[j], alpha[i, j])
            expected += weight * np.outer(step, step)
    reach = np.abs(near).max() + np.abs(near_prime).max()
    logits = 8 * m * (shape[1] + m + 4) * EPS * (shape[1] * np.abs(W).max() * reach) ** 2 + logit_error(m, largest)
    # 1 - alpha_ii loses the digits of alpha_ii near one: an absolute EPS, within the bound.
    atol = (4 * logits + 32 * (shape[0] + shape[1]) * EPS) * 4 * shape[0] * reach**2
    np.testing.assert_allclose(gram_difference(x, x_prime, W), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("widths", [(5, 4), (5, 4, 3), (5, 2, 6, 3)])
def test_lemma_3_each_layer_moves_by_the_layers_around_X(widths):
    rng = np.random.default_rng(2)
    x, x_prime, _, _ = pair(4, (8, 5))
    layers = [torch.tensor(rng.standard_normal((m, d)) / d**0.5, requires_grad=True) for d, m in pairwise(widths)]
    z, z_prime = torch.tensor(x), torch.tensor(x_prime)
    for W in layers:
        z, z_prime = z @ W.T, z_prime @ W.T
    expected = torch.autograd.grad(loss_of(z, z_prime), layers)
    layers = [W.detach().numpy() for W in layers]
    product = lambda matrices, size: np.linalg.multi_dot([*matrices[::-1], np.eye(size), np.eye(size)])
    W = product(layers, 5)
    G = -W @ gram_difference(x, x_prime, W)
    for place, want in enumerate(expected):
        before = product(layers[:place], 5)
        after = product(layers[place + 1 :], widths[place + 1])
        got = after.T @ G @ before.T
        assert np.abs(got - want.numpy()).max() < 1e-12 * want.abs().max()


CALLS = {
    "infonce": lambda a, b: infonce(a, b),
    "infonce dot": lambda a, b: infonce(a, b, "dot", 0.3),
    "infonce cosine": lambda a, b: infonce(a, b, "cosine", 0.3),
    "infonce_gradients": infonce_gradients,
    "gram_difference": lambda a, b: gram_difference(a, b, a[:2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_numpy_gives_numpy_and_torch_gives_torch_through_which_gradients_flow(name):
    call, (x, x_prime, _, _) = CALLS[name], pair(5, (5, 3))
    as_tuple = lambda result: result if isinstance(result, tuple) else (result,)
    of_numpy = as_tuple(call(x, x_prime))
    assert all(isinstance(part, (np.ndarray, np.float64)) and part.dtype == np.float64 for part in of_numpy)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, x_prime)]
    of_torch = as_tuple(call(*tensors))
    for part, same in zip(of_torch, of_numpy, strict=True):
        assert isinstance(part, torch.Tensor)
        np.testing.assert_array_equal(part.detach(), same)
    assert torch.autograd.gradcheck(call, tensors)


def test_lists_integers_and_float32_count_as_float64():
    a, b = [[1, 2], [3, 5]], [[0, 2], [4, 4]]
    expected = infonce(np.array(a, dtype=np.float64), np.array(b, dtype=np.float64))
    assert infonce(a, b) == infonce(np.array(a), np.array(b, dtype=np.float32)) == expected
    mixed = infonce(torch.tensor(a, dtype=torch.float32), b)
    assert isinstance(mixed, torch.Tensor)
    assert mixed.dtype == torch.float64
    assert mixed.item() == expected


ONES = np.ones((3, 2))
NAN = np.where(np.eye(3, 2), np.nan, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: infonce(ONES, ONES[:2]), r"z, z_prime: got shapes \(3, 2\) and \(2, 2\)"),
        (lambda: infonce(ONES[0], ONES[0]), r"z, z_prime: got shapes \(2,\) and \(2,\)"),
        (lambda: infonce(1.0, 2.0), r"z, z_prime: got shapes \(\) and \(\)"),
        (lambda: gram_difference(ONES, ONES, 1.0), r"W: got shape \(\), expected \(m, 2\)"),
        (lambda: infonce(ONES[:0], ONES[:0]), r"neither of them 0"),
        (lambda: infonce(NAN, ONES), r"z: entry \[0, 0\] of shape \(3, 2\) is NaN"),
        (lambda: infonce(ONES, 1 / (NAN - 2)), r"z_prime: entry \[0, 0\]"),
        (lambda: infonce([["a", "b"]], [[1, 2]]), "z: is not an array of real numbers"),
        (lambda: infonce([[1.0], [1.0, 2.0]], ONES), "z: is not an array of real numbers"),
        (lambda: infonce(torch.ones(3, 2, dtype=torch.complex64), ONES), "z: holds complex numbers"),
        (lambda: infonce(ONES, ONES, "manhattan"), "similarity: got 'manhattan', expected one of euclidean, dot"),
        (lambda: infonce(ONES, ONES, "dot", 0.0), "temperature: got 0.0"),
        (lambda: infonce(ONES, ONES, "dot", -1.0), "temperature: got -1.0"),
        (lambda: infonce(ONES, ONES, "dot", math.nan), "temperature: got nan"),
        (lambda: infonce(ONES, ONES, "dot", math.inf), "temperature: got inf"),
        (lambda: infonce(np.diag([1.0, 0.0, 2.0]), np.eye(3), "cosine"), "z: row 1 is zero"),
        (lambda: infonce(np.eye(3), np.diag([1.0, 1.0, 0.0]), "cosine"), "z_prime: row 2 is zero"),
        (lambda: infonce(1e200 * np.eye(3), np.eye(3)), r"z: entries up to 1.0e\+200 overflow"),
        (lambda: infonce(1e200 * np.eye(3), 1e200 * np.eye(3), "dot"), r"z: entries up to 1.0e\+200 overflow"),
        (lambda: infonce([[1e154], [-1e154]], [[-1e154], [1e154]], "dot", 0.6), "overflow"),
        (lambda: infonce_gradients(1e200 * np.eye(3), np.eye(3)), "overflow"),
        (lambda: infonce_gradients(ONES, ONES[:, :1]), "z, z_prime: got shapes"),
        (lambda: infonce_gradients(ONES, NAN), r"z_prime: entry \[0, 0\]"),
        (lambda: gram_difference(ONES, ONES[:2], ONES), "x, x_prime: got shapes"),
        (lambda: gram_difference(ONES, ONES, ONES.T), r"W: got shape \(2, 3\), expected \(m, 2\)"),
        (lambda: gram_difference(ONES, ONES, ONES[0]), r"W: got shape \(2,\)"),
        (lambda: gram_difference(ONES, ONES, NAN), r"W: entry \[0, 0\]"),
        (lambda: gram_difference(np.eye(3), np.eye(3), 1e200 * np.eye(3)), "overflow"),
        (lambda: gram_difference(np.eye(3), np.eye(3), 1e200 * np.eye(3), "dot"), "overflow"),
        (lambda: gram_difference(np.eye(3), np.eye(3), np.eye(3), "angle"), "similarity: got 'angle'"),
        (lambda: gram_difference(np.eye(3), np.eye(3), np.eye(3), temperature=2.0), "temperature: got 2.0"),
        (lambda: gram_difference(np.eye(3), np.eye(3), np.zeros((2, 3)), "cosine"), "row 0 is zero"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
