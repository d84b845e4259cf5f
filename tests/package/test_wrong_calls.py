"""What a user may get wrong in Python: a TypeError at once for a misspelling, one line of InputError for a value."""

import os

import numpy as np
import pytest
import torch
from torch import nn

import collapse
from collapse import InputError, metrics, plots, theory
from collapse.encoders import accuracy
from collapse.metrics import attribution

Z = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
X = torch.rand(20, 3, 8, 8)
LABELS = np.arange(60) % 3


class Nowhere(nn.Module):
    """A network that has diverged."""

    def forward(self, x):
        return x.flatten(1) * torch.nan


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def cov(**given):
    return collapse.Covariance(4, **given).update(Z)


# What is called, and what the one line says; a TypeError says the name of the keyword.
MISSPELT = {
    "spectrum of rows": (lambda: collapse.spectrum(Z, treshold=1e-2), "treshold.*did you mean threshold"),
    "spectrum of a network": (lambda: collapse.spectrum(net(), X, batchsize=4), "batchsize.*did you mean batch_size"),
    "layer_spectra": (lambda: collapse.layer_spectra(net(), X, layer="0"), "layer'"),
    "diagnose": (lambda: collapse.diagnose(net(), X, treshold=1e-2, view=9), "treshold.*did you mean threshold"),
    "diagnose, provenance": (lambda: collapse.diagnose(net(), X, warnings=[]), "warnings"),
    "compare": (lambda: collapse.compare({"a": Z, "b": Z}, normalise=False), "normalise.*did you mean normalize"),
    "embed": (lambda: collapse.embed(net(), X, layers="all"), "layers"),
    "load": (lambda: collapse.load("absent.pth", headz=1), "headz.*did you mean heads"),
    "inspect": (lambda: collapse.inspect("absent.pth", branche="x"), "branche.*did you mean branch"),
    "probe": (lambda: collapse.probe(net(), "sklearn:digits", epoch=3), "epoch"),
    "knn": (lambda: collapse.knn(net(), "sklearn:digits", neighbours=3), "neighbours"),
    "train": (lambda: collapse.train("sklearn:digits", "run", presets="digits"), "presets.*did you mean preset"),
    "Covariance": (lambda: collapse.Covariance(4, normalise=True), "normalise"),
    "Covariance.spectrum": (lambda: cov().spectrum(treshold=1e-2), "treshold"),
    "Monitor": (lambda: collapse.Monitor(net(), evry=3), "evry"),
    "metrics": (lambda: metrics.rankme(collapse.spectrum(Z), eps=1e-7), "eps"),
}
WRONG = {
    "a threshold of 5": (lambda: collapse.spectrum(Z, threshold=5), "threshold= is 5, expected a number from 0"),
    "a threshold that is text": (lambda: collapse.spectrum(Z, threshold="1e-6"), "threshold= is '1e-6'"),
    "a threshold of an accumulator": (lambda: cov().spectrum(threshold=-1), "threshold= is -1"),
    "a device that is absent": (lambda: collapse.spectrum(Z, device="cuda:7"), "device=cuda:7: there are"),
    "a device of an accumulator": (lambda: cov(device="cuda:7"), "device=cuda:7: there are"),
    "a device that is none": (lambda: collapse.spectrum(net(), X, device="gpu"), "device= is 'gpu', expected auto"),
    "one group": (lambda: collapse.spectrum(Z, jackknife=1), "jackknife= is 1"),
    "half a group": (lambda: collapse.spectrum(Z, jackknife=2.5), "jackknife= is 2.5"),
    "a method": (lambda: collapse.spectrum(Z, method="svd"), "method= is 'svd', expected auto"),
    "the old second positional": (lambda: collapse.spectrum(Z, False), "images: got a bool, give a path"),
    "normalize that is a word": (lambda: collapse.spectrum(Z, normalize="no"), "normalize= is 'no'"),
    "a limit of one row": (lambda: collapse.spectrum(Z, limit=1), "limit= is 1"),
    "a sample of none": (lambda: collapse.spectrum(Z, sample=0), "sample= is 0"),
    "a layer of an array": (lambda: collapse.spectrum(Z, layer="projector"), "layer= wants a checkpoint or a module"),
    "a network without images": (lambda: collapse.spectrum(net()), "images: a network needs images"),
    "a state dict without images": (lambda: collapse.spectrum(net().state_dict()), "is no embeddings"),
    "a number": (lambda: collapse.spectrum(3), "source: a int is no embeddings"),
    "rows that differ in length": (lambda: collapse.spectrum([[1.0, 2.0], [3.0]]), "rows differ in length"),
    "words": (lambda: collapse.spectrum(np.array([["a", "b"]] * 3)), "is not real numbers"),
    "three axes": (lambda: collapse.spectrum(X[0]), r"got shape \(3, 8, 8\), expected \(n, d\)"),
    "no rows": (lambda: collapse.spectrum([]), "no rows|expected"),
    "one row": (lambda: collapse.spectrum(Z[:1]), "needs at least 2"),
    "a file that is absent": (lambda: collapse.spectrum("absent.npy"), "absent.npy: no such file"),
    "a folder of images that is absent": (lambda: collapse.spectrum(net(), "absent"), "no such folder"),
    "one image": (lambda: collapse.spectrum(net(), X[:1]), "1 image; a covariance needs"),
    "images that are batches of text": (lambda: collapse.spectrum(net(), ["a", "b"]), "a batch is a str"),
    "images that are dicts": (lambda: collapse.spectrum(net(), [{"x": X}]), "a batch is a dict"),
    "images of another size": (lambda: collapse.spectrum(nn.Linear(3, 2), X), "the network fails on a batch"),
    "a network that gives a tuple": (lambda: collapse.spectrum(nn.LSTM(8, 4), X[:, 0]), "gives a tuple, expected"),
    "a layer that is absent": (lambda: collapse.spectrum(net(), X, layer="9"), "no '9'; there are representation"),
    "a branch of a module": (lambda: collapse.spectrum(net(), X, branch="q"), "branch= says how a checkpoint is read"),
    "a std of zero": (lambda: collapse.spectrum(net(), X, mean=(0, 0, 0), std=(0, 0, 0)), "std= is"),
    "a checkpoint that is a number": (lambda: collapse.embed(3, X), "source: a int is no network"),
    "an empty state dict": (lambda: collapse.load({}), "state dict: no known layout"),
    "one view": (lambda: collapse.diagnose(net(), X, views=1), "views= is 1"),
    "a temperature of zero": (lambda: collapse.diagnose(net(), X, temperature=0), "temperature= is 0"),
    "a preset that is absent": (lambda: collapse.diagnose(net(), X, augmentations="nothing"), "no 'nothing'"),
    "one spectrum to compare": (lambda: collapse.compare({"a": Z}), "two spectra or more"),
    "a list to compare": (lambda: collapse.compare([Z, Z]), "sources: got a list"),
    "images that are used up": (lambda: collapse.compare({"a": net(), "b": net()}, iter([X])), "an iterator is used"),
    "no neighbours": (lambda: collapse.knn(net(), "sklearn:digits", k=0), "k= is 0"),
    "a recipe": (lambda: collapse.probe(net(), "sklearn:digits", recipe="slow"), "recipe= is 'slow'"),
    "data that is absent": (lambda: collapse.probe(net(), "absent"), "absent.*no such folder"),
    "a batch larger than the data": (
        lambda: collapse.train("sklearn:digits", "run", preset="digits", batch_size=5000),
        "lower the batch size",
    ),
    "a method of training": (lambda: collapse.train("sklearn:digits", "run", method="swav"), "method"),
    "workers below zero": (lambda: collapse.train("sklearn:digits", "run", workers=-1), "workers= is -1"),
    "a monitor that never reports": (lambda: collapse.Monitor(net(), every=0), "every = 0"),
    "an accumulator without columns": (lambda: collapse.Covariance(0), "dim= is 0"),
    "a result that is absent": (lambda: collapse.Spectrum.load("absent.json"), "absent.json"),
    "text that is no result": (lambda: collapse.Spectrum.from_json("{}"), "expected collapse.spectrum/1"),
    "neighbours of NaN": (lambda: accuracy.knn(Z * np.nan, LABELS, Z, LABELS), "training rows: row 0 is NaN"),
    "a network of NaN": (lambda: collapse.knn(Nowhere(), "sklearn:digits"), "training rows: row 0 is NaN"),
    "a probe of NaN": (lambda: collapse.probe(Nowhere(), "sklearn:digits"), "training rows: row 0 is NaN"),
    "labels of fewer rows": (lambda: accuracy.probe(Z, LABELS[:4], Z, LABELS), r"training rows: .*labels \(4,\)"),
    "labels of more rows": (
        lambda: accuracy.knn(Z, np.tile(LABELS, 2), Z, LABELS),
        r"training rows: .*labels \(120,\)",
    ),
    "tests of another width": (lambda: accuracy.knn(Z, LABELS, Z[:, :2], LABELS), r"test rows: got shape \(60, 2\)"),
    "labels below zero": (lambda: accuracy.probe(Z, LABELS, Z, LABELS - 1), "test labels: expected whole numbers"),
    "labels between two": (lambda: accuracy.knn(Z, LABELS + 0.5, Z, LABELS), "training labels: expected whole numbers"),
    "votes at no temperature": (lambda: accuracy.knn(Z, LABELS, Z, LABELS, temperature=0), "temperature= is 0"),
    "a decay below zero": (lambda: accuracy.probe(Z, LABELS, Z, LABELS, decay=-1), "decay= is -1"),
    "more right than there are": (lambda: accuracy.wilson(5, n=3), "right= is 5, n= is 3"),
    "covariances of one view": (
        lambda: attribution.signal_and_augmentation(np.eye(2), np.eye(2), n=9, views=1),
        "views= 1",
    ),
    "noise of what does not vary": (
        lambda: collapse.spectrum(np.ones((9, 3))).plot(kind="noise"),
        "kind noise wants 3 rows",
    ),
    "a drawing of nothing": (lambda: plots.draw({}, "spectrum", None), "no spectrum is given"),
    "an array of negative numbers": (lambda: metrics.effective_rank(of_covariance=[1.0, -1.0]), "not a number >= 0"),
    "an array with infinity": (
        lambda: metrics.stable_rank(of_covariance=[np.inf, 1.0]),
        "inf is not a number >= 0, and",
    ),
    "an array of text": (lambda: metrics.uniformity([["a"], ["b"]]), "no array of real numbers"),
    "rows of two lengths": (lambda: metrics.alignment([[1, 2], [3]], [[1, 2], [3]]), "no array of real numbers"),
    "complex numbers": (lambda: metrics.condition(of_covariance=np.array([1 + 1j])), "they are complex"),
    "complex numbers of torch": (lambda: metrics.coherence(torch.ones(2, 2) + 1j), "they are complex"),
    "covariances of two widths": (lambda: metrics.lidar_of(np.eye(2), np.eye(3)), "lidar: got shapes"),
    "no scatter within samples": (lambda: metrics.lidar(np.eye(2)[[0, 0, 1, 1]], [0, 0, 1, 1], delta=0), "delta= 0"),
    "an edge of one row": (lambda: metrics.above_edge(of_covariance=[1.0, 2], n=1), "n= is 1"),
    "noise of negative variance": (lambda: metrics.marchenko_pastur_edges(9, 3, variance=-1), "variance= -1"),
    "one knot": (lambda: metrics.epps_pulley(Z, knots=1), "knots= is 1"),
    "no slices": (lambda: metrics.sigreg(Z, seed=0, slices=0), "slices= is 0"),
    "a law from the zeroth value": (
        lambda: metrics.power_law(of_covariance=np.arange(1, 99.0), first=0),
        "first= is 0",
    ),
    "a mean of no shares": (lambda: metrics.auc(of_covariance=[1.0, 2], count=0), "count= is 0"),
    "shares less than nothing": (lambda: metrics.rankme(of_rows=[1.0, 1], epsilon=-1), "epsilon= is -1"),
    "traces of two widths": (
        lambda: metrics.mean_cosine(of_covariance=[1.0], moments=[1.0, 2]),
        "moments: got 2 for 1",
    ),
    "directions with NaN": (lambda: metrics.principal_angles([[np.nan], [0]], [[1.0], [1]]), "hold NaN"),
    "a negative variance": (lambda: metrics.variance_within([1.0, -1], np.eye(2), np.eye(2)), "is negative"),
    "shapes of theory": (lambda: theory.gram_difference([[1.0, 2.0]], [[1.0]], [[1.0, 0.0]]), "got shape"),
    "shapes of a gradient": (lambda: theory.population_gradient(np.ones((2, 3)), np.eye(4), np.eye(4)), "but d = 3"),
    "no temperature": (lambda: theory.population_gradient([[1.0]], [[1.0]], [[1.0]], 0), "temperature: got 0"),
    "K that is not square": (lambda: theory.balanced_grams(np.ones((2, 3)), 1.0), r"K: got shape \(2, 3\)"),
    "a product below zero": (lambda: theory.balanced_grams(np.eye(2), -1.0), "m: got -1.0"),
    "splits of two lengths": (lambda: theory.conserved_split([1.0, 2, 3], [1.0, 2]), r"m, kappa: got shapes \(3,\)"),
    "a split below zero": (lambda: theory.conserved_split(-1.0, 0.0), "m: entry 0 is -1, below zero"),
    "a direction without variance": (lambda: theory.cosine_modes([1.0, 0], [1.0, 0]), "direction 1 has no variance"),
    "a mode that starts at zero": (lambda: theory.population_modes([0, 1], [0.0], [1], [1], depth=2), "w0: entry 0"),
    "modes at no temperature": (
        lambda: theory.population_modes([0], [1], [1], [1], temperature=0),
        "temperature: got 0",
    ),
    "a mode of zero": (lambda: theory.euclidean_modes([0, 1], [0.0], [1.0], [1.0]), "m0: entry 0 is not positive"),
    "times that fall": (lambda: theory.predictor_modes([1, 0], [1], [1], [1], [1]), "t: .* ascending times"),
    "layers that do not fit": (
        lambda: theory.matrix_flow([0, 1], [np.ones((2, 3)), np.ones((2, 3))], lambda W: W),
        "weights: got shapes",
    ),
    "a mask of another layer": (
        lambda: theory.matrix_flow([0, 1], [np.eye(2)], lambda W: W, masks=[np.eye(3)]),
        "masks: got shapes",
    ),
    "an aligned layer of zero": (lambda: theory.aligned_flow([0, 1], [[0.0]], lambda m: m), "sigma: got shape"),
    "a layer of another width": (
        lambda: theory.MeanField([[1.0]], [[1.0]], points=16).gradient(np.ones((1, 2))),
        r"W: got shape \(1, 2\), but d = 1",
    ),
    "views of two sizes": (lambda: theory.sample_gradient(np.ones((2, 3)), np.ones((3, 3))), "x, x_prime: got shapes"),
    "a row for a matrix": (lambda: theory.singular_values([1.0, 2.0]), r"weights: got shape \(2,\)"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_keyword_is_a_type_error_at_once(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = MISSPELT[case]
    with pytest.raises(TypeError, match=message):
        call()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_value_is_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)  # a flag means nothing in Python
    assert not os.listdir(tmp_path)


def test_there_are_forty_of_them():
    assert len(MISSPELT) + len(WRONG) >= 40
