"""The study: its runs differ in what they say they do, its measures are what they claim, its scripts run end to end."""

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import diagnosis
import matplotlib
import numpy as np
import predictors
import pytest
import regimes
import study
import summary
import torch
from processes import begun, code_of, scripted
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from collapse import plots
from collapse.data.labelled import of_arrays
from collapse.diagnosis import wording
from collapse.metrics.attribution import CAUSES
from collapse.models.heads import make_head
from collapse.recipes.config import make_config
from collapse.results import load_result
from collapse.training.network import Network, save_encoder
from collapse.training.relaxation import represented

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDY = EXPERIMENTS / "networks/study.py"
SCRIPTS = sorted(path for path in EXPERIMENTS.rglob("*.py") if "import summary" in path.read_text())


@pytest.fixture(scope="module")
def plan():
    return study.plan(study.PRESET)


@pytest.mark.parametrize("head", ["linear", "orthogonal", "lowrank", "none"])
def test_the_heads_of_a_run_on_cuda_are_read_from_the_device(monkeypatch, head):
    def numpy(tensor):
        assert tensor.device.type == "cpu"
        return np.ones(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)  # a card that is not there has no numbers
    with FakeTensorMode(), torch.device("cuda"):
        net = make_head(head, 12, 12 if head in ("orthogonal", "none") else 6)
        assert {p.device.type for p in [*net.parameters(), *net.buffers()]} <= {"cuda"}
        assert study.product(net, 12)[-1].shape[1] == 12


def difference(one, two):
    return {key for key, value in one.as_dict().items() if value != two.as_dict()[key]}


def test_runs_are_a_flag_apart(plan):
    assert difference(plan["none-s0"], plan["mlp-s0"]) == {"head", "dim"}
    assert difference(plan["mlp-s0"], plan["linear-s0"]) == {"head"}
    assert difference(plan["mlp-s0"], plan["mlp-s2"]) == {"seed"}
    assert difference(plan["directclr-s0"], plan["directclr-d8-s0"]) == {"dim"}
    assert difference(plan["linear-s0"], plan["linear-depth2-s0"]) == {"depth"}
    assert difference(plan["lowrank-s1"], plan["lowrank-t0.5-s1"]) == {"temperature"}
    for name, config in plan.items():
        kind, head, *setting = name.split("-", 2)
        if kind in ("choice", "map") and setting != ["base"] and not setting[0].startswith("strength"):
            axis = setting[0].split("-")[0]
            others = {"width": {"planes"}, "batch_size": {"batch_size", "lr"}}
            wanted = others.get(axis, {axis})
            if axis == "crop":  # in float32; one of them has the preset's own
                _, value, seed = setting[0].split("-")
                wanted = (
                    {"precision"} | ({"scale"} if value != "0.2" else set()) | ({"seed"} if seed != "s0" else set())
                )
            own = difference(plan[f"choice-{head}-base"], config)
            # A linear head's and DirectCLR's own widths follow the network's.
            assert own - {"dim"} == wanted, name


def test_the_papers_regime_has_the_papers_views_optimiser_and_temperature(plan):
    runs = {name: config for name, config in plan.items() if study.PAPER in name}
    weak = {name.replace(study.WEAK, study.PAPER): runs.pop(name) for name in list(runs) if study.WEAK in name}
    assert set(runs) == {f"{head}-paper-s{seed}" for head in study.FOUR for seed in range(3)}
    assert set(weak) == {f"{head}-paper-s{seed}" for head in ("none", "mlp") for seed in range(3)}
    assert all(difference(config, runs[name]) == {"scale", "blur", "solarize"} for name, config in weak.items())
    assert len({json.dumps(replace(c, method="", head="", dim=0, seed=0).as_dict()) for c in runs.values()}) == 1
    ours, paper = runs["none-paper-s0"], make_config("imagenet")
    for view in (0, 1):
        assert replace(ours.augmentation(view), size=224) == paper.augmentation(view)
    for name in ("temperature", "optimizer", "weight_decay", "lr"):
        assert getattr(ours, name) == getattr(paper, name), name


def test_a_seed_moves_every_run_and_its_folder(plan):
    other = study.plan(study.PRESET, seed=5)
    assert {name: config.seed - 5 for name, config in other.items()} == {n: c.seed for n, c in plan.items()}
    places = {study.where(study.flags("").parse_args(["--seed", seed])) for seed in ("0", "5")}
    assert len(places) == 2


def test_no_choice_is_made_by_the_images_that_are_reported_on():
    chosen, test = study.sets("choice-none-base", "sklearn:digits")
    everything, val = study.sets("none-s0", "sklearn:digits")
    rows = lambda data: {data.images.pixels[i].numpy().tobytes() for i in range(len(data))}
    assert not rows(chosen) & rows(test)
    assert rows(chosen) | rows(test) <= rows(everything)
    assert len(val) == 600
    assert len(chosen) == 2 * len(test)
    part, held = study.sets("none-paper-s0", "sklearn:digits")
    assert rows(part) <= rows(everything)
    assert len(part) == len(everything) // 4
    assert rows(held) == rows(val)


def test_a_row_counts_what_lies_under_a_share_of_the_largest_and_at_the_floor():
    meta, arrays = load_result(study.RESULTS / "study/none-paper-s0.npz")
    ratio = arrays["singular_values"] / arrays["singular_values"].max()
    floor = np.sort(arrays["singular_values"])[40] / summary.CLEAR
    (row,) = summary.rows(summary.Runs({"none-paper-s0": (meta, arrays | {"floor": floor})}), ["none"], study.PAPER)
    assert row["at_floor"] == [41]
    assert row[summary.RANKS[2]] == [(ratio < 1e-3).sum()]


def test_stronger_views_are_compared_over_the_seeds():
    ranks = {"paper": [(12, 6), (9, 6)], "paper-weak": [(30, 6), (20, 5)], "base": [(1, 2)]}
    runs = {}
    for setting, pairs in ranks.items():
        for seed, pair in enumerate(pairs):
            for head, rank in zip(("none", "mlp"), pair, strict=True):
                meta = {"curve": [{"effective_rank": 99}, {"effective_rank": rank}], "config": {"seed": seed}}
                meta |= {"probe_top1": 0.5, "probe_interval": [0.4, 0.6], "metrics": {"collapsed_dimensions_1e-03": 7}}
                name = f"choice-{head}-base" if setting == "base" else f"{head}-{setting}-s{seed}"
                runs[name] = (meta, {})
    found = regimes.summarise(summary.Runs(runs))
    assert {one["setting"]: one["seeds"] for one in found["settings"]} == {
        "paper": [0, 1],
        "paper-weak": [0, 1],
        "base": [0],
    }
    expected = {name: np.log([a / b for a, b in pairs]) for name, pairs in ranks.items()}
    for one in found["settings"]:
        assert one["ln_ratio"] == pytest.approx(expected[one["setting"]])
        assert one["none"]["effective_rank"][0] == [99, ranks[one["setting"]][0][0]]
    own, weak = expected["paper"], expected["paper-weak"]
    first, crops = found["views"]
    assert [row["ln_ratio"] for row in first["rows"]] == [pytest.approx(own), pytest.approx(weak)]
    (claim,) = first["claims"]
    assert (claim["above"], claim["below"]) == ("paper-weak", "paper")
    assert claim["p"] == pytest.approx(stats.ttest_ind(own, weak, equal_var=False).pvalue)
    assert crops == {"rows": [], "claims": []}
    low, high = stats.t.interval(0.95, 1, np.mean(own), stats.sem(own))
    assert regimes.half_width(own) == pytest.approx((high - low) / 2)
    assert regimes.title({"setting": "paper", "seeds": [0, 1]}) == "paper's regime, 2 seeds"
    assert regimes.title({"setting": "crop-0.08", "seeds": [0]}) == "crops from 0.08"


def test_a_spectrum_is_drawn_no_deeper_than_the_floor():
    values = [np.array([1.0, 1e-3, 0.0])]  # a dead unit has nothing
    config = {"epochs": 1, "lr": 4.8}
    found = {"floor": 1e-12, "relaxed": {}, "configs": {"paper": config}, "paper": {"none": values, "mlp": values}}
    (ax,) = summary.draw_spectra(found, "r").axes
    assert min(line.get_ydata().min() for line in ax.lines) == pytest.approx(np.log(1e-12))


def gaussian_views(rng, images, d):
    """Views whose covariances of signal and augmentation are known."""
    signal, noise = (a @ a.T / d for a in rng.normal(size=(2, d, d)))
    clean = rng.multivariate_normal(np.zeros(d), signal, images)
    views = clean[:, None] + rng.multivariate_normal(np.zeros(d), noise, (images, study.VIEWS))
    return views, signal, noise


def test_signal_and_augmentation_are_told_apart():
    views, signal, noise = gaussian_views(np.random.default_rng(0), 40_000, 6)
    between, within = study.covariances(views)
    # An entry of a covariance of n rows deviates by at most sqrt(2 / n) of the largest variance: 5 deviations.
    largest = [np.diag(c).max() for c in (signal + noise, noise)]
    np.testing.assert_allclose(between, signal, rtol=0, atol=5 * np.sqrt(2 / 40_000) * largest[0])
    np.testing.assert_allclose(within, noise, rtol=0, atol=5 * np.sqrt(2 / 120_000) * largest[1])


def test_the_modes_shares_are_those_of_the_embedding():
    rng = np.random.default_rng(1)
    views, _, _ = gaussian_views(rng, 2000, 8)
    between, within = study.covariances(views)
    W = rng.normal(size=(3, 8))
    found = study.modes_of(views, W)
    values, vectors = np.linalg.eig(np.linalg.solve(between + within, between))  # another way to the same modes
    order = np.argsort(-values.real)
    np.testing.assert_allclose(found["modes_rho"], values.real[order], rtol=1e-9)
    u = vectors.real[:, order]
    u = u / np.sqrt(np.einsum("ik,ij,jk->k", u, between + within, u))
    share = ((W @ (between + within) @ u) ** 2).sum(0)
    np.testing.assert_allclose(found["modes_share"], share / np.trace(W @ (between + within) @ W.T), rtol=1e-8)


def test_claims_are_welchs_with_holms_correction():
    table = [
        {"name": h, "probe_top1": v}
        for h, v in (("a", [0.5, 0.52, 0.51]), ("b", [0.4, 0.43, 0.41]), ("c", [0.4, 0.5, 0.6]))
    ]
    found = {(c["above"], c["below"]): c for c in summary.claims(table)}
    assert set(found) == {("a", "b"), ("a", "c"), ("c", "b")}
    raw = {
        pair: stats.ttest_ind(*[next(r["probe_top1"] for r in table if r["name"] == h) for h in pair], equal_var=False)
        for pair in found
    }
    assert found["a", "b"]["p"] == pytest.approx(3 * raw["a", "b"].pvalue)
    assert found["a", "c"]["p"] == pytest.approx(max(found["c", "b"]["p"], raw["a", "c"].pvalue))
    assert found["a", "b"]["interval"] == pytest.approx(list(raw["a", "b"].confidence_interval()))


def test_the_signal_is_that_of_all_classes():
    """Files come sorted by class: the first of them are one class."""
    labels = np.repeat(np.arange(10), 40)
    pixels = torch.from_numpy(labels.astype(np.uint8) * 20)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    config = make_config("digits", jitter=0.0, grayscale=0.0)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    views = represented(net, config, of_arrays(pixels, labels), 60, study.VIEWS)
    assert views.shape == (60, study.VIEWS, 3)
    assert len(np.unique(views[:, 0, 0].round(3))) == 10


def test_directclrs_embedding_is_its_subvector(tmp_path):
    config = study.plan("digits")["directclr-s0"]
    save_encoder(tmp_path / "encoder.safetensors", Network(config, 10))
    net = study.load(tmp_path / "encoder.safetensors", config)
    rows = torch.randn(3, net.report["feature_dim"])
    assert torch.equal(net.projector(rows), rows[:, : config.dim])
    assert 0 < config.dim < rows.shape[1]


def test_what_was_chosen_on_small_images_is_not_forced_on_others(plan):
    assert plan["mlp-s0"].lr == pytest.approx(3 * make_config(study.PRESET).lr)
    assert study.plan("digits")["mlp-s0"].lr == make_config("digits").lr


def test_a_setting_is_left_out_as_a_whole():
    rng = np.random.default_rng(0)
    x, groups = rng.standard_normal((24, 2)), np.repeat(np.arange(8), 3)
    y = x @ [1.0, -2.0] + rng.standard_normal(24)
    wanted = cross_val_predict(LinearRegression(), x, y, groups=groups, cv=LeaveOneGroupOut())
    np.testing.assert_allclose(predictors.left_out(x, y, groups), wanted, rtol=1e-9)


def test_intervals_do_not_shrink_when_seeds_are_copied():
    rng = np.random.default_rng(0)
    keys = ("effective_rank", "both")
    y, columns = rng.standard_normal(12), {key: rng.standard_normal(12) for key in keys}
    alone = predictors.correlations(columns, y, np.arange(12), 0)
    for key in keys:
        assert alone[key]["rho"] == pytest.approx(stats.spearmanr(columns[key], y).statistic)
    columns = {key: np.repeat(column, 5) for key, column in columns.items()}
    copied = predictors.correlations(columns, np.repeat(y, 5), np.repeat(np.arange(12), 5), 0)
    for key in (*keys, "gain"):
        assert copied[key]["interval"] == pytest.approx(alone[key]["interval"])
    low, high = alone["effective_rank"]["interval"]
    assert high - low > 0.5  # of twelve settings little is known


def test_runs_save_and_end_when_their_queue_is_killed(tmp_path):
    call = [STUDY, "--data", "sklearn:digits", "--epochs", 100, "--only", "mlp-s?"]
    with open(os.devnull, "w") as nowhere:
        queue = begun(*call, files=(nowhere, nowhere), cwd=tmp_path)
    logs = [tmp_path / f"runs/study-{study.PRESET}-x100/mlp-s{seed}/metrics.jsonl" for seed in (0, 1)]
    ended = time.monotonic() + 400
    while not all(log.exists() for log in logs) and time.monotonic() < ended:
        time.sleep(0.5)
    held = [json.loads((log.parent / ".lock").read_text())["pid"] for log in logs]
    os.kill(queue, signal.SIGKILL)
    assert code_of(queue) == -signal.SIGKILL
    while any(Path(f"/proc/{pid}").exists() for pid in held) and time.monotonic() < ended:
        time.sleep(0.5)
    assert not any(Path(f"/proc/{pid}").exists() for pid in held)
    assert all((log.parent / "resume.pt").exists() for log in logs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run on the digits, and its result under the name of every other."""
    folder = tmp_path_factory.mktemp("study")
    command = [STUDY, "--data", "sklearn:digits", "--epochs", 0.34, "--only", "linear-depth2-s0"]
    ran = scripted(*command, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    results = folder / f"runs/study-{study.PRESET}-x0.34/results"
    content = (results / "linear-depth2-s0.npz").read_bytes()
    again = scripted(*command, cwd=folder)
    assert (again.returncode, again.stdout) == (0, "")
    assert (results / "linear-depth2-s0.npz").read_bytes() == content
    for name in study.plan(study.PRESET):
        (results / f"{name}.npz").write_bytes(content)
    return folder


def test_a_run_leaves_what_it_says(results):
    meta, arrays = load_result(results / f"runs/study-{study.PRESET}-x0.34/results/linear-depth2-s0.npz")
    assert meta["config"]["depth"] == 2
    assert meta["probe_interval"][0] < meta["probe_top1"] < meta["probe_interval"][1]
    assert [line["epoch"] for line in meta["curve"]] == [1]
    assert arrays["singular_values"].shape == (512,)
    assert arrays["embedding_singular_values"].shape == (128,)
    assert arrays["epochs"].tolist() == [0, 1]
    assert arrays["head_singular_values"].shape == (2, 3, 512)
    assert arrays["alignment"].shape == (2, 128)
    assert arrays["modes_share"].sum() == pytest.approx(1)
    assert meta["signal_fraction"] == pytest.approx(
        arrays["between"].sum() / (arrays["between"] + arrays["within"]).sum()
    )


@pytest.mark.filterwarnings("ignore")  # one run under every name has no variance
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_sums_up(results, monkeypatch, capsys, path):
    name = path.stem
    monkeypatch.chdir(results)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--epochs", "0.34"])
    runpy.run_path(str(path), run_name="__main__")
    folder = results / f"runs/study-{study.PRESET}-x0.34"
    document = json.loads((folder / f"{name}.json").read_text())
    assert document["schema"] == "collapse.study/1"
    assert document["command"][0] == f"{name}.py"
    assert {"config", "versions"} <= set(document)
    assert (folder / f"{name}.png").exists()
    assert (folder / f"{name}.pdf").exists()
    assert capsys.readouterr().out.strip()
    drawn = (folder / f"{name}.png").read_bytes()
    copy = results / f"elsewhere/{name}.json"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes((folder / f"{name}.json").read_bytes())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--plot-only", "--out", str(copy)])
    runpy.run_path(str(path), run_name="__main__")
    assert copy.with_suffix(".png").read_bytes() == drawn
    if name.startswith("table"):
        row = {"method", "head", "seeds", "probe_top1", "knn_top1", "effective_rank", "collapsed_dimensions"}
        assert all(row <= set(one) for one in document["rows"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_missing_is_one_line(results, tmp_path, monkeypatch, capsys, path):
    name = path.stem
    kept = Path(f"runs/study-{study.PRESET}-x0.34/results/none-s0.npz")
    (tmp_path / kept).parent.mkdir(parents=True)
    (tmp_path / kept).write_bytes((results / kept).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--epochs", "0.34"])
    with contextlib.suppress(SystemExit) if name in ("table1", "table2") else pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith((f"{name}.py: ", "wrote ")) for line in lines)
    assert any(line.startswith(f"{name}.py: ") for line in lines)


def test_the_page_quotes_what_the_result_files_hold():
    page = " ".join((EXPERIMENTS.parent / "docs/study.md").read_text().split())
    stored = lambda name: json.loads((EXPERIMENTS / f"results/{name}.json").read_text())
    quoted = []
    for regime in ("chosen", "temperature_0.5"):
        one, two = stored("table1")[regime]["rows"], stored("table2")[regime]["rows"]
        quoted.append("(" + ", ".join(f"{100 * np.mean(row['probe_top1']):.1f}" for row in one))
        ranks = {row["name"]: np.mean(row["effective_rank"]) for row in one}
        quoted.append(f"{ranks['none']:.1f} against {ranks['mlp']:.1f}")
        assert max(two, key=lambda row: np.mean(row["probe_top1"]))["name"] == "lowrank"
        assert min(c["p"] for c in stored("table1")[regime]["claims"] + stored("table2")[regime]["claims"]) > 0.05
        backed = [c["above"] for c in stored("table1")[regime]["rank_claims"] if c["below"] == "mlp" and c["p"] < 0.05]
        assert "none" in backed
    apart = {(c["above"], c["below"]) for c in stored("table2")["chosen"]["rank_claims"] if c["p"] < 0.05}
    flat, steep = ("none", "orthogonal", "diagonal"), ("linear", "lowrank", "directclr")
    assert {(high, low) for high in flat for low in steep} <= apart
    rank = lambda name: load_result(study.RESULTS / f"study/{name}.npz")[0]["metrics"]["effective_rank"]
    strengths = [rank("linear-s0" if s == 1 else f"linear-strength{s:g}-s0") for s in study.STRENGTHS]
    quoted.append(", ".join(f"{value:.1f}" for value in strengths))
    quoted.append(f"{rank('linear-s0'):.1f} with one linear layer behind the network, {rank('linear-depth2-s0'):.1f}")
    theory = stored("network_theory")
    shrunk = theory["shrinkage"].values()
    quoted.append("(Spearman " + ", ".join(f"{one['spearman']:.2f}" for one in shrunk) + " by strength)")
    quoted.append("(R² of the logarithms " + ", ".join(f"{one['r2']:.2f}" for one in shrunk) + ")")
    dead, held = zip(*[(one["dead"][1], 100 * one["held"]["together"]) for one in shrunk], strict=True)
    quoted.append(f"the {min(dead)} to {max(dead)} directions that it calls dead keep 2e-4 each")
    assert all(1.5e-4 < one["held"]["median"] < 3e-4 for one in shrunk)
    quoted.append(f"{min(held):.0f} to {max(held):.0f} % of the variance together")
    weights = [100 * one["weight"][-1] for one in theory["negative"].values()]
    quoted.append("to " + ", ".join(f"{value:.0f}" for value in weights) + " % at strengths 0.25, 0.5, 1, 1.2")
    assert all(0.45 < share < 0.55 for one in theory["negative"].values() for share in one["share"])
    outside = [[100 * value for value in one["outside"]] for one in theory["negative"].values()]
    quoted.append("X is negative along " + ", ".join(f"{one[-1]:.0f}" for one in outside) + " % at the end")
    start = [one[0] for one in outside]
    quoted.append(f"{min(start):.0f} to {max(start):.0f} % at the start")
    aligned = theory["alignment"]["alignment"]
    quoted.append(f"({aligned[0]:.2f} at the start, {aligned[-1]:.2f} at the end)")
    views, crops = stored("regimes")["views"]
    strong, weak = (row["ln_ratio"] for row in views["rows"])
    quoted.append("ratio is {:.2f}, {:.2f} and {:.2f} over the seeds".format(*weak))
    quoted.append("views give {:.2f}, {:.2f} and {:.2f}".format(*strong))
    (moved,) = views["claims"]
    low, high = moved["interval"]
    quoted.append(f"difference is {moved['difference']:.2f} ({low:.2f} to {high:.2f}, p = {moved['p']:.3f})")
    small, large = ("{:.2f}, {:.2f}, {:.2f}".format(*row["ln_ratio"]) for row in crops["rows"])
    quoted.append(f"ratio of the ranks is {small} instead of {large} over three seeds")
    (moved,) = crops["claims"]
    assert (moved["above"], moved["p"] > 0.05) == ("crop-0.2", True)
    low, high = moved["interval"]
    quoted.append(f"difference is {moved['difference']:.2f} ({low:.2f} to {high:.2f}, p = {moved['p']:.2f}), towards")
    predictors = stored("predictors")
    found, within = predictors["correlations"], predictors["within"]
    low, high = found["effective_rank"]["interval"]
    quoted.append(f"(Spearman {found['effective_rank']['rho']:.2f}, 95 % interval {low:.2f} to {high:.2f})")
    quoted += [f"({found[key]['rho']:.2f})" for key in ("lidar", "signal_fraction")]
    gain = [predictors["gain"]["rho"], *predictors["gain"]["interval"]]
    quoted.append("({:.2f}; difference to rank alone {:.2f}, {:.2f} to {:.2f})".format(found["both"]["rho"], *gain))
    parts = [", ".join(f"{one[key]:.2f}" for one in within.values()) for key in ("effective_rank", "signal_fraction")]
    quoted.append("rank has ({}) and signal fraction ({})".format(*parts))
    assert {one["settings"] for one in within.values()} == {7}
    quoted.append(f"the {len(predictors['runs'])} runs in which both were measured")
    about, diagnosed = load_result(study.RESULTS / "network_diagnosis.npz")  # the start, study.FOUR, two relaxed
    counts, orders = diagnosed["counts"], diagnosed["orders"]
    quoted.append("{}, {}, {}, {} are alive at 1e-3 (none, two layers, linear, DirectCLR)".format(*counts[1:5, 0]))
    quoted.append("with {} alive, {} of augmentation and {} dead units".format(*counts[0][[0, 1, 4]]))
    quoted.append("but for {} behind two layers and {} behind a linear one".format(*counts[[2, 3], 2]))
    assert counts[1:5, 2:].sum() == counts[[2, 3], 2].sum()
    quoted.append("is {:.2f} in the start and {:.2f}, {:.2f}, {:.2f}, {:.2f} after training".format(*orders))
    quoted.append("it is {:.2f} behind the start and {:.2f} behind the trained trunk".format(*orders[5:]))
    assert max(orders[0], orders[5]) < wording.ORDERED < orders[[1, 2, 3, 4, 6]].min()
    told = ["no contrastive loss has ordered" in verdict for verdict in about["verdicts"]]
    assert told == [True, False, False, False, False, True, False]
    quoted.append("{}, {}, {} and {} lie below the line too".format(*diagnosed["below"][1:5]))
    quoted.append(f"After the relaxation {diagnosed['below'][6]} of {counts[6, 0]} do")
    summed = load_result(study.RESULTS / "relaxation.npz")[0]
    relaxed = summed["cells"]
    quoted.append(f"planned cells, {len(relaxed)} were run")
    cell = {(c["trunk"], c["head"], c["temperature"], c["seed"]): c for c in relaxed}
    for temperature, text in ((0.2, "Above the floor are {} without a projector, after {:,} steps. This is one seed."),
                              (0.1, "Without a projector {} are above the floor after {:,} steps")):  # fmt: skip
        heads = [cell["trained", head, temperature, 0] for head in ("none", "linear", "mlp")]
        live = [one["measured"]["z"][0] for one in heads]
        quoted.append(f"lets {heads[0]['predicted']['r'][0]} directions live. Above 1e-3 are {live[0]} without")
        quoted.append(f"{live[1]} behind a linear one and {live[2]} behind two layers")
        quoted.append(text.format(heads[0]["measured"]["r"][1], heads[0]["steps"]))
        held = [100 * c["held"] for c in relaxed if c["temperature"] == temperature]
        quoted.append(f"{min(held):.0f} to {max(held):.0f} % at {temperature}")
    trained = [c for c in relaxed if c["trunk"] == "trained"]
    assert all(max(c["error"]["r"]) <= 0.1 for c in relaxed if c["head"] != "mlp")
    assert all(max(c["error"]["r"]) <= 0.03 for c in relaxed if c["head"] == "linear")
    assert max(c["drift"] for c in relaxed) < 5e-11
    arrays = load_result(study.RESULTS / "relaxation.npz")[1]
    of = lambda head, key: arrays[f"trained-{head}-t0.1-s0-{key}"]
    apart = [np.abs(of(head, "shares") - of(head, "predicted")).sum() / 2 for head in ("linear", "mlp", "none")]
    quoted.append("(total variation {:.2f}, {:.2f} and {:.2f})".format(*apart))
    assert all(max(c["error"]["z"]) <= 0.1 for c in relaxed if c["head"] == "none")
    assert min(c["spearman"] for c in trained) >= 0.955
    rows = [c["measured"]["r"][0] for c in trained if c["head"] == "mlp"]
    quoted.append(f"Behind those r has {min(rows)} to {max(rows)} of 512")
    moved = [c["moved"] for c in relaxed]
    quoted.append(f"moved by {min(moved):.2f} to {max(moved):.2f}. Four stood still")
    still = [(c["head"], c["temperature"]) for c in relaxed if c["moved"] <= 0.02]
    assert sorted(still) == [("linear", 0.2)] + 3 * [("linear", 0.5)]
    dead = {(o["trunk"], o["temperature"], o["seed"]): o["dead"] for o in summed["orders"]}
    assert len(dead) == 6
    for key, before in (
        (("trained", 0.2, 0), "is there ("),
        (("trained", 0.1, 0), "none yet ("),
        (("start", 0.5, 0), "there too ("),
    ):
        quoted.append(before + ", ".join(str(dead[key][head][1]) for head in ("none", "directclr", "linear", "mlp")))
    fine = stored("table1")["stem3"]
    top, low = ({row["name"]: np.mean(row[key]) for row in fine["rows"]} for key in ("probe_top1", summary.RANKS[2]))
    quoted.append("(" + ", ".join(f"{100 * value:.1f}" for value in top.values()) + " %")
    quoted.append(", ".join(f"{low[head]:.0f}" for head in ("none", "mlp", "linear", "directclr")))
    ranks = {row["name"]: np.mean(row["effective_rank"]) for row in fine["rows"]}
    quoted.append(f"({ranks['none']:.1f} against {ranks['mlp']:.1f} for none and two layers)")
    backed = {(c["above"], c["below"]): c for c in fine["claims"] if c["p"] < 0.05}
    assert set(backed) == {("mlp", "none")}
    gap = 100 * np.array([backed["mlp", "none"]["difference"], *backed["mlp", "none"]["interval"]])
    quoted.append("({:.1f} points, 95 % interval {:.1f} to {:.1f})".format(*gap))
    backed = {(c["above"], c["below"]) for c in fine["collapsed_claims"] if c["p"] < 0.05}
    assert {("none", "linear"), ("none", "directclr")} <= backed
    assert ("none", "mlp") not in backed
    mean = lambda rows, key, heads: [np.mean(next(r[key] for r in rows if r["name"] == h)) for h in heads]
    both, order = stored("table1")["stem3_temperature_0.5"], ("none", "mlp", "linear", "directclr")
    ranks = [f"{value:.1f}" for value in mean(both["rows"], "effective_rank", order)]
    quoted.append(f"effective rank is {ranks[0]}, with two layers, a linear one and DirectCLR {', '.join(ranks[1:])}")
    quoted.append(", ".join(f"{value:.0f}" for value in mean(both["rows"], summary.RANKS[2], order)) + " of 512")
    quoted.append(", ".join(f"{100 * value:.1f}" for value in mean(both["rows"], "probe_top1", order)) + " %")
    backed = {key: {(c["above"], c["below"]) for c in both[key] if c["p"] < 0.05} for key in both if "claims" in key}
    assert {(head, "none") for head in order[1:]} <= backed["rank_claims"]
    assert len(backed["collapsed_claims"]) == 6
    assert backed["claims"] == {("mlp", "none"), ("linear", "none"), ("mlp", "directclr")}
    own = stored("table1")["paper"]
    keys = {"probe_top1": 100, "effective_rank": 1, summary.RANKS[2]: 1, "at_floor": 1}
    for row in own["rows"]:
        cells = [f"{f * np.mean(row[k]):.1f} ± {f * np.std(row[k], ddof=1):.1f}" for k, f in keys.items()]
        quoted.append(f"| {study.LABELS[row['name']]} | {len(row['seeds'])} | {' | '.join(cells)} |")
    ranks = {(c["above"], c["below"]): c for c in own["rank_claims"]}
    assert {("none", head) for head in ("mlp", "linear", "directclr")} <= set(ranks)  # the paper's order reversed
    for head in ("mlp", "linear", "directclr"):
        claim = ranks["none", head]
        low, high = claim["interval"]
        quoted.append(f"{claim['difference']:.1f} ({low:.1f} to {high:.1f}, p = {claim['p']:.2g})")
    tiny = stored("table1-tiny-imagenet")["chosen"]
    top = mean(tiny["rows"], "probe_top1", ("mlp", "linear", "none", "directclr"))
    quoted.append("(" + ", ".join(f"{100 * value:.1f}" for value in top) + " %), and not backed")
    assert min(c["p"] for c in tiny["claims"]) > 0.05
    quoted.append("({:.1f} against {:.1f})".format(*mean(tiny["rows"], "effective_rank", ("none", "mlp"))))
    for text in quoted:
        assert text in page, text
    settings = {one["setting"]: one for one in stored("regimes")["settings"]}
    ratio = {k: np.exp(np.mean(one["ln_ratio"])) for k, one in settings.items()}
    gap = {
        k: 100 * np.mean(np.subtract(one["mlp"]["probe_top1"], one["none"]["probe_top1"]))
        for k, one in settings.items()
    }
    assert {setting for setting, value in ratio.items() if value < 1} == {"temperature-0.5", "temperature-1", "stem-3"}
    assert (round(ratio["base"], 2), round(gap["base"], 1)) == (1.18, 0.8)
    assert (round(gap["stem-3"], 1), round(gap["epochs-4"], 1), round(ratio["epochs-4"], 1)) == (5.9, 2.5, 2.1)
    small = [k for k in settings if k.startswith(("batch", "width", "weight"))]
    assert len(small) == 5
    assert all(1.15 < ratio[k] < 1.45 and abs(gap[k]) < 1.35 for k in small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no run of that name"),
        (["--only", "none-s0", "--epochs", "0.2"], "give --data"),
        (["--only", "none-s0", "--preset", "nowhere"], "preset: no 'nowhere'"),
        (["--only", "none-s0", "--epochs", "0.2", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    ran = scripted(STUDY, *arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_a_drawn_table_has_a_point_a_seed_and_their_mean_beside_them():
    found = json.loads((EXPERIMENTS / "results/table1.json").read_text())
    tables = [found[regime]["rows"] for regime in summary.TITLES if regime in found]
    figure = summary.draw_tables(found)
    for ax, key, factor in zip(
        figure.axes, ("probe_top1", "effective_rank", "signal_fraction"), (100, 1, 1), strict=True
    ):
        rows = [factor * np.array(row[key], float) for table in tables for row in table]
        rows = [row for row in rows if not np.isnan(row).all()]
        points = np.concatenate([np.ma.getdata(one.get_offsets()) for one in ax.collections])
        points = points[~np.isnan(points).any(1)]
        np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(np.concatenate(rows)))
        means = np.concatenate([line.get_xydata() for line in ax.lines])
        means = means[~np.isnan(means).any(1)]
        np.testing.assert_allclose(np.sort(means[:, 0]), np.sort([row.mean() for row in rows]))
        for x, y in means:
            assert points[np.isclose(points[:, 1], y, atol=1e-6), 0].mean() == pytest.approx(x)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "2-layer projector, 3 seeds"


def test_the_drawn_confusion_has_truth_in_rows_and_the_histogram_counts_by_truth():
    confusion = np.arange(50).reshape(2, 5, 5)
    truth = np.array(["augmentation"] * 3 + ["implicit"] * 2)
    arrays = {"confusion": confusion, "truth": truth, "fractions": np.array([0.1, 0.11, 0.4, 0.9, 0.99])}
    ax, beside = diagnosis.draw({}, arrays).axes
    assert [text.get_text() for text in ax.texts] == [str(count) for count in confusion.sum(0).ravel()]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(CAUSES)
    assert [text.get_text() for text in ax.get_xticklabels()] == list(CAUSES)
    for cause in ("augmentation", "implicit"):
        color = matplotlib.colors.to_rgb(plots.CAUSE_COLORS[cause])
        bars = [bar for bar in beside.patches if bar.get_height() and bar.get_facecolor()[:3] == color]
        assert sum(bar.get_height() for bar in bars) == (truth == cause).sum()


def test_nothing_to_draw_is_one_line(tmp_path):
    ran = scripted(EXPERIMENTS / "table1.py", "--plot-only", "--out", tmp_path / "none.json")
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
