"""What a terminal shows: the verdict first, tables that fit, results shown again, legends off the data."""

import json

import numpy as np
import pytest

import collapse
from collapse import cli, plots
from collapse.results.screen import columns, fitted
from collapse.spectra.scale import verdict


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 12)) * np.exp(-np.arange(12.0))
    np.save("z.npy", rows.astype(np.float32))
    return tmp_path


def told(capsys, *words):
    assert cli.main(list(words)) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("width", [60, 80, 110])
def test_text_fits_the_terminal_and_loses_no_number(here, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    name = "a_rather_long_name_of_an_array_of_embeddings.npy"
    np.save(name, np.load("z.npy"))
    out = told(capsys, "compare", "z.npy", name).out
    assert columns() == width
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    found = collapse.compare({"z.npy": "z.npy", name: name})
    row = next(line.split() for line in lines if line.startswith("z.npy "))
    assert row[1:3] == ["500", "12"]
    assert row[3] == f"{found.rows[0]['effective_rank']:.2f}"
    assert sum(line.split()[-9:] == row[1:] for line in lines) == 2
    out = told(capsys, "spectrum", "z.npy").out
    assert max(map(len, out.splitlines())) <= width


def test_a_name_that_is_too_long_has_its_own_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("", "number"), ("n" * 50, "12345.678"), ("b", "2")]
    assert fitted(rows).splitlines()[1:] == ["n" * 50, " " * 29 + "  12345.678", "b" + " " * 38 + "2"]


def test_the_verdict_comes_first_with_what_weakens_it(here, capsys):
    out = told(capsys, "spectrum", "z.npy").out.split("\n\n")
    s = collapse.spectrum("z.npy")
    assert out[0].startswith("z.npy\n")
    assert " ".join(out[0].split()[1:]) == verdict(s)
    assert verdict(s).startswith(f"Some dimensions are collapsed: {s.collapsed_dimensions} of 12 lie below")
    rows = np.random.default_rng(0).standard_normal((60, 12))
    assert "60 rows are few for 12 dimensions, which biases small values down (10 d advised)." in verdict(
        collapse.spectrum(rows)
    )
    rows[:, 6:] = 0
    few = verdict(collapse.spectrum(rows[:9]))
    assert few == "Cannot tell: 9 rows can show at most 8 of 12 directions. They show 6; use 120 rows (10 d)."


def test_each_number_has_its_meaning_beside_it_where_there_is_room(here, capsys, monkeypatch):
    from collapse.spectra import METRICS
    from collapse.spectra.scale import MEANINGS

    assert set(MEANINGS) == set(METRICS)
    s = collapse.spectrum("z.npy")
    lines = told(capsys, "spectrum", "z.npy").out.splitlines()
    assert f"  effective_rank            {s.effective_rank:10.4f}  of 12; a flat spectrum has all" in lines
    assert f"  condition                 {s.condition:10.2e}  smallest over largest; 1 is flat" in lines
    monkeypatch.setenv("COLUMNS", "60")
    assert f"  effective_rank            {s.effective_rank:10.4f}" in told(capsys, "spectrum", "z.npy").out.splitlines()


def test_a_result_is_shown_again_and_drawn(here, capsys):
    first = told(capsys, "spectrum", "z.npy", "--out", "r.json")
    assert first.err.startswith("wrote r.json\n")
    again = told(capsys, "spectrum", "r.json", "--plot", "r.png", "--kind", "explained")
    assert again.out == first.out
    assert "wrote r.png" in again.err
    assert (here / "r.png").stat().st_size > 1000
    assert told(capsys, "spectrum", "r.json", "--json").out == (here / "r.json").read_text()
    told(capsys, "spectrum", "z.npy", "--vectors", "--out", "v.json")
    told(capsys, "spectrum", "v.json", "--out", "copy.json")  # with its directions
    assert collapse.Spectrum.load("copy.json") == collapse.Spectrum.load("v.json")
    assert cli.main(["spectrum", "r.json", "--fail-under", "effective_rank=12"]) == 3


@pytest.mark.parametrize(("words", "flag"), [(["--raw"], "--raw"), (["--limit", "5"], "--limit"), (["x"], "IMAGES")])
def test_a_result_follows_no_flag_of_measuring(here, capsys, words, flag):
    told(capsys, "spectrum", "z.npy", "--out", "r.json")
    assert cli.main(["spectrum", "r.json", *words]) == 2
    err = capsys.readouterr().err
    assert err == f"collapse: r.json: is a result, already measured; leave out {flag}\n"


def layers(path, seed):
    rng = np.random.default_rng(seed)
    found = []
    for name, d in (("stem", 4), ("block", 6), ("representation", 8)):
        s = collapse.spectrum(rng.standard_normal((200, d))).to_dict()
        found.append({**s, "source": {**s["source"], "kind": "checkpoint", "layer": name, "path": path.stem}})
    document = {"schema": "collapse.spectra/1", "layers": found}
    path.write_text(collapse.spectra.result.to_json(document))


def test_results_of_all_layers_are_compared_panel_by_panel(here, capsys, monkeypatch):
    layers(here / "a.json", 0)
    layers(here / "b.json", 1)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda fig, *_: drawn.append(fig))
    told(capsys, "compare", "a.json", "b.json", "--plot", "both.png")
    told(capsys, "spectrum", "a.json", "--plot", "depth.png")
    panels, depth = drawn
    assert [ax.get_title() for ax in panels.axes] == ["stem", "block", "representation"]
    values = [s["singular_values"] for s in json.loads((here / "b.json").read_text())["layers"]]
    for ax, expected in zip(panels.axes, values, strict=True):
        assert [line.get_label() for line in ax.lines] == ["a.json", "b.json"]
        np.testing.assert_allclose(ax.lines[1].get_ydata(), np.log(expected))
    assert [text.get_text() for text in panels.legends[0].get_texts()] == ["a.json", "b.json"]
    assert [tick.get_text() for tick in depth.axes[0].get_xticklabels()] == ["stem", "block", "representation"]


@pytest.mark.parametrize(
    ("kind", "count"), [("spectrum", 1), ("spectrum", 9), ("explained", 1), ("explained", 9), ("noise", 1)]
)
def test_a_legend_stands_outside_the_data(kind, count):
    rng = np.random.default_rng(0)
    ax = plots.draw({f"run {k}": collapse.spectrum(rng.standard_normal((200, 6))) for k in range(count)}, kind, None)
    ax.figure.canvas.draw()
    legend, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= inside.y1 - 1 or legend.x0 >= inside.x1 - 1
    assert legend.x1 <= ax.figure.bbox.x1
    assert legend.y1 <= ax.figure.bbox.y1 + 1
    plots.drawing.matplotlib.pyplot.close(ax.figure)
