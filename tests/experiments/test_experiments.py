"""The experiment scripts, run small: result file, report and figure; interrupted and stale work."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import begun, code_of, ended, scripted

import collapse
from collapse import experiment
from collapse.results import Tolerance, change, load_result

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"


def script(name, *arguments, **environment):
    call = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
    return ended(call, env={**os.environ, **environment})


def simulate(seed: int = 0, scale: float = 2.0):
    """A module's docstring stands in the help."""
    return {"r2": 1.0}, {"x": scale * np.arange(3.0) + seed}


def draw(meta, arrays):
    from collapse.plots import figure

    fig, ax = figure()
    ax.plot(arrays["x"])
    return fig


def main(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, arguments)])
    (tmp_path / "experiments").mkdir(exist_ok=True)
    experiment.main(str(tmp_path / "experiments/toy.py"), simulate, lambda meta, arrays: f"r2 {meta['r2']}", draw)


def test_an_experiment_saves_reports_and_draws(monkeypatch, tmp_path, capsys):
    main(monkeypatch, tmp_path, "--seed", 5, "--scale", 3)
    meta, arrays = load_result(tmp_path / "experiments/results/toy.npz")
    assert meta["config"] == {"seed": 5, "scale": 3.0}
    np.testing.assert_array_equal(arrays["x"], [5, 8, 11])
    said = capsys.readouterr()
    assert said.out == "r2 1.0\n"
    assert [line.split("/")[-1] for line in said.err.splitlines()] == ["toy.npz", "toy.png and .pdf"]
    figures = [tmp_path / f"figures/toy{suffix}" for suffix in (".png", ".pdf")]
    before = [path.read_bytes() for path in figures]
    main(monkeypatch, tmp_path, "--plot-only")
    assert [path.read_bytes() for path in figures] == before
    assert load_result(tmp_path / "experiments/results/toy.npz")[0]["config"]["seed"] == 5


def test_a_result_made_anew_is_kept_if_it_is_the_same_but_for_rounding(monkeypatch, tmp_path, capsys):
    result, figure = tmp_path / "experiments/results/toy.npz", tmp_path / "figures/toy.png"
    main(monkeypatch, tmp_path)
    capsys.readouterr()
    stored, drawn = result.read_bytes(), figure.read_bytes()
    exact, where = simulate, result.relative_to(tmp_path)

    def off(share):
        return lambda: ({"r2": 1.0}, {"x": exact()[1]["x"] * (1 + share * np.array([0, 0, 1]))})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(globals(), "simulate", off(0.0))
    main(monkeypatch, tmp_path, "--anew")  # the configuration is another one: no flags
    stored = result.read_bytes()
    monkeypatch.setattr("collapse.results.documents.command", lambda: ["another.py"])
    for share, said in ((0.0, "0e+00"), (3e-7, "3e-07")):
        monkeypatch.setitem(globals(), "simulate", off(share))
        capsys.readouterr()
        main(monkeypatch, tmp_path)
        assert capsys.readouterr().err.startswith(f"kept {where}: agrees to {said}; rounding may make it 1e-05\n")
        assert result.read_bytes() == stored
        assert figure.read_bytes() == drawn
    monkeypatch.setitem(globals(), "simulate", off(0.25))
    main(monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(f"wrote {where}: x[2] is 5, was 4, by 2e-01; rounding may make it 1e-05\n")
    assert load_result(result)[1]["x"][2] == 5
    assert figure.read_bytes() != drawn
    monkeypatch.setitem(globals(), "simulate", off(0.25 + 1e-9))
    main(monkeypatch, tmp_path, "--anew")
    assert capsys.readouterr().err.startswith(f"wrote {where}\n")
    assert load_result(result)[1]["x"][2] != 5


def test_a_drawing_that_changes_is_drawn_though_the_result_is_kept(monkeypatch, tmp_path, capsys):
    main(monkeypatch, tmp_path)
    figure = tmp_path / "figures/toy.png"
    before, plain = figure.read_bytes(), draw

    def titled(meta, arrays):
        drawn = plain(meta, arrays)
        drawn.suptitle("another")
        return drawn

    monkeypatch.setitem(globals(), "draw", titled)
    main(monkeypatch, tmp_path)
    assert "kept " in capsys.readouterr().err
    assert figure.read_bytes() != before


STORED = (
    {"r2": {"all": 0.5, "odd": 0.5}, "ceiling": [0.9, 1e-9], "n": 3, "of": None},
    {
        "x": np.array([1.0, 1e-6]),
        "residual": np.array([1e-16, 2e-14]),
        "names": np.array(["a"]),
        "nan": np.array([np.nan]),
        "seen": np.array([40, 1]),
    },
)


ALLOWED = Tolerance(of={"residual": Tolerance(bound=1e-13), "seen": Tolerance(0.5, 0.1), "r2.odd": Tolerance(0.3)})


@pytest.mark.parametrize(
    ("changed", "share", "where"),
    [
        ({}, 0, None),
        ({"versions": {"numpy": "9"}, "command": ["x"], "schema": "1"}, 0, None),
        ({"x": np.array([1.0 + 3e-6, 1e-6])}, 3e-6, "x[0]"),
        ({"x": np.array([1.0, 2e-6])}, 1e-3, "x[1]"),  # of a thousandth of the largest
        ({"residual": np.array([9e-14, 0])}, 0, None),  # both below the bound
        ({"residual": np.array([1e-16, 2e-13])}, 9, "residual[1]"),
        ({"r2": {"all": 0.6, "odd": 0.5}}, 0.2, "meta.r2.all is 0.6, was 0.5"),
        ({"r2": {"all": 0.500004, "odd": 0.6}}, 8e-6, "meta.r2.all"),  # odd is allowed more
        ({"r2": {"all": 0.5, "odd": 0.9}}, 0.8, "meta.r2.odd"),
        ({"seen": np.array([40, 2])}, 0.25, "seen[1]"),  # of a tenth of the largest
        ({"ceiling": [0.9, 9e-10]}, 1.1e-7, "meta.ceiling[1]"),
        ({"n": 4}, np.inf, "meta.n is 4, was 3"),
        ({"n": 3.0}, np.inf, "meta.n"),
        ({"of": "x"}, np.inf, "meta.of"),
        ({"names": np.array(["b"])}, np.inf, "names[0] is b, was a"),
        ({"nan": np.array([1.0])}, np.inf, "nan[0]"),
        ({"x": np.array([1.0, np.inf])}, np.inf, "x[1]"),
        ({"x": np.array([1.0])}, np.inf, "x is float64 (1,), was float64 (2,)"),
        ({"x": np.array([1.0, 1e-6], np.float32)}, np.inf, "x is float32"),
        ({"y": np.array([1.0])}, np.inf, "y is new"),
        ({"more": 1.0}, np.inf, "meta.more is new"),
    ],
)
def test_the_largest_change_between_two_results_is_found(changed, share, where):
    meta, arrays = ({**part} for part in STORED)
    for name, value in changed.items():
        (arrays if isinstance(value, np.ndarray) else meta)[name] = value
    found = change((meta, arrays), STORED, ALLOWED)
    assert found.share == pytest.approx(share, rel=0.02)
    assert where is None or found.where.startswith(where)
    back = change(STORED, (meta, arrays), ALLOWED)
    assert (back.share > 1e-9) == (share > 0)
    assert not where or not where.endswith("new") or back.where.endswith("gone")


def test_lemma_1_on_another_processor_keeps_its_result(tmp_path):
    shutil.copy(ROOT / "experiments/results/lemma1.npz", tmp_path / "x.npz")
    stored = (tmp_path / "x.npz").read_bytes()
    other = {"ATEN_CPU_CAPABILITY": "default", "OPENBLAS_CORETYPE": "Nehalem", "MKL_CBWR": "COMPATIBLE"}
    result = script("lemma1", "--out", tmp_path / "x.npz", **other)
    assert re.match(r"kept .*x\.npz: agrees to ", result.stderr), result.stderr
    assert (tmp_path / "x.npz").read_bytes() == stored


def test_out_moves_both_files_and_a_missing_result_is_one_line(monkeypatch, tmp_path, capsys):
    main(monkeypatch, tmp_path, "--out", tmp_path / "other.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"experiments", "other.npz", "other.png", "other.pdf"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, tmp_path, "--plot-only")
    assert end.value.code == 2
    assert re.fullmatch(r"toy\.py: .*no such result.*\n", capsys.readouterr().err)


def test_the_digits_study_runs_small_goes_on_and_is_read_by_the_command(tmp_path):
    small = ["--epochs", 1, "--seeds", 1, "--runs", tmp_path / "runs", "--out", tmp_path / "digits.npz"]
    result = scripted(FOLDER / "networks/digits.py", *small)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("DirectCLR") == 2
    _, arrays = load_result(tmp_path / "digits.npz")
    assert arrays["singular_values"].shape == (4, 2, 1, 128)
    assert arrays["probe"].min() > 0.2  # chance is 0.1; its standard deviation over 600 images is 0.012
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/encoder.safetensors")}
    assert len(trained) == 8
    victim = next(iter(trained))
    victim.unlink()
    again = scripted(FOLDER / "networks/digits.py", *small)
    assert "training 1 networks" in again.stderr
    assert again.stdout == result.stdout
    changed = {path for path, time in trained.items() if path.stat().st_mtime_ns != time}
    assert changed == {victim}
    command = ["spectrum", tmp_path / "runs/mlp.safetensors", tmp_path / "runs/images"]
    measured = scripted(Path(collapse.__file__).with_name("__main__.py"), *command, "--json", "--workers", 0)
    document = json.loads(measured.stdout)
    assert (document["n"], document["dim"]) == (1797, 128)
    np.testing.assert_allclose(document["singular_values"], arrays["singular_values"][2, 1, 0], rtol=1e-4, atol=1e-12)


UNLIKE = ("study", "summary", "digits_command")  # no result of their own, or one of the command
SCRIPTS = [path.relative_to(FOLDER) for path in sorted(FOLDER.rglob("*.py")) if path.stem not in UNLIKE]


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_every_experiment_has_its_result_and_figure_in_the_repository(path):
    name = path.stem
    result = ROOT / f"experiments/results/{name}.json"
    meta = json.loads(result.read_text()) if result.exists() else load_result(result.with_suffix(".npz"))[0]
    assert meta["command"][0] == f"{name}.py"
    assert (ROOT / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    assert f"`experiments/{path}`" in (ROOT / "figures/README.md").read_text()


def test_the_pages_quote_what_the_result_files_hold():
    claims = (ROOT / "docs/claims.md").read_text()
    quoted = []
    r2 = load_result(ROOT / "experiments/results/figure3.npz")[0]["r2"]
    final = {name: values["final"] for name, values in r2.items()}
    quoted.append(
        f"R² {final['random_predicted']:.4f} from random weights, {final['aligned_predicted']:.4f} aligned "
        f"(infinite-batch theory: {final['random_population']:.3f}, {final['aligned_population']:.3f})"
    )
    meta, _ = load_result(ROOT / "experiments/results/figure6.npz")
    quoted.append(
        f"R² {meta['r2']['product']:.3f}; no theory can do better than "
        f"{min(meta['ceiling']):.3f} to {max(meta['ceiling']):.3f}"
    )
    _, digits = load_result(ROOT / "experiments/results/digits.npz")
    mean = lambda values: ", ".join(f"{row.mean():.1f} ± {row.std(ddof=1):.1f}" for row in values)
    quoted += [mean(digits["effective_rank"][:, t]) for t in (0, 1)] + [mean(100 * digits["probe"][:, 1])]
    stored = lambda name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    case = next(case for case in stored("spectrum")["cases"] if case["d"] == 2048)
    quoted.append(f"| {1 / case['ratios']['bare / covariance']:.2f}; {case['ratios']['qr / covariance']:.1f} |")
    peaks = stored("spectrum")["memory"][-1]["peak_mib"]
    quoted.append(f"| {peaks['covariance']:.0f} MiB, {peaks['official']:.0f} MiB |")
    quoted += [f"| {stored('embed')['share_of_bare']:.2f} |", f"| {100 * stored('monitor')['share']:.1f} % |"]
    lives = map(stored, ("resume", "resume-workers"))
    lives = [(one["moments"] + one["random_deaths"], len(one["differing"])) for one in lives]
    (deaths, differed), (deaths_two, differed_two) = lives
    quoted.append(f"| {differed} of {deaths}; with two workers {differed_two} of {deaths_two} |")
    quoted.append(f"| {100 * stored('mutants')['killed']:.0f} % of {len(stored('mutants')['mutants'])} |")
    meta, _ = load_result(ROOT / "experiments/results/phase_diagram.npz")
    quoted.append(f"{meta['exact']['mean_field']} of 15, {meta['r2']:.4f}")
    toy = stored("toy")["ratios"]
    quoted.append(f"{toy['autograd / batched']:.1f} and {toy['official / batched']:.1f} times faster")
    meta, _ = load_result(ROOT / "experiments/results/linear_digits.npz")
    readme = (ROOT / "README.md").read_text()
    assert f"R² {meta['r2']['real_spectrum']['predicted']['final']:.1f} only" in readme
    meta, _ = load_result(ROOT / "experiments/results/diagnosis.npz")
    share = f"{100 * meta['share']:.1f} % of {meta['directions']}"
    assert share in (ROOT / "docs/diagnosis.md").read_text()
    quoted += [f"| {share} |", f"| {stored('diagnose')['ratio']:.2f} |"]
    card = stored("gpu")["figures"]
    quoted.append(
        f"{card['trainer224/in_a_row / synthetic']:.2f} of the step on tensors "
        f"({card['trainer224/images_per_second_in_a_row']:,.0f} of "
        f"{card['trainer224/compiled']['images_per_second']:,.0f} images/s"
    )
    quoted.append("| " + "; ".join([
        ", ".join(f"{card[f'extract/{how}']['share']:.2f}" for how in ("float32", "bf16")),
        f"{card['extract/files']['share']:.2f} |",
    ]))  # fmt: skip
    quoted.append("| " + ", ".join(f"{card[f'spectrum/d = {d}']['share']:.2f}" for d in (512, 2048, 8192)) + " |")
    error = lambda name: f"{card[f'correct/{name}']['error']:.0e}".replace("e-0", "e-")
    heads = max((name for name in card if name.startswith("correct/head_")), key=lambda name: card[name]["error"])
    errors = [error(heads.partition("/")[2]), *(error(f"spectrum_{how}") for how in ("covariance", "qr"))]
    assert all(check["holds"] for name, check in card.items() if name.startswith("correct/"))
    quoted.append("| {}; {}, {}; 0 |".format(*errors))
    step, budget = card["trainer224/compiled"], card["budget/step"]
    of_budget = f"{budget['images_per_second'] / step['images_per_second']:.2f} of it, "
    held = [run["memory_bytes"] / 2**30 for run in (budget, step)]
    quoted.append(of_budget + "in {:.0f} of {:.0f} GiB".format(*held))
    probes = lambda head: [card[f"table1/{head}, temperature 0.1, seed {s}"]["probe"]["top1"] for s in (0, 1)]
    of_heads = [", ".join(f"{100 * top:.1f}" for top in probes(h)) for h in ("none", "directclr", "linear", "mlp")]
    quoted.append("| " + "; ".join(of_heads) + " %")
    for text in quoted:
        assert text in claims, text
    rows = re.findall(r"^\| .* \| `[a-z]+/.*$", readme, re.MULTILINE)
    assert len(rows) == 9
    assert all(row in claims for row in rows)


@pytest.mark.parametrize("call", ["networks/study.py --list", "theorem2.py --plot-only --out {}/x.npz"])
def test_a_reader_that_leaves_is_no_error_and_the_work_is_done(tmp_path, call):
    words = [word.format(tmp_path) for word in call.split()]
    shutil.copy(ROOT / "experiments/results/theorem2.npz", tmp_path / "x.npz")
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has seen enough
    with open(writer, "w") as out, open(tmp_path / "err", "w") as err:
        assert code_of(begun(FOLDER / words[0], *words[1:], files=(out, err))) == 0
    assert all(line.startswith("wrote ") for line in (tmp_path / "err").read_text().splitlines())
    assert call.startswith("networks") or (tmp_path / "x.png").exists()
