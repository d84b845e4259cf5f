"""The library does what the command does: one call each, the same document, results that are saved, equal and shown."""

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import collapse
from collapse import InputError, Spectrum, cli
from collapse.spectra.comparison import Comparison

SMALL = {"resize": 40, "crop": 32}


@pytest.fixture
def z():
    return (np.random.default_rng(0).standard_normal((600, 6)) / np.arange(1, 7)).astype(np.float32)


@pytest.fixture
def net():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, nn.Linear(8, 6))


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (90, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_command(capsys, *words):
    """The document of a command."""
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    assert cli.main([*map(str, words), "--json", *(map(str, flags) if words[:2] != ("spectrum", "z.npy") else ())]) == 0
    return json.loads(capsys.readouterr().out)


def by_call(result):
    return json.loads(result.to_json())


def same(one, other):
    """Whether two documents are one but for the command, also that of a part."""
    strip = lambda value: (
        {k: strip(v) for k, v in value.items() if k != "command"}
        if isinstance(value, dict)
        else [strip(v) for v in value]
        if isinstance(value, list)
        else value
    )
    assert strip(one) == strip(other)


def test_a_command_is_the_call_of_its_name(capsys, resnet18, photos, z, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", z)
    command = lambda *words: by_command(capsys, *words)
    same(command("spectrum", "z.npy", "--jackknife", 3, "--sample", 300, "--seed", 2),
         by_call(collapse.spectrum("z.npy", jackknife=3, sample=300, seed=2)))  # fmt: skip
    same(command("spectrum", resnet18, photos, "--layer", "layer2.1", "--raw"),
         by_call(collapse.spectrum(resnet18, photos, layer="layer2.1", normalize=False, **SMALL)))  # fmt: skip
    layers = collapse.layer_spectra(resnet18, photos, limit=20, **SMALL)
    document = command("spectrum", resnet18, photos, "--layer", "all", "--limit", 20)
    same(document["layers"], [by_call(spectrum) for spectrum in layers.values()])
    assert list(layers) == [layer["source"]["layer"] for layer in document["layers"]]
    same(command("inspect", resnet18), by_call(collapse.inspect(resnet18, **SMALL)))
    named = {"z.npy": "z.npy", Path(resnet18).name: resnet18}
    same(command("compare", "z.npy", resnet18, "--images", photos), by_call(collapse.compare(named, photos, **SMALL)))
    same(command("diagnose", resnet18, photos, "--views", 2, "--seed", 4, "--temperature", 0.2),
         by_call(collapse.diagnose(resnet18, photos, views=2, seed=4, temperature=0.2, **SMALL)))  # fmt: skip
    command("embed", resnet18, photos, "--out", "e.npy")
    rows = collapse.embed(resnet18, photos, **SMALL)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.load("e.npy"))


def test_images_and_networks_may_be_given_in_any_form(net, pixels):
    rows = collapse.embed(net, pixels)
    with torch.no_grad():
        np.testing.assert_array_equal(rows, net.eval()(pixels.float() / 255).numpy())
    expected = collapse.spectrum(rows).singular_values
    forms = (
        pixels,
        pixels.numpy(),
        [pixels[:30], pixels[30:]],
        [(pixels[:64], torch.zeros(64)), (pixels[64:], torch.zeros(26))],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, torch.arange(90)), batch_size=32),
        pixels.float() / 255,
        iter(pixels.split(64)),
    )
    for images in forms:
        result = collapse.spectrum(net, images)
        np.testing.assert_allclose(result.singular_values, expected, rtol=1e-4, atol=1e-9)
        assert result.images == {"path": None, "count": 90, "skipped": []}
    layers = collapse.layer_spectra(net, pixels)
    assert [(name, s.dim) for name, s in layers.items()] == [("0", 8), ("1", 8), ("5", 6), ("representation", 6)]
    two = collapse.layer_spectra(net, pixels, layers=["representation", "0"])
    assert list(two) == ["0", "representation"]
    np.testing.assert_allclose(two["0"].singular_values, layers["0"].singular_values, rtol=1e-6)
    assert collapse.spectrum(net, pixels, limit=50).n == collapse.spectrum(net, pixels.split(40), limit=50).n == 50
    drawn = [collapse.spectrum(net, images, sample=40, seed=3) for images in (pixels, pixels.split(40))]
    assert [s.n for s in drawn] == [40, 40]
    assert all("40 of 90 images, drawn at random with seed 3" in s.warnings for s in drawn)


def test_a_sample_is_the_same_rows_in_their_order(z):
    same_seed = [collapse.spectrum(source, sample=100, seed=1) for source in (z, np.split(z, [7, 300]))]
    assert same_seed[0] == same_seed[1]
    assert same_seed[0] != collapse.spectrum(z, sample=100, seed=2)
    assert collapse.spectrum(z, sample=1000).singular_values == pytest.approx(collapse.spectrum(z).singular_values)


def test_a_state_dict_and_a_loaded_network_are_its_file(resnet18, photos):
    from_file = collapse.spectrum(resnet18, photos, limit=12, **SMALL)
    from_net = collapse.spectrum(collapse.load(resnet18, **SMALL), photos, limit=12)
    state = torch.load(resnet18)
    from_state = collapse.spectrum({"state_dict": state}, photos, limit=12, **SMALL)
    assert from_net == from_file
    np.testing.assert_array_equal(from_state.singular_values, from_file.singular_values)
    assert from_state.source["path"] is from_state.source["sha256"] is None
    assert collapse.load(state).report["architecture"] == "resnet18"


def test_a_module_comes_back_as_it_was(net, pixels):
    net[1].eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    collapse.layer_spectra(net, pixels)
    collapse.diagnose(net, pixels.float() / 255, views=2, limit=20)
    collapse.embed(net, pixels)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype
               for key, value in net.state_dict().items())  # fmt: skip
    assert all(mine is held for mine, held in zip(net.parameters(), optimizer.param_groups[0]["params"], strict=True))
    assert not any(module._forward_hooks for module in net.modules())
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert collapse.spectrum(half, pixels).floor > 1e3 * collapse.spectrum(net, pixels).floor
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


class Table(nn.Module):
    """A constant of float32 in the forward pass: nothing that runs in float64."""

    def forward(self, x):
        return torch.einsum("ni,ij->nj", x, torch.arange(6.0).reshape(3, 2).to(torch.float32))


def test_what_a_network_gives_is_named_where_it_is_no_row(pixels):
    maps = collapse.spectrum(nn.Conv2d(3, 8, 3), pixels)
    assert maps.dim == 8
    with pytest.raises(InputError, match=r"gives shape \(64, 3, 144\), expected \(n, d\)"):
        collapse.spectrum(nn.Sequential(nn.Unflatten(2, (12,)), nn.Flatten(2, 3), nn.Flatten(1, 1))[1:2], pixels)
    with pytest.raises(InputError, match="fails on a batch of shape"):
        collapse.spectrum(nn.Linear(5, 2), pixels)
    result = collapse.spectrum(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), Table()), pixels)
    assert any("does not run in float64" in note for note in result.warnings)


def results(z, net, pixels, resnet18):
    """One of each kind."""
    spectrum = collapse.spectrum(z, jackknife=4, vectors=True)
    return [
        spectrum,
        collapse.compare({"all": spectrum, "raw": collapse.spectrum(z, normalize=False)}),
        collapse.diagnose(net, pixels.float() / 255, views=2, limit=30, threshold=1e-2),
        collapse.inspect(resnet18),
    ]


def test_results_are_saved_equal_and_shown(z, net, pixels, resnet18, tmp_path):
    for result in results(z, net, pixels, resnet18):
        kind = type(result)
        for path in (tmp_path / "result.json", str(tmp_path / "result.json")):
            result.save(path)
            again = kind.load(path)
            assert again == result
            assert again.to_json() == result.to_json()
        assert result != 3
        assert copy.copy(result) == pickle.loads(pickle.dumps(result)) == result
        lines = repr(result).splitlines()
        assert len(lines) <= 30
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith(kind.__name__)
        assert "<table>" in result._repr_html_()
        with pytest.raises(InputError, match=r"result\.json"):
            kind.load(tmp_path / "absent" / "result.json")
        (tmp_path / "odd.json").write_text('{"schema": "collapse.other/1"}')
        with pytest.raises(InputError, match="expected"):
            kind.load(tmp_path / "odd.json")


def test_what_is_drawn_is_what_is_stored(z, net, pixels, tmp_path):
    found = collapse.diagnose(net, pixels.float() / 255, views=2, limit=30, threshold=1e-2)
    ax = found.plot()
    heights = np.array([bar.get_height() for bar in ax.patches])
    widths = [block.spectrum.dim for block in found.blocks]
    shares = [[block.attribution.counts()[cause] / block.spectrum.dim for block in found.blocks]
              for cause in collapse.diagnosis.result.CAUSES]  # fmt: skip
    np.testing.assert_allclose(heights, np.ravel(shares))
    assert len(heights) == 5 * len(widths)
    compared = collapse.compare({"a": z, "b": z[:, :4]})
    compared.save(tmp_path / "c.json")
    for one in (compared, Comparison.load(tmp_path / "c.json")):
        drawn = {line.get_label(): line.get_ydata() for line in one.plot().lines}
        np.testing.assert_allclose(drawn["b"], np.log(collapse.spectrum(z[:, :4]).singular_values))


def test_metrics_are_attributes_and_computed_once(z, monkeypatch):
    s = collapse.spectrum(z)
    assert s.effective_rank == s.metrics()["effective_rank"]
    assert {"effective_rank", "rankme"} <= set(dir(s))
    with pytest.raises(AttributeError, match="'effectiv_rank'"):
        _ = s.effectiv_rank
    monkeypatch.setattr(collapse.metrics, "noise_variance", None)  # would be called again
    assert json.loads(s.to_json())["metrics"]["rankme"] == s.rankme
    s.metrics()["rankme"] = 0.0
    assert s.rankme > 0


def test_rows_are_normalised_by_one_default(z):
    total = collapse.Covariance(6).update(z[:100]).merge(collapse.Covariance(6).update(z[100:]))
    np.testing.assert_allclose(total.spectrum().singular_values, collapse.spectrum(z).singular_values, rtol=1e-9)
    assert total.spectrum().l2_normalized


def test_warnings_are_python_warnings_at_the_line_of_the_caller(z, resnet18, photos):
    with pytest.warns(collapse.CollapseWarning, match="20 rows for 6 dimensions") as caught:
        result = collapse.spectrum(z[:20])
    assert caught[0].filename == __file__
    assert str(caught[0].message) in result.warnings
    with pytest.warns(collapse.CollapseWarning, match="preprocessing is not in the file"):
        collapse.load(resnet18)
    with pytest.warns(collapse.CollapseWarning, match="24 images for up to 512"):
        collapse.diagnose(resnet18, photos, views=2, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse.spectrum(z)
        collapse.spectrum(z.astype(float))  # which method is taken is no reason for a warning


def test_a_command_says_each_warning_once_on_stderr(resnet18, photos, capsys):
    assert cli.main(["spectrum", str(resnet18), str(photos), "--resize", "40", "--crop", "32", "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert "warning" not in out
    assert "warning: 24 rows in 512 dimensions: at most 23 singular values are not zero" in lines
    assert len(set(lines)) == len(lines)
    assert all(line.startswith("warning: ") for line in lines)


def test_old_names_work_for_one_release(z):
    spectra = {"a": collapse.spectrum(z), "b": collapse.spectrum(z)}
    sys.modules.pop("collapse.compare", None)
    with pytest.warns(DeprecationWarning, match=r"collapse\.compare"):
        from collapse.compare import comparison
    assert comparison(spectra)["schema"] == "collapse.comparison/1"
    assert callable(collapse.compare)
    assert isinstance(collapse.compare(spectra), Comparison)
    assert isinstance(collapse.spectra.measure.spectrum(z), Spectrum)


def test_no_module_bears_the_name_of_a_function():
    names = {path.stem for path in Path(collapse.__file__).parent.iterdir()}
    assert not names & {name for name in collapse.__all__ if name not in ("metrics", "plots", "theory")}


def test_probes_and_training_are_calls_too(capsys, resnet18, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = collapse.train("sklearn:digits", "one", preset="digits", epochs=1, head="linear", held=100, knn_every=1)
    assert run.encoder.exists()
    assert run.last["epoch"] == 1
    assert collapse.Trained.load(_saved(run, tmp_path)) == run
    assert len(run.plot().lines) == 2
    words = [
        "train",
        "--data",
        "sklearn:digits",
        "--out",
        "one",
        "--preset",
        "digits",
        "--epochs",
        1,
        "--head",
        "linear",
    ]
    assert cli.main([*map(str, words), "--held", "100", "--knn-every", "1", "--json"]) == 0  # finished: nothing is done
    same(json.loads(capsys.readouterr().out), by_call(run))
    for name, call, flags, how in (
        ("knn", collapse.knn, ["--k", 5], {"k": 5}),
        ("probe", collapse.probe, [], {}),
        ("probe", collapse.probe, ["--recipe", "paper", "--epochs", 1], {"recipe": "paper", "epochs": 1}),
    ):
        assert cli.main([name, str(run.encoder), "--data", "sklearn:digits", "--json", *map(str, flags)]) == 0
        document = json.loads(capsys.readouterr().out)
        result = call(str(run.encoder), "sklearn:digits", **how)
        same(document, by_call(result))
        assert (document["top1"], document["n"]) == (result.top1, 600)
        assert collapse.Accuracy.load(_saved(result, tmp_path)) == result
        assert f"{100 * result.top1:.2f} % of 600 images are right" in repr(result)


def _saved(result, folder):
    result.save(folder / "saved.json")
    return folder / "saved.json"


def test_a_message_names_arguments_and_the_command_its_flags(capsys, tmp_path, monkeypatch):
    with_flags = cli.with_flags
    cli.parser()
    assert with_flags("2 encoders, a, b; choose one with branch=") == "2 encoders, a, b; choose one with --branch"
    assert with_flags('give pool="mean", or max_pixels=9') == "give --pool mean, or --max-pixels 9"
    assert with_flags("give allow_unknown=True or compile=False") == "give --allow-unknown or --no-compile"
    assert (
        with_flags("checkpoint=True: no blocks, device=cuda:7: none")
        == "--checkpoint: no blocks, --device cuda:7: none"
    )
    assert with_flags("data: no such file; a/limit=3.npy, norm=2") == "data: no such file; a/limit=3.npy, norm=2"
    monkeypatch.chdir(tmp_path)  # a file may bear the name of a flag
    assert cli.main(["spectrum", "data"]) == 2
    assert capsys.readouterr().err.startswith("collapse: data: no such file")
