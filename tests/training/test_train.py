"""Training end to end in small: every head learns, resumes to the same bits, and refuses what it cannot do."""

import json
import math
import os
import signal
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import byte, code_of, ended, forked, together
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import collapse
from collapse import InputError, cli
from collapse.data.labelled import of_arrays, open_data
from collapse.encoders.accuracy import Accuracy, knn, knn_top1, logistic_regression, probe, probe_top1, wilson
from collapse.encoders.passes import embed
from collapse.models.backbones import make_backbone
from collapse.models.heads import HEADS
from collapse.recipes.config import Config, load_preset, make_config, presets
from collapse.training.losses import contrastive_loss
from collapse.training.network import Network, save_encoder
from collapse.training.optim import learning_rate
from collapse.training.run import Run, Signals
from collapse.training.train import Options, Training, _plan, train

ROOT = Path(__file__).parents[2]
TINY = make_config(
    "digits", blocks=(1, 1), planes=(8, 32), epochs=4, batch_size=64, lr=0.1, warmup=1, dim=8, temperature=0.1
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8))
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A zip of 48 training and 24 held-out images of several sizes; the class is the colour."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for index in range(72):
            kind, split = index % 3, "train" if index < 48 else "val"
            coarse = rng.integers(0, 90, (4, 5, 3), dtype=np.uint8)
            coarse[..., kind] += 160
            path = folder / f"{index}.png"
            Image.fromarray(coarse).resize((40 + index % 7, 48), Image.Resampling.BICUBIC).save(path)
            archive.write(path, f"photos/{split}/{'abc'[kind]}/{index:02d}.png")
    return folder / "photos.zip"


def data_of(digits, n):
    return of_arrays(digits[0][:n], digits[1][:n])


def lines(run):
    """The log without what tells the time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "waited")} for line in found]


def same(one, other):
    """Whether two runs hold the same curve, spectra and final weights, bit for bit."""
    with np.load(one / "spectra.npz") as mine, np.load(other / "spectra.npz") as theirs:
        assert mine.files == theirs.files
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], theirs[name])
    assert lines(one) == lines(other)
    for name in ("config.json", "encoder.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("head", [*HEADS, "directclr", "deep linear"])
def test_every_head_learns_and_its_encoder_is_read_back(digits, tmp_path, head):
    fixed = {"lowrank": 12, "lowrank-diagonal": 12, "directclr": 12, "linear": 8, "deep linear": 8, "mlp": 8}
    options = {"head": head, "dim": fixed.get(head, 0)}
    options |= {"method": "directclr", "head": "none"} if head == "directclr" else {}
    options |= {"head": "linear", "depth": 3} if head == "deep linear" else {}
    config = replace(TINY, epochs=8, **options)
    log = [line for line in train(tmp_path, config, data_of(digits, 600)) if "epoch_loss" in line]
    assert [line["epoch"] for line in log] == [*range(1, 9)]
    assert log[-1]["epoch_loss"] < log[0]["epoch_loss"] - 0.005
    net = collapse.load(tmp_path / "encoder.safetensors")
    assert net.report["keys"]["unknown"] == 0
    assert net.preprocess == config.preprocessing()
    r = torch.cat(list(embed(net, digits[0].split(500), net.preprocess))).numpy()
    # Chance is right for a tenth of 1,197 guesses; a share above this has probability 1e-9.
    chance = binom.ppf(1 - 1e-9, 1197, 0.1) / 1197
    assert knn_top1(r[:600], digits[1][:600], r[600:], digits[1][600:]) > chance
    assert probe_top1(r[:600], digits[1][:600], r[600:], digits[1][600:]) > chance
    assert list(train(tmp_path, config, data_of(digits, 600))) == []
    if net.projector is not None:  # the file's head maps as the trained one
        network = Network(config, 10).eval()
        state = load_file(tmp_path / "encoder.safetensors")
        if head == "diagonal":
            network.projector.scale.data = state["projector.0.weight"].diagonal()
        else:
            network.projector.load_state_dict({k[10:]: v for k, v in state.items() if k.startswith("projector.")})
        x = torch.rand(5, 32)
        torch.testing.assert_close(net.projector(x), network.projector(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", [h for h in HEADS if h != "group"])
def test_a_zip_of_images_trains_every_head_by_the_command(photos, tmp_path, head, capsys):
    small = ["--arch", "resnet18", "--blocks", 1, 1, "--planes", 8, 16, "--stem", 3, "--image-size", 24, "--epochs", 2]
    call = ["train", "--data", photos, "--out", tmp_path / "run", "--batch-size", 16, "--workers", 0, "--head", head]
    assert cli.main([*map(str, call), *map(str, small), "--device", "cpu", "--knn-every", "1"]) == 0
    out, err = capsys.readouterr()
    assert f"head = {head}" in err
    assert out.startswith(f"{tmp_path}/run: 2 epochs, 6 steps: loss ")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "spectra.npz", "resume.pt", "encoder.safetensors", "spectrum.png",
    }  # fmt: skip
    log = lines(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1), (6, 2)]
    assert {"loss", "lr", "effective_rank", "embedding_effective_rank", "knn_top1", "classifier_top1"} <= log[-1].keys()
    with np.load(tmp_path / "run/spectra.npz") as spectra:
        assert spectra["steps"].tolist() == [3, 6]
        assert spectra["representation"].shape == (2, 16)
    before = (tmp_path / "run/encoder.safetensors").stat().st_mtime_ns
    assert cli.main([*map(str, call), *map(str, small), "--device", "cpu", "--knn-every", "1"]) == 0
    assert capsys.readouterr().out == out  # a finished run says again what it was
    assert cli.main([*map(str, call), *map(str, small), "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "collapse.training/1"
    assert document.items() >= log[-1].items()
    assert (tmp_path / "run/encoder.safetensors").stat().st_mtime_ns == before
    stored = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert stored["head"] == head
    assert stored["lr"] == pytest.approx(4.8 * 16 / 4096)


def test_the_log_and_the_spectra_are_those_of_the_network(digits, tmp_path):
    data, val = data_of(digits, 200), of_arrays(digits[0][200:400], digits[1][200:400])
    config = replace(TINY, epochs=2, head="linear", final_lr=0.2)
    log = list(train(tmp_path, config, data, val, Options(spectrum_every=2, log_every=2, knn_every=1)))
    assert [line["step"] for line in log] == [2, 3, 4, 6]
    rates = [learning_rate(step - 1, 6, 3, config.lr, 0.2 * config.lr) for step in (2, 3, 4, 6)]
    assert [line["lr"] for line in log] == pytest.approx(rates)
    net = collapse.load(tmp_path / "encoder.safetensors")
    for name, layer in (("representation", "representation"), ("embedding", "projector")):
        z = torch.cat(list(embed(net.layer(layer), [val.images.pixels], net.preprocess))).numpy()
        with np.load(tmp_path / "spectra.npz") as spectra:
            np.testing.assert_allclose(spectra[name][-1], collapse.spectrum(z).singular_values, rtol=1e-4, atol=1e-9)
    r = [torch.cat(list(embed(net, [x.images.pixels], net.preprocess))) for x in (data, val)]
    assert log[-1]["knn_top1"] == knn_top1(r[0], data.labels, r[1], val.labels)
    # A run's loss is that of its weights: one more step at their state.
    plan = _plan(config, data)
    training = Training(config, 10, plan, Options())
    run = Run(tmp_path, training.config.as_dict(), {"images": 200, "digest": data.digest})
    state = run.load()
    run.close()
    assert state["step"] == 6
    training.restore(state)
    assert all(
        torch.equal(a, load_file(tmp_path / "encoder.safetensors")[k])
        for k, a in training.network.backbone.state_dict().items()
    )


def test_what_is_done_does_not_depend_on_workers_and_a_lost_image_is_replaced(photos, tmp_path, capfd):
    folder = tmp_path / "set"
    with zipfile.ZipFile(photos) as archive:
        archive.extractall(folder)
    (folder / "photos/train/b/01.png").write_bytes(b"no image")
    config = make_config(
        "imagenet", arch="resnet18", blocks=(1, 1), planes=(8, 16), stem=3, image_size=24, batch_size=16, epochs=2
    )
    for name, workers in (("none", 0), ("two", 2)):
        data, val = (open_data(folder / "photos", split) for split in ("train", "val"))
        assert list(train(tmp_path / name, config, data, val, Options(workers=workers)))
    same(tmp_path / "none", tmp_path / "two")
    assert capfd.readouterr().err.count("01.png: not a readable image") == 2


def test_lives_and_deaths_of_a_run(tmp_path):
    """Forked from one program, so that they are quick: see lives.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(ROOT / "tests/lives.py"), str(tmp_path)]
    result = ended(call, env=environment)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    # Lives that ended by SIGKILL, or saved on SIGTERM, at places drawn among all where a run steps or writes.
    assert {-signal.SIGKILL, 128 + signal.SIGTERM, 0} <= set(report["ends"])
    assert len(report["ends"]) > 12
    for chain in range(3):
        same(tmp_path / "unbroken", tmp_path / f"broken{chain}")
        names = {path.name for path in (tmp_path / f"broken{chain}").iterdir()}
        assert names == {path.name for path in (tmp_path / "unbroken").iterdir()}
    assert report["second"] == 2
    assert f"process {report['first']} on " in report["refusal"]
    assert report["refusal"].count("\n") == 1
    assert report["stopped"] == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "locked/resume.pt", weights_only=True)["step"] >= 1


def test_two_processes_train_as_one(tmp_path):
    """By torchrun, batch norms and all; a process of other flags is refused."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = "--preset digits --data sklearn:digits --device cpu --epochs 1 --precision float32 --log-every 1 "
    flags += "--spectrum-every 0 --knn-every 0 --workers 0"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*torchrun, "-m", "collapse", "train", *flags.split(), "--out", str(tmp_path / "two")]
    ran = ended(call, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert cli.main(["train", *flags.split(), "--out", str(tmp_path / "one")]) == 0
    one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 9
    assert two[:2] == pytest.approx(one[:2], rel=1e-6)  # then the roundings of float32 grow with the steps
    assert two == pytest.approx(one, rel=1e-2)
    call = ["train", *flags.split(), "--out", str(tmp_path / "odd"), "--held"]
    assert together(tmp_path, lambda rank: cli.main([*call, str(100 + rank)])) == [2, 2]
    said = (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    assert "collapse: rank 1 has another configuration, options" in said
    assert not (tmp_path / "odd").exists()


def test_a_damaged_state_is_noticed_and_the_one_before_is_taken(digits, tmp_path, capsys):
    data = data_of(digits, 200)
    val = of_arrays(digits[0][200:300], digits[1][200:300])
    options = Options(save_every=2)
    config = replace(TINY, optimizer="lars", lr=2.0, precision="bf16")
    list(train(tmp_path / "unbroken", config, data, val, options))
    running = train(tmp_path / "run", config, data, val, options)
    for _ in range(3):
        next(running)
    running.close()
    path = tmp_path / "run/resume.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    list(train(tmp_path / "run", config, data, val, options))
    assert "resume.pt: damaged; kept as resume.damaged-1.pt" in capsys.readouterr().err
    same(tmp_path / "unbroken", tmp_path / "run")


def test_a_full_disk_keeps_the_old_state(digits, tmp_path, monkeypatch):
    run = Run(tmp_path, {}, {})
    run.save({"step": 1, "weights": torch.zeros(1000)})
    for call in ("fsync", "replace", "write"):
        with monkeypatch.context() as patch:
            if call == "write":
                real = torch.save
                patch.setattr(
                    "builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
                )
                assert real
            else:
                patch.setattr(os, call, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(InputError, match="No space left"):
                run.save({"step": 2, "weights": torch.zeros(1000)})
        assert run.load()["step"] == 1
        assert not list(tmp_path.glob(".resume*"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(InputError, match="disk full"):
        run.require_space(1000)
    run.close()


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_state(digits, tmp_path, monkeypatch):
    config, options = replace(TINY, epochs=3), Options(save_every=2, log_every=4)
    seen = []

    def poisoned(*arguments):
        seen.append(1)
        return contrastive_loss(*arguments) * (math.nan if len(seen) == 6 else 1)

    monkeypatch.setattr("collapse.training.network.contrastive_loss", poisoned)
    with pytest.raises(InputError, match="epoch 1, step 5: the loss is nan"):
        list(train(tmp_path, config, data_of(digits, 200), options=options))
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == 4
    assert len(list(train(tmp_path, config, data_of(digits, 200), options=options))) > 0


@pytest.mark.parametrize(
    ("precision", "advice"), [("float32", "lower lr"), ("bf16", 'give precision="float32", which')]
)
def test_weights_that_are_not_finite_are_not_saved(digits, tmp_path, monkeypatch, precision, advice):
    config, seen = replace(TINY, epochs=1, precision=precision), []

    def poisoned(self, *arguments):
        step(self, *arguments)
        seen.append(1)
        if len(seen) == 3:  # the last step: no loss sees it
            next(self.network.backbone.parameters()).data.fill_(math.inf)

    step = Training.run_step
    monkeypatch.setattr(Training, "run_step", poisoned)
    with pytest.raises(InputError, match=f"step 3: a weight is not finite; {advice}"):
        list(train(tmp_path, config, data_of(digits, 200), options=Options(save_every=2)))
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "encoder.safetensors").exists()


def test_a_log_that_lost_its_end_is_cut_at_a_whole_line(digits, tmp_path, capsys):
    config, options, data = replace(TINY, epochs=2), Options(log_every=1), data_of(digits, 200)
    running = train(tmp_path, config, data, options=options)
    for _ in range(5):
        next(running)
    running.close()
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[: log.read_bytes().index(b"\n") + 20])
    list(train(tmp_path, config, data, options=options))
    assert "lines are missing" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 5, 6]


def test_only_what_a_killed_writer_left_is_removed(digits, tmp_path):
    left = f".collapse-{'a' * 12}-{'b' * 8}-77-{'c' * 16}"
    names = [".notes.md.swp", ".resume.pt.bak", ".collapse-notes", f"x{left}", f"{left}.safetensors", left]
    for name in names:
        (tmp_path / name).write_text("")
    names.append(left.replace("a", "d"))
    (tmp_path / names[-1]).mkdir()
    list(train(tmp_path, replace(TINY, epochs=1), data_of(digits, 200)))
    assert [(tmp_path / name).exists() for name in names] == [True, True, True, True, False, False, True]


def test_a_worker_that_outlives_its_run_does_not_hold_it(tmp_path):
    run, (started, start), (over, end) = Run(tmp_path, {}, {}), os.pipe(), os.pipe()
    pid = forked(lambda: os.write(start, b".") - len(os.read(over, 1)))
    assert byte(started) == b"."
    run.close()
    Run(tmp_path, {}, {}).close()
    os.write(end, b".")
    assert code_of(pid) == 0


def test_neighbours_are_counted_without_spectra(digits, tmp_path):
    options = Options(spectrum_every=0, knn_every=1)
    data, val = data_of(digits, 200), of_arrays(digits[0][200:300], digits[1][200:300])
    (line,) = list(train(tmp_path, replace(TINY, epochs=1), data, val, options))
    assert "knn_top1" in line
    assert "effective_rank" not in line
    assert not (tmp_path / "spectra.npz").exists()


def test_spectra_and_saves_by_seconds_change_nothing_else(digits, tmp_path):
    config, data = replace(TINY, epochs=2), data_of(digits, 300)
    often = Options(spectrum_seconds=1e-9, save_seconds=1e-9, knn_every=0)
    for name, how in (("plain", Options(knn_every=0)), ("often", often)):
        list(train(tmp_path / name, config, data, data, how))
    steps = np.load(tmp_path / "often/spectra.npz")["steps"].tolist()
    assert steps == list(range(2, 9))  # the clock is asked after a step
    assert np.load(tmp_path / "plain/spectra.npz")["steps"].tolist() == [4, 8]
    assert (tmp_path / "often/encoder.safetensors").read_bytes() == (
        tmp_path / "plain/encoder.safetensors"
    ).read_bytes()


def test_stochastic_depth_is_off():
    net = Network(replace(TINY, arch="torchvision:swin_t", blocks=(), planes=(), image_size=32), 10).backbone
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.train()(x), net(x), rtol=0, atol=0)


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    now, before = [0.0], signal.signal(signal.SIGINT, signal.default_int_handler)  # other tests leave other handlers
    monkeypatch.setattr("collapse.training.run.time.monotonic", lambda: now[0])
    try:
        with Signals() as signals:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            assert signals() == signal.SIGINT
            now[0] = 2.0
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_of_another_configuration_is_refused_and_kept(digits, tmp_path):
    config = replace(TINY, epochs=1)
    list(train(tmp_path, config, data_of(digits, 200)))
    before = (tmp_path / "encoder.safetensors").read_bytes()
    for other, message in (
        ({"lr": 0.2}, r"lr = 0\.1, not 0\.2"),
        ({"head": "none", "dim": 0}, "head = mlp, not none"),
        ({"seed": 1}, "seed = 0, not 1"),
    ):
        with pytest.raises(InputError, match=message):
            list(train(tmp_path, replace(config, **other), data_of(digits, 200)))
    with pytest.raises(InputError, match="images = 200, not 300"):
        list(train(tmp_path, config, data_of(digits, 300)))
    assert (tmp_path / "encoder.safetensors").read_bytes() == before


def test_bad_input_is_one_line_and_exit_2(tmp_path, photos, capsys):
    with zipfile.ZipFile(photos) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "photos"
    (tmp_path / "one/train/a").mkdir(parents=True)
    (tmp_path / "one/val/a").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"one/{split}/a/0.png").write_bytes((folder / "train/a/00.png").read_bytes())
    empty = tmp_path / "empty"
    os.symlink(folder, empty)
    (tmp_path / "odd/train").mkdir(parents=True)
    (tmp_path / "odd/train/new").mkdir()
    (tmp_path / "odd/train/a").mkdir()
    (tmp_path / "odd/train/a/0.png").write_bytes((folder / "train/a/00.png").read_bytes())
    (tmp_path / "file").write_text("")
    wrong = {"batch": {"batch_size": "many"}, "list": {"scale": [0.1, 0.2, 0.3]}}
    for name, values in wrong.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    cases = [
        (["--data", tmp_path / "odd"], "new: a class without images"),
        (["--data", tmp_path / "one"], "1 images, but a batch of 4096"),
        (["--data", folder, "--batch-size", 64], "48 images, but a batch of 64"),
        (["--data", folder, "--method", "directclr", "--dim", 2049], "d0 = 2049, expected 1..2048"),
        (["--data", folder, "--head", "deep"], "head: got 'deep', expected one of none"),
        (["--data", folder, "--arch", "resnet9"], "arch: got 'resnet9'"),
        (["--data", folder, "--out", tmp_path / "file"], "cannot be made a folder"),
        (["--data", folder, "--out", tmp_path / "file/run"], "cannot be made a folder"),
        (["--data", folder, "--out", tmp_path / "broken"], "config.json: not readable as JSON"),
        (["--data", tmp_path / "nothing"], "no such folder or zip"),
        (["--data", folder, "--device", "cuda:7"], "CUDA devices here"),
        (["--data", folder, "--preset", "nothing"], "preset: no 'nothing'"),
        (["--data", folder, "--method", "directclr", "--head", "mlp"], "no projector"),
        (["--data", folder, "--head", "mlp", "--depth", 2], "depth 2"),
        (["--data", folder, "--seed", -1], "seed: got -1, expected 0 or more"),
        (["--data", folder, "--preset", tmp_path / "batch.json"], "batch_size: got 'many', expected int"),
        (["--data", folder, "--preset", tmp_path / "list.json"], "scale: got [0.1, 0.2, 0.3], expected 2 of float"),
        (["--data", folder, "--arch", "timm:vit_tiny_patch16_224", "--image-size", 24], "takes no images of 24 px"),
    ]
    small = ["--planes", "8", "16", "32", "2048", "--arch", "resnet18", "--image-size", "24", "--workers", "0"]
    for options, message in cases:
        arch = [] if "--arch" in options else small
        size = [] if "--batch-size" in options or tmp_path / "one" in options else ["--batch-size", "16"]
        call = ["train", "--out", tmp_path / "run", *arch, *size, *options]
        assert cli.main([str(a) for a in call]) == 2, options
        out, err = capsys.readouterr()
        assert message in err.splitlines()[-1], (options, err)
        assert "Traceback" not in err
        assert out == ""
    assert not (tmp_path / "run/encoder.safetensors").exists()


def test_the_papers_recipe_is_the_default():
    config = make_config("imagenet")
    assert config == Config()
    wanted = {
        "arch": "resnet50", "zero_init": True, "batch_size": 4096, "epochs": 100, "optimizer": "lars", "momentum": 0.9,
        "eta": 0.001, "weight_decay": 1e-6, "lr": 4.8, "warmup": 10, "final_lr": 0.001, "temperature": 0.1,
        "negatives": "other", "image_size": 224, "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4,
        "saturation": 0.2, "hue": 0.1, "grayscale": 0.2, "blur": (1.0, 0.1), "sigma": (0.1, 2.0),
        "solarize": (0.0, 0.2),
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    network = Network(config, 1000)
    assert [type(m).__name__ for m in network.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert network.projector[0].weight.shape == (2048, 2048)
    assert network.projector[3].weight.shape == (128, 2048)
    assert network.config.dim == 128
    assert Network(replace(config, method="directclr"), 10).config.dim == 360
    assert make_config("imagenet", batch_size=256).lr == pytest.approx(0.3)
    assert make_config("imagenet", batch_size=256, lr=1.0).lr == 1.0
    for name in presets():
        assert Network(replace(make_config(name), head="none"), 10).config.epochs == load_preset(name)["epochs"]


def test_torchvision_and_timm_load_the_encoder(tmp_path):
    from torchvision.models import get_model

    network = Network(make_config("imagenet", head="linear", image_size=64), 10)
    save_encoder(tmp_path / "encoder.safetensors", network)
    state = load_file(tmp_path / "encoder.safetensors")
    backbone = {key: value for key, value in state.items() if not key.startswith("projector.")}
    assert state["projector.0.weight"].shape == (128, 2048)
    x = torch.rand(2, 3, 64, 64)
    theirs = get_model("resnet50", weights=None)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(backbone)
    torch.testing.assert_close(theirs.eval()(x), network.backbone.eval()(x), rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["collapse"])["training"]["head"] == "linear"
    other = timm.create_model("resnet50", num_classes=0)
    other.load_state_dict(backbone)
    torch.testing.assert_close(other.eval()(x), network.backbone(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arch",
    ["mlp", "resnet18", "torchvision:mobilenet_v3_small", "timm:resnet10t", "timm:mobilenetv3_small_050"],
)
def test_backbones_come_by_name_and_are_read_back(tmp_path, arch):
    network = Network(make_config("digits", arch=arch, image_size=32, blocks=(), planes=(), head="mlp"), 10).eval()
    save_encoder(tmp_path / "encoder.safetensors", network)
    net = collapse.load(tmp_path / "encoder.safetensors")
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, network.backbone.width)
    torch.testing.assert_close(net(x), network.backbone(x))
    torch.testing.assert_close(net.projector.eval()(net(x)), network.projector(network.backbone(x)))


def test_an_encoder_of_ours_is_not_guessed_whatever_lies_beside_it(tmp_path):
    """A 3 x 3 stem, whose padding other projects' files leave open."""
    network = Network(make_config("cifar10", planes=(8, 16, 32, 64)), 10)
    network.backbone.train()(torch.rand(8, 3, 32, 32))  # else it looks untrained
    network.eval()
    save_encoder(tmp_path / "encoder.safetensors", network)
    (tmp_path / "args.json").write_text(json.dumps({"method": "simclr", "backbone": {"name": "resnet18"}}))
    net, x = collapse.load(tmp_path / "encoder.safetensors"), torch.rand(2, 3, 32, 32)
    assert net.report["warnings"] == []
    torch.testing.assert_close(net(x), network.backbone(x))


@pytest.mark.parametrize("arch", ["torchvision:resnet19", "timm:resnet19"])
def test_an_unknown_backbone_is_named(arch):
    with pytest.raises(InputError, match="has no such network"):
        make_backbone(arch, 64)


@pytest.mark.parametrize(
    "about",
    [{"arch": "timm:hf-hub:x/y"}, {"arch": "mlp"}, {"arch": "mlp", "image_size": "x", "planes": [1]},
     {"arch": "mlp", "image_size": -1, "planes": [1]}, {"arch": "mlp", "image_size": 10**9, "planes": [8]}],
)  # fmt: skip
def test_a_lying_header_is_one_line(tmp_path, about):
    network = Network(make_config("digits", arch="mlp", image_size=8, blocks=(), planes=(8,), head="none"), 10)
    tensors = network.backbone.state_dict()
    save_file(tensors, tmp_path / "encoder.safetensors", {"collapse": json.dumps({"architecture": about})})
    with pytest.raises(InputError, match=r"encoder\.safetensors"):
        collapse.load(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(("head", "dim"), [("orthogonal", 32), ("lowrank", 12)])
def test_fixed_heads_are_orthonormal_and_stay_as_they_were(digits, tmp_path, head, dim):
    config = replace(TINY, head=head, dim=dim, epochs=1)
    start = Network(config, 10).projector[0].weight
    torch.testing.assert_close(start @ start.T, torch.eye(dim), rtol=0, atol=1e-5)
    list(train(tmp_path, config, data_of(digits, 200)))
    assert torch.equal(load_file(tmp_path / "encoder.safetensors")["projector.0.weight"], start)


def test_seeds_change_the_start_and_nothing_else_does():
    weights = lambda seed: Network(replace(TINY, seed=seed), 10).backbone.conv1.weight
    torch.manual_seed(5)
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_directclr_sends_gradient_through_the_first_entries_only(digits):
    network = Network(replace(TINY, method="directclr", head="none"), 10)
    r = network.backbone(TINY.preprocessing().normalize(digits[0][:32]))
    r.retain_grad()
    contrastive_loss(network.projector(r), network.projector(r.flip(0)), 0.1).backward()
    assert (r.grad[:, :8] != 0).any()
    assert (r.grad[:, 8:] == 0).all()


def test_nearest_neighbours_agree_with_scikit_learn():
    data = load_digits()
    train_rows, test_rows = data.data[:1000], data.data[1000:]
    split = (data.target[:1000], test_rows, data.target[1000:])
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    votes = theirs.fit(train_rows, split[0]).predict_proba(test_rows)
    found = knn(train_rows, *split)
    assert found.correct1 == (votes.argmax(1) == split[2]).sum()
    # Classes without a vote tie, so the five best may differ in what they hold of those.
    voted = ((votes > 0) & np.eye(10, dtype=bool)[split[2]]).any(1).sum()
    assert found.correct5 >= voted - (np.sum(votes > 0, 1) > 5).sum()
    # lightly 1.6.0 knn_predict on unit rows, k = 20 and 200.
    assert knn_top1(train_rows, *split) == pytest.approx(0.9560853199498118)
    assert knn_top1(train_rows, *split, k=200, temperature=0.1) == pytest.approx(0.9134253450439147)


def test_the_linear_probe_is_scikit_learns_logistic_regression_on_standardised_features():
    data = load_digits()
    split = (data.data[:1000], data.target[:1000], data.data[1000:], data.target[1000:])
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-8)).fit(*split[:2])
    rows = torch.from_numpy(theirs[0].transform(split[0]))
    weight = logistic_regression(rows, torch.from_numpy(split[1]), 10, 1e-3)
    # A gradient of 1e-6 over a curvature of at least 1e-3 leaves errors below 1e-3.
    np.testing.assert_allclose(weight[:, :-1], theirs[1].coef_, rtol=0, atol=1e-3)
    found = probe(*split)
    likely = np.argsort(-theirs.predict_proba(split[2]), 1)
    assert found.top1 == pytest.approx(theirs.score(*split[2:]), abs=1e-9)
    assert found.correct5 == (likely[:, :5] == split[3][:, None]).any(1).sum()


def test_wilsons_interval_solves_its_equation():
    for right, n in ((0, 10), (3, 10), (945, 1000), (10, 10)):
        for end in wilson(right, n):  # |share - p| is 1.96 standard errors of p itself
            assert (right / n - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)
    shown = Accuracy(9, 10, 10).as_dict()
    assert (shown["top1"], shown["top5"], shown["n"]) == (0.9, 1.0, 10)


@pytest.mark.parametrize("recipe", [["probe"], ["probe", "--recipe", "paper", "--epochs", "6"], ["knn"]])
def test_the_evaluations_of_a_checkpoint_are_above_chance(photos, tmp_path_factory, tmp_path, capsys, recipe):
    config = make_config("imagenet", arch="resnet18", planes=(8, 16, 32, 64), image_size=32, batch_size=16, epochs=2)
    data = open_data(photos, "train")
    assert data.classes == ("a", "b", "c")
    assert np.bincount(data.labels).tolist() == [16, 16, 16]
    list(train(tmp_path / "run", config, data))
    out = tmp_path / "out.json"
    call = [recipe[0], tmp_path / "run/encoder.safetensors", "--data", photos, "--workers", 0, "--batch-size", 16]
    assert cli.main([*map(str, call), *recipe[1:], "--json", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["n"] == 24
    # A third of 24 guesses is right by chance; a share above this has probability 1e-3.
    assert document["top1"] > binom.ppf(1 - 1e-3, 24, 1 / 3) / 24
    assert document["top1_interval"][0] < document["top1"] <= document["top1_interval"][1]
    assert cli.main([*map(str, call), *recipe[1:], "--out", str(out)]) == 2


def test_a_class_without_a_vote_is_not_among_the_five():
    z, labels = np.eye(8), np.arange(8)
    shifted = np.roll(labels, 1)
    assert knn(z, labels, z, shifted, k=1).top5 == 0
    assert knn(z, labels, z, labels, k=1).top5 == 1
    assert knn(z, labels, z, shifted, k=8).top5 > 0


def test_a_finished_run_goes_on_to_more_epochs_and_keeps_its_encoder(tmp_path, digits, capsys):
    data = data_of(digits, 200)
    list(train(tmp_path, replace(TINY, epochs=1), data))
    first = (tmp_path / "encoder.safetensors").read_bytes()
    assert [line["epoch"] for line in train(tmp_path, replace(TINY, epochs=2), data)] == [2]
    said = capsys.readouterr().err
    assert "2 epochs instead of 1: from here on the learning rate follows the schedule of 2" in said
    assert (tmp_path / "encoder-0001.safetensors").read_bytes() == first
    assert (tmp_path / "encoder.safetensors").read_bytes() != first
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["config"]["epochs"], stored["raised_from"]) == (2, [1])
    assert list(train(tmp_path, replace(TINY, epochs=2), data)) == []
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="holds a run with epochs = 2, not 1"):
        list(train(tmp_path, replace(TINY, epochs=1), data))
    with pytest.raises(InputError, match="holds a run with epochs = 2, not 3, lr = "):
        list(train(tmp_path, replace(TINY, epochs=3, lr=0.2), data))
    (tmp_path / "resume.pt").unlink()
    with pytest.raises(InputError, match=r"is finished and has no resume\.pt to go on from"):
        list(train(tmp_path, replace(TINY, epochs=3), data))


@pytest.mark.parametrize("chunks", [1, 2])
def test_without_labels_the_backbone_is_trained_as_with_them(tmp_path, digits, chunks):
    config = replace(TINY, epochs=1, chunks=chunks)
    data, val = data_of(digits, 128), of_arrays(digits[0][200:260], digits[1][200:260])
    options = Options(knn_every=1)
    found = {}
    for name, parts in (("with", (data, val)), ("without", (data.unlabelled(), val.unlabelled()))):
        (*_, line) = train(tmp_path / name, config, *parts, options)
        found[name] = line, load_file(tmp_path / name / "encoder.safetensors")
    assert {"classifier_top1", "knn_top1"} <= found["with"][0].keys()
    assert not {"classifier_top1", "knn_top1"} & found["without"][0].keys()
    for key in ("loss", "effective_rank"):
        assert found["with"][0][key] == found["without"][0][key]
    for key, tensor in found["with"][1].items():
        assert torch.equal(tensor, found["without"][1][key]), key
