"""Training: the loss, the draws of the views, exact resumption, and that it learns."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import collapse
from collapse import InputError
from collapse.evaluate import embed, knn_top1, probe_top1
from collapse.images import Preprocessing
from collapse.models import ResNetShape
from collapse.train import Config, Network, Training, infonce, learning_rate, train
from collapse.views import Augmentation, uniforms

PREPROCESSING = Preprocessing(None, None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TINY = Config(
    epochs=6,
    batch_size=64,
    lr=0.1,
    warmup=1,
    dim=8,
    shape=ResNetShape((1, 1), (8, 32), stem=3, stem_planes=8),
    augmentation=Augmentation(scale=(0.5, 1.0), degrees=15, flip=0.0),
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8))
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), data.target


def test_the_loss_is_the_mean_over_anchors_and_directions_of_the_papers_formula():
    z, z_prime = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    terms = []
    for a, b in ((z, z_prime), (z_prime, z)):
        for i in range(9):
            similar = [math.exp(float(torch.cosine_similarity(a[i], b[j], dim=0)) / 0.1) for j in range(9)]
            terms.append(-math.log(similar[i] / sum(similar)))
    # float32 logits up to 10 carry errors of 10 * 2^-24 * sqrt(5).
    assert infonce(z, z_prime, 0.1).item() == pytest.approx(np.mean(terms), abs=1e-5)


def test_identical_far_apart_views_have_no_loss():
    z = torch.eye(6)
    assert infonce(z, z, 0.01).item() < 1e-6
    assert infonce(torch.ones(6, 3), torch.ones(6, 3), 0.1).item() == pytest.approx(math.log(6), abs=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 10, 0.5) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11))
    assert rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == 0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


def test_a_draw_depends_on_its_image_alone():
    whole = uniforms(7, 3, np.arange(100), 1, 8)
    order = np.random.default_rng(0).permutation(100)
    assert torch.equal(uniforms(7, 3, order, 1, 8), whole[torch.from_numpy(order)])
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 0)):
        seed, epoch, view = other
        assert not (uniforms(seed, epoch, np.arange(100), view, 8) == whole).any()


def test_draws_are_uniform_and_independent():
    u = torch.cat([uniforms(0, epoch, np.arange(2000), view, 8) for epoch in range(3) for view in range(2)]).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    # 8 columns at a level of 1e-4 each: a sound generator fails once in a thousand seeds, and this seed is fixed.
    assert min(kstest(column, "uniform").pvalue for column in u.T) > 1e-4
    correlation = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(u))


def test_an_augmentation_with_nothing_to_do_returns_the_image():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    still = Augmentation(scale=(1, 1), ratio=1, degrees=0, flip=0, brightness=0, contrast=0)
    u = uniforms(0, 0, np.arange(5), 0, still.DRAWS)
    torch.testing.assert_close(still(images, u), images, rtol=0, atol=1e-5)
    mirrored = replace(still, flip=1.0)(images, u)
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=1e-5)


def test_crops_and_rotations_show_the_image_itself():
    ramp = torch.linspace(0, 1, 33).expand(1, 1, 33, 33)  # brightness is the horizontal position
    crop = Augmentation(scale=(0.25, 0.25), ratio=1, degrees=0, flip=0, brightness=0, contrast=0)
    for index in range(20):
        view = crop(ramp, uniforms(0, 0, np.array([index]), 0, 8))[0, 0]
        assert view.max() - view.min() == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(view, view[:1].expand(33, 33), rtol=0, atol=1e-5)
    quarter = Augmentation(scale=(1, 1), ratio=1, degrees=90, flip=0, brightness=0, contrast=0)
    u = torch.zeros(1, 8)
    torch.testing.assert_close(quarter(ramp, u)[0, 0].T, ramp[0, 0], rtol=0, atol=1e-5)


def test_brightness_and_contrast_stay_in_their_range():
    grey = torch.full((200, 3, 4, 4), 0.5)
    jitter = Augmentation(scale=(1, 1), ratio=1, flip=0, brightness=0.4, contrast=0)
    level = jitter(grey, uniforms(0, 0, np.arange(200), 0, 8)).mean((1, 2, 3))
    assert 0.3 - 1e-6 <= level.min() < 0.32
    assert 0.68 < level.max() <= 0.7 + 1e-6


def test_directclr_sends_gradient_through_the_first_entries_only(digits):
    network = Network(replace(TINY, method="directclr", head="none"))
    r = network.backbone(PREPROCESSING.normalize(digits[0][:32]))
    r.retain_grad()
    infonce(network.projector(r), network.projector(r.flip(0)), 0.1).backward()
    assert (r.grad[:, :8] != 0).any()
    assert (r.grad[:, 8:] == 0).all()


@pytest.mark.parametrize(
    "options", [{"head": "none"}, {"head": "linear"}, {"head": "mlp"}, {"method": "directclr", "head": "none"}]
)
def test_every_head_learns_and_its_encoder_is_read_back(digits, tmp_path, options):
    pixels, labels = digits
    config = replace(TINY, **options)
    assert list(train(tmp_path, config, pixels[:600], PREPROCESSING)) == [1, 2, 3, 4, 5, 6]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert not (tmp_path / "resume.pt").exists()
    net = collapse.load(tmp_path / "encoder.safetensors")
    assert net.report["keys"]["unknown"] == 0
    assert net.preprocess == PREPROCESSING
    trained = config.head in ("linear", "mlp")
    assert (net.projector is not None) == trained
    r = torch.cat(list(embed(net, pixels.split(500), net.preprocess))).numpy()
    # Chance is 0.1; six standard deviations of 1,197 guesses are 0.052.
    assert knn_top1(r[:600], labels[:600], r[600:], labels[600:]) > 0.16
    assert list(train(tmp_path, config, pixels[:600], PREPROCESSING)) == []


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(digits, tmp_path, stop):
    pixels = digits[0][:200]
    for _ in train(tmp_path / "unbroken", TINY, pixels, PREPROCESSING, save_every=2):
        pass
    broken = train(tmp_path / "broken", TINY, pixels, PREPROCESSING, save_every=2)
    for _ in range(stop):
        next(broken)
    broken.close()
    for _ in train(tmp_path / "broken", TINY, pixels, PREPROCESSING, save_every=2):
        pass
    for name in ("metrics.jsonl", "config.json", "encoder.safetensors"):
        assert (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_a_run_of_another_configuration_is_refused_and_kept(digits, tmp_path):
    pixels = digits[0][:200]
    list(train(tmp_path, replace(TINY, epochs=1), pixels, PREPROCESSING))
    before = (tmp_path / "encoder.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"lr = 0\.1, not 0\.2"):
        list(train(tmp_path, replace(TINY, epochs=1, lr=0.2), pixels, PREPROCESSING))
    assert (tmp_path / "encoder.safetensors").read_bytes() == before


def test_what_cannot_be_trained_is_refused(digits, tmp_path):
    pixels = digits[0]
    cases = {
        "lower the batch size": (TINY, pixels[:63]),
        "head: got 'deep'": (replace(TINY, head="deep"), pixels[:100]),
        "no projector: --head none": (replace(TINY, method="directclr"), pixels[:100]),
        "d0 = 33": (replace(TINY, method="directclr", head="none", dim=33), pixels[:100]),
    }
    for index, (message, (config, images)) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            list(train(tmp_path / str(index), config, images, PREPROCESSING))


def test_a_loss_that_is_not_finite_stops_with_its_step(digits):
    training = Training(TINY)
    with torch.no_grad():
        training.network.backbone.conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="epoch 0, step 0: the loss is nan"):
        training.run_epoch(digits[0][:128], PREPROCESSING)


def test_seeds_change_the_start_and_nothing_else_does():
    weights = lambda seed: Network(replace(TINY, seed=seed)).backbone.conv1.weight
    torch.manual_seed(5)
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_nearest_neighbours_agree_with_scikit_learn():
    data = load_digits()
    train_rows, test_rows = data.data[:1000], data.data[1000:]
    split = (data.target[:1000], test_rows, data.target[1000:])
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    expected = theirs.fit(train_rows, split[0]).score(test_rows, split[2])
    assert knn_top1(train_rows, *split) == pytest.approx(expected, abs=1e-9)
    # lightly 1.6.0 knn_predict on unit rows, k = 20 and 200.
    assert knn_top1(train_rows, *split) == pytest.approx(0.9560853199498118)
    assert knn_top1(train_rows, *split, k=200, temperature=0.1) == pytest.approx(0.9134253450439147)


def test_the_linear_probe_is_logistic_regression_on_standardised_features():
    data = load_digits()
    accuracy = probe_top1(data.data[:1000], data.target[:1000], data.data[1000:], data.target[1000:])
    assert accuracy == pytest.approx(0.9335006273525721)  # scikit-learn 1.9.1, tol 1e-8


def test_an_encoder_file_says_what_it_is(digits, tmp_path):
    list(train(tmp_path, replace(TINY, epochs=1, head="linear"), digits[0][:100], PREPROCESSING))
    names = set(load_file(tmp_path / "encoder.safetensors"))
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "projector.0.weight"} < names
    net = collapse.load(tmp_path / "encoder.safetensors")
    assert net.report["architecture"] == "resnet6 (8-32 planes), 3x3 stem"
    assert net.report["projector"] == {"dims": [32, 8], "prefix": "projector."}
    assert net.layer("projector")(torch.zeros(1, 3, 8, 8)).shape == (1, 8)
