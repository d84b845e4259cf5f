"""The monitor: its reports are the spectra of the rows that passed, on one process and on several, before and after."""

import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from collapse import InputError, Monitor, spectrum


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


def batches(count, size=10):
    return torch.randn(count, size, 9, generator=torch.Generator().manual_seed(1))


def train(net, monitor, data):
    reports = []
    for x in data:
        net(x).square().mean().backward()
        reports.append(monitor.step())
    return reports


def test_a_report_is_the_spectrum_of_the_last_rows(tmp_path):
    net, data = network(), batches(9)
    monitor = Monitor(net[0], every=4, rows=20, log=tmp_path / "rank.jsonl")
    reports = train(net, monitor, data)
    assert [report is not None for report in reports] == [False, False, False, True] * 2 + [False]
    for step in (4, 8):
        exact = spectrum(net[0](torch.cat(list(data[step - 2 : step]))))  # 20 rows are the last two batches
        report = reports[step - 1]
        assert (report["step"], report["n"]) == (step, 20)
        assert report["effective_rank"] == pytest.approx(exact.metrics()["effective_rank"], rel=1e-12)
        np.testing.assert_allclose(monitor.spectra[step // 4 - 1], exact.singular_values, rtol=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "rank.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == monitor.steps.tolist() == [4, 8]
    assert monitor.plot().get_xlabel() == "step"
    monitor.remove()
    assert train(net, monitor, data[:3]) == [None] * 3


def test_evaluation_is_not_watched_and_feature_maps_are_averaged():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    monitor = Monitor(net[1], every=1, normalize=False)
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    maps = net(images)
    net.eval()(images)
    report = monitor.step()
    exact = spectrum(maps.mean((2, 3)), normalize=False)
    assert report["n"] == 8
    np.testing.assert_allclose(monitor.spectra[0], exact.singular_values, rtol=1e-9)


def test_a_saved_monitor_goes_on_where_it_was():
    net, data = network(), batches(12)
    whole = Monitor(net[0], every=6)
    train(net, whole, data)
    whole.remove()
    first = Monitor(net[0], every=6)
    train(net, first, data[:8])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.remove()
    second = Monitor(net[0], every=6)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(net, second, data[8:])
    np.testing.assert_equal(second.history, whole.history)  # NaN where undefined, in both
    np.testing.assert_array_equal(second.spectra, whole.spectra)


def _one_process(rank, store, out):
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    net = network()
    monitor = Monitor(net[0], every=3, rows=40, log=out / "log.jsonl")
    train(net, monitor, batches(6, 20)[:, rank * 10 : rank * 10 + 10])
    np.save(out / f"{rank}.npy", monitor.spectra)
    distributed.destroy_process_group()


def test_two_processes_report_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_one_process, (tmp_path / "store", tmp_path), nprocs=2)
    net = network()
    monitor = Monitor(net[0], every=3, rows=40)
    train(net, monitor, batches(6, 20))
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), monitor.spectra, rtol=1e-9)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(InputError, match="every = 0"):
        Monitor(network(), every=0)
    net = nn.Identity()
    Monitor(net)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        net(torch.ones(3))
    with pytest.raises(InputError, match="a tuple"):
        net((torch.ones(3), 1))


@pytest.mark.filterwarnings("ignore")  # of Lightning itself, about loaders and loggers
def test_lightning_saves_it_with_the_run(tmp_path):
    import lightning.pytorch as pl

    from collapse.lightning import MonitorCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches(1, 60)[0]), batch_size=10)

    def fit(epochs, checkpoint=None):
        callback, module = MonitorCallback("net.0", every=4), Module()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer, callback

    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, whole = fit(2)
    trainer, resumed = fit(2, tmp_path / "one.ckpt")
    assert resumed.monitor.steps.tolist() == whole.monitor.steps.tolist() == [4, 8, 12]
    np.testing.assert_array_equal(resumed.monitor.spectra, whole.monitor.spectra)
    assert "rank/effective_rank" in trainer.callback_metrics
