"""The accumulators against an SVD of all rows, which never forms a covariance."""

import io
import json
import math
from datetime import timedelta

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from collapse import Covariance, InputError, Spectrum, spectrum

EPS = np.finfo(np.float64).eps


def reference(z):
    """Singular values of the covariance from those of the centred rows."""
    values = np.zeros(z.shape[1])
    found = np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2 / (len(z) - 1)
    values[: len(found)] = found
    return values


def bound(z, shift):
    """Absolute error of an eigenvalue of a float64 covariance: of its sums, and of centring rows that lie far off."""
    n, d = z.shape
    largest = reference(z)[0]
    return 8 * n * d * EPS * (largest + abs(shift) * math.sqrt(largest) + EPS * shift**2) + 1e-300


def rows(seed, n, d, shift):
    return np.random.default_rng(seed).standard_normal((n, d)) / np.arange(1, d + 1) + shift


shards = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2)


@given(shards, st.integers(1, 12), st.sampled_from([0.0, 1.0, 1e6]), st.integers(0, 2**32 - 1), st.booleans())
@pytest.mark.parametrize("method", ["covariance", "qr"])
@settings(max_examples=60, deadline=None)
def test_any_shards_in_any_order_merge_to_the_spectrum_of_the_whole(method, sizes, d, shift, seed, as_tree):
    z = rows(seed, sum(sizes), d, shift)
    parts = [Covariance(d, method, False) for _ in sizes]
    for part, shard in zip(parts, np.split(z, np.cumsum(sizes)[:-1]), strict=True):
        for batch in np.array_split(shard, 3):
            part.update(batch)
    order = np.random.default_rng(seed).permutation(len(parts))
    total = Covariance(d, method, False)
    if as_tree and len(parts) > 1:
        parts[order[0]].merge(parts[order[1]])
        order = np.delete(order, 1)
    for index in order:
        total.merge(parts[index])
    result = total.spectrum()
    assert result.n == len(z)
    np.testing.assert_allclose(result.singular_values, reference(z), rtol=0, atol=bound(z, shift))
    moments = np.zeros(d)
    found = np.linalg.svd(z, compute_uv=False) ** 2 / len(z)
    moments[: len(found)] = found
    np.testing.assert_allclose(result.moments, moments, rtol=0, atol=8 * len(z) * d * EPS * moments[0])


def test_qr_keeps_what_a_covariance_loses():
    d, n = 24, 2000
    s = np.logspace(0, -11, d)
    z = np.linalg.qr(np.random.default_rng(0).standard_normal((n, d)))[0]
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.qr(z - z.mean(0))[1]) * s @ ortho_group.rvs(d, random_state=1)
    truth = s**2 / (n - 1)
    qr = spectrum(z, normalize=False, method="qr")
    covariance = spectrum(z, normalize=False, method="covariance")
    # Householder QR is backward stable: an absolute error of a few d eps |Z| in each singular value of Z.
    error = np.abs(np.sqrt(qr.singular_values) - np.sqrt(truth))
    assert (error < 4 * d * EPS * math.sqrt(truth[0])).all()
    assert abs(covariance.singular_values[-1] / truth[-1] - 1) > 0.9
    assert qr.floor < truth[-1] < covariance.floor


@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_the_floor_separates_data_from_rounding(method):
    truth = np.random.default_rng(1).standard_normal((500, 8)) @ np.random.default_rng(2).standard_normal((8, 32))
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        s = spectrum(torch.tensor(truth).to(dtype), normalize=False, method=method)
        assert (s.singular_values[8:] < s.floor).all(), dtype
        assert s.singular_values[7] > 1e3 * s.floor, dtype
        assert s.metrics()["numerical_rank"] == 8


def test_the_floor_is_what_the_docstrings_say():
    z = rows(0, 9, 4, 2.0)
    values, moments = reference(z), np.linalg.svd(z, compute_uv=False) ** 2
    # 2 sqrt(d) eps of the largest eigenvalue of the scatter; (d eps)^2 of the sum of squares for qr.
    for method, rounding in (
        ("covariance", 2 * math.sqrt(4) * EPS * values[0] * 8),
        ("qr", (4 * EPS) ** 2 * moments.sum()),
    ):
        assert spectrum(z, normalize=False, method=method).floor == pytest.approx(rounding / 8, rel=1e-12, abs=0)
    z = z.astype(np.float32)
    column = (z.astype(float) ** 2).mean(0).max()
    stored = (2**-24) ** 2 * column / 3 * (1 + math.sqrt(4 / 8)) ** 2
    assert spectrum(z, normalize=False, method="qr").floor == pytest.approx(stored, rel=1e-12, abs=0)


def test_the_dtype_floor_is_the_rounding_it_makes_to_a_small_factor():
    z = np.random.default_rng(0).standard_normal((4000, 16))
    for dtype, name in ((np.float16, "float16"), (np.float32, "float32")):
        noise = reference(z.astype(dtype) - z)[0]
        floor = spectrum(z.astype(dtype), normalize=False, method="qr").floor
        assert noise < floor < 4 * noise, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
def test_tensors_and_arrays_of_the_same_numbers_give_the_same(dtype):
    z = (8 * torch.randn(300, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    from_tensor = spectrum(z, method="covariance")
    from_array = spectrum(z.double().numpy(), method="covariance")
    on_device = Covariance(7, device="cpu").update(z).spectrum()
    np.testing.assert_array_equal(from_tensor.singular_values, from_array.singular_values)
    np.testing.assert_allclose(on_device.singular_values, from_array.singular_values, rtol=1e-12)


def test_float32_rows_are_accumulated_in_float64_on_a_device_too():
    z = rows(0, 300, 7, 50.0).astype(np.float32)
    exact = reference(z.astype(np.float64))
    for batch in (z, torch.tensor(z)):
        for device in (None, "cpu"):
            found = Covariance(7, normalize=False, device=device).update(batch).spectrum().singular_values
            np.testing.assert_allclose(found, exact, rtol=0, atol=bound(z, 50.0))


@pytest.mark.parametrize("method", ["covariance", "qr"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_saved_accumulator_goes_on(method, device):
    z = rows(0, 90, 5, 1.0)
    z[3] = 0
    whole, first = (Covariance(5, method, True, device) for _ in range(2))
    whole.update(z[:40]).update(z[40:])
    file = io.BytesIO()
    torch.save(first.update(z[:40]).state_dict(), file)
    first.update(z[:7])  # what is saved is a copy
    again = Covariance.from_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert (again.device, again.zero_rows) == (device, 1)
    assert again.update(z[40:]).spectrum().to_json() == whole.spectrum().to_json()


def test_shards_add_up_their_zero_rows():
    z = rows(0, 30, 4, 0.0)
    z[[2, 20, 21]] = 0
    parts = [Covariance(4).update(part) for part in (z[:10], z[10:])]
    assert parts[0].merge(parts[1]).zero_rows == 3
    assert parts[1].zero_rows == 2


def test_one_process_alone_joins_with_itself(tmp_path):
    from torch import distributed

    z = rows(0, 30, 4, 2.0)
    z[3] = 0
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    for method in ("covariance", "qr"):
        for device in (None, "cpu"):
            total = Covariance(4, method, True, device).update(z)
            before = total.spectrum()
            joined = total.all_reduce().spectrum()
            np.testing.assert_allclose(joined.singular_values, before.singular_values, rtol=1e-12)
            assert (joined.n, joined.floor) == (30, pytest.approx(before.floor, rel=1e-12, abs=0))
            assert total.zero_rows == 1
    distributed.destroy_process_group()


def test_vectors_are_kept_only_if_asked_for():
    z = rows(0, 30, 4, 2.0)
    assert spectrum(z).vectors is None
    assert spectrum(z, rounding=1e-9 * z[:5]).vectors is None
    assert spectrum(z, vectors=True).vectors.shape == (4, 4)


def test_a_device_accumulates_by_qr_as_numpy_does():
    z = rows(0, 200, 9, 3.0)
    on_device = (
        Covariance(9, "qr", False, device="cpu")
        .update(z[:50])
        .merge(Covariance(9, "qr", False, device="cpu").update(z[50:]))
    )
    np.testing.assert_allclose(on_device.spectrum().singular_values, reference(z), rtol=1e-10)


def test_rows_are_normalised_unless_asked_not_to():
    z = rows(1, 100, 6, 0.0)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(spectrum(z).singular_values, reference(unit), rtol=1e-12)
    np.testing.assert_allclose(spectrum(z, normalize=False).singular_values, reference(z), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_normalisation_survives_extreme_scales(scale):
    z = rows(2, 100, 6, 0.0)
    np.testing.assert_allclose(spectrum(z * scale).singular_values, spectrum(z).singular_values, rtol=1e-10)


def test_zero_rows_stay_zero_and_are_counted():
    z = rows(3, 50, 4, 0.0)
    z[[3, 7]] = 0
    result = spectrum(z)
    assert any("2 of 50 rows are zero" in note for note in result.warnings)


def test_auto_takes_qr_for_float64_only():
    z = rows(4, 30, 3, 0.0)
    assert spectrum(z).method == "qr"
    assert spectrum(z.astype(np.float32)).method == "covariance"
    assert spectrum(torch.tensor(z)).method == "qr"
    assert any("qr" in note for note in spectrum(z).warnings)


def test_an_iterable_of_batches_is_the_whole():
    z = rows(5, 90, 5, 1.0)
    parts = (torch.tensor(part) for part in np.split(z, 9))
    np.testing.assert_allclose(spectrum(parts).singular_values, spectrum(z).singular_values, rtol=1e-9)
    np.testing.assert_allclose(spectrum(z.tolist()).singular_values, spectrum(z).singular_values, rtol=1e-9)


@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_a_bad_batch_is_refused_and_changes_nothing(method):
    z = rows(6, 40, 5, 0.0)
    total = Covariance(5, method).update(z)
    before = total.spectrum().singular_values
    nan = z.copy()
    nan[3, 2] = math.nan
    bad = [nan, z[:, :4], z[0], z + 1j, z > 0, np.array(["a"]), torch.tensor(z).to_sparse(), np.where(z > 1, np.inf, z)]
    for batch in bad:
        with pytest.raises(InputError, match="embeddings"):
            total.update(batch)
    with pytest.raises(InputError, match="row 43, column 2"):
        total.update(nan)
    total.update(z[:0])
    assert total.n == 40
    np.testing.assert_array_equal(total.spectrum().singular_values, before)


def test_an_overflow_is_said_and_changes_nothing():
    total = Covariance(2, normalize=False).update([[1.0, 2.0], [3.0, 5.0]])
    with pytest.raises(InputError, match="overflow"):
        total.update([[1e200, 0.0], [-1e200, 0.0]])
    assert total.n == 2


@pytest.mark.parametrize("z", [np.zeros((0, 3)), np.zeros((1, 3)), iter([]), np.zeros(3), np.zeros((2, 3, 4))])
def test_too_few_rows_or_another_shape_is_refused(z):
    with pytest.raises(InputError):
        spectrum(z)


def test_fewer_rows_than_dimensions_is_answered_with_a_warning():
    result = spectrum(rows(7, 10, 30, 0.0))
    assert result.singular_values.shape == (30,)
    assert (result.singular_values[9:] <= result.floor).all()
    assert result.metrics()["numerical_rank"] == 9
    assert any("at most 9" in note for note in result.warnings)


def test_accumulators_of_different_kinds_do_not_merge():
    for other in (Covariance(4), Covariance(3, "qr"), Covariance(3, normalize=False)):
        with pytest.raises(InputError, match="merge"):
            Covariance(3).merge(other)
    for arguments in ((0,), (3, "svd")):
        with pytest.raises(InputError):
            Covariance(*arguments)
    with pytest.raises(InputError, match="method"):
        spectrum(np.eye(3), method="svd")


def test_json_is_strict_and_comes_back_the_same():
    for z in (rows(8, 60, 5, 0.0), np.ones((10, 4))):
        result = spectrum(z)
        text = result.to_json()
        document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert document["schema"] == "collapse.spectrum/1"
        source = {"kind", "path", "sha256", "architecture", "branch", "layer", "keys", "preprocessing", "foreign"}
        assert document["source"].keys() == source | {"warnings"}
        assert document["dim"] == z.shape[1] == len(document["singular_values"])
        again = Spectrum.from_json(text)
        assert again.to_json() == text
    assert document["metrics"]["effective_rank"] is None
    assert any("undefined" in note for note in document["source"]["warnings"])
    for text in ("{}", "not json", '{"schema": "other/1"}', "[1]"):
        with pytest.raises(InputError):
            Spectrum.from_json(text)


def test_a_plot_draws_the_natural_logarithm_and_the_floor():
    result = spectrum(rows(9, 40, 60, 0.0), method="covariance")
    ax = result.plot()
    drawn = ax.lines[0].get_ydata()
    positive = result.singular_values[result.singular_values > 0]
    np.testing.assert_allclose(drawn, np.log(positive))
    assert "rounding" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert result.plot(ax) is ax


def _one_process(rank, processes, store, method, shares, out):
    from torch import distributed

    distributed.init_process_group(
        "gloo", f"file://{store}", timeout=timedelta(seconds=120), rank=rank, world_size=processes
    )
    z = rows(11, sum(shares), 6, 3.0).astype(np.float32 if rank == 1 else np.float64)
    z[0] = 0
    mine = np.split(z, np.cumsum(shares)[:-1])[rank]
    result = Covariance(6, method).update(mine).all_reduce().spectrum()
    (out / f"{rank}.json").write_text(result.to_json())
    distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["covariance", "qr"])
@pytest.mark.parametrize("shares", [(30, 21), (40, 0, 7, 25)])
def test_processes_join_to_the_spectrum_of_all_rows_even_one_without_rows(tmp_path, method, shares):
    given = (len(shares), tmp_path / "store", method, shares, tmp_path)
    torch.multiprocessing.start_processes(_one_process, given, len(shares), start_method="fork")
    z = rows(11, sum(shares), 6, 3.0)
    z[0] = 0
    alone = Covariance(6, method).update(z).spectrum()
    for rank in range(len(shares)):
        joined = Spectrum.from_json((tmp_path / f"{rank}.json").read_text())
        assert joined.n == alone.n
        # The second process holds its rows in float32, unless it has none: 2^-24 relative, and a floor that says so.
        rtol = 1e-6 if shares[1] else 1e-12
        np.testing.assert_allclose(joined.singular_values, alone.singular_values, rtol=rtol)
        np.testing.assert_allclose(joined.moments, alone.moments, rtol=rtol)
        if shares[1]:
            assert joined.floor > 2 * alone.floor
        else:
            assert joined.floor == pytest.approx(alone.floor, rel=1e-12, abs=0)
        assert any("1 of" in note for note in joined.warnings)


def test_qr_is_right_to_1e_6_at_1e_11_of_the_largest_whatever_the_mean_and_the_blocks():
    mpmath.mp.dps = 50
    d, n = 8, 200
    for seed, mean in ((0, 0.0), (1, 1.0)):
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((n, d)) * np.logspace(0, -11, d) @ ortho_group.rvs(d, random_state=seed) + mean
        exact = mpmath.matrix(z.tolist())
        means = [mpmath.fsum(exact[i, j] for i in range(n)) / n for j in range(d)]
        columns = [[exact[i, j] - means[j] for i in range(n)] for j in range(d)]
        gram = mpmath.matrix(d, d)
        for a in range(d):
            for b in range(d):
                gram[a, b] = mpmath.fdot(columns[a], columns[b])
        truth = [float(mpmath.sqrt(value / (n - 1))) for value in mpmath.eigsy(gram, eigvals_only=True)][::-1]
        total = Covariance(d, "qr", False)
        for block in np.array_split(z, 7):
            total.update(block)
        np.testing.assert_allclose(np.sqrt(total.spectrum().singular_values), truth, rtol=1e-6)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_the_matrix_and_the_constant_columns_are_those_of_the_rows(method, device):
    rng = np.random.default_rng(0)
    z = (rng.standard_normal((300, 8)) * np.geomspace(1, 1e-3, 8) + rng.uniform(-50, 50, 8)).astype(np.float32)
    z[:, 2], z[:, 5] = 0, 1234.5678
    z[:, 6] = np.float32(7) * (1 + 1e-7 * rng.standard_normal(300)).astype(np.float32)  # rounding of a constant
    total = Covariance(8, method, False, device=device)
    for part in np.array_split(z, 7):
        total.update(part)
    expected = np.cov(z.T.astype(np.float64))
    np.testing.assert_allclose(total.matrix(), expected, atol=1e-12 * 50**2)
    np.testing.assert_array_equal(np.flatnonzero(total.constant()), [2, 5, 6])
    noisy = np.zeros((4, 8))
    noisy[:, 7] = 1.0  # errors as large as what a column holds make it a constant too
    np.testing.assert_array_equal(np.flatnonzero(total.constant(noisy)), [2, 5, 6, 7])
    with pytest.raises(InputError, match="at least 2"):
        Covariance(8).matrix()


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_come_in_tiles_and_stay_as_they_are(normalize):
    """Five tiles at once: the mean drifts with the rows; and a row far from the others comes alone, before them."""
    z = np.random.default_rng(0).standard_normal((2100, 120)).astype(np.float32)
    rounding = 2 * math.sqrt(120) * EPS  # of the largest, as the floor says
    drift, outlier = z + np.linspace(0, 1e4, len(z), dtype=np.float32)[:, None], z.copy()
    outlier[0] = 1e7
    for rows_, cut in ((drift, 0), (drift, 700), (outlier, 1)):
        kept = rows_.copy()
        total = Covariance(120, normalize=normalize).update(rows_[:cut]).update(rows_[cut:])
        np.testing.assert_array_equal(rows_, kept)
        exact = rows_.astype(np.float64)
        if normalize:
            exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        values = np.linalg.svd(exact - exact.mean(0), compute_uv=False) ** 2 / (len(z) - 1)
        np.testing.assert_allclose(total.spectrum().singular_values, values, rtol=0, atol=rounding * values[0])
