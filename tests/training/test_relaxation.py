"""A frozen trunk's last map, relaxed on views: it stands still where water-filling says, and what heads leave of r."""

import sys

import numpy as np
import pytest
import relaxation as script
import scipy.linalg
import study
import summary
import torch

from collapse import InputError
from collapse.data.labelled import of_arrays
from collapse.models.heads import make_head
from collapse.recipes.config import make_config
from collapse.recipes.views import uniforms
from collapse.results import load_result
from collapse.training import relaxation as module
from collapse.training.network import Network
from collapse.training.relaxation import Relaxation, Views, agreement, living, relax, represented

DIM, TEMPERATURE = 12, 0.5
RHO = np.array([0.95, 0.93, 0.9, 0.88, 0.86, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.02])
SCALES = np.geomspace(3, 0.3, DIM)
HEADS = {"none": ("none", DIM), "linear": ("linear", 8), "directclr": ("lowrank-diagonal", 8), "mlp": ("mlp", 8)}


@pytest.fixture(scope="module")
def views():
    """Gaussian, of known signal fractions, in a turned basis: 1,000 images in 4 views."""
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((1000, 1, DIM)) * np.sqrt(RHO)
    seen = clean + rng.standard_normal((1000, 4, DIM)) * np.sqrt(1 - RHO)
    return Views(seen * SCALES @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] + 3)


def relaxed(views, head, limit=100, lr=0.2, **how):
    torch.manual_seed(0)
    relaxation = Relaxation(views, make_head(HEADS[head][0], DIM, HEADS[head][1]), TEMPERATURE, lr, 128, **how)
    return relaxation, relax(relaxation, first=50, limit=limit)


def test_a_head_of_the_study_comes_by_name_and_draws_nothing_from_the_caller(views):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for head, count in (("none", DIM), ("directclr", 2), ("linear", DIM), ("mlp", DIM)):
        made, again = (Relaxation.of(views, head, TEMPERATURE, seed=1) for _ in range(2))
        assert made.count == count
        assert (made.V is None) == (head in ("none", "directclr"))
        made.step()
        again.step()
        assert torch.equal(made.W, again.W)
    assert torch.equal(torch.rand(3), wanted)
    with pytest.raises(InputError, match="head= is 'group', expected"):
        Relaxation.of(views, "group", TEMPERATURE)


def test_views_have_the_signal_fractions_they_were_made_with(views):
    np.testing.assert_allclose(views.fractions, RHO, atol=0.05)
    np.testing.assert_allclose(views.modes.T @ views.total @ views.modes, np.eye(DIM), atol=1e-9)
    np.testing.assert_allclose(views.rows.square().mean(), 1, rtol=1e-5)


@pytest.mark.parametrize(("head", "kept"), [("none", 0), ("linear", DIM - 5), ("directclr", DIM - 8)])
def test_a_linear_map_stands_still_where_water_filling_says(views, head, kept):
    """Five live; r keeps what the loss does not see: all behind a projector, the last four entries of DirectCLR's."""
    predicted, counts = Relaxation(views, make_head(HEADS[head][0], DIM, HEADS[head][1]), TEMPERATURE).predicted()
    assert np.array_equal(predicted, views.predicted(HEADS[head][1], TEMPERATURE))
    assert (predicted > 0).sum() == 5
    assert counts == {"z": [5, 5], "r": [5 + kept, 5 + kept]}
    _, (state, _, _) = relaxed(views, head, lr=0.1 if head == "linear" else 0.2)
    assert state.living()["z"][0] == 5
    assert state.living()["r"][0] == 5 + kept
    assert np.abs(state.shares - predicted).sum() / 2 < 0.06


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("lr", [0.02, 0.3])
def test_the_balance_of_the_layers_is_kept_however_long_the_steps_and_leaves_r_alive(views, head, lr):
    relaxation, (state, _, _) = relaxed(views, head, limit=50, lr=lr)
    start = relaxed(views, head, limit=0, lr=lr)[0]
    assert torch.linalg.matrix_norm(relaxation.W - start.W) > 0.01
    assert 0 < state.drift < 1e-12
    assert state.living()["r"] == [DIM, DIM]
    assert relaxation.rest.training


def test_a_step_of_two_layers_is_the_flow_to_second_order(views):
    """Beside scipy's exponential: [W, V^T] exp(-K), K = [[0, H^T], [H, 0]]."""
    relaxation = Relaxation.of(views, "linear", TEMPERATURE)
    H = torch.randn(*relaxation.V.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H, m, errors = H / torch.linalg.matrix_norm(H, 2), len(H), []
    for share in (0.02, 0.01):
        W, V = module._balanced_step(relaxation.W, relaxation.V, share * H)
        K = np.zeros((DIM + m, DIM + m))
        K[DIM:, :DIM], K[:DIM, DIM:] = share * H, share * H.T
        flow = np.hstack([relaxation.W, relaxation.V.T]) @ scipy.linalg.expm(-K)
        errors.append(np.abs(np.hstack([W, V.T]) - flow).max())
    before = relaxation.W @ relaxation.W.T - relaxation.V.T @ relaxation.V
    plain = relaxation.W - relaxation.V.T @ H, relaxation.V - H @ relaxation.W.T
    grown, kept = (W @ W.T - V.T @ V - before for W, V in (plain, module._balanced_step(relaxation.W, relaxation.V, H)))
    assert grown.abs().max() > 0.1
    assert kept.abs().max() < 1e-12
    assert errors[0] < 1e-5
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)


def test_it_ends_when_nothing_moves_or_at_the_limit(views):
    seen = []
    relaxation = Relaxation(views, make_head("none", DIM, DIM), TEMPERATURE, 0.2, 64)
    state, moved, seconds = relax(relaxation, 10, 40, 0.0, lambda state, moved: seen.append((state.step, moved)))
    assert [step for step, _ in seen] == [10, 20, 40]
    assert moved == seen[-1][1] > 0
    assert state.step == 50
    assert seconds > 0
    _, moved, _ = relax(Relaxation(views, make_head("none", DIM, DIM), TEMPERATURE, 0.2, 64), 10, 40, 1.0)
    assert moved <= 1


def test_equal_seeds_give_equal_weights(views):
    runs = [Relaxation(views, make_head("none", DIM, DIM), TEMPERATURE, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.step()
        run.step()
    assert torch.equal(runs[0].W, runs[1].W)
    assert not torch.equal(runs[0].W, runs[2].W)


def test_shares_are_compared_where_theory_lets_live_and_what_the_dead_hold_is_told():
    found = agreement(np.array([0.3, 0.5, 0.1, 0.06, 0.04]), np.array([0.6, 0.3, 0.1, 0, 0]))
    assert found["spearman"] == pytest.approx(0.5)
    assert found["held"] == pytest.approx(0.1)


def test_views_are_those_of_training_each_image_its_own_over_batches_too():
    config = make_config("cifar10", blocks=(1,), planes=(8,), blur=(1.0, 0.1))
    pixels = torch.randint(0, 256, (260, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = Network(config, 10).backbone
    found = represented(net, config, of_arrays(pixels, np.arange(260) % 10), 260, 2)
    assert found.shape == (260, 2, 8)
    augmentation = config.augmentation(0)
    for image, view in ((3, 0), (255, 0), (255, 1)):  # the second batch begins at 250
        u = uniforms(config.seed + 1, 0, np.array([image]), view, augmentation.DRAWS)
        x = config.preprocessing().standardise(augmentation(pixels[image : image + 1], u))
        with torch.no_grad():
            np.testing.assert_allclose(found[image, view], net(x)[0].numpy(), rtol=1e-4, atol=1e-6)


def test_what_counts_as_living():
    assert living(np.array([1.0, 1e-2, 1e-4, 1e-9]), 1e-6) == [2, 3]
    assert living(np.array([1e-3, 1e-7]), 1e-2) == [0, 0]


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4), (1, 2, 4)])
def test_views_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(InputError, match="2 views or more"):
        Views(np.zeros(shape))


def test_cells_are_predicted_relaxed_kept_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"IMAGES": 80, "FIRST": 2, "STILL": 0.0}.items():
        monkeypatch.setattr(script, name, value)
    call = ["relaxation.py", "--data", "sklearn:digits", "--only", "trained-*-t0.5-s0", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", [*call, "--out", "relaxation.npz"])
    script.main(script.__file__, script.simulate, script.report, script.draw)
    meta, arrays = load_result(tmp_path / "relaxation.npz")
    assert [(cell["head"], cell["steps"]) for cell in meta["cells"]] == [(head, 5) for head in script.HEADS]
    widths = {cell["head"]: len(arrays[f"{cell['name']}-z"]) for cell in meta["cells"]}
    assert widths == {"none": 512, "directclr": 90, "linear": 128, "mlp": 128}
    (order,) = meta["orders"]
    none = next(cell for cell in meta["cells"] if cell["head"] == "none")
    assert order["dead"]["none"] == [512 - count for count in none["measured"]["r"]]
    assert "4 of 48 cells" in capsys.readouterr().out
    assert (tmp_path / "relaxation.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/relaxation").iterdir()}
    script.main(script.__file__, script.simulate, script.report, script.draw)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/relaxation").iterdir()}
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    drawn = summary.relaxed(["none", "mlp"], "r")["0.5"]
    assert drawn["none"]["seeds"] == [0]
    assert len(drawn["mlp"]["values"][0]) == 512
    assert drawn["none"]["predicted"] == [none["predicted"]["r"]]
    assert summary.relaxed(["none", "diagonal"], "r") == {}
