"""Training by other losses than InfoNCE: Barlow Twins, VICReg, SimSiam, BYOL."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import binom
from torch import nn

import collapse
from collapse import InputError, cli
from collapse.data.labelled import open_data
from collapse.recipes.config import METHODS, OWN, make_config
from collapse.training import network
from collapse.training.loader import BatchOrder
from collapse.training.losses import barlow_twins, negative_cosine, vicreg
from collapse.training.network import Network, backward, resolve
from collapse.training.optim import target_momentum
from collapse.training.run import Run
from collapse.training.train import Options, Training, train

NEW = METHODS[2:]
TINY = make_config("digits", blocks=(1, 1), planes=(8, 32), epochs=2, batch_size=32, warmup=1, dim=16, method="byol")


@pytest.fixture(scope="module")
def digits():
    return [open_data("sklearn:digits", split).subset(np.arange(300)) for split in ("train", "val")]


def of(method):
    return replace(TINY, method=method, lr=0.02 if method == "barlow-twins" else 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_is_completed_as_its_networks_is(method):
    for config in (replace(TINY, method=method), replace(TINY, method=method, dim=0)):
        found = resolve(config)
        assert found == Network(config, 1).config
        assert found.dim


def test_a_configuration_is_completed_without_a_draw_from_torchs_generator(monkeypatch):
    def make(*shape):
        net = nn.Flatten()
        net.width = 8 + int(torch.rand(1).item())  # of no use without memory: it is made with it
        return net

    monkeypatch.setattr(network, "make_backbone", make)
    before = torch.get_rng_state()
    assert resolve(replace(TINY, planes=(3, 7), dim=5)).dim == 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": "group", "dim": 12}, "leave dim= out"),
        ({"head": "mlp", "depth": 2}, "only linear takes more"),
        ({"head": "nothing"}, "expected one of"),
        ({"stem": 5}, "expected 7 or 3"),
    ],
)
def test_a_configuration_that_no_network_has_is_refused_without_one(values, message):
    config = replace(TINY, method="simclr", **values)
    for made in (resolve, lambda config: Network(config, 1)):
        with pytest.raises(InputError, match=message):
            made(config)


def views():
    """Four (12, 5) float64 with gradients: embeddings of 12 images in two views, and two targets."""
    i, j, k = np.arange(12.0)[:, None], np.arange(5.0), np.arange(4.0)[:, None, None]
    rows = np.sin(7 * i + 3 * j * j + 1) / (1 + j) + 0.3 * np.sin(5 * i * (j + 1) + 11 * k)
    return [torch.tensor(one, requires_grad=True) for one in rows]


def moments(rows):
    """Means, and covariances with divisor n, of a view, entry by entry."""
    n, m = rows.shape
    means = [sum(rows[b, i] for b in range(n)) / n for i in range(m)]
    between = lambda i, j: sum((rows[b, i] - means[i]) * (rows[b, j] - means[j]) for b in range(n)) / n
    return means, [[between(i, j) for j in range(m)] for i in range(m)]


def plain_barlow_twins(a, b):
    """Equations 1 and 2 of arXiv 2103.03230; the variances of batch norm have 1e-5 added."""
    n, m = a.shape
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    total = 0
    for i in range(m):
        for j in range(m):
            product = sum((a[k, i] - mean_a[i]) * (b[k, j] - mean_b[j]) for k in range(n)) / n
            c = product / ((cov_a[i][i] + 1e-5) * (cov_b[j][j] + 1e-5)).sqrt()
            total = total + ((1 - c) ** 2 if i == j else 5e-3 * c**2)
    return total


def plain_vicreg(a, b):
    """Section 4.1 of arXiv 2105.04906, with its code's factors: invariance / m, variance / 2."""
    n, m = a.shape
    total = 25 * sum((a[k, i] - b[k, i]) ** 2 for k in range(n) for i in range(m)) / (n * m)
    for rows in (a, b):
        cov = [[value * n / (n - 1) for value in row] for row in moments(rows)[1]]
        total = total + 25 / 2 * sum((1 - (cov[i][i] + 1e-4).sqrt()).clamp(min=0) for i in range(m)) / m
        total = total + sum(cov[i][j] ** 2 for i in range(m) for j in range(m) if i != j) / m
    return total


def plain_byol(p, q, target, target_prime):
    """Equation 2 of arXiv 2006.07733, both directions."""
    unit = lambda row: row / row.square().sum().sqrt()
    pairs = [(p, target_prime.detach()), (q, target.detach())]
    return sum((unit(a) - unit(b)).square().sum() for one, other in pairs for a, b in zip(one, other, strict=True)) / 12


# Of lightly 1.6.0 (BarlowTwinsLoss, VICRegLoss, NegativeCosineSimilarity both ways, halved) and, for BYOL, of
# solo-learn 1.0.2 (byol_loss_func both ways), on views(): the loss, and the squared norms of both gradients.
THEIRS = {
    "barlow-twins": (0.9615337832671523, 5.314932103088075, 7.158834817885525),
    "vicreg": (17.043714119075904, 3.2957744414493857, 3.652590566052992),
    "simsiam": (-0.621621422034166, 0.015067822779866364, 0.015285929936291628),
    "byol": (1.5135143118633358, 0.24108516447786182, 0.24457487898066604),
}


@pytest.mark.parametrize("method", NEW)
def test_losses_and_gradients_are_the_papers_and_the_libraries(method):
    plain = {
        "barlow-twins": plain_barlow_twins, "vicreg": plain_vicreg, "byol": plain_byol,
        "simsiam": lambda *rows: (plain_byol(*rows) - 4) / 4,
    }[method]  # fmt: skip
    network = Network(of(method), 10)
    count = 4 if method in ("simsiam", "byol") else 2
    found = []
    for loss in (lambda *rows: network.loss(rows), plain):
        rows = views()[:count]
        value = loss(*rows)
        value.backward()
        found.append((value.item(), [one.grad for one in rows]))
    (ours, grads), (expected, wanted) = found
    assert ours == pytest.approx(expected, rel=1e-12)
    for mine, theirs in zip(grads[:2], wanted[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    assert grads[2:] == [None] * (count - 2)  # targets carry none
    assert [ours, *(float(one.square().sum()) for one in grads[:2])] == pytest.approx(THEIRS[method], rel=1e-12)


@pytest.mark.parametrize("loss", [barlow_twins, vicreg, negative_cosine])
def test_losses_are_float32_under_autocast(loss):
    rows = [one.detach().float() for one in views()[: 4 if loss is negative_cosine else 2]]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*rows), inside := loss(*rows))
        assert loss(*(one.bfloat16() for one in rows)).dtype == torch.float32
    assert torch.equal(loss(*rows), inside)


def test_networks_have_the_papers_predictors_and_widths():
    with torch.device("meta"):
        made = {method: Network(make_config("imagenet", method=method), 10) for method in METHODS}
    for method, hidden, dim in (("simsiam", 512, 2048), ("byol", 4096, 256)):
        predictor = made[method].predictor
        assert [type(m).__name__ for m in predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert predictor[0].weight.shape == (hidden, dim)
        assert predictor[3].weight.shape == (dim, hidden)
        assert predictor[0].bias is None
    for method in ("barlow-twins", "vicreg"):
        shapes = [tuple(m.weight.shape) for m in made[method].projector if isinstance(m, nn.Linear)]
        assert shapes == [(8192, 2048), (8192, 8192), (8192, 8192)]
        assert isinstance(made[method].projector[-1], nn.Linear)
    plain = list(made["simclr"].state_dict())
    assert not [name for name in plain if name.startswith(("predictor", "target"))]  # as runs of before have it


def test_the_target_follows_the_online_network_along_its_schedule(digits):
    training = Training(of("byol"), 10, BatchOrder(300, 32, 2, 0), Options())
    online = [*training.network.backbone.parameters(), *training.network.projector.parameters()]
    expected = [one.detach().clone() for one in online]
    assert all(torch.equal(a, b) for a, b in zip(training.network.target.parameters(), expected, strict=True))
    for step in range(4):
        training.run_step((torch.rand(8, 3, 8, 8), torch.rand(8, 3, 8, 8)), torch.zeros(8, dtype=torch.long))
        share = 1 - (1 - 0.996) * (math.cos(math.pi * step / 18) + 1) / 2
        expected = [share * old + (1 - share) * new.detach() for old, new in zip(expected, online, strict=True)]
    for mine, theirs in zip(training.network.target.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert mine.grad is None
    assert (target_momentum(0, 8, 0.9), target_momentum(8, 8, 0.9)) == (pytest.approx(0.9), 1.0)


def test_gradients_come_in_chunks_for_every_method():
    # Without batch norm, exactly: the loss sees the whole batch, and targets are not learned from.
    views = torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for method in NEW:
        found = []
        for chunks in (1, 3):
            config = make_config("digits", method=method, head="linear", arch="mlp", planes=(24, 16))
            network = Network(replace(config, chunks=chunks), 10).double().train()
            for part in [*network.modules()]:
                for name, child in part.named_children():
                    if isinstance(child, nn.BatchNorm1d):
                        setattr(part, name, nn.Identity())
            loss = backward(network, network, views, torch.arange(12) % 10, "cpu")
            found.append([loss, *(p.grad for p in network.parameters() if p.requires_grad)])
        for whole, parts in zip(*found, strict=True):
            torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", NEW)
def test_a_method_trains_and_what_it_made_is_read(digits, tmp_path, method):
    log = list(train(tmp_path, of(method), *digits, Options(held=200, knn_every=2)))
    losses = [line["epoch_loss"] for line in log]
    assert losses[-1] < losses[0]
    assert {"effective_rank", "embedding_effective_rank"} <= log[-1].keys()
    # Chance is right for a tenth of 200 guesses; a share above this has probability 1e-9.
    assert log[-1]["knn_top1"] > binom.ppf(1 - 1e-9, 200, 0.1) / 200
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert stored["method"] == method
    assert {name for name in OWN if name in stored} == {name for name in OWN if method in OWN[name]}
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["collapse"])["training"] == stored
        assert not [name for name in file.keys() if name.startswith(("predictor", "target"))]  # noqa: SIM118
    found = collapse.layer_spectra(tmp_path / "encoder.safetensors", digits[1].images.pixels, layers=["projector"])
    with np.load(tmp_path / "spectra.npz") as spectra:
        assert spectra["embedding"].shape[1] == found["projector"].dim == 16
    assert list(train(tmp_path, of(method), *digits, Options(held=200, knn_every=2))) == []


def test_a_run_that_stops_goes_on_to_the_same_bits_with_predictor_and_target(digits, tmp_path):
    options = Options(save_every=3, log_every=1, knn_every=0, spectrum_every=0)
    list(train(tmp_path / "unbroken", of("byol"), *digits, options))
    running = train(tmp_path / "broken", of("byol"), *digits, options)
    for _ in range(5):
        next(running)
    running.close()
    list(train(tmp_path / "broken", of("byol"), *digits, options))
    one, other = (tmp_path / name for name in ("unbroken", "broken"))
    assert (one / "encoder.safetensors").read_bytes() == (other / "encoder.safetensors").read_bytes()
    states = []
    for folder in (one, other):
        run = Run(folder, json.loads((folder / "config.json").read_text())["config"], {})
        states.append(run.load()["network"])
        run.close()
    assert states[0].keys() == states[1].keys()
    assert {name.split(".")[0] for name in states[0]} == {"backbone", "projector", "classifier", "predictor", "target"}
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method barlow-twins --temperature 0.1", "temperature: barlow-twins has none, simclr and directclr only"),
        ("--method simclr --redundancy 0.1", "redundancy: simclr has none, barlow-twins only; leave it out"),
        ("--target-momentum 0.9 --method simsiam", "target_momentum: simsiam has none, byol only"),
        ("--method vicreg --head group", "head group: each group has an InfoNCE of its own"),
        ("--method vicreg --batch-size 1", "batch_size: got 1, vicreg has statistics of 2 images or more"),
        ("--method vicreg --vicreg-weights 25 -1 1", "redundancy, vicreg_weights, predictor_dim: expected 0 or more"),
        ("--method byol --target-momentum 1.5", "target_momentum: got 1.5, expected a share, 0 to 1"),
        ("--method moco", "method: got 'moco', expected simclr or directclr or barlow-twins"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path, capsys, options, message):
    call = f"train --preset digits --data sklearn:digits --out {tmp_path}/run {options}"
    assert cli.main(call.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_preset_that_names_a_method_holds_only_what_it_has(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"method": "vicreg", "temperature": 0.2}))
    with pytest.raises(InputError, match="temperature: vicreg has none"):
        make_config(str(path))
    path.write_text(json.dumps({"method": "vicreg", "vicreg_weights": [10.0, 10.0, 1.0]}))
    assert make_config(str(path)).vicreg_weights == (10.0, 10.0, 1.0)
    assert "temperature" not in make_config("digits", method="vicreg").as_dict()
