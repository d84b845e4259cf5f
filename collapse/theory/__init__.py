"""Theory of dimensional collapse: exact identities, closed forms, the finite-batch mean field, and simulation.

identities   the InfoNCE loss, its gradient and X = Sigma0 - Sigma1, for any finite batch (lemmas 1 and 2)
predict      closed forms at fixed X (theorems 1 to 3), depth, the population limit, flows of matrices
meanfield    what a finite batch adds: the exact mean loss over Gaussian data and its flows
simulate     stochastic gradient descent of linear networks, many runs at once
"""

from collapse.theory.identities import gram_difference, infonce, infonce_gradients
from collapse.theory.meanfield import MeanField, negative_weights
from collapse.theory.predict import (
    alignment,
    deep_modes,
    matrix_flow,
    one_layer,
    population_gradient,
    population_loss,
    population_modes,
    stationary_modes,
    two_layer_modes,
)
from collapse.theory.simulate import Descent, GaussianViews, sgd, singular_values

__all__ = [
    "Descent",
    "GaussianViews",
    "MeanField",
    "alignment",
    "deep_modes",
    "gram_difference",
    "infonce",
    "infonce_gradients",
    "matrix_flow",
    "negative_weights",
    "one_layer",
    "population_gradient",
    "population_loss",
    "population_modes",
    "sgd",
    "singular_values",
    "stationary_modes",
    "two_layer_modes",
]
