"""The monitor: its reports are the spectra of the rows that passed, on one process and on several, before and after."""

import io
import json
import re
import warnings
from collections import namedtuple
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn

from collapse import CollapseWarning, GateError, InputError, Monitor, spectrum


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


@pytest.mark.parametrize(
    ("every", "rows", "seen"), [(8, None, 40), (8, 41, 50), (8, 40, 40), (3, None, 30), (2, 2, 10)]
)
def test_a_report_takes_as_many_of_the_last_batches_as_give_the_rows_wanted(every, rows, seen):
    net = nn.Linear(9, 4)
    monitor = Monitor(net, every=every, rows=rows)  # by default 10 rows a dimension
    (report,) = (report for report in train(net, monitor, batches(every)) if report)
    assert report["n"] == seen


def test_what_is_undefined_is_null_in_the_log_and_drawn_are_the_steps(tmp_path):
    monitor = Monitor(every=5, log=tmp_path / "log.jsonl")
    for step in range(10):
        monitor.update(np.random.default_rng(step).standard_normal((30, 3)))
        monitor.step()
    (line, _) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert np.isnan(monitor.history[0]["alpha"])
    assert line["alpha"] is None
    assert line["effective_rank"] == monitor.history[0]["effective_rank"]
    image = monitor.plot().collections[0]
    np.testing.assert_allclose(np.reshape(image.get_array(), (3, 2)), np.log(monitor.spectra).T)
    np.testing.assert_allclose(image.get_coordinates()[0, :, 0], [2.5, 7.5, 12.5])


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

    distributed.init_process_group("gloo", f"file://{store}", timeout=timedelta(seconds=120), rank=rank, world_size=2)
    net = network()
    monitor = Monitor(net[0], every=3, rows=40, log=out / "log.jsonl")
    train(net, monitor, batches(6, 20)[:, rank * 10 : rank * 10 + 10])
    np.save(out / f"{rank}.npy", monitor.spectra)
    late = Monitor(net[0], every=1)
    assert late.step() is None
    if rank:  # in the first process the layer has never run
        net[0](batches(1)[0])
    late.step()
    np.save(out / f"late-{rank}.npy", late.spectra)
    distributed.destroy_process_group()


def test_two_processes_report_what_one_would(tmp_path):
    torch.multiprocessing.start_processes(_one_process, (tmp_path / "store", tmp_path), 2, start_method="fork")
    net = network()
    monitor = Monitor(net[0], every=3, rows=40)
    train(net, monitor, batches(6, 20))
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), monitor.spectra, rtol=1e-9)
        late = spectrum(net[0](batches(1)[0])).singular_values
        np.testing.assert_allclose(np.load(tmp_path / f"late-{rank}.npy"), [late], rtol=1e-9)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_network_is_watched_as_another_is(before):
    data, histories = batches(6, 20), []
    for compiled in (False, True):
        net = network()
        run = torch.compile(net, backend="eager") if compiled else net
        if not before:
            run(data[0])
        monitor = Monitor(net[0], every=3, rows=40)
        for x in data:
            run(x)
            monitor.step()
        histories.append(monitor.history)
    assert len(histories[0]) == 2
    np.testing.assert_equal(*histories)


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(InputError, match="every = 0"):
        Monitor(network(), every=0)
    net = nn.Identity()
    Monitor(net)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        net(torch.ones(3))
    with pytest.raises(InputError, match="a tuple"):
        net((torch.ones(3), 1))
    with pytest.raises(InputError, match="a dict of logits; give a transform="):
        net({"logits": torch.ones(3, 2)})
    Monitor(net := nn.Identity(), transform=lambda out: out[0])
    with pytest.raises(InputError, match=r"shape \(4, 3\), of which transform= makes shape \(3,\); give a transform="):
        net(torch.ones(4, 3))


Z = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(2))
Output = namedtuple("Output", "features logits")
OUTPUTS = {
    "tokens": (Z, None, Z.mean(1), r"shape \(6, 3, 5\): the mean of its tokens is watched; transform= says otherwise"),
    "a pair": ((Z[:, 0], Z), None, Z[:, 0], "a tuple: its first part is watched"),
    "a named pair": (Output(Z[:, 1], Z), None, Z[:, 1], "a Output: its first part"),
    "a single one": ([Z[:, 0]], None, Z[:, 0], ""),
    "pooled": ({"last_hidden_state": Z, "pooler_output": Z[:, 2]}, None, Z[:, 2], "pooler_output is watched"),
    "hidden": ({"last_hidden_state": Z, "pooler_output": None}, None, Z.mean(1), "the mean of last_hidden_state is w"),
    "class token": ({"last_hidden_state": Z}, lambda out: out["last_hidden_state"][:, 0], Z[:, 0], ""),
    "maps": ({"maps": Z[..., None]}, lambda out: out["maps"], Z.mean(2), ""),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_other_outputs_are_watched_and_what_is_taken_is_said_once(kind):
    output, transform, rows, said = OUTPUTS[kind]
    monitor = Monitor(net := nn.Identity(), every=1, transform=transform)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net(output)
            monitor.step()
    np.testing.assert_allclose(monitor.spectra[2], spectrum(rows).singular_values, rtol=1e-9)
    found = [text for text in (str(warning.message) for warning in caught) if " rows for " not in text]
    assert len(found) == bool(said)
    assert not said or re.search(said, found[0]), found


def test_an_output_of_transformers_itself_is_watched():
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    net = ViTModel(ViTConfig(**small, image_size=8, patch_size=4)).train()
    monitor = Monitor(net, every=1, transform=lambda out: out.last_hidden_state[:, 0])
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = net(images).last_hidden_state[:, 0].detach()
    monitor.step()
    np.testing.assert_allclose(monitor.spectra[0], spectrum(rows).singular_values, rtol=1e-9)


def test_rows_are_given_computed_and_forgotten_in_torchmetrics_words():
    data = batches(4, 50)[..., :5]
    monitor = Monitor(every=3)
    for x in data[:2]:
        monitor.update(x.numpy())
        assert monitor.step() is None
    exact = spectrum(torch.cat(list(data[:2]))).metrics()
    for _ in range(2):  # rows stay
        report = monitor.compute()
        assert (report["step"], report["n"], len(monitor.history)) == (2, 100, 0)
        assert report["effective_rank"] == pytest.approx(exact["effective_rank"], rel=1e-12)
    monitor.reset()
    for _ in range(2):
        with pytest.warns(CollapseWarning, match="step 2: nothing to report, every 3 steps: update was not called"):
            assert monitor.compute() is None
    monitor.update(data[2])
    assert monitor.step() == monitor.history[0]
    np.testing.assert_allclose(monitor.spectra[0], spectrum(data[2]).singular_values, rtol=1e-9)
    monitor.update(data[3][:1])
    with pytest.warns(CollapseWarning, match="one row, and a covariance needs two"):
        assert monitor.compute() is None
    monitor.update(data[3][1:5])
    with pytest.warns(CollapseWarning, match="monitor: 5 rows in 5 dimensions: at most 4"):
        monitor.compute()
    monitor.remove()


def test_the_first_step_says_what_is_watched_and_when_a_report_comes(capsys):
    net, data = network(), batches(3)
    monitors = [Monitor(net[0], every=50, rows=30), Monitor(net[2].eval(), every=4), Monitor(every=2)]
    quiet = Monitor(net[0], verbose=False)
    for x in data:
        net(x)
        monitors[2].update(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for monitor in (*monitors, quiet):
                monitor.step()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "monitor: step 1: a report every 50 steps on the 7 dimensions of Linear, from the last 3 steps",
        "monitor: step 1: a report every 4 steps; nothing seen yet: the layer runs in eval mode, in which nothing is "
        "watched; call its .train()",
        "monitor: step 1: a report every 2 steps on the 9 dimensions of update",
    ]


def test_each_time_that_reports_cease_it_is_said_and_why():
    monitor, data = Monitor(net := network()[0], every=2, rows=10, verbose=False), batches(1)[0]

    def silent(*at):
        """What is said in two intervals in which the layer runs at these steps of each."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (0, 1, 0, 1):
                if step in at:
                    net(data)
                monitor.step()
        return [str(warning.message).partition("steps: ")[2] for warning in caught if "nothing" in str(warning.message)]

    assert silent(0, 1) == silent(1) == []
    assert silent() == ["the layer did not run"]
    assert silent(0) == ["the layer ran, but not in the last step, from which a report takes rows"]
    assert silent(0, 1) == []
    net.eval()
    assert silent(0) == ["the layer runs in eval mode, in which nothing is watched; call its .train()"]
    net.train()
    assert silent(1) == []
    assert silent() == ["the layer did not run"]
    assert monitor.steps.tolist() == [2, 4, 6, 8, 18, 20, 26, 28]


@pytest.mark.parametrize(("runs", "said"), [(True, "runs in eval mode"), (False, "did not run")])
def test_what_never_reports_says_so_once(runs, said):
    monitor = Monitor(net := network().eval(), every=2)
    with pytest.warns(CollapseWarning, match=f"nothing to report, every 2 steps: the layer {said}") as caught:
        reports = [monitor.step() for x in batches(6) if not runs or len(net(x))]
    assert reports == [None] * 6
    assert len(caught) == 1
    net.train()(batches(1)[0])
    monitor.step()
    net(batches(1)[0])
    assert monitor.step()["n"] == 20


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

    def fit(epochs, checkpoint=None, layer="net.0", every=4):
        callback, module = MonitorCallback(layer, every=every), Module()
        others = [MonitorCallback("net.0", every=3), MonitorCallback("net.2", every=4, transform=lambda out: 2 * out)]
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[callback, *others], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer, callback, others

    trainer, _, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, whole, more = fit(2)
    trainer, resumed, again = fit(2, tmp_path / "one.ckpt")
    for one, other in zip(more, again, strict=True):
        np.testing.assert_equal(one.monitor.history, other.monitor.history)
    assert [one.monitor.steps.tolist() for one in more] == [[3, 6, 9, 12], [4, 8, 12]]
    assert resumed.monitor.steps.tolist() == whole.monitor.steps.tolist() == [4, 8, 12]
    np.testing.assert_array_equal(resumed.monitor.spectra, whole.monitor.spectra)
    with pytest.warns(CollapseWarning, match="monitor: 12 steps, and a report comes every 1000; lower every="):
        fit(2, every=1000)
    with pytest.raises(InputError, match=r"layer: no module 'nett\.0'; there are net\.0"):
        fit(1, layer="nett.0")
    logged = {name for name in trainer.callback_metrics if name.endswith("/effective_rank")}
    assert logged == {f"rank/{layer}/effective_rank" for layer in ("net.0/4", "net.0/3", "net.2")}


def test_an_alarm_is_a_share_of_the_best_rank():
    net = nn.Linear(8, 8, bias=False)
    monitor = Monitor(net, every=1, alarm={"effective_rank": 0.5})
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    nn.init.eye_(net.weight)
    net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = monitor.step()["effective_rank"]
    net.weight.data[2:] = 0
    net(x)
    said = rf"step 2: effective_rank is .*, below 0\.5 of its best, {first:.4g} at step 1"
    with pytest.warns(CollapseWarning, match=said):
        assert monitor.step()["effective_rank"] < first / 2
    monitor.stop = True
    net(x)
    with pytest.raises(GateError, match="step 3: effective_rank"):
        monitor.step()
    assert len(monitor.history) == 3
    heard = []
    monitor.stop, monitor.on_alarm = False, lambda note, report: heard.append((note[:32], report["step"]))
    net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()
    monitor.stop = True
    net(x)
    with pytest.raises(GateError):
        monitor.step()
    assert heard == [("monitor: step 4: effective_rank ", 4), ("monitor: step 5: effective_rank ", 5)]
    for wrong in ({"effective_rank": 2}, {"alpha": 0.5}, {"rankme": "half"}):
        with pytest.raises(InputError, match=r"expected a share in 0..1 of effective_rank, rankme"):
            Monitor(net, alarm=wrong)
    with pytest.raises(InputError, match=r"alarm = 0.5; expected a dict, as {'effective_rank': 0.5}"):
        Monitor(net, alarm=0.5)
    with pytest.raises(InputError, match=r"module is a str; expected a torch.nn.Module, as model.backbone"):
        Monitor("backbone")
    assert repr(monitor) == "Monitor of Linear: 5 steps, 5 reports, one every 1 steps"


def test_few_rows_are_told_of_once_and_no_report_is_no_plot():
    monitor = Monitor(net := nn.Identity(), every=1)
    with pytest.raises(InputError, match="no report yet after 0 steps, one comes every 1"):
        monitor.plot()
    for told in (1, 0):
        net(batches(1, 30)[0])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            monitor.step()
        assert [str(w.message)[:36] for w in seen] == ["monitor: 30 rows for 9 dimensions: s"] * told
