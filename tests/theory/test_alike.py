"""Every function of the theory takes lists, tensors, float32, bfloat16 and reversed views as it takes arrays."""

import numpy as np
import pytest
import torch

from collapse import InputError, theory
from collapse.theory import BiasedViews, Descent, GaussianViews, MaskedViews, MeanField

rng = np.random.default_rng(0)
D = 3


def halves(*shape):
    """Numbers that bfloat16 holds, so that no kind rounds them."""
    return rng.integers(1, 16, shape) / 16


C0 = np.diag([2.0, 1.0, 0.5]) + 0.25
CE = np.diag([0.125, 0.25, 0.5])
W, W1, W2, X, X2, PS = halves(2, D), halves(D, D), halves(D, D), halves(20, D), halves(20, D), halves(1, 2, 2)
T, LAM, w, c0, ce = np.arange(5) / 4, np.array([1, 0.5, -0.25]), halves(D), np.array([2, 1, 0.5]), halves(D) / 4
SIGMA, BIASED = np.full((2, D), 0.25), np.full((1, 2, D + 1), 0.25)
STEPS = Descent(steps=3, batch=4)
CASES = {
    "aligned_flow": lambda a: theory.aligned_flow(a(T), a(SIGMA), MeanField(a(C0), a(CE), 16).mode_gradient),
    "alignment": lambda a: theory.alignment(a(W1), a(W2)),
    "alignment_index": lambda a: theory.alignment_index(a(w), a(C0)),
    "balanced_grams": lambda a: theory.balanced_grams(a(np.diag([0.25, 0.125, -0.125])), 0.5),
    "barlow_twins_loss": lambda a: theory.barlow_twins_loss(a(W), a(C0), a(CE)),
    "barlow_twins_modes": lambda a: theory.barlow_twins_modes(a(T), a(c0), a(w)),
    "collapsed_modes": lambda a: theory.collapsed_modes(a(w), a(c0), a(ce), 2, 10.0),
    "conserved_split": lambda a: theory.conserved_split(a(w), a(LAM)),
    "cosine_modes": lambda a: theory.cosine_modes(a(c0), a(ce)),
    "critical_start": lambda a: theory.critical_start(a(c0), a(ce), 2),
    "deep_modes": lambda a: theory.deep_modes(a(T), a(LAM), a(w), 3),
    "distil": lambda a: theory.distil(a(W[None]), a(PS), GaussianViews(a(c0), a(ce)), [0], STEPS, [0, 3]),
    "escape_time": lambda a: theory.escape_time(a(w), a(2 * w), a(c0), 2),
    "euclidean_modes": lambda a: theory.euclidean_modes(a(T), a(w), a(c0), a(ce)),
    "gram_difference": lambda a: theory.gram_difference(a(X), a(X2), a(W)),
    "infonce": lambda a: theory.infonce(a(X), a(X2)),
    "infonce_gradients": lambda a: theory.infonce_gradients(a(X), a(X2)),
    "lars_time": lambda a: theory.lars_time(a(T), a(1 + T), a(2 + T), 0.001),
    "loss_gradient": lambda a: theory.loss_gradient(theory.spectral_loss, a(C0), a(CE))(a(W)),
    "matrix_flow": lambda a: theory.matrix_flow(a(T), [a(W1), a(W)], lambda G: G, masks=[a(np.eye(D)), None]),
    "MeanField": lambda a: MeanField(a(C0), a(CE), 16).gradient(a(W)),
    "BiasedViews": lambda a: theory.sgd([a(BIASED)], BiasedViews(MaskedViews(a(c0), a(ce))), [0], STEPS, [3]),
    "momentum_rate": lambda a: theory.momentum_rate(a(c0), 0.01, 0.9),
    "negative_weights": lambda a: theory.negative_weights(a(w), a(c0), 16),
    "one_layer": lambda a: theory.one_layer(a(T), a(W), a(C0)),
    "population_gradient": lambda a: theory.population_gradient(a(W), a(C0), a(CE)),
    "population_loss": lambda a: theory.population_loss(a(W), a(C0), a(CE)),
    "population_modes": lambda a: theory.population_modes(a(T), a(w), a(c0), a(ce)),
    "predictor_modes": lambda a: theory.predictor_modes(a(T), a(w), a(w), a(c0), a(ce)),
    "predictor_roots": lambda a: theory.predictor_roots(a(c0), a(ce / 16)),
    "sample_gradient": lambda a: theory.sample_gradient(a(X), a(X2))(a(W)),
    "sgd": lambda a: theory.sgd([a(W1[None]), a(W[None])], GaussianViews(a(c0), a(ce)), [0], STEPS, [0, 3]),
    "singular_values": lambda a: theory.singular_values(a(W1)),
    "spectral_loss": lambda a: theory.spectral_loss(a(W), a(C0), a(CE)),
    "stationary_modes": lambda a: theory.stationary_modes(a(c0), a(ce)),
    "two_layer_modes": lambda a: theory.two_layer_modes(a(T), a(LAM), a(w), a(w)),
    "vicreg_loss": lambda a: theory.vicreg_loss(a(W), a(C0), a(CE)),
    "vicreg_modes": lambda a: theory.vicreg_modes(a(c0), a(ce)),
    "collapse_line": lambda a: theory.collapse_line(a(ce)),
    "water_level": lambda a: theory.water_level(a(ce)),
}  # fmt: skip
CLASSES = {"Descent", "Distillation", "GaussianViews", "MaskedViews"}  # of numbers, or used above
KINDS = {
    "list": np.ndarray.tolist,
    "tensor": torch.from_numpy,
    "bfloat16": lambda a: torch.from_numpy(a).to(torch.bfloat16),
    "graph": lambda a: torch.from_numpy(a).clone().requires_grad_(),
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "float32": lambda a: a.astype(np.float32),
}


def numbers(value):
    parts = value if isinstance(value, (tuple, list)) else [value]
    return [p.detach().numpy() if isinstance(p, torch.Tensor) else np.asarray(p) for p in parts]


def test_every_function_is_tried():
    assert set(CASES) | CLASSES == set(theory.__all__)


@pytest.mark.parametrize("name", CASES)
def test_kinds_of_arrays_are_alike(name):
    expected = numbers(CASES[name](lambda a: a))
    for kind, make in KINDS.items():
        found = numbers(CASES[name](make))
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14, err_msg=kind)


def test_covariances_of_two_sizes_are_refused():
    with pytest.raises(InputError, match=r"C0, Ce: got shapes \(3, 3\) and \(2, 2\)"):
        MeanField(np.eye(3), np.eye(2))
