"""Several layers in one pass, several spectra side by side, and the files that the commands write."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from collapse import InputError, Spectrum, cli, compare, load, metrics, spectrum
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.encoders.passes import embed, embed_layers, rounding
from collapse.spectra.comparison import subspaces, text
from collapse.spectra.layers import chosen
from collapse.spectra.measurement import Measure, Measurement


def run(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((600, 12)) / np.arange(1, 13)


def test_standard_errors_are_the_spread_over_samples():
    """Over 400 samples singular values and effective rank spread as one sample's jackknife says of itself."""
    scale = 1 / np.arange(1, 9)
    draws = [np.random.default_rng(seed).standard_normal((500, 8)) * scale for seed in range(400)]
    results = [spectrum(z, normalize=False, method="covariance") for z in draws]
    spread = np.std([s.singular_values for s in results], axis=0)
    rank = np.std([s.metrics()["effective_rank"] for s in results])
    errors = [spectrum(z, normalize=False, method="covariance", jackknife=20).errors for z in draws[:30]]
    mean = np.sqrt(np.mean([np.square(e["singular_values"]) for e in errors], axis=0))
    # Variances from 400 samples, and from 30 of 19 degrees of freedom each: 4 % and 3 % in their roots; 5 sigma.
    np.testing.assert_allclose(mean, spread, rtol=0.25)
    assert np.sqrt(np.mean([e["metrics"]["effective_rank"] ** 2 for e in errors])) == pytest.approx(rank, rel=0.25)


def test_a_jackknife_does_not_depend_on_the_batches(rows):
    whole = spectrum(rows, jackknife=5)
    batches = spectrum(iter(np.split(rows, [1, 7, 300])), jackknife=5)
    np.testing.assert_allclose(batches.errors["singular_values"], whole.errors["singular_values"], rtol=1e-9)
    left_out = [spectrum(np.delete(rows, np.s_[g::5], axis=0)).singular_values for g in range(5)]
    np.testing.assert_allclose(whole.errors["singular_values"], 2 * np.std(left_out, axis=0), rtol=1e-9)
    np.testing.assert_allclose(whole.singular_values, spectrum(rows).singular_values, rtol=1e-12)
    assert json.loads(whole.to_json())["errors"]["groups"] == 5
    assert Spectrum.from_json(whole.to_json()).to_json() == whole.to_json()
    with pytest.raises(InputError, match="jackknife: 301 groups of 0"):
        Measurement(Measure(jackknife=301)).update(rows[:300]).spectrum()
    rows[123, 4] = np.nan
    with pytest.raises(InputError, match="row 123, column 4"):
        spectrum(iter(np.split(rows, [100])), jackknife=5)


@pytest.mark.parametrize("method", ["covariance", "qr"])
def test_the_directions_are_those_of_the_covariance(rows, method, tmp_path):
    s = spectrum(rows, normalize=False, method=method, vectors=True)
    C = np.cov(rows.T)
    np.testing.assert_allclose(C @ s.vectors, s.vectors * s.singular_values, atol=1e-12 * s.singular_values[0])
    np.testing.assert_allclose(s.vectors.T @ s.vectors, np.eye(12), atol=1e-12)
    s.save(tmp_path / "s.json")
    again = Spectrum.load(tmp_path / "s.json")
    np.testing.assert_array_equal(again.vectors, s.vectors)
    np.savez(tmp_path / "s.npz", vectors=np.eye(3), meta=np.array("{}"))
    with pytest.raises(InputError, match=r"s\.npz: is not the file that s\.json was written with"):
        Spectrum.load(tmp_path / "s.json")


def test_every_layer_in_one_pass_is_each_alone(resnet18, photos):
    net = load(resnet18, resize=40, crop=32)
    batches = list(pixel_batches(Images(photos), net.preprocess, 10))
    names = [net.blocks[0], "layer2.1", "representation"]
    together = [
        torch.cat(parts) for parts in zip(*(row.values() for row in embed_layers(net, names, batches)), strict=True)
    ]
    for name, rows in zip(names, together, strict=True):
        alone = torch.cat(list(embed(net.layer(name), batches, net.preprocess)))
        torch.testing.assert_close(rows, alone, rtol=0, atol=0)
    assert net.blocks[1:] == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    (sampled,) = (row["layer2.1"] for row in embed_layers(net, ["layer2.1"], batches[:1], positions=3, seed=4))
    hooks = lambda: sum(len(module._forward_hooks) for module in net.modules())
    before, stopped = hooks(), embed_layers(net, ["layer2.1"], batches)
    next(stopped)
    assert hooks() == before + 1
    stopped.close()
    assert hooks() == before  # none is left behind
    assert sampled.shape == (30, 128)
    net.backbone.layer2[1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    maps = []
    (again,) = (row["layer2.1"] for row in embed_layers(net, ["layer2.1"], batches[:1], positions=3, seed=4))
    torch.testing.assert_close(again, sampled, rtol=0, atol=0)
    columns = maps[0].flatten(2).mT  # (n, positions, d): each sampled row is a position of its own image
    for index in range(30):
        assert (columns[index // 3] == sampled[index]).all(1).any()


def test_the_rounding_of_a_pass_is_found_by_a_finer_one(resnet18, photos):
    net = load(resnet18, resize=40, crop=32)
    pixels = next(pixel_batches(Images(photos), net.preprocess, 8))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    errors = rounding(net, ["representation"], pixels, normalize=False)["representation"]
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    with torch.no_grad():
        x = net.preprocess.normalize(pixels)
        exact = nn.Module.double(load(resnet18, resize=40, crop=32))(x.double())
        np.testing.assert_allclose(errors, (net(x).double() - exact).numpy(), rtol=1e-6, atol=1e-15)
    assert 0 < np.abs(errors).max() < 1e-4 * float(exact.abs().max())


def test_the_floor_of_a_pass_is_its_rounding_where_nothing_else_is(rows):
    z = np.hstack([rows, np.zeros((600, 4))])
    noise = 1e-5 * np.random.default_rng(1).standard_normal((600, 16))
    s = spectrum(z + noise, normalize=False, rounding=noise[:50])
    assert s.singular_values[12] < s.floor < 10 * s.singular_values[12]
    assert s.metrics()["numerical_rank"] == 12
    tail = np.linalg.svd(noise[:50] @ spectrum(z + noise, normalize=False, vectors=True).vectors[:, -2:])[1]
    assert s.floor == pytest.approx(2 * tail[0] ** 2 / 50, rel=1e-9, abs=0)


def test_a_threshold_in_the_rounding_is_said(rows):
    z = torch.tensor(rows).to(torch.bfloat16)
    assert any("lies in the rounding" in note for note in spectrum(z, threshold=1e-6).warnings)
    assert not any("lies in the rounding" in note for note in spectrum(z, threshold=1e-2).warnings)


def test_the_command_measures_every_layer(resnet18, photos, tmp_path, capsys):
    call = ["spectrum", resnet18, photos, "--resize", "40", "--crop", "32", "--workers", "0", "--layer", "all"]
    code, out, _ = run(capsys, *call, "--out", tmp_path / "all.json", "--plot", tmp_path / "depth.png")
    assert code == 0
    assert out.count("layer") > 8
    document = json.loads((tmp_path / "all.json").read_text())
    assert document["schema"] == "collapse.spectra/1"
    layers = [layer["source"]["layer"] for layer in document["layers"]]
    assert layers == [*load(resnet18).blocks, "representation"]
    assert (tmp_path / "depth.png").stat().st_size > 5000
    code, out, _ = run(capsys, "compare", tmp_path / "all.json", "--json")
    assert [row["dim"] for row in json.loads(out)["rows"]] == [layer["dim"] for layer in document["layers"]]
    assert run(capsys, *call[:-1], "layer9.9")[0] == 2


def test_the_command_compares(rows, tmp_path, capsys):
    np.save(tmp_path / "a.npy", rows[:, :10])
    np.save(tmp_path / "b.npy", rows[:, :10] @ np.diag([0, 0, *np.ones(8)]))
    for name in "ab":
        code, *_ = run(
            capsys, "spectrum", tmp_path / f"{name}.npy", "--raw", "--vectors", "--out", tmp_path / f"{name}.json"
        )
        assert code == 0
    code, out, _ = run(
        capsys, "compare", tmp_path / "a.json", tmp_path / "b.npy", "--raw", "--plot", tmp_path / "p.png"
    )
    assert code == 0
    assert "of the variance of a.npy lies in" in out
    assert (tmp_path / "p.png").exists()
    code, out, _ = run(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    pair = json.loads(out)["subspaces"][1]  # of b, in the directions of a
    a, b = (Spectrum.load(tmp_path / f"{name}.json") for name in "ab")
    within = metrics.variance_within(b.singular_values, b.vectors, a.vectors)[pair["k"] - 1]
    assert pair["variance_within"] == pytest.approx(within)
    assert json.loads(out)["rows"][1]["collapsed_dimensions"] == 2
    for kind in ("explained", "noise", "spectrum"):
        extra = ["--log10", "--log-index"] if kind == "spectrum" else []
        call = ["spectrum", tmp_path / "a.npy", "--jackknife", 5, "--kind", kind, *extra]
        assert run(capsys, *call, "--plot", tmp_path / f"{kind}.pdf")[0] == 0


def along(axes, variances):
    """A spectrum of rows that vary along axes of space alone, by as much as given."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200, 6))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(199)
    return spectrum(z * np.sqrt(variances) @ np.eye(6)[axes], normalize=False, vectors=True)


def test_what_two_spectra_share_is_said_of_known_directions():
    a = along([0, 1, 2, 3, 4, 5], [4, 3.9, 3.8, 1e-9, 1e-9, 1e-9])
    b = along([0, 1, 3, 2, 4, 5], [2, 1.9, 9e-9, 1e-9, 1e-9, 1e-9])
    turned = subspaces("a", a, "b", b)
    assert (turned["a"], turned["b"], turned["k"]) == ("a", "b", 2)
    assert turned["variance_within"] == pytest.approx(7.9 / 11.7, rel=1e-6)  # of a's three, b has two
    assert turned["collapsed_overlap"] == pytest.approx(1, rel=1e-6)  # a's three dead are among b's four
    back = subspaces("b", b, "a", a)
    assert back["k"] == 3
    assert back["variance_within"] == pytest.approx(1, rel=1e-6)
    assert back["angle"] == pytest.approx(np.pi / 2, rel=1e-6)  # a's third is none of b's first three
    away = subspaces("a", a, "c", along([3, 4, 5, 0, 1, 2], [4, 3.9, 3.8, 1e-9, 1e-9, 1e-9]))
    assert (away["variance_within"], away["collapsed_overlap"]) == pytest.approx((0, 0), abs=1e-6)
    assert away["angle"] == pytest.approx(np.pi / 2, rel=1e-6)
    assert np.isnan(subspaces("a", a, "d", along(range(6), np.ones(6)))["collapsed_overlap"])


def test_a_comparison_says_who_has_most_and_what_speaks_against_it(rows):
    named = {"a" * 30: rows[:500], "most": rows / np.linalg.norm(rows, axis=0), "least": rows * ([1] + [1e-3] * 11)}
    found = compare({name: spectrum(z, normalize=name != "most") for name, z in named.items()})
    ranks = [row["effective_rank"] for row in found.rows]
    assert found.sentence() == (
        f"3 spectra; effective rank from {ranks[2]:.4g} of 12 (least) to {ranks[1]:.4g} of 12 (most)."
    )
    head, first, *_ = found.table()
    assert head == ("", "rows", "dim", "eff. rank", "rankme", "num. rank", "collapsed")
    assert first[:4] == (f"...{'a' * 21}", "500", "12", f"{ranks[0]:.2f}")
    assert found.table()[2][0] == "most"
    assert found.notes()[:2] == [
        "some rows were normalised and some were not; their spectra do not compare",
        "different numbers of rows; small singular values grow with their number",
    ]
    alike = compare({name: spectrum(rows.astype(np.float32), normalize=False) for name in "ab"})
    assert alike.notes() == []
    assert text(alike).count("of the variance of") == text(found).count("of the variance of") == 0
    said = text(compare({name: spectrum(rows[:, :2], normalize=False, vectors=True) for name in "ab"}))
    kept = " ".join(said.split())
    assert "100.0% of the variance of a lies in the first 2 directions of b (largest angle 0.0 degrees)" in kept
    assert "overlap" not in kept
    still = compare({name: spectrum(np.ones((30, 3)), normalize=False) for name in "ab"})
    assert still.sentence() == "2 spectra, none of which varies."
    assert still.table()[1][3] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a.npy"], "two spectra or more"),
        (["compare", "a.npy", "none.json"], "none.json"),
        (["compare", "a.npy", "bad.json"], "bad.json"),
        (["compare", "a.npy", "b.npy", "--kind", "noise", "--plot", "x.png"], "single spectrum"),
        (["spectrum", "a.npy", "--vectors"], "--out"),
        (["spectrum", "a.npy", "--vectors", "--out", "old.json"], "--force"),
        (["spectrum", "a.npy", "--jackknife", "1"], "at least 2"),
        (["spectrum", "a.npy", "--jackknife", "40"], "groups of 1 rows"),
        (["spectrum", "a.npy", "--layer", "all"], "--layer wants a checkpoint"),
    ],
)
def test_wrong_calls_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        np.save(f"{name}.npy", np.random.default_rng(0).standard_normal((40, 3)))
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "old.npz").write_bytes(b"kept")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_layers_are_the_blocks_the_representation_and_a_projector_if_there_is_one():
    for projector, last in ((object(), ["projector"]), (None, [])):
        net = SimpleNamespace(blocks=["a", "b"], projector=projector)
        assert chosen(net, "all") == ["a", "b", "representation", *last]
