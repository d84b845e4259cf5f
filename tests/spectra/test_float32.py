"""Covariances by float32 products: every value is right to the floor, which lies where the rounding does."""

import io
import threading

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import ortho_group
from torch import distributed

from collapse import Covariance, InputError, Monitor, Spectrum, cli, compare, spectrum
from collapse.spectra import accumulators, covariance, streams

U = 2.0**-24


@pytest.fixture
def small_products(monkeypatch):
    """Products of 16 rows, so that there are many, and some rows wait."""
    for module in (accumulators, covariance, streams):
        monkeypatch.setattr(module, "tile32", lambda dim: 16)


def rows(n, d, seed=0, shift=0.5):
    z = np.random.default_rng(seed).standard_normal((n, d)) / np.arange(1, d + 1) + shift
    return z.astype(np.float32)


def exact(z, normalize=False):
    """Singular values of the covariance, float64, of rows that are float32."""
    z = z.astype(np.float64)
    if normalize:
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    return np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2 / (len(z) - 1)


def measured(z, normalize=False, device=None, cuts=()):
    total = Covariance(z.shape[1], "float32", normalize, device)
    for part in np.split(z, cuts):
        total.update(part)
    return total.measured()


def hard(n, d):
    """Rows of many kinds, by name; those of few values round alike, not independently."""
    rng = np.random.default_rng(0)
    g, few = rng.standard_normal((n, d)), rng.standard_normal((5, d))
    outlier = g.copy()
    outlier[n // 2] = 1e4
    return {
        "white": g,
        "low rank": rng.standard_normal((n, d // 4)) @ rng.standard_normal((d // 4, d)),
        "far off": g + 100,
        "drift": g + np.linspace(0, 1e3, n)[:, None],
        "growing": g * np.geomspace(1, 1e3, n)[:, None],
        "outlier": outlier,
        "heavy": rng.standard_t(2, (n, d)),
        "one direction": g[:, :1] + 1e-3 * g,
        "sparse": np.maximum(g - 2, 0),
        "two values": np.where(g > 0, 1.1, -1.1),
        "five rows": few[np.sort(rng.integers(0, 5, n))],
    }


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_every_small_value_is_right_to_the_floor_and_every_large_one_to_two(normalize, device):
    for name, z in hard(5000, 48).items():
        z = z.astype(np.float32)
        found, truth = measured(z, normalize, device), exact(z, normalize)
        error = np.abs(found.singular_values - truth)
        assert error.max() < 2 * found.floor, name
        assert (error[truth < 1e-3 * truth[0]] < found.floor).all(), name
        assert found.floor < 4e-6 * truth[0], name


def test_the_floor_falls_with_the_number_of_products_as_the_rounding_does():
    errors, floors = [], []
    for n in (1024, 65_536):
        z = np.random.default_rng(0).standard_normal((n, 24)).astype(np.float32)
        found, truth = measured(z), exact(z)
        errors.append(np.sqrt(((found.singular_values / truth - 1) ** 2).mean()))
        floors.append(found.floor / truth[0])
    assert floors[0] / floors[1] == pytest.approx(8, rel=0.15)
    assert errors[0] / errors[1] > 3
    assert all(error < floor < 300 * error for error, floor in zip(errors, floors, strict=True))


def test_the_floor_is_what_the_docstring_says():
    z = rows(700, 5, shift=0)
    centred = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    scatter = centred.T @ centred
    values, column = np.linalg.eigvalsh(scatter), scatter.diagonal().max()
    products = 8 * U * np.sqrt(column * (700 * values[-1] / 3 + values.sum() / 2) / 3)
    assert measured(z).floor == pytest.approx(products / 699, rel=1e-4)
    two = Covariance(5, "float32", False).update(z).merge(Covariance(5, "float32", False).update(z))
    products = 8 * U * np.sqrt(column * (1024 * 2 * values[-1] / 3 + 2 * values.sum() / 2) / 3)
    assert two.measured().floor == pytest.approx(products / 1399, rel=1e-4)
    # Rows far off zero round where they are stored, and where their mean is taken off.
    far = measured(z + np.float32(1e6))
    column = ((z.astype(np.float64) + 1e6) ** 2).mean(0).max()
    assert far.floor == pytest.approx(U**2 * column * (1 + np.sqrt(5 / 699)) ** 2, rel=1e-3)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_known_spectrum_comes_back_down_to_the_floor(device):
    """Columns of a Hadamard matrix are centred and orthogonal, so the values are those chosen, up to storage."""
    n, d = 4096, 64
    truth = np.geomspace(1, 1e-9, d)
    z = (hadamard(n)[:, 1 : d + 1] * np.sqrt(truth * (n - 1) / n)) @ ortho_group.rvs(d, random_state=0)
    found = measured(z.astype(np.float32), device=device)
    np.testing.assert_allclose(found.singular_values, truth, rtol=1e-6, atol=found.floor)
    assert 1e-9 < found.floor < 1e-6
    above = truth > 3 * found.floor
    np.testing.assert_allclose(found.singular_values[above], truth[above], rtol=0.35)
    assert (found.singular_values[truth < 0.1 * found.floor] < found.floor).all()
    assert found.numerical_rank == (found.singular_values > found.floor).sum() < d


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_batches_of_any_size_and_shards_give_the_whole(small_products, normalize, device):
    z = rows(211, 7)
    z[[3, 120]] = 0
    known = Covariance(7, "covariance", normalize).update(z).measured(vectors=True)
    for cuts in ([], [1], [1, 16, 61, 150], [40]):
        found = measured(z, normalize, device, cuts)
        shards = [Covariance(7, "float32", normalize, device).update(part) for part in np.split(z, cuts)]
        joined = shards[0]
        for shard in shards[1:]:
            joined.merge(shard)
        for one in (found, joined.measured(vectors=True)):
            assert (one.n, one.method) == (211, "float32")
            np.testing.assert_allclose(one.singular_values, known.singular_values, atol=one.floor)
            np.testing.assert_allclose(one.moments, known.moments, atol=one.floor)
            assert [note for note in one.warnings if "zero" in note] == known.warnings
        np.testing.assert_allclose(np.abs(joined.measured(vectors=True).vectors), np.abs(known.vectors), atol=1e-4)
        np.testing.assert_allclose(joined.matrix(), np.cov((z / norms(z) if normalize else z).T), atol=found.floor)


def norms(z):
    return np.maximum(np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True), 1e-300)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_processes_join_their_products(monkeypatch, small_products, device):
    """Threads for processes: each adds what the other has, of every tensor in turn."""
    held, barrier, place = {}, threading.Barrier(2), threading.local()

    def all_reduce(tensor, op=distributed.ReduceOp.SUM):
        held[place.rank] = tensor.clone()
        barrier.wait(60)
        made = torch.stack([held[0], held[1]])
        barrier.wait(60)
        tensor.copy_(made.amax(0) if op == distributed.ReduceOp.MAX else made.sum(0))

    def act(rank):
        place.rank = rank
        found[rank] = parts[rank].all_reduce().measured()

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    z, found = rows(90, 6), {}
    parts = [Covariance(6, "float32", True, device).update(part) for part in np.split(z, [35])]
    whole = Covariance.from_state_dict(parts[0].state_dict()).merge(Covariance.from_state_dict(parts[1].state_dict()))
    threads = [threading.Thread(target=act, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in (0, 1):
        assert found[rank].n == 90
        np.testing.assert_allclose(found[rank].singular_values, whole.measured().singular_values, rtol=1e-9)
        assert found[rank].floor == pytest.approx(whole.measured().floor, rel=0.02)  # about another mean


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_saved_accumulator_goes_on(small_products, device):
    z = rows(90, 5)
    whole, first = (Covariance(5, "float32", True, device) for _ in range(2))
    whole.update(z[:40]).update(z[40:])
    file = io.BytesIO()
    torch.save(first.update(z[:40]).state_dict(), file)
    first.update(z[:7])  # what is saved is a copy
    again = Covariance.from_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert again.n == 40
    assert again.update(z[40:]).measured().to_json() == whole.measured().to_json()


def test_float64_rows_are_refused_and_coarser_ones_are_not(tmp_path, capsys):
    z = rows(50, 4)
    for batch in (z.astype(np.float64), torch.tensor(z).double(), z.tolist()):
        for device in (None, "cpu"):
            with pytest.raises(InputError, match="float64 rows, which method float32 would round; give covariance or"):
                Covariance(4, "float32", device=device).update(batch)
    half = z.astype(np.float16)
    for batch in (half, torch.tensor(half), torch.tensor(half).bfloat16(), (100 * z).astype(np.int16)):
        rows64 = batch.double().numpy() if isinstance(batch, torch.Tensor) else batch.astype(np.float64)
        found = spectrum(batch, method="float32")
        np.testing.assert_allclose(found.singular_values, exact(rows64, True), atol=2 * found.floor)
    np.save(tmp_path / "z.npy", z.astype(np.float64))
    assert cli.main(["spectrum", str(tmp_path / "z.npy"), "--method", "float32"]) == 2
    assert "float64 rows" in capsys.readouterr().err


@pytest.mark.parametrize("device", [None, "cpu"])
def test_rows_that_float32_cannot_square_are_refused_or_normalised(device):
    z = rows(60, 4)
    for scale, word in ((1e16, "overflow float32"), (1e-14, "vanish in float32")):
        scaled = z * np.float32(scale)
        with pytest.raises(InputError, match=word):
            Covariance(4, "float32", False, device).update(scaled).measured()
    for scale in (1e-30, 1e30):
        found, wanted = (measured(rows, True, device) for rows in (z * np.float32(scale), z))
        np.testing.assert_allclose(found.singular_values, wanted.singular_values, atol=wanted.floor)
    z[17, 2] = np.nan
    total = Covariance(4, "float32", True, device)
    with pytest.raises(InputError, match="row 17"):
        total.update(z).measured()
    assert device or total.n == 0


def test_a_result_is_saved_loaded_and_compared(tmp_path):
    z = np.eye(64, dtype=np.float32)[np.sort(np.random.default_rng(0).integers(0, 64, 9000))]  # all rounding alike
    found = spectrum(z, method="float32", vectors=True, jackknife=4)
    found.save(tmp_path / "s.json")
    assert Spectrum.load(tmp_path / "s.json") == found
    both = compare({"fast": found, "slow": spectrum(z, method="covariance", vectors=True)})
    assert both.rows[0]["effective_rank"] == pytest.approx(both.rows[1]["effective_rank"], rel=1e-5)


def test_a_monitor_watches_by_it():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 8)
    reports = []
    for method in ("covariance", "float32"):
        torch.manual_seed(1)
        monitor = Monitor(net, every=3, method=method, verbose=False)
        for _ in range(6):
            net(torch.rand(40, 3))
            monitor.step()
        again = Monitor(net, every=3, method=method, verbose=False)
        again.load_state_dict(monitor.state_dict())
        assert again._sum.method == method
        reports.append(monitor.history)
    for slow, fast in zip(*reports, strict=True):
        assert slow["numerical_rank"] == fast["numerical_rank"] == 4
        assert fast["effective_rank"] == pytest.approx(slow["effective_rank"], rel=1e-5)
    with pytest.raises(InputError, match="method"):
        Monitor(net, method="svd")
