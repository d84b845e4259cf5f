"""Covariances on a device: the same numbers as with numpy, and one wait, where a result is read."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from collapse import Covariance, InputError
from collapse.spectra import streams
from collapse.spectra.measurement import Measure, Measurement

EPS = np.finfo(np.float64).eps


def rows(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)) / np.arange(1, d + 1) + 0.5


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 d rows even where these are few, and products of several panels."""
    monkeypatch.setattr(streams, "ROWS", 8)
    monkeypatch.setattr(streams, "ENTRIES", 1)
    monkeypatch.setattr(streams, "PANEL", 3)


class Waits(TorchDispatchMode):
    """Counts what a host waits for: values, shapes that depend on them, copies either way; and products."""

    def __init__(self):
        super().__init__()
        self.waits, self.products, self.launched = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, name = function(*args, **(kwargs or {})), str(function)
        there = isinstance(made, torch.Tensor) and made.device.type == "cpu"
        here = any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)
        tensors = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        written = name.startswith("aten.copy_") and tensors == ["cuda", "cpu"] and not any(a is True for a in args)
        if (there and here) or written or name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.item")):
            self.waits.append(name)
        self.launched += here
        self.products += name.startswith(("aten.addmm_", "aten.mm.", "aten.linalg_qr"))
        return made


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(how, of) for how in ("covariance", "qr") for of in (torch.float32, torch.float64)] + [("float32", torch.float32)],
)
def test_a_device_is_waited_for_once_where_the_spectrum_is_read(monkeypatch, method, normalize, dtype):
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape))  # what no card has computed
    monkeypatch.setattr("collapse.spectra.covariance.device_of", lambda device: device)
    monkeypatch.setattr(streams, "ENTRIES", 1)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as seen:
        total = Covariance(300, method, normalize, device="cuda")
        for size in (0, 64, 700, 3000, 256):
            total.update(torch.empty(size, 300, dtype=dtype, device="cuda"))
        assert seen.waits == []
        assert seen.products == 3  # of 4 d rows each
        total.merge(Covariance(300, method, normalize, device="cuda").update(torch.empty(9, 300, device="cuda")))
        assert seen.waits == []
        assert total.measured().n == 4029
    assert len(seen.waits) == 1
    assert "_to_copy" in seen.waits[0]


def test_narrow_rows_are_few_launches(monkeypatch):
    """65,536 rows of 512 at once: a card multiplies them in the time of some hundred launches."""
    monkeypatch.setattr("collapse.spectra.covariance.device_of", lambda device: device)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as seen:
        Covariance(512, "covariance", normalize=False, device="cuda").update(torch.empty(65_536, 512, device="cuda"))
    assert seen.products == 2
    assert seen.launched < 200  # views of tensors among them; 2,235 in blocks of 4 d


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_a_device_gives_numpys_numbers_whatever_the_batches(small_blocks, method, normalize):
    z = rows(211, 7)
    z[[3, 120]] = 0
    for dtype in (np.float32, np.float64):
        known = Covariance(7, method, normalize).update(z.astype(dtype))
        for cuts in ([], [1], [1, 60, 61, 150]):
            total = Covariance(7, method, normalize, device="cpu")
            for part in np.split(z.astype(dtype), cuts):
                total.update(part)
            found, wanted = total.measured(vectors=True), known.measured(vectors=True)
            np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-11)
            np.testing.assert_allclose(found.moments, wanted.moments, rtol=1e-11)
            np.testing.assert_allclose(np.abs(found.vectors), np.abs(wanted.vectors), atol=1e-9)
            np.testing.assert_allclose(total.matrix(), known.matrix(), atol=1e-14)
            assert found.warnings == wanted.warnings


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_a_device_normalises_rows_of_any_scale(scale):
    found, wanted = (Covariance(6, device=on).update(rows(100, 6) * scale).measured() for on in ("cpu", None))
    np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-10)


@pytest.mark.parametrize("method", ["covariance", "qr"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named_where_the_result_is_read(small_blocks, method, value):
    z = rows(90, 4)
    z[[58, 71], 2] = value
    total = Covariance(4, method, device="cpu")
    for part in np.array_split(z, 7):
        total.update(torch.tensor(part))
    joined = Covariance(4, method, device="cpu").merge(total)
    for read in (total.measured, total.matrix, total.constant, joined.measured):
        with pytest.raises(InputError, match=r"row 58 is NaN or infinite \(2 such rows\)"):
            read()
    again = Covariance.from_state_dict(total.state_dict())
    with pytest.raises(InputError, match="row 58"):
        again.measured()


def test_groups_of_rows_are_named_by_their_numbers_in_all():
    z = rows(60, 4)
    z[37, 1] = math.nan
    measured = Measurement(Measure(jackknife=5), "cpu", "file.npy")
    for part in np.array_split(z, 3):
        measured.update(torch.tensor(part))
    with pytest.raises(InputError, match=r"file.npy: row 37 is NaN"):
        measured.spectrum()


@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_what_float64_cannot_square_is_refused_on_a_device(method):
    for scale, word in ((1e200, "overflow"), (1e-200, "vanish")):
        total = Covariance(4, method, normalize=False, device="cpu").update(rows(30, 4) * scale)
        with pytest.raises(InputError, match=word):
            total.measured()


def test_the_floor_holds_where_the_first_rows_lie_far_from_the_rest():
    """Rows are taken off one shift: what is added up and taken off again rounds."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 24)) + 1e5
    z[:16] -= 1e5
    total = Covariance(24, normalize=False, device="cpu")
    for part in np.split(z, [16]):
        total.update(part)
    found, exact = total.measured(), np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2 / (len(z) - 1)
    assert found.floor > 2 * math.sqrt(24) * EPS * (exact[0] + 0.9e10 * 24)
    assert np.abs(found.singular_values - exact).max() < found.floor


def test_what_a_version_before_saved_of_a_device_goes_on():
    z = rows(50, 5)
    z[4] = 0
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    mean, about = unit[:30].mean(0), unit[:30] - unit[:30].mean(0)
    ones = np.column_stack([np.ones(30), about])
    shared = {"dim": 5, "normalize": True, "device": "cpu", "zero_rows": 1, "roundoff": EPS / 2}
    sums = {
        "covariance": {"n": 30, "mean": torch.tensor(mean), "scatter": torch.tensor(about.T @ about)},
        "qr": {"n": 30, "shift": torch.tensor(mean), "waiting": [torch.zeros(0, 6), torch.tensor(ones)]},
    }
    for method, kept in sums.items():
        total = Covariance.from_state_dict({**shared, "method": method, "sum": kept}).update(z[30:])
        known = Covariance(5, method).update(z).measured()
        np.testing.assert_allclose(total.measured().singular_values, known.singular_values, rtol=1e-12)
        assert total.zero_rows == 1
