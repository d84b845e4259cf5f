"""Images and rows shared over processes: the document of one process, in each; one that is lost ends all in a line."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from processes import together

import collapse
from collapse import InputError, cli
from collapse.encoders import accuracy, processes
from collapse.encoders.embedding import embed
from collapse.files.rows import blocks

SIZES = {"resize": 32, "crop": 32, "batch_size": 8}
FLAGS = ["--resize", "32", "--crop", "32", "--batch-size", "8", "--workers", "0"]


def command(*words):
    return lambda rank: cli.main([str(word) for word in words])


def said(folder, name):
    return [(folder / f"{name}{rank}").read_text() for rank in (0, 1)]


def differences(one, other, place=()):
    """Where two documents differ: values by 1e-12, standard errors, which are small differences, by 1e-9."""
    if place[:1] == ("command",):
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], (*place, key))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [f for key, pair in enumerate(zip(one, other, strict=True)) for f in differences(*pair, (*place, key))]
    if isinstance(one, float) and isinstance(other, float):
        alike = one == pytest.approx(other, rel=1e-9 if "errors" in place else 1e-12, abs=1e-15, nan_ok=True)
        return [] if alike else [(place, one, other)]
    return [] if one == other else [(place, one, other)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """45 images in two classes, of which one cannot be read, one is plain, and the third of six batches is lost."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(45):
        path = folder / f"{'a' if index < 20 else 'b'}/{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        values = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8) if index != 9 else np.zeros((5, 6, 3), np.uint8)
        Image.fromarray(values).resize((40, 44), Image.Resampling.BICUBIC).save(path)
        if index == 5 or 16 <= index < 24:
            path.write_bytes(b"no image")
    return folder


def digits():
    """A network without its own seed, and its inputs."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))


def calls(resnet18, pictures, tmp_path, **how):
    """The documents of every call that shares."""
    z = np.load(tmp_path / "z.npy")
    net = digits()
    pixels = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    layers = collapse.layer_spectra(resnet18, pictures, jackknife=3, **SIZES, **how)
    return {
        **{f"layer {name}": s.to_dict() for name, s in layers.items()},
        "diagnosis": collapse.diagnose(resnet18, pictures, views=3, **SIZES, **how).to_dict(),
        "sample": collapse.spectrum(resnet18, pictures, sample=30, seed=3, **SIZES, **how).to_dict(),
        "tensor": collapse.spectrum(net, pixels, batch_size=7, **how).to_dict(),
        "batches": collapse.spectrum(net, [pixels[:20], pixels[20:33], pixels[33:]], batch_size=8, **how).to_dict(),
        "embeddings": embed(resnet18, pictures, **SIZES, **how).tolist(),
        "knn": collapse.knn(net, "sklearn:digits", batch_size=100, **how).to_dict(),
        "probe": collapse.probe(net, "sklearn:digits", batch_size=100, **how).to_dict(),
        "rows": collapse.spectrum(tmp_path / "z.npy", jackknife=4, **how).to_dict(),
        "float64": collapse.spectrum(z.astype(float), normalize=False, vectors=False, **how).to_dict(),
    }


def test_each_process_gets_the_document_of_one(resnet18, pictures, tmp_path):
    z = np.random.default_rng(0).standard_normal((150_000, 64), dtype=np.float32) / np.arange(1, 65, dtype=np.float32)
    assert len(list(blocks(z))) == 3
    np.save(tmp_path / "z.npy", z)

    def act(rank):
        processes.start("cpu")
        found = calls(resnet18, pictures, tmp_path, distributed=True)
        (tmp_path / f"{rank}.json").write_text(json.dumps(found, default=str))
        processes.stop()

    one = json.loads(json.dumps(calls(resnet18, pictures, tmp_path), default=str))
    assert one["diagnosis"]["images"]["count"] == 36
    assert "1 of 36 images are of one colour" in str(one["layer representation"])
    assert together(tmp_path, act) == [0, 0], said(tmp_path, "err")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == one.keys()
        for name in one:
            assert not differences(one[name], found[name])[:4], (rank, name)


def test_the_votes_of_neighbours_are_shared(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 5)) if d else rng.integers(0, 7, n) for n in (80, 50) for d in (1, 0)]
    monkeypatch.setattr(accuracy, "VOTES", 10)  # five parts, of which the first process has three
    counted, real = [], accuracy.Accuracy.of
    monkeypatch.setattr(accuracy.Accuracy, "of", lambda *votes: counted.append(1) or real(*votes))

    def act(rank):
        processes.start("cpu")
        found = accuracy.knn(*parts, k=3, distributed=True)
        (tmp_path / f"{rank}.json").write_text(json.dumps([found.correct1, found.correct5, found.n, len(counted)]))
        processes.stop()

    assert together(tmp_path, act) == [0, 0], said(tmp_path, "err")
    one = accuracy.knn(*parts, k=3)
    assert one.n == 50
    for rank, shares in ((0, 3), (1, 2)):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [one.correct1, one.correct5, 50, shares]
    with pytest.raises(InputError, match="distributed= wants"):
        accuracy.knn(*parts, distributed=True)


def test_one_process_of_a_command_prints_and_writes(resnet18, pictures, tmp_path, capsys):
    spectrum = command("spectrum", resnet18, pictures, *FLAGS, "--out", tmp_path / "s.json")
    rows = command("embed", resnet18, pictures, *FLAGS, "--out", tmp_path / "e.npy")
    assert together(tmp_path, spectrum, rows) == [0, 0], said(tmp_path, "err")
    assert cli.main(["spectrum", str(resnet18), str(pictures), *FLAGS, "--out", str(tmp_path / "one.json")]) == 0
    assert cli.main(["embed", str(resnet18), str(pictures), *FLAGS, "--out", str(tmp_path / "f.npy")]) == 0
    out, err = capsys.readouterr()
    assert said(tmp_path, "out") == [out.replace("f.npy", "e.npy"), ""]
    assert said(tmp_path, "err") == [err.replace("one.json", "s.json"), ""]
    assert not differences(*(json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "s")))
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "f.npy").read_bytes()
    assert (tmp_path / "e.txt").read_bytes() == (tmp_path / "f.txt").read_bytes()


def test_what_one_process_refuses_ends_all_alike(resnet18, pictures, tmp_path):
    z = np.ones((9000, 700), np.float32)
    z[8000, 3] = np.nan
    np.save(tmp_path / "z.npy", z)

    strict = command("spectrum", resnet18, pictures, *FLAGS, "--strict")
    assert together(tmp_path, strict, command("spectrum", tmp_path / "z.npy")) == [22, 22]
    for err in said(tmp_path, "err"):
        image, row = err.splitlines()
        assert "a/05.png" in image
        assert "row 8000, column 3 is NaN" in row


def test_a_lost_process_ends_the_others_in_a_line(resnet18, pictures, tmp_path, monkeypatch):
    real = processes.collect

    def collect(value):
        if processes.rank() == 1 and len(asked) == 3:
            os._exit(9)
        asked.append(value)
        return real(value)

    asked = []
    monkeypatch.setattr(processes, "collect", collect)
    assert together(tmp_path, command("spectrum", resnet18, pictures, *FLAGS)) == [2, 9]
    assert said(tmp_path, "err")[0].count("\n") == 1
    assert "another process was lost" in said(tmp_path, "err")[0]


@pytest.mark.parametrize("at", [0, 20, 40])
def test_an_empty_batch_among_others_changes_nothing(at):
    net, pixels = digits(), torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [pixels[:at], pixels[at:at], pixels[at:]]
    whole = collapse.spectrum(net, [pixels])
    found = collapse.spectrum(net, batches)
    assert (found.n, embed(net, batches).shape) == (40, (40, 10))
    np.testing.assert_allclose(
        found.singular_values, whole.singular_values, rtol=0, atol=1e-7 * whole.singular_values[0]
    )


def test_sharing_wants_processes_and_images(resnet18, pictures, tmp_path):
    with pytest.raises(InputError, match="distributed= wants the processes of torch"):
        collapse.spectrum(resnet18, pictures, distributed=True, **SIZES)
    with pytest.raises(InputError, match="distributed= wants the processes"):
        collapse.spectrum(np.ones((9, 3)), distributed=True)

    def act(rank):
        processes.start("cpu")
        with pytest.raises(InputError, match="leave distributed= out, or give recipe="):
            collapse.probe(torch.nn.Flatten(), "sklearn:digits", recipe="paper", distributed=True)
        processes.stop()

    assert together(tmp_path, act, world=1) == [0]
