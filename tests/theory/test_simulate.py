"""Stochastic gradient descent against autograd on the same draws, and the draws against their covariances."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collapse import CollapseWarning, InputError
from collapse.theory import (
    BiasedViews,
    Descent,
    GaussianViews,
    MaskedViews,
    MeanField,
    distil,
    infonce,
    sample_gradient,
    sgd,
    singular_values,
)

EPS32 = np.finfo(np.float32).eps
CLEAN, NOISE = np.array([1.0, 0.5, 2.0, 1.0]), np.array([0.5, 1.0, 0.0, 2.0])
VIEWS = GaussianViews(CLEAN, NOISE)


def initial(widths, seeds, scale=0.6):
    """Layers of width widths[0] -> .. -> widths[-1], a run for each seed, exactly representable in float32."""
    runs = [np.random.default_rng(seed) for seed in seeds]
    return [
        np.stack([scale * rng.standard_normal((m, d)) / d**0.5 for rng in runs]).astype(np.float32)
        for d, m in pairwise(widths)
    ]


def draws(views, seed, steps, batch):
    """(steps, 2, batch, d) of one run, in float64."""
    return views.draw([torch.Generator().manual_seed(seed)], steps, batch)[0].double()


def reference_loss(z, z_prime, descent):
    if descent.similarity == "euclidean":
        return infonce(z, z_prime, "euclidean", descent.temperature) / len(z)
    if descent.similarity == "cosine":
        z, z_prime = (torch.nn.functional.normalize(a, dim=1) for a in (z, z_prime))
    return torch.nn.functional.cross_entropy(z @ z_prime.T / descent.temperature, torch.arange(len(z)))


def by_autograd(layers, batches, descent):
    """The weights after the batches given, by torch.optim.SGD in float64; and the largest logit and gradient met."""
    layers = [torch.tensor(W, dtype=torch.float64, requires_grad=True) for W in layers]
    optimizer = torch.optim.SGD(layers, lr=descent.lr)
    logit = gradient = 0.0
    for x, x_prime in batches:
        z, z_prime = x, x_prime
        for depth, W in enumerate(layers, 1):
            z, z_prime = z @ W.T, z_prime @ W.T
            if descent.activation == "relu" and depth < len(layers):
                z, z_prime = z.relu(), z_prime.relu()
        optimizer.zero_grad()
        reference_loss(z, z_prime, descent).backward()
        optimizer.step()
        reach = (z.norm(dim=1).max() * z_prime.norm(dim=1).max()).item()
        logit = max(logit, (1 if descent.similarity == "cosine" else reach) / descent.temperature)
        gradient = max(gradient, *(W.grad.abs().max().item() for W in layers))
    return [W.detach().numpy() for W in layers], logit, gradient


@pytest.mark.parametrize("widths", [(4, 3), (4, 4, 4), (4, 6, 2), (4, 2, 5, 3)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_that_of_autograd_and_torch_optim_on_the_same_draws(widths, steps):
    descent = Descent(lr=0.05, steps=steps, batch=24, temperature=0.7)
    layers = initial(widths, [5])
    found = sgd(layers, VIEWS, [5], descent, [steps])
    expected, logit, gradient = by_autograd([W[0] for W in layers], draws(VIEWS, 5, steps, 24), descent)
    # A float32 logit errs by some (widths + 2) EPS |z| |z'| / tau and its softmax by as much, relatively; products of
    # layers and sums over the batch add their lengths. A step passes on what it was given, lr curvature < 4 times.
    relative = (logit * (sum(widths) + 2) + sum(widths) + 2 * 24) * EPS32
    atol = 4.0 ** (steps - 1) * (descent.lr * 4 * gradient * relative + EPS32 * max(np.abs(W).max() for W in expected))
    assert atol < 1e-3 * descent.lr * gradient * 4.0 ** (steps - 1)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got[0, 0], want, rtol=0, atol=atol)


def test_a_last_column_is_the_bias_of_a_layer():
    views, descent = BiasedViews(VIEWS), Descent(lr=0.05, steps=1, batch=24, temperature=0.7)
    start = initial((5, 3), [5])
    (found,) = sgd(start, views, [5], descent, [1])
    layer = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(start[0][0, :, :4]))
        layer.bias.copy_(torch.tensor(start[0][0, :, 4]))
    reference_loss(*map(layer, draws(VIEWS, 5, 1, 24)[0]), descent).backward()
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).numpy()
    assert np.abs(gradient[:, 4]).min() > 0.01
    np.testing.assert_allclose(found[0, 0], start[0][0] - 0.05 * gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
def test_every_loss_and_activation_has_the_gradient_of_autograd(similarity, activation):
    descent = Descent(lr=0.3, steps=1, batch=24, temperature=0.7, similarity=similarity, activation=activation)
    layers = initial((4, 6, 5, 3), [6, 7, 8])
    found = sgd(layers, VIEWS, [6, 7, 8], descent, [1])
    expected, logit, gradient = by_autograd([W[0] for W in layers], draws(VIEWS, 6, 1, 24), descent)
    relative = (2 * logit * 20 + 18 + 2 * 24) * EPS32
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got[0, 0], want, rtol=0, atol=descent.lr * 4 * gradient * relative + EPS32)


def test_masked_entries_stay_and_the_others_move_as_without_a_mask():
    layers, descent = initial((4, 4, 3), [1, 2]), Descent(lr=0.2, steps=1, batch=16)
    mask = np.eye(4)
    free = sgd(layers, VIEWS, [1, 2], descent, [1])
    masked = sgd(layers, VIEWS, [1, 2], descent, [1], [mask, None])
    np.testing.assert_array_equal(masked[0][0], np.where(mask == 1, free[0][0], layers[0]))
    np.testing.assert_array_equal(masked[1], free[1])
    of_runs = np.stack([mask, np.zeros((4, 4))])
    (first, _) = sgd(layers, VIEWS, [1, 2], descent, [1], [of_runs, None])
    np.testing.assert_array_equal(first[0], np.where(of_runs == 1, free[0][0], layers[0]))
    assert (free[0][0] != layers[0]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["dot", "cosine", "euclidean"]))
def test_the_gradient_of_a_sample_is_that_of_the_mean_loss(seed, similarity):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 9, 4)) + rng.standard_normal((9, 4))
    W = torch.tensor(rng.standard_normal((3, 4)), requires_grad=True)
    first, second = (torch.tensor(view) @ W.T for view in x)
    (expected,) = torch.autograd.grad(infonce(first, second, similarity, 0.5) / 9, W)
    found = sample_gradient(*x, similarity, 0.5)(W.detach().numpy())
    # Logits reach some 200 and cosine divides by rows that may be short: 1e-10 of the largest term.
    largest = np.abs(x).max() ** 2 * W.detach().abs().max().item() / 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * largest)


def test_a_run_does_not_depend_on_the_runs_beside_it():
    seeds = [11, 3, 7]
    clean, noise = np.stack([CLEAN, 2 * CLEAN, CLEAN / 2]), np.stack([NOISE, NOISE / 2, 0 * NOISE])
    layers, descent = initial((4, 4, 3), seeds), Descent(lr=0.02, steps=20, batch=16)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    together = GaussianViews(clean, noise).draw(generators, 9, 16)
    runs = sgd(layers, GaussianViews(clean, noise), seeds, descent, [0, 9, 20])
    for run, seed in enumerate(seeds):
        views = GaussianViews(clean[run], noise[run])
        alone = views.draw([torch.Generator().manual_seed(seed)], 9, 16)
        np.testing.assert_array_equal(alone[0], together[run])
        # Products of several matrices at once may round otherwise than one: 20 steps of float32 rounding.
        for got, want in zip(
            runs, sgd([W[run : run + 1] for W in layers], views, [seed], descent, [0, 9, 20]), strict=True
        ):
            np.testing.assert_allclose(got[:, run], want[:, 0], rtol=0, atol=20 * 100 * EPS32)


def test_a_seed_repeats_to_the_bit_and_another_gives_another_run():
    layers = [np.repeat(W, 3, axis=0) for W in initial((4, 3), [0])]
    descent = Descent(lr=0.05, steps=10, batch=16)
    (first,), (again,) = (sgd(layers, VIEWS, [1, 2, 1], descent, [10]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[0, 0], first[0, 2])
    assert (first[0, 0] != first[0, 1]).all()


def test_the_weights_given_are_left_alone_and_kept_at_the_steps_asked_for():
    layers, descent = initial((4, 3, 2), [0, 1]), Descent(lr=0.05, steps=20, batch=16)
    before = [W.copy() for W in layers]
    every = sgd(layers, VIEWS, [0, 1], descent, range(21))
    some = sgd(layers, VIEWS, [0, 1], descent, [0, 7, 8, 9, 20])
    for W, start, all_steps, kept in zip(layers, before, every, some, strict=True):
        np.testing.assert_array_equal(W, start)
        assert (all_steps.shape, kept.dtype) == ((21, *W.shape), np.float64)
        np.testing.assert_array_equal(all_steps[0], start)
        np.testing.assert_array_equal(kept, all_steps[[0, 7, 8, 9, 20]])
        assert all((a != b).any() for a, b in pairwise(all_steps))
    for got, all_steps in zip(sgd(layers, VIEWS, [0, 1], descent, [7]), every, strict=True):
        np.testing.assert_array_equal(got, all_steps[[7]])


def second_moments_agree(first, second, expected, of_first, of_second):
    """Entry (i, j) of a mean of n products of Gaussians has variance (c_ii c'_jj + b_ij b_ji) / n."""
    n = len(first)
    found = (first.T @ second / n).numpy()
    error = np.sqrt((np.outer(np.diag(of_first), np.diag(of_second)) + expected * expected.T) / n)
    assert (np.abs(found - expected) <= 5 * error + 1e-12).all()


ROOTS = np.random.default_rng(8).standard_normal((2, 2, 4, 4)) / 2


@pytest.mark.parametrize(
    ("views", "clean", "noise"),
    [
        (VIEWS, [np.diag(CLEAN**2)] * 2, [np.diag(NOISE**2)] * 2),
        (
            GaussianViews(np.stack([CLEAN, 3 * CLEAN]), np.stack([NOISE, 0 * NOISE])),
            [np.diag(CLEAN**2), np.diag(9 * CLEAN**2)],
            [np.diag(NOISE**2), np.zeros((4, 4))],
        ),
        (GaussianViews(0 * CLEAN, NOISE), [np.zeros((4, 4))] * 2, [np.diag(NOISE**2)] * 2),
        (
            GaussianViews(*ROOTS[:, 0], matrices=True),
            [ROOTS[0, 0] @ ROOTS[0, 0].T] * 2,
            [ROOTS[1, 0] @ ROOTS[1, 0].T] * 2,
        ),
        (
            GaussianViews(*ROOTS, matrices=True),
            [A @ A.T for A in ROOTS[0]],
            [A @ A.T for A in ROOTS[1]],
        ),
    ],
    ids=["one", "a run each", "noise alone", "matrices", "matrices of a run each"],
)
def test_views_have_the_covariances_asked_for(views, clean, noise):
    drawn = views.draw([torch.Generator().manual_seed(seed) for seed in (1, 2)], 10, 5000)
    assert (drawn.shape, drawn.dtype) == ((2, 10, 2, 5000, 4), torch.float32)
    for run, C0, Ce in zip(drawn.double(), clean, noise, strict=True):
        x, x_prime = run.transpose(0, 1).flatten(1, 2)
        C = C0 + Ce
        second_moments_agree(x, x, C, C, C)
        second_moments_agree(x_prime, x_prime, C, C, C)
        second_moments_agree(x, x_prime, C0, C, C)
        second_moments_agree(x[5000:], x[:-5000], np.zeros((4, 4)), C, C)  # batches are drawn afresh
        means = torch.stack([x.mean(0), x_prime.mean(0)]).abs().numpy()
        assert (means <= 5 * np.sqrt(np.diag(C) / len(x)) + 1e-12).all()


def test_masked_views_drop_coordinates_and_keep_the_rest():
    missing = np.array([0.0, 0.25, 0.5, 1.0])
    (drawn,) = MaskedViews(CLEAN, missing).draw([torch.Generator().manual_seed(0)], 10, 5000)
    x, x_prime = drawn.double().transpose(0, 1).flatten(1, 2)
    n, kept = len(x), 1 - missing
    for view in (x, x_prime):
        error = np.sqrt(missing * kept / n)
        assert (np.abs((view == 0).double().mean(0).numpy() - missing) <= 5 * error).all()
    both = (x != 0) & (x_prime != 0)
    np.testing.assert_array_equal(x[both], x_prime[both])
    assert (np.abs(both.double().mean(0).numpy() - kept**2) <= 5 * np.sqrt(kept**2 * (1 - kept**2) / n)).all()
    variance = (x**2).mean(0).numpy()
    assert (np.abs(variance - kept * CLEAN**2) <= 5 * CLEAN**2 * np.sqrt(3 * kept / n)).all()


@pytest.mark.parametrize("widths", [(3, 3), (3, 3, 3)])
def test_the_mean_of_many_runs_follows_the_mean_field(widths):
    """Aligned layers on independent coordinates: the product's diagonal, averaged over 64 seeds.

    Its error is that of the mean over seeds; the flow's step, lr d ln w / dt / 2 of each step, is below 1 %.
    """
    clean, noise, depth = np.array([1.0, 1.0, 0.7]), np.array([0.0, 1.0, 0.5]), len(widths) - 1
    descent, seeds = Descent(lr=2e-3, steps=300, batch=16, temperature=0.5), range(64)
    sigma = np.tile([0.4, 0.6, 0.5], (depth, 1)) + 0.1 * np.arange(depth)[:, None]
    layers = [np.repeat(np.diag(s)[None], 64, axis=0) for s in sigma]
    at = [0, 100, 300]
    W = np.broadcast_to(np.eye(3), (3, 64, 3, 3))
    for layer in sgd(layers, GaussianViews(clean, noise), seeds, descent, at):
        W = layer @ W
    found = np.einsum("trkk->trk", W)
    field = MeanField(np.diag(clean**2), np.diag(noise**2), 16, 0.5)
    predicted = field.modes(descent.lr * np.array(at), sigma).prod(1)
    assert np.abs(np.log(predicted[-1] / predicted[0])).max() > 0.3
    error = found.std(1, ddof=1) / math.sqrt(64)
    assert (np.abs(found.mean(1) - predicted) <= 4.5 * error + 0.01 * predicted).all()
    assert error.max() < 0.01


def test_singular_values_are_those_of_each_matrix_descending():
    weights = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    found = singular_values(weights)
    assert (found.shape, found.dtype) == ((2, 3, 4), np.float64)
    for place in np.ndindex(2, 3):
        W = weights[place].astype(np.float64)
        expected = np.sqrt(np.linalg.eigvalsh(W @ W.T)[::-1])
        np.testing.assert_allclose(found[place], expected, rtol=1e-10)


LAYERS = initial((4, 3, 2), [0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd([], VIEWS, [0, 1], Descent(), [0]), r"weights: got shapes \[\]"),
        (
            lambda: sgd(LAYERS, VIEWS, [0], Descent(), [0]),
            r"weights: got shapes .*expected layers \(1, rows, columns\)",
        ),
        (lambda: sgd(LAYERS[::-1], VIEWS, [0, 1], Descent(), [0]), r"weights: got shapes .* that fit"),
        (lambda: sgd([W[0] for W in LAYERS], VIEWS, [0, 1], Descent(), [0]), "weights: got shapes"),
        (
            lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(steps=5), []),
            r"at: got \[\], expected ascending steps from 0 to 5",
        ),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(steps=5), [6]), r"at: got \[6\]"),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(steps=5), [-1, 2]), r"at: got \[-1, 2\]"),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(steps=5), [3, 2]), r"at: got \[3, 2\]"),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(steps=5), [2, 2]), r"at: got \[2, 2\]"),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(similarity="l1"), [0]), "similarity: got 'l1'"),
        (lambda: sgd(LAYERS, VIEWS, [0, 1], Descent(activation="tanh"), [0]), "activation: got 'tanh'"),
        (lambda: sample_gradient(np.ones((2, 2)), np.ones((2, 2)), "l1"), "similarity: got 'l1'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_run_that_diverges_is_said():
    views, at = GaussianViews([1.0, 1.0], [0.1, 0.1]), [0, 100, 200]
    start = np.stack([np.eye(2), np.zeros((2, 2))])  # no gradient at zero: the second run stays
    with pytest.warns(CollapseWarning, match="of 1 of 2 runs are not finite at step 100; give a smaller lr="):
        (W,) = sgd([start], views, [0, 1], Descent(lr=1e3, steps=200, batch=8, temperature=1.0), at)
    assert not np.isfinite(W[1:, 0]).all()
    assert (W[:, 1] == 0).all()
    with pytest.warns(CollapseWarning, match="of 2 of 2 runs are not finite at step"):
        distil(start + np.eye(2), np.stack([np.eye(2)] * 2), views, [0, 1], Descent(lr=1e3, steps=200, batch=8), at)


def test_masked_views_of_several_runs_have_their_own_deviations():
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    clean = np.array([[1.0, 2.0], [3.0, 4.0]])
    ones, scaled = (MaskedViews(scale, np.full(2, 0.5)).draw(generators(), 3, 5) for scale in (np.ones((2, 2)), clean))
    torch.testing.assert_close(scaled, ones * torch.tensor(clean, dtype=torch.float32).view(2, 1, 1, 1, 2))
