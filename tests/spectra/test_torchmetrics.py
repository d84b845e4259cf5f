"""The metric of torchmetrics: its value is that of all rows at once, however torchmetrics cuts and joins them."""

from copy import deepcopy
from datetime import timedelta

import numpy as np
import pytest
import torch
from processes import code_of, forked
from torchmetrics import MetricCollection

import collapse
from collapse import CollapseWarning, InputError
from collapse.spectra.torchmetrics import SpectrumMetric

NAMES = ("effective_rank", "collapsed_dimensions", "rankme", "condition")


def rows(n=120, dim=6, seed=0):
    """Rows far from the origin, whose last direction is all but dead."""
    random = torch.Generator().manual_seed(seed)
    return 3 + torch.randn(n, dim, generator=random) * torch.logspace(0, -4, dim)


def exact(z, name="effective_rank", **options):
    return collapse.spectrum(z, **options).metrics()[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_value_is_that_of_all_rows_at_once(name, normalize):
    z = rows()
    metric = SpectrumMetric(6, name, normalize=normalize, threshold=1e-3)
    for part in z.split((50, 1, 69)):
        metric.update(part)
    found = collapse.spectrum(z, normalize=normalize, threshold=1e-3)
    np.testing.assert_allclose(metric.spectrum().singular_values, found.singular_values, rtol=1e-12, atol=found.floor)
    assert metric.spectrum().floor == pytest.approx(found.floor, rel=1e-9)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(found.metrics()[name], rel=1e-12)


def test_merged_states_are_one_state():
    z = rows()
    mine, other, empty = SpectrumMetric(6), SpectrumMetric(6), SpectrumMetric(6)
    mine.update(z[:70])
    other.update(z[70:].double())
    mine.merge_state(other)
    mine.merge_state(empty)
    assert mine.compute().item() == pytest.approx(exact(z), rel=1e-12)
    assert mine.spectrum().floor == pytest.approx(collapse.spectrum(z).floor, rel=1e-9)  # of float32, the coarser


def test_forward_is_the_batch_and_compute_is_all():
    metric, z = SpectrumMetric(6), rows()
    for part in z.split(60):
        assert metric(part).item() == pytest.approx(exact(part), rel=1e-12)
    assert metric.compute().item() == pytest.approx(exact(z), rel=1e-12)
    metric.reset()
    metric.update(z[:60])
    assert metric.compute().item() == pytest.approx(exact(z[:60]), rel=1e-12)


def test_a_collection_shares_one_state(monkeypatch):
    z, updates = rows(), []
    update = collapse.Covariance.update
    monkeypatch.setattr(collapse.Covariance, "update", lambda self, part: (updates.append(1), update(self, part))[1])
    both = MetricCollection({name: SpectrumMetric(6, name) for name in NAMES}, prefix="rank/")
    for part in z.split(40):
        both.update(part)
    assert len(updates) == len(NAMES) + 2  # all at first, then one for all
    found = collapse.spectrum(z).metrics()
    for name, value in both.compute().items():
        assert value.item() == pytest.approx(found[name.removeprefix("rank/")], rel=1e-12)


def test_clones_copies_and_saved_states_go_on():
    metric, z = SpectrumMetric(6), rows()
    metric.persistent(True)
    metric.update(z[:70])
    twins = [metric.clone(), deepcopy(metric), SpectrumMetric(6)]
    twins[2].persistent(True)
    twins[2].load_state_dict(metric.state_dict())
    for twin in twins:
        twin.update(z[70:])
        assert twin.compute().item() == pytest.approx(exact(z), rel=1e-12)
    assert metric.compute().item() == pytest.approx(exact(z[:70]), rel=1e-12)
    assert torch.nn.ModuleDict({"rank": metric}).half()["rank"].moments.dtype == torch.float64
    assert SpectrumMetric(6).state_dict() == {}  # as other metrics, unless persistent


def in_process(rank, folder):
    """One of two processes of torch.distributed: its share of the rows, the value that both compute, and its own n."""
    from torch import distributed

    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", timeout=limit, rank=rank, world_size=2)
    metric = SpectrumMetric(6)
    for part in (rows()[:90].split(30), rows()[90:].split(15))[rank]:
        metric.update(part)
    np.save(folder / f"{rank}.npy", [metric.compute().item(), metric.spectrum().n])
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_would(tmp_path):
    pids = [forked(in_process, rank, tmp_path) for rank in range(2)]
    assert [code_of(pid) for pid in pids] == [0, 0]
    for rank, own in enumerate((90, 30)):
        value, n = np.load(tmp_path / f"{rank}.npy")
        assert value == pytest.approx(exact(rows()), rel=1e-12)
        assert n == own  # after the value, each goes on with its own rows


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of torchmetrics: nothing was given yet
def test_what_has_no_value_says_why():
    metric = SpectrumMetric(6)
    with pytest.warns(CollapseWarning, match="effective_rank: 0 rows; a covariance needs at least 2"):
        assert metric.compute().isnan()
    with pytest.raises(InputError, match=r"got shape \(3, 5\), expected \(n, 6\)"):
        metric.update(torch.ones(3, 5))
    metric.update(torch.cat([torch.zeros(2, 6), rows(58)]))
    with pytest.warns(CollapseWarning, match="2 of 60 rows are zero"):
        metric.compute()
    metric.update(torch.full((1, 6), torch.nan))
    with pytest.raises(InputError, match=r"effective_rank: a row is NaN or infinite; .*, then reset\(\)"):
        metric.compute()
    for wrong, said in (({"dim": 0}, "dim= is 0"), ({"dim": 2, "name": "rank"}, "name= is 'rank', expected collapsed")):
        with pytest.raises(InputError, match=said):
            SpectrumMetric(**wrong)
