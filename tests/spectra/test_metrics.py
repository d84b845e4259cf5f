"""Rank measures: closed forms, published implementations' values, and orderings that must always hold."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits, load_iris

import collapse
from collapse import InputError, metrics, spectrum
from collapse.spectra import METRICS


def reference_inputs():
    power = np.random.default_rng(0).standard_normal((1000, 64)) / np.arange(1, 65)
    r = np.random.default_rng(1)
    low = r.standard_normal((500, 8)) @ r.standard_normal((8, 32))
    return {
        "power": power,
        "shift": power + 5.0,
        "lowrank": low,
        "wide": np.random.default_rng(2).standard_normal((40, 128)),
        "iso": np.random.default_rng(3).standard_normal((4096, 32)),
        "digits": load_digits().data.astype(float),
        "iris": load_iris().data.astype(float),
        "hada": scipy.linalg.hadamard(16).astype(float),
    }


# Values printed by effdim 0.1.1 (shannon_entropy, participation_ratio), google-research graph_embedding/metrics
# (rankme with epsilon 1e-12, stable rank of the centred rows, self-clustering), sirbastiano/RankMe EffectiveRank,
# MouseLand get_powerlaw, noncontrastive-ssl auc, p_eickhoff_isoscore, vendi-score 0.0.3, numpy matrix_rank of C.
NAMES = ["effective_rank", "participation_ratio", "stable_rank", "rankme", "rankme_centered", "auc", "numerical_rank"]
RAW = {
    "power": [4.74145592456, 2.48867032643, 1.64175434367, 28.9623740545, 28.9537740078, 0.807426307657, 64],
    "shift": [4.74145592456, 2.48867032643, 1.64175434367, 1.98382791627, 28.9537740078, 0.807426307657, 64],
    "lowrank": [7.2413242671, 6.71768758399, 4.74216895199, 7.78038650892, 7.78000130882, 0.907261251556, 8],
    "wide": [33.6568393917, 30.0385053171, 16.9062507149, 38.3736857776, 37.4472006312, 0.604559472288, 39],
    "iso": [31.8670048854, 31.7348601633, 27.4001550791, 31.9667298952, 31.9667076575, 0.528766637221, 32],
    "digits": [20.5532513628, 13.1685111701, 6.71564900589, 29.6290859208, 39.7074004473, 0.769648204847, 61],
    "iris": [1.38439301473, 1.16542577814, 1.08152687687, 1.87044355065, 2.53208834368, 0.873019686852, 4],
    "hada": [15, 15, 15, 16.0000000004, 15.0000000004, 0.5625, 15],
}
UNIT_NAMES = [*NAMES[:5], "vendi", "isoscore", "self_clustering"]
UNIT = {
    "power": [8.01741000422, 4.13865891932, 2.28158418141, 34.4278493383, 34.4219857192, 8.01955252457, 0.0498199828464,
              0.228784318356],
    "shift": [4.74087784755, 2.48853301117, 1.64177965576, 1.98384361644, 28.9746734392, 1.0094051662, 0.0236275081138,
              0.997991793345],
    "iso": [31.8768266742, 31.7544514604, 27.378720173, 31.9691675265, 31.9691591464, 31.876865593, 0.992079079368,
            5.21346544411e-06],
    "digits": [20.0865318473, 12.7739193045, 6.59506660628, 29.7900686976, 39.4979627097, 4.67761260519, 0.186887608008,
               0.475998963022],
    "hada": [15, 15, 15, 16.0000000004, 15.0000000004, 16, 0.933333333333, -0.0666666666667],
}  # fmt: skip


@pytest.mark.parametrize("method", ["covariance", "qr"])
@pytest.mark.parametrize("name", RAW)
def test_raw_rows_give_the_values_of_the_published_implementations(name, method):
    measured = spectrum(reference_inputs()[name], normalize=False, method=method).metrics()
    np.testing.assert_allclose([measured[m] for m in NAMES], RAW[name], rtol=2e-9)


@pytest.mark.parametrize("name", UNIT)
def test_unit_rows_give_the_values_of_the_published_implementations(name):
    measured = spectrum(reference_inputs()[name]).metrics()
    # The reference for the stable rank adds 1e-12 to each singular value, 6e-8 of the sum for the smallest input.
    np.testing.assert_allclose([measured[m] for m in UNIT_NAMES], UNIT[name], rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "normalize", "expected"),
    [
        ("power", False, 2.06903727231),
        ("wide", False, 1.11158273724),
        ("iso", True, 0.175015053161),
        ("digits", True, 3.69689751309),
        ("iris", True, math.nan),
    ],
)
def test_alpha_is_the_weighted_fit_of_stringer_et_al(name, normalize, expected):
    measured = spectrum(reference_inputs()[name], normalize=normalize).metrics()["alpha"]
    np.testing.assert_allclose(measured, expected, rtol=1e-8)


def test_too_few_points_give_no_exponent():
    fit = metrics.power_law(of_covariance=np.arange(1, 20.0) ** -1)
    assert math.isnan(fit.alpha)
    assert math.isnan(fit.r2)
    assert fit[2:] == (11, 19)
    assert metrics.power_law(of_covariance=np.arange(1, 21.0) ** -1).alpha == pytest.approx(1)
    assert math.isnan(metrics.self_clustering(moments=[1.0], n=5))
    assert math.isnan(metrics.self_clustering(moments=[1.0, 0.0], n=1))


def test_a_power_law_gives_its_exponent_back():
    for a in (0.5, 1.0, 2.5):
        fit = metrics.power_law(of_covariance=np.arange(1, 200.0) ** -a)
        assert fit.alpha == pytest.approx(a, abs=1e-12)
        assert fit.r2 == pytest.approx(1, abs=1e-12)
        assert (fit.first, fit.last) == (11, 100)


def test_geometric_spectra_have_their_closed_forms():
    q, k = 0.8, np.arange(400)
    values = q**k
    entropy = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    assert metrics.participation_ratio(of_covariance=values) == pytest.approx((1 + q) / (1 - q))
    assert metrics.stable_rank(of_covariance=values) == pytest.approx(1 / (1 - q))
    assert metrics.effective_rank(of_covariance=values) == pytest.approx(math.exp(entropy / (1 - q)))
    assert metrics.condition(of_covariance=values[:3]) == pytest.approx(q**2)


@given(st.integers(1, 40), st.integers(0, 40), st.floats(1e-300, 1e300))
def test_m_equal_values_among_d_are_rank_m_in_every_measure(m, zeros, value):
    values = [value] * m + [0.0] * zeros
    for measure in (metrics.effective_rank, metrics.participation_ratio, metrics.stable_rank, metrics.numerical_rank):
        assert measure(of_covariance=values) == pytest.approx(m)
    assert metrics.collapsed_dimensions(of_covariance=values) == zeros
    if m + zeros > 1:
        assert metrics.isoscore(of_covariance=values) == pytest.approx((m - 1) / (m + zeros - 1))
    assert metrics.auc(of_covariance=values, count=m) == pytest.approx(0.5 + 0.5 / m)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50).filter(lambda v: max(v) > 0))
def test_renyi_entropies_are_ordered(values):
    stable, ratio = metrics.stable_rank(of_covariance=values), metrics.participation_ratio(of_covariance=values)
    effective, flattened = metrics.effective_rank(of_covariance=values), metrics.rankme(of_rows=np.sqrt(values))
    slack = 1 + 1e-12
    assert stable * slack >= 1
    assert stable <= ratio * slack
    assert ratio <= effective * slack
    assert effective <= flattened * slack
    assert flattened <= np.count_nonzero(values) * slack


def test_complete_collapse_is_undefined_and_never_a_good_score():
    zeros = np.zeros(16)
    assert metrics.collapsed_dimensions(of_covariance=zeros) == 16
    assert metrics.numerical_rank(of_covariance=zeros) == 0
    for measure in (
        metrics.effective_rank,
        metrics.participation_ratio,
        metrics.stable_rank,
        metrics.alpha,
        metrics.auc,
        metrics.isoscore,
        metrics.condition,
    ):
        assert math.isnan(measure(of_covariance=zeros))
    constant = spectrum(np.ones((100, 16), np.float32), method="covariance")
    assert constant.metrics()["rankme"] == pytest.approx(1)
    assert constant.metrics()["collapsed_dimensions"] == 16


def test_the_threshold_counts_strictly_below_it():
    assert metrics.collapsed_dimensions(of_covariance=[1, 1e-2, 1e-4, 1e-7], threshold=1e-4) == 1
    assert metrics.collapsed_dimensions(of_covariance=[1, 1e-2, 1e-4, 1e-7], threshold=1e-3) == 2


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, -1.0], [1.0, math.nan]])
def test_what_is_no_spectrum_is_refused(bad):
    with pytest.raises(InputError, match="singular values"):
        metrics.effective_rank(of_covariance=bad)


def views():
    r = np.random.default_rng(4)
    centres = r.standard_normal((100, 1, 32)) * (np.arange(1, 33) ** -0.5)
    return (centres + 0.3 * r.standard_normal((100, 10, 32))).reshape(1000, 32)


def test_embeddings_give_the_values_of_the_published_implementations():
    inputs = {**reference_inputs(), "views": views()}
    # lightly 1.6.0 std_of_l2_normalized, align_uniform uniform_loss, google-research coherence.
    expected = {
        "power": (0.0693598571613, -2.49387092041, 1.53140476125),
        "iso": (0.176766785327, -3.75180246823, 2.2614521586),
        "lowrank": (0.173265893658, -3.00492530424, None),
        "views": (0.169968441162, -3.59285063343, 1.81071799606),
        "hada": (0.242061459138, -4, 1),
    }
    for name, (std, uniform, coherent) in expected.items():
        z = inputs[name]
        assert metrics.l2_std(z) == pytest.approx(std, rel=1e-9)
        assert metrics.uniformity(z) == pytest.approx(uniform, rel=1e-9)
        if name != "lowrank":  # whose null space the published program counts, and rounding turns
            assert metrics.coherence(z) == pytest.approx(coherent, rel=1e-9)
    z = inputs["views"].reshape(100, 10, 32)
    assert metrics.alignment(z[:, 0], z[:, 1]) == pytest.approx(0.9109637776573613, rel=1e-12)  # align_uniform
    assert metrics.uniformity(z[:, 0]) == pytest.approx(-3.632190117842122, rel=1e-12)


def test_lidar_is_that_of_stable_pretraining_whatever_the_order_of_rows():
    z, samples = views(), np.repeat(np.arange(100), 10)
    order = np.random.default_rng(0).permutation(1000)
    # stable-pretraining 0.1.8, Lightning callback, adds 1e-8 to each share.
    assert metrics.lidar(z, samples) == pytest.approx(16.870934011505543, rel=1e-7)
    assert metrics.lidar(z[order], samples[order]) == pytest.approx(metrics.lidar(z, samples), rel=1e-9)
    assert metrics.lidar(z, samples, delta=1e-6) == pytest.approx(16.869893913135563, rel=1e-7)
    for bad in (samples[:-1], np.zeros(1000), np.arange(1000), np.where(np.arange(1000) == 7, -1, samples)):
        with pytest.raises(InputError, match="lidar"):
            metrics.lidar(z, bad)


def test_lidar_takes_samples_of_unequal_numbers_of_views():
    z, rng = views(), np.random.default_rng(0)
    samples = np.sort(rng.integers(0, 100, 1000))
    groups = [z[samples == name] for name in range(100)]
    within = sum((g - g.mean(0)).T @ (g - g.mean(0)) for g in groups) / (1000 - 100)
    between = np.cov(np.array([g.mean(0) for g in groups]).T)
    assert metrics.lidar(z, samples) == pytest.approx(metrics.lidar_of(between, within), rel=1e-9)


def test_tensors_are_taken_as_they_are():
    z = views()[:50]
    for tensor, rtol in (
        (torch.tensor(z, requires_grad=True), 1e-12),
        (torch.tensor(z).bfloat16(), 0.05),
        (torch.tensor(z, dtype=torch.float32, requires_grad=True), 1e-5),
    ):
        for measure in (metrics.l2_std, metrics.uniformity, metrics.coherence):
            assert measure(tensor) == pytest.approx(measure(z), rel=rtol)
        samples = np.arange(50) // 10
        assert metrics.lidar(tensor, torch.tensor(samples)) == pytest.approx(metrics.lidar(z, samples), rel=rtol)
        assert metrics.linear_cka(tensor, tensor) == pytest.approx(1)
        s = torch.linalg.svdvals(tensor.float())
        assert metrics.rankme(of_rows=s, epsilon=1e-7) == pytest.approx(
            metrics.rankme(of_rows=s.detach().numpy(), epsilon=1e-7)
        )


def test_epps_pulley_is_that_of_lejepa():
    inputs = {**reference_inputs(), "views": views()}
    # lejepa EppsPulley().double(), mean over columns.
    expected = {"power": 383.461197318, "iso": 1.0661918485, "views": 199.95432403, "iris": 327.9762742}
    for name, value in expected.items():
        assert metrics.epps_pulley(inputs[name]).mean() == pytest.approx(value, rel=1e-7)  # its weights are float32
    # Under the hypothesis its mean is the integral of (1 - exp(-t^2)) exp(-t^2 / 2), 1.0526; 1,024 dependent slices.
    assert metrics.sigreg(inputs["iso"], seed=0) == pytest.approx(1.0526, abs=0.05)
    assert metrics.sigreg(inputs["iso"], seed=0, slices=8) == metrics.sigreg(inputs["iso"], seed=0, slices=8)


def two_embeddings():
    x = reference_inputs()["power"]
    return x, np.tanh(x[:, :32]) + 0.1 * np.random.default_rng(5).standard_normal((1000, 32))


def test_two_embeddings_compare_as_in_the_published_implementations():
    x, y = two_embeddings()
    assert metrics.linear_cka(x, y) == pytest.approx(0.87128679879941, rel=1e-12)  # ckatorch, repsim, netrep
    rho = metrics.canonical_correlations(x, y)
    np.testing.assert_allclose(rho[:3], [0.9674807889811797, 0.9573818935438083, 0.9549110735768476], rtol=1e-10)
    assert rho.mean() == pytest.approx(0.5970952433506367, rel=1e-10)  # repsim "pillai"
    assert metrics.linear_cka(x, 3 * x + 1) == pytest.approx(1)
    with pytest.raises(InputError, match="same samples"):
        metrics.linear_cka(x, y[:-1])


def test_rankme_with_the_epsilons_of_others_gives_their_values():
    s = np.linalg.svd(reference_inputs()["power"], compute_uv=False)
    assert metrics.rankme(of_rows=s, epsilon=1e-7) == pytest.approx(
        28.963, abs=1e-3
    )  # stable-pretraining's jax callback
    assert metrics.rankme(of_rows=s, epsilon=1e-5) == pytest.approx(
        29.0324219548, rel=1e-10
    )  # and its Lightning callback


# noise_var_ of scikit-dimension 0.5.0 lPCA(ver="MP"), the edges in units of it, and how many values lie above.
NOISE = {
    "iso": (0.9909261413435803, 0.8310161293792622, 1.1846126862495532, 0),
    "wide": (1.018676117016869, 0.6587647727885757, 7.90533779131399, 0),
    "power": (0.0009474192375626682, 0.5578464663293979, 1.57028166179873, 26),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_what_scikit_dimension_finds(name):
    z = reference_inputs()[name]
    variance, low, high, above = NOISE[name]
    s = spectrum(z, normalize=False)
    np.testing.assert_allclose(metrics.marchenko_pastur_edges(*z.shape), (low, high), rtol=1e-12)
    assert metrics.noise_variance(of_covariance=s.singular_values, n=len(z)) == pytest.approx(variance, rel=1e-10)
    assert s.metrics()["mp_edge"] == pytest.approx(variance * high, rel=1e-10)
    assert s.metrics()["above_edge"] == above
    x = np.linspace(0, 1.1 * high, 200_001)
    mass = metrics.marchenko_pastur_density(x * variance, *z.shape, variance).sum() * (x[1] - x[0]) * variance
    assert mass == pytest.approx(1, abs=1e-4)  # of square roots at both edges, on a grid of 1e-5
    assert metrics.above_edge(of_covariance=np.append(s.singular_values[:-1], 0), n=len(z), variance=1e9) == 0
    assert math.isnan(metrics.noise_variance(of_covariance=np.zeros(5), n=10))


def test_the_options_are_what_other_packages_print():
    s = spectrum(reference_inputs()["power"])
    unit = s.moments
    assert metrics.vendi(moments=unit, order=2) == pytest.approx(
        4.13918028788, rel=1e-11
    )  # vendi-score 0.0.3, q = 2 and inf
    assert metrics.vendi(moments=unit, order=math.inf) == pytest.approx(2.2816316031, rel=1e-10)
    raw = spectrum(reference_inputs()["power"], normalize=False).singular_values
    assert metrics.auc(of_covariance=raw, power=2) == pytest.approx(
        0.970001759897, rel=1e-11
    )  # noncontrastive-ssl of c_k^2
    x, y = two_embeddings()
    assert metrics.linear_cka(x, y, unbiased=True) == pytest.approx(0.8715369620038519, rel=1e-12)  # ckatorch


def test_directions_that_two_embeddings_share():
    power = reference_inputs()["power"]
    halves = [spectrum(half, normalize=False, vectors=True) for half in (power[:500], power[500:])]
    tops = [np.linalg.svd(half - half.mean(0), full_matrices=False)[2][:5] for half in (power[:500], power[500:])]
    cosines = np.linalg.svd(tops[0] @ tops[1].T, compute_uv=False)  # Bjorck and Golub 1973
    found = metrics.principal_angles(halves[0].vectors[:, :5], halves[1].vectors[:, :5])
    np.testing.assert_allclose(np.cos(found), cosines[::-1], rtol=1e-12)
    near = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 9)))[0]
    tilted = near[:, :4] + 1e-9 * near[:, 4:8]  # columns of a length that is not quite 1
    exact = [np.pi / 2, np.pi / 2, 1e-9, 0]  # scipy gives 2e-8 for the last two
    np.testing.assert_allclose(metrics.principal_angles(tilted * 3, near[:, 2:7]), exact, atol=1e-14, rtol=1e-6)
    for first, second in ((near, tilted), (power[:64, :5], np.eye(64)[:, :3])):
        theirs = scipy.linalg.subspace_angles(first, second)
        np.testing.assert_allclose(metrics.principal_angles(first, second), theirs, rtol=1e-6, atol=1e-14)
    a, b = halves
    within = metrics.variance_within(a.singular_values, a.vectors, b.vectors)
    C, total = np.cov(power[:500].T), a.singular_values.sum()
    direct = [np.trace(b.vectors[:, :k].T @ C @ b.vectors[:, :k]) / total for k in (1, 7, 64)]
    np.testing.assert_allclose(within[[0, 6, 63]], direct, rtol=1e-12)
    own = metrics.variance_within(a.singular_values, a.vectors, a.vectors)
    np.testing.assert_allclose(own, np.cumsum(a.singular_values) / total, rtol=1e-12)
    with pytest.raises(InputError, match="directions"):
        metrics.variance_within(a.singular_values[:3], a.vectors, b.vectors)
    with pytest.raises(InputError, match="directions"):
        metrics.principal_angles(a.vectors[:3], b.vectors)


def test_a_projection_explains_what_it_keeps():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) * [3, 2, 1, 1, 1, 1]
    explained = metrics.explained_variance(x, np.hstack([x[:, :2] @ rng.standard_normal((2, 2)), np.zeros((400, 1))]))
    centred = x - x.mean(0)
    fit = np.linalg.lstsq(centred[:, :2], centred, rcond=None)[0]
    assert explained[1] == pytest.approx((centred[:, :2] @ fit).var() / centred.var(), rel=1e-10)
    assert explained[2] == explained[1]  # a constant column explains nothing
    np.testing.assert_allclose(metrics.explained_variance(x, x)[-1], 1, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((0, 3)), [[math.inf]]])
def test_what_are_no_embeddings_is_refused(bad):
    with pytest.raises(InputError, match="embeddings"):
        metrics.coherence(bad)


def test_a_measure_takes_a_spectrum_or_says_by_keyword_what_it_wants():
    z = reference_inputs()["power"]
    s = spectrum(z, threshold=1e-2)
    named = [name for name in METRICS if hasattr(metrics, name)]
    assert len(named) == 14
    for name in named:
        np.testing.assert_equal(getattr(metrics, name)(s), s.metrics()[name])
    singular_values = np.linalg.svd(z / np.linalg.norm(z, axis=1, keepdims=True), compute_uv=False)
    assert metrics.rankme(of_rows=singular_values) == pytest.approx(s.rankme, rel=1e-9)
    with pytest.warns(DeprecationWarning, match=r"rankme: give a Spectrum, or of_rows="):
        metrics.rankme(s.singular_values)
    assert metrics.collapsed_dimensions(s, 1e-3) == s.metrics()["collapsed_dimensions_1e-03"]
    with pytest.raises(TypeError, match="of_covariance"):
        metrics.rankme(of_covariance=s.singular_values)
    with pytest.raises(InputError, match="normalize=True"):
        metrics.vendi(spectrum(z, normalize=False))


def test_more_arguments_than_a_measure_takes_are_refused():
    s = collapse.spectrum(np.random.default_rng(0).standard_normal((50, 4)))
    with pytest.raises(TypeError, match="effective_rank: 1 arguments behind the Spectrum, at most 0"):
        collapse.metrics.effective_rank(s, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.l2_std([[1.0, 2]]),
        lambda: metrics.uniformity([[1.0, 2]]),
        lambda: metrics.linear_cka(np.ones((5, 2)), np.eye(5)),
        lambda: metrics.linear_cka(np.eye(3), np.eye(3), unbiased=True),
        lambda: metrics.linear_cka(np.ones((5, 2)), np.eye(5), unbiased=True),
        lambda: metrics.explained_variance(np.ones((5, 2)), np.eye(5)).max(),
        lambda: metrics.variance_within([0, 0], np.eye(2), np.eye(2)).max(),
    ],
)
def test_what_is_undefined_is_nan_without_a_warning(call):
    assert math.isnan(call())
