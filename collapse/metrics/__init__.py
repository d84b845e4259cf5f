"""Measures of collapse: one plain function each, on anybody's singular values, or on embeddings where these are needed.

Notation: Z (N, d) embeddings, rows are samples;  C = Zc^T Zc / (N - 1) the covariance of the centred rows;
`values` (d,) its singular values lambda_k;  s_k the singular values of Z itself, uncentred;
H(p) = -sum p_k ln p_k, with 0 ln 0 = 0.  No epsilon stands inside a logarithm: exact zeros are dropped instead.

A measure of a spectrum takes a `Spectrum`, of which it knows what to take, or by keyword the numbers that it is defined
on, which are not the same for all: `of_covariance` are the lambda_k, `of_rows` the s_k, `moments` the eigenvalues of
Z^T Z / N.  So `rankme(s.singular_values)`, which is another number, is said in a warning.

Published measures that share a name differ in matrix, centring, power and epsilon; each docstring says which one it is.
A value that is undefined for the input (complete collapse, too few points) is NaN, which JSON shows as null.
Functions take any array of non-negative numbers in any order and return float or int.

spectral    of the singular values alone;  noise  against the Marchenko-Pastur law
subspaces   of singular vectors;  embeddings  of the rows themselves
"""

from collapse.metrics.embeddings import (
    alignment,
    canonical_correlations,
    coherence,
    epps_pulley,
    explained_variance,
    l2_std,
    lidar,
    lidar_of,
    linear_cka,
    sigreg,
    uniformity,
)
from collapse.metrics.noise import (
    above_edge,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    noise_variance,
)
from collapse.metrics.spectral import (
    PowerLaw,
    alpha,
    auc,
    collapsed_dimensions,
    condition,
    effective_rank,
    entropy_rank,
    isoscore,
    mean_cosine,
    numerical_rank,
    participation_ratio,
    power_law,
    rankme,
    self_clustering,
    stable_rank,
    vendi,
)
from collapse.metrics.subspaces import (
    principal_angles,
    variance_within,
)

__all__ = [
    "PowerLaw",
    "above_edge",
    "alignment",
    "alpha",
    "auc",
    "canonical_correlations",
    "coherence",
    "collapsed_dimensions",
    "condition",
    "effective_rank",
    "entropy_rank",
    "epps_pulley",
    "explained_variance",
    "isoscore",
    "l2_std",
    "lidar",
    "lidar_of",
    "linear_cka",
    "marchenko_pastur_density",
    "marchenko_pastur_edges",
    "mean_cosine",
    "noise_variance",
    "numerical_rank",
    "participation_ratio",
    "power_law",
    "principal_angles",
    "rankme",
    "self_clustering",
    "sigreg",
    "stable_rank",
    "uniformity",
    "variance_within",
    "vendi",
]
