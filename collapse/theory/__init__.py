"""Theory of dimensional collapse: exact identities, closed forms, the finite-batch mean field, and simulation.

identities   the InfoNCE loss, its gradient and X = Sigma0 - Sigma1, for any finite batch (lemmas 1 and 2)
predict      closed forms at fixed X (theorems 1 to 3), depth, the balance of layers
population   an infinite batch: losses in closed form, trajectories, where the flow stops
meanfield    a finite batch, exactly: the mean loss over Gaussian data by quadrature
flow         the gradient flow of any number of layers (lemma 3)
losses       Barlow Twins, VICReg and the spectral contrastive loss: exact means, closed forms
descent      losses and optimisers of one step
predictor    learning without negatives: BYOL, SimSiam, DirectPred
simulate     stochastic gradient descent, many runs at once
"""

from collapse.theory.descent import Descent
from collapse.theory.flow import aligned_flow, lars_time, matrix_flow, momentum_rate
from collapse.theory.identities import gram_difference, infonce, infonce_gradients
from collapse.theory.losses import (
    barlow_twins_loss,
    barlow_twins_modes,
    loss_gradient,
    spectral_loss,
    vicreg_loss,
    vicreg_modes,
)
from collapse.theory.meanfield import MeanField, negative_weights
from collapse.theory.population import (
    collapse_line,
    collapsed_modes,
    cosine_modes,
    critical_start,
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
    alignment_index,
    balanced_grams,
    conserved_split,
    deep_modes,
    one_layer,
    two_layer_modes,
)
from collapse.theory.predictor import Distillation, distil, predictor_modes, predictor_roots
from collapse.theory.simulate import (
    BiasedViews,
    GaussianViews,
    MaskedViews,
    sample_gradient,
    sgd,
    singular_values,
)

__all__ = [
    "BiasedViews",
    "Descent",
    "Distillation",
    "GaussianViews",
    "MaskedViews",
    "MeanField",
    "aligned_flow",
    "alignment",
    "alignment_index",
    "balanced_grams",
    "barlow_twins_loss",
    "barlow_twins_modes",
    "collapse_line",
    "collapsed_modes",
    "conserved_split",
    "cosine_modes",
    "critical_start",
    "deep_modes",
    "distil",
    "escape_time",
    "euclidean_modes",
    "gram_difference",
    "infonce",
    "infonce_gradients",
    "lars_time",
    "loss_gradient",
    "matrix_flow",
    "momentum_rate",
    "negative_weights",
    "one_layer",
    "population_gradient",
    "population_loss",
    "population_modes",
    "predictor_modes",
    "predictor_roots",
    "sample_gradient",
    "sgd",
    "singular_values",
    "spectral_loss",
    "stationary_modes",
    "two_layer_modes",
    "vicreg_loss",
    "vicreg_modes",
    "water_level",
]
