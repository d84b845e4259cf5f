"""Theory of dimensional collapse: exact identities, closed forms, the finite-batch mean field, and simulation.

identities   the InfoNCE loss, its gradient and X = Sigma0 - Sigma1, for any finite batch (lemmas 1 and 2)
predict      closed forms at fixed X (theorems 1 to 3), depth, the balance of layers
population   an infinite batch: losses in closed form, trajectories, where the flow stops
meanfield    a finite batch, exactly: the mean loss over Gaussian data by quadrature
flow         the gradient flow of any number of layers (lemma 3)
simulate     stochastic gradient descent, many runs at once
"""

from collapse.theory.flow import matrix_flow
from collapse.theory.identities import gram_difference, infonce, infonce_gradients
from collapse.theory.meanfield import MeanField, negative_weights
from collapse.theory.population import (
    collapsed_modes,
    cosine_modes,
    escape_time,
    euclidean_modes,
    population_gradient,
    population_loss,
    population_modes,
    stationary_modes,
    water_level,
)
from collapse.theory.predict import (
    alignment,
    balanced_grams,
    conserved_split,
    deep_modes,
    one_layer,
    two_layer_modes,
)
from collapse.theory.simulate import (
    BiasedViews,
    Descent,
    GaussianViews,
    MaskedViews,
    sample_gradient,
    sgd,
    singular_values,
)

__all__ = [
    "BiasedViews",
    "Descent",
    "GaussianViews",
    "MaskedViews",
    "MeanField",
    "alignment",
    "balanced_grams",
    "collapsed_modes",
    "conserved_split",
    "cosine_modes",
    "deep_modes",
    "escape_time",
    "euclidean_modes",
    "gram_difference",
    "infonce",
    "infonce_gradients",
    "matrix_flow",
    "negative_weights",
    "one_layer",
    "population_gradient",
    "population_loss",
    "population_modes",
    "sample_gradient",
    "sgd",
    "singular_values",
    "stationary_modes",
    "two_layer_modes",
    "water_level",
]
