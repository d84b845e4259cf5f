"""Which directions of a layer are collapsed, and by what: the mechanisms of arXiv 2110.09348, rounding, dead units.

Notation:  n images, V views of each, rows z (d,);  C the covariance of all rows;  B that of the images' means;  A the
mean covariance within an image: augmentation;  S = B - A / V, what B is for infinitely many views: signal;  T = S + A,
that of a single view.  All (d, d).

The rule, in this order:

dead          a unit whose variance is zero to rounding: it is the same whatever the image.  Then, of the other units,
alive         eigenvectors of C of variance at least threshold times the largest, and above the floor;
rounding      eigenvectors of C of variance at or below the floor: nothing is known of them but that they are small;
augmentation  of the rest, as many as S - A has negative eigenvalues there: the views of an image differ more along
              them than images do, as in mechanism one (theorem 1);
implicit      as many as it has others: signal outweighs augmentation, and yet they are small.  That is what small,
              aligned singular values of layers do (theorems 2, 3): mechanism two, by elimination.

The line at S = A is a convention, for a loss that is not known.  Where a direction really dies depends on the loss: the
X = Sigma0 - Sigma1 of lemma 2 weighs S and A by softmaxes.  theory.collapse_line draws the line of a known one, which
takes the place of S = A: for the cosine it moves with the temperature.

S - A is taken at the output, where a direction was pulled through every layer.  The numbers of negative and positive
eigenvalues of M and P M P^T are the same for a square invertible P (Sylvester's law of inertia); for any linear map
they are those of the form at its input, restricted to the directions P^T u that were pulled back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from collapse import InputError
from collapse.moved import Renamed

CAUSES = ("alive", "augmentation", "implicit", "rounding", "dead")
LINE = 0.5  # of the signal fraction: there S - A changes its sign; see above


@dataclass(frozen=True)
class Attribution:
    """The directions of a layer, one a column, by cause.

    directions: (d, d) float64 unit columns: alive ones by descending variance, then the others in the order of CAUSES.
    causes: (d,) of CAUSES.  variances: (d,) of C along each.
    fractions: (d,) signal fraction S / T along each, in 0..1; NaN for rounding and dead ones.
    undecided: (d,) whether so few images leave open on which side of LINE a collapsed direction lies.

    Examples:
        >>> C, A = np.diag([1.0, 1e-4, 1e-4]), np.diag([0.1, 9e-5, 1e-5])
        >>> result = attribute(C, C - A, A, np.zeros(3, bool), floor=1e-9, threshold=1e-2, n=1000, views=2)
        >>> result.counts()
        {'alive': 1, 'augmentation': 1, 'implicit': 1, 'rounding': 0, 'dead': 0}
        >>> result.causes.tolist(), result.fractions.round(3).tolist()
        (['alive', 'implicit', 'augmentation'], [0.9, 0.9, 0.1])
    """

    directions: NDArray
    causes: NDArray
    variances: NDArray
    fractions: NDArray
    undecided: NDArray
    thin = Renamed("undecided")
    judged = Renamed("collapsed")

    def counts(self) -> dict[str, int]:
        """How many directions each cause has; together d."""
        return {cause: int((self.causes == cause).sum()) for cause in CAUSES}

    def of(self, cause: str) -> NDArray:
        """(d,) bool: the directions of a cause."""
        return self.causes == cause

    def collapsed(self) -> NDArray:
        """(d,) bool: collapsed directions whose cause is told by their signal fraction."""
        return self.of("augmentation") | self.of("implicit")


def signal_and_augmentation(total: NDArray, means: NDArray, n: int, views: int) -> tuple[NDArray, NDArray]:
    """(S, A), each (d, d), of the covariances of all n V rows and of the n means (analysis of variance).

    S is free of bias and may have negative eigenvalues where there is no signal.

    Raises InputError: not two (d, d), fewer than 2 images, or fewer than 2 views.

    Examples:
        >>> S, A = signal_and_augmentation(total=198 / 199 * np.eye(1), means=np.eye(1), n=100, views=2)
        >>> S.round(6).tolist(), abs(A).round(6).tolist()  # no view differs from the other
        ([[1.0]], [[0.0]])
    """
    if total.ndim != 2 or not total.shape == total.shape[::-1] == means.shape or n < 2 or views < 2:
        shapes = f"{total.shape} and {means.shape}"
        raise InputError(f"covariances: got shapes {shapes}, n= {n}, views= {views}; expected (d, d), and 2 of each")
    within = ((n * views - 1) * total - views * (n - 1) * means) / (n * (views - 1))
    return means - within / views, within


def attribute(
    total: NDArray,
    signal: NDArray,
    augmentation: NDArray,
    dead: NDArray,
    floor: float,
    threshold: float,
    n: int,
    views: int,
    line: float = LINE,
) -> Attribution:
    """Apply the rule above, with the line between augmentation and implicit at a signal fraction of `line`.

    total, signal, augmentation: (d, d) C, S and A.  dead: (d,) bool, constant units.  floor: variances up to it are
    rounding.  threshold: collapsed is below it times the largest variance.  n, views: for `Attribution.undecided`.

    Examples:
        >>> C, A = np.diag([1.0, 1e-4, 0]), np.diag([0.1, 9e-5, 0])
        >>> result = attribute(C, C - A, A, np.array([False, False, True]), floor=1e-9, threshold=1e-2, n=1000, views=2)
        >>> result.causes.tolist()
        ['alive', 'augmentation', 'dead']
    """
    d, live = len(total), np.flatnonzero(~dead)
    values, vectors = _descending(total[np.ix_(live, live)])
    resolved = values > floor
    alive = resolved & (values >= threshold * values.max(initial=0.0))
    collapsed = vectors[:, resolved & ~alive]
    view = (signal + augmentation)[np.ix_(live, live)]
    fractions, turned = _generalised(signal[np.ix_(live, live)], view, collapsed)
    kept = np.concatenate([vectors[:, alive], turned, vectors[:, ~resolved]], 1)
    directions = np.zeros((d, d))
    directions[live, : len(live)] = kept
    directions[np.flatnonzero(dead), np.arange(len(live), d)] = 1
    all_fractions = np.full(d, np.nan)
    first, last = alive.sum(), resolved.sum()
    all_fractions[:first] = np.einsum("ij,ij->j", vectors[:, alive], signal[np.ix_(live, live)] @ vectors[:, alive])
    all_fractions[:first] /= np.einsum("ij,ij->j", vectors[:, alive], view @ vectors[:, alive])
    all_fractions[first:last] = fractions
    causes = np.array(["alive"] * first + ["implicit"] * (last - first) + ["rounding"] * (len(live) - last)
                      + ["dead"] * (d - len(live)), dtype="<U12")  # fmt: skip
    causes[first:last][fractions < line] = "augmentation"
    is_undecided = np.zeros(d, bool)
    is_undecided[first:last] = undecided(fractions, n, views, line)
    variances = np.einsum("ij,ij->j", directions, total @ directions)
    return Attribution(directions, causes, variances, all_fractions.clip(0, 1), is_undecided)


def _descending(matrix: NDArray) -> tuple[NDArray, NDArray]:
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]


def _generalised(signal: NDArray, view: NDArray, basis: NDArray) -> tuple[NDArray, NDArray]:
    """Signal fractions (k,), descending, in the span of basis (d, k), and the unit directions (d, k) that have them.

    S g = rho T g: directions that share neither signal nor augmentation, so that each has one cause.
    """
    if basis.shape[1] == 0:
        return np.zeros(0), basis
    S, T, scale = _restricted(signal, view, basis)
    values, vectors = scipy.linalg.eigh(S, T)
    turned = basis @ (scale[:, None] * vectors[:, ::-1])
    return values[::-1], turned / np.linalg.norm(turned, axis=0)


def _restricted(signal: NDArray, view: NDArray, basis: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(S, T, scale) in the columns of basis times scale, in which T has a unit diagonal.

    Variances may span ten orders: the scaling keeps the digits of the small ones.
    """
    S, T = (basis.T @ matrix @ basis for matrix in (signal, view))
    scale = 1 / np.sqrt(T.diagonal())
    return scale[:, None] * S * scale, scale[:, None] * T * scale, scale


def signal_modes(signal: NDArray, view: NDArray, basis: NDArray) -> tuple[NDArray, NDArray]:
    """(signal fractions (k,), descending, in 0..1; shares (k,) of the variance) of the modes in the span of basis.

    basis: (d, k) orthonormal.  The modes are generalised eigenvectors g of S against T, g^T T g = 1.  z is the sum of
    T g times coefficients without correlation, of variance 1, so that a mode has |T g|^2 of the variance.

    Examples:
        >>> fractions, shares = signal_modes(np.diag([0.9, 0.3]), np.diag([1.0, 3.0]), basis=np.eye(2))  # S and T
        >>> fractions.round(3).tolist(), shares.round(3).tolist()
        ([0.9, 0.1], [0.25, 0.75])
    """
    if basis.shape[1] == 0:
        return np.zeros(0), np.zeros(0)
    S, T, scale = _restricted(signal, view, basis)
    values, vectors = scipy.linalg.eigh(S, T)
    shares = ((T @ vectors[:, ::-1] / scale[:, None]) ** 2).sum(0)
    return values[::-1].clip(0, 1), shares / shares.sum()


def undecided(fractions: NDArray, n: int, views: int, line: float = LINE) -> NDArray:
    """(k,) bool: whether the truth may lie on the other side of the line, for k directions found together in n images.

    The ratio of mean squares between and within images is 1 + V S / A.  Of k directions of white noise in n rows the
    largest and least deviations are within a factor 1 +- (sqrt k + t) / sqrt n with probability 1 - 2 e^{-t^2 / 2}
    (Davidson and Szarek 2001); t = 2.7 leaves 5 %.  Embeddings are not Gaussian, so it is a rough guard.

    Examples:
        >>> undecided(np.array([0.9, 0.5]), n=1000, views=2).tolist()
        [False, True]
    """
    k = len(fractions)
    between, within = ((math.sqrt(k) + 2.7) / math.sqrt(rows) for rows in (n - 1, n * (views - 1)))
    low = max(0.0, 1 - between) ** 2 / (1 + within) ** 2
    high = (1 + between) ** 2 / max(1e-9, 1 - within) ** 2
    inner = fractions.clip(0, 1 - 1e-12)
    ratio, at_line = (1 + views * share / (1 - share) for share in (inner, min(line, 1 - 1e-12)))
    return np.where(fractions < line, ratio >= low * at_line, ratio <= high * at_line)


def examine_map(
    weight: NDArray, signal: NDArray, augmentation: NDArray, floor: float, attribution: Attribution
) -> dict[str, Any]:
    """How the last linear map treats its input, for the directions whose cause the output does not show.

    weight: (d, h), the map; signal, augmentation: (h, h) S and A of what goes into it; floor: of its output.

    Returns medians over the "implicit" directions u, with p = weight^T u; None where there are none:
        explained: variance of the input along p over that of u: 1 where the map alone makes u, and not 1 where
            something is added to it, or what follows is not linear;
        gain: |p|^2 over its largest, the map's own singular value squared: small means the map lets little through;
        input: variance of the input along p / |p| over its largest: small means the layers before let little through;
        alignment: share of the span of the p in as many directions of least variance of the input; chance: that of
            random ones.  Theorem 2's aligned layers have small gain and input, and alignment 1.
    And of the map's right singular vectors that it lets through at or below the floor, whatever the input holds there,
    killed: how many; killed_augmentation: of them, negative eigenvalues of S - A there.

    Examples:
        >>> C, A = np.diag([1.0, 1e-4]), np.diag([0.1, 1e-5])
        >>> result = attribute(C, C - A, A, np.zeros(2, bool), floor=1e-9, threshold=1e-2, n=1000, views=2)
        >>> made = examine_map(np.diag([1.0, 1e-2]), np.diag([0.9, 0.9]), np.diag([0.1, 0.1]), 1e-9, result)
        >>> round(made["explained"], 6), round(made["gain"], 6), made["killed"]  # a map of 1 and 1e-2
        (1.0, 0.0001, 0)
    """
    inputs = signal + augmentation
    values, vectors = _descending(inputs)
    _, gains, right = np.linalg.svd(weight, full_matrices=False)
    gains = gains**2
    lost = right[gains * values[0] <= floor]
    negative = np.linalg.eigvalsh(lost @ (signal - augmentation) @ lost.T) < 0
    made = {"killed": len(lost), "killed_augmentation": int(negative.sum())}
    pulled = weight.T @ attribution.directions[:, attribution.of("implicit")]
    square = np.einsum("ij,ij->j", pulled, pulled)
    if pulled.shape[1] == 0 or not square.all() or values[0] <= 0:
        return {**dict.fromkeys(("explained", "gain", "input", "alignment", "chance")), **made}
    variance = np.einsum("ij,ij->j", pulled, inputs @ pulled)
    k = min(pulled.shape)
    span = np.linalg.svd(pulled / np.sqrt(square), full_matrices=False)[0][:, :k]
    return {
        "explained": float(np.median(variance / attribution.variances[attribution.of("implicit")])),
        "gain": float(np.median(square) / gains[0]),
        "input": float(np.median(variance / square) / values[0]),
        "alignment": float(np.linalg.norm(vectors[:, len(vectors) - k :].T @ span) ** 2 / k),
        "chance": k / len(inputs),
        **made,
    }


def augmentation_at_line(attribution: Attribution) -> Mapping[str, int]:
    """How many directions augmentation would have with the line elsewhere: is the answer the data's or the line's?

    Examples:
        >>> C, A = np.diag([1.0, 1e-4]), np.diag([0.1, 6e-5])
        >>> augmentation_at_line(attribute(C, C - A, A, np.zeros(2, bool), floor=1e-9, threshold=1e-2, n=1000, views=2))
        {'1/3': 0, '1/2': 1, '2/3': 1}
    """
    fractions = attribution.fractions[attribution.collapsed()]
    return {name: int((fractions < line).sum()) for name, line in (("1/3", 1 / 3), ("1/2", LINE), ("2/3", 2 / 3))}
