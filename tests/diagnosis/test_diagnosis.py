"""Where and why a network collapses: the rule against independent sums, known truths, the command end to end."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import scripted
from scipy.stats import ortho_group
from torch import nn

import collapse
from collapse import InputError, cli, metrics
from collapse.data.preprocessing import Preprocessing
from collapse.diagnosis import as_encoder, last_map, paper_augmentations
from collapse.diagnosis.page import page
from collapse.diagnosis.views import augmentations_of, augmented, before_crop
from collapse.diagnosis.wording import table
from collapse.metrics.attribution import (
    CAUSES,
    Attribution,
    attribute,
    augmentation_at_line,
    examine_map,
    signal_and_augmentation,
    signal_modes,
    undecided,
)
from collapse.recipes.views import uniforms
from collapse.results import load_result

ROOT = Path(__file__).parents[2]


class Noise:
    """Gaussian noise of the standard deviations given, (d,), rotated by `turn`."""

    def __init__(self, deviations, turn=None):
        self.root, self.DRAWS = np.diag(deviations), len(deviations)
        self.root = self.root if turn is None else turn @ self.root

    def __call__(self, images, u):
        return images + (torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)) @ torch.tensor(self.root.T)).float()


def linear(*weights):
    layers = [nn.Linear(W.shape[1], W.shape[0], bias=False) for W in weights]
    for layer, W in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(W).float()
    return nn.Sequential(*layers)


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


# The rule.


def random_parts(rng, d, low):
    """S and A of d directions of variances from `low` to 1 in a random basis."""
    turn = ortho_group.rvs(d, random_state=rng)
    scale = turn * np.sqrt(np.geomspace(1, low, d))
    mix, fractions = ortho_group.rvs(d, random_state=rng), rng.uniform(0, 1, d)
    fractions = np.where(abs(fractions - 0.5) < 0.01, 0.6, fractions)  # a sign that rounding could turn is no test
    S = scale @ (mix * fractions) @ mix.T @ scale.T
    A = scale @ (mix * (1 - fractions)) @ mix.T @ scale.T
    return S, A


@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_augmentation_has_the_negative_eigenvalues_of_signal_minus_augmentation(d, seed):
    S, A = random_parts(np.random.default_rng(seed), d, 1e-6)
    found = attribute(S + A, S, A, np.zeros(d, bool), 0.0, 1e-3, 10_000, 4)
    values, vectors = np.linalg.eigh(S + A)
    collapsed = vectors[:, values < 1e-3 * values[-1]]
    difference = np.linalg.eigvalsh(collapsed.T @ (S - A) @ collapsed)
    counts = found.counts()
    assert counts["alive"] == d - collapsed.shape[1]
    assert counts["augmentation"] == (difference < 0).sum()
    assert counts["implicit"] == (difference > 0).sum()
    assert sum(counts.values()) == d
    # The directions of the collapsed are those of no shared signal and no shared augmentation, and span their subspace.
    U = found.directions[:, found.collapsed()]
    assert np.linalg.norm(U - collapsed @ (collapsed.T @ U)) < 1e-8 * math.sqrt(d)
    for M in (S, A):
        form = U.T @ M @ U / np.sqrt(np.outer(*2 * [found.variances[found.collapsed()]]))
        assert abs(form - np.diag(form.diagonal())).max(initial=0) < 1e-6


@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_linear_map_moves_no_direction_across_the_line(d, seed):
    """Sylvester's law: what S - A is at the input of a map it is, in signs, along the pulled back directions."""
    rng = np.random.default_rng(seed)
    S, A = random_parts(rng, d, 0.1)
    W = ortho_group.rvs(d, random_state=rng) * np.geomspace(1, 1e-2, d) @ ortho_group.rvs(d, random_state=rng)
    found = attribute(W @ (S + A) @ W.T, W @ S @ W.T, W @ A @ W.T, np.zeros(d, bool), 0.0, 0.999999, 10_000, 4)
    pulled = W.T @ found.directions
    at_input = np.einsum("ij,ij->j", pulled, S @ pulled) / np.einsum("ij,ij->j", pulled, (S + A) @ pulled)
    np.testing.assert_allclose(found.fractions, at_input, atol=1e-8)
    judged = found.collapsed()
    np.testing.assert_array_equal(found.causes[judged] == "augmentation", at_input[judged] < 0.5)


def test_signal_and_augmentation_are_those_of_a_two_way_sum_of_squares():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, 1, 6)) * 2 + rng.standard_normal((50, 4, 6))
    means = z.mean(1)
    S, A = signal_and_augmentation(np.cov(z.reshape(-1, 6).T), np.cov(means.T), 50, 4)
    inside = z - means[:, None]
    within = np.einsum("nvi,nvj->ij", inside, inside) / (50 * 3)
    np.testing.assert_allclose(A, within, atol=1e-12)
    np.testing.assert_allclose(S, np.cov(means.T) - within / 4, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_modes_share_is_the_variance_that_its_coordinate_explains(d, seed):
    """Of rows z with covariance T exactly: least squares of z on y = z g, whose fitted values have that variance."""
    rng = np.random.default_rng(seed)
    S, A = random_parts(rng, d, 0.1)
    rows = rng.standard_normal((4 * d, d))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(rows.T @ rows / len(rows))).T @ np.linalg.cholesky(S + A).T
    fractions, shares = signal_modes(S, S + A, np.eye(d))
    values, modes = scipy.linalg.eigh(S, S + A)
    np.testing.assert_allclose(fractions, values[::-1], atol=1e-10)
    explained = []
    for g in modes.T[::-1]:
        y = rows @ g
        fitted = np.outer(y, np.linalg.lstsq(y[:, None], rows, rcond=None)[0][0])
        explained.append((fitted**2).sum() / (rows**2).sum())
    np.testing.assert_allclose(shares, explained, rtol=1e-7)


def test_directions_that_few_images_may_have_put_on_the_wrong_side_are_said_to_be_undecided():
    rng = np.random.default_rng(1)
    k, n, views, wrong = 6, 400, 4, 0
    for _ in range(100):
        z = rng.standard_normal((n, 1, k)) * math.sqrt(0.6) + rng.standard_normal((n, views, k)) * math.sqrt(0.4)
        S, A = signal_and_augmentation(np.cov(z.reshape(-1, k).T), np.cov(z.mean(1).T), n, views)
        fractions = scipy.linalg.eigh(S, S + A, eigvals_only=True)
        wrong += ((fractions < 0.5) & ~undecided(fractions, n, views)).any()
    assert wrong <= 5  # the bound leaves 5 %
    assert undecided(np.array([0.6, 0.4]), 20, 4).all()
    assert not undecided(np.array([0.9, 0.1]), 2000, 4).any()


@pytest.mark.parametrize(
    ("n", "views", "k", "line", "low", "high"),
    [(1001, 2, 1, 0.5, 0.304, 0.655), (1001, 2, 4, 0.5, 0.245, 0.690), (3001, 4, 2, 0.4, 0.320, 0.476)],
)
def test_undecided_are_signal_fractions_within_the_bound_of_the_line(n, views, k, line, low, high):
    """The ends are those of the ratios of mean squares, 1 + V S / A, within ((1 +- b) / (1 -+ w))^2 of the line's."""
    for fraction, expected in ((low - 1e-3, False), (low + 1e-3, True), (high - 1e-3, True), (high + 1e-3, False)):
        assert undecided(np.full(k, fraction), n, views, line).all() == expected, fraction
    assert undecided(np.array([1.0] * k), n, views, line).any() == 0
    assert undecided(np.array([0.5]), 3, 2).all()  # so few that there is no bound


def test_how_many_would_be_augmentation_with_the_line_elsewhere():
    fractions = np.array([0.1, 0.3, 0.4, 0.45, 0.6, 0.7, 0.2])
    causes = np.array(["augmentation"] * 4 + ["implicit"] * 2 + ["alive"])
    found = Attribution(np.eye(7), causes, np.ones(7), fractions, np.zeros(7, bool))
    assert augmentation_at_line(found) == {"1/3": 2, "1/2": 4, "2/3": 5}


def test_two_aligned_layers_share_their_small_singular_values():
    rng = np.random.default_rng(2)
    U, Q, V = ortho_group.rvs(8, size=3, random_state=rng)
    sigma = np.array([1.0] * 6 + [0.1] * 2)
    W1, W2 = Q * sigma @ V.T, U * sigma @ Q.T
    S, A = 0.9 * W1 @ W1.T, 0.1 * W1 @ W1.T
    found = attribute(W2 @ (S + A) @ W2.T, W2 @ S @ W2.T, W2 @ A @ W2.T, np.zeros(8, bool), 1e-12, 1e-3, 10_000, 4)
    seen = examine_map(W2, S, A, 1e-12, found)
    assert found.counts()["implicit"] == 2
    assert seen["explained"] == pytest.approx(1, rel=1e-9)
    assert seen["gain"] == pytest.approx(0.01, rel=1e-9)
    assert seen["input"] == pytest.approx(0.01, rel=1e-9)
    assert (seen["alignment"], seen["chance"]) == (pytest.approx(1, rel=1e-9), 0.25)
    assert (seen["killed"], seen["killed_augmentation"]) == (0, 0)
    # A map that lets nothing through: its cause shows at its input only.
    noisy = np.diag([0.1] * 6 + [5.0, 0.0])
    killed = examine_map(np.diag([1.0] * 6 + [0.0] * 2), np.eye(8), noisy, 1e-12, found)
    assert (killed["killed"], killed["killed_augmentation"]) == (2, 1)


# The measurement.


def test_one_pass_gives_what_all_rows_at_once_give():
    rng = np.random.default_rng(3)
    W1, W2 = rng.standard_normal((10, 12)) / 3, rng.standard_normal((7, 10)) / 3
    net, noise = linear(W1, W2), Noise(np.full(12, 0.7))
    x = torch.tensor(rng.standard_normal((30, 12))).float()
    found = collapse.diagnose(net, x, views=3, augmentations=[noise], seed=5, batch_size=12)
    views = [noise(x, uniforms(5, 0, np.arange(30), v, 12)) for v in range(3)]
    with torch.no_grad():
        h = torch.stack([net[0](view) for view in views], 1).double().numpy()
        z = torch.stack([net(view) for view in views], 1).double().numpy()
    assert [block.layer for block in found.blocks] == ["0", "1", "representation"]
    for block, rows in zip(found.blocks, (h, z, z), strict=True):
        flat = rows.reshape(-1, rows.shape[2])
        values = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2 / (len(flat) - 1)
        np.testing.assert_allclose(block.spectrum.singular_values, values, rtol=1e-5)
        assert block.lidar == pytest.approx(metrics.lidar(flat, np.repeat(np.arange(30), 3)), rel=1e-4)
        S, A = signal_and_augmentation(np.cov(flat.T), np.cov(rows.mean(1).T), 30, 3)
        expected = scipy.linalg.eigh(S, S + A, eigvals_only=True)[::-1].clip(0)
        np.testing.assert_allclose(block.signal_fraction, expected, atol=1e-5)
    again = collapse.diagnose(net, [x[:11], x[11:]], views=3, augmentations=[noise], seed=5, batch_size=96)
    np.testing.assert_allclose(
        again.blocks[-1].attribution.variances, found.blocks[-1].attribution.variances, rtol=1e-6
    )
    other = collapse.diagnose(net, x, views=3, augmentations=[noise], seed=6)
    assert abs(other.blocks[-1].attribution.variances / found.blocks[-1].attribution.variances - 1).max() > 1e-3


def test_each_kind_of_collapse_is_told_from_the_others():
    d, rng = 16, np.random.default_rng(4)
    U, Q, V = ortho_group.rvs(d, size=3, random_state=rng)
    sigma, noise = np.ones(d), np.full(d, 0.1)
    noise[8:11] = 3.0
    sigma[8:11] = sigma[11:13] = 0.01
    W2 = np.concatenate([U * np.sqrt(sigma) @ Q.T, np.zeros((2, d)), (U * sigma**0.5 @ Q.T)[:3]])
    net = linear(Q * np.sqrt(sigma) @ V.T, W2)
    x = torch.tensor(rng.standard_normal((600, d)) @ V.T).float()
    found = collapse.diagnose(net, x, augmentations=[Noise(noise, V)], threshold=1e-2, batch_size=256)
    block = found.blocks[-1]
    assert block.attribution.counts() == {"alive": 11, "augmentation": 3, "implicit": 2, "rounding": 3, "dead": 2}
    assert not block.attribution.undecided.any()
    directions = U.T @ block.attribution.directions[:16, block.attribution.of("augmentation")]
    # With 600 images each is off by a correlation of some 1 / sqrt(600) with each of 16 others.
    assert (directions[8:11] ** 2).sum() / (directions**2).sum() > 1 - 3 * 16 / 600
    assert block.sentence() == (
        "representation, 11 of 21 directions are alive; 3 augmentation, 2 implicit, 3 rounding, 2 dead."
    )
    head, _, _, row = found.table()
    assert head == ("layer", "width", "eff. rank", *CAUSES)
    assert row == ("representation", "21", f"{block.spectrum.effective_rank:.2f}", "11", "3", "2", "3", "2")
    before, after = found.blocks[1:]
    assert found.rank_lost()[1] == {
        "from": "1", "to": "representation", "alive": [before.attribution.counts()["alive"], 11], "width": [21, 21],
        "effective_rank": [before.spectrum.effective_rank, after.spectrum.effective_rank],
    }  # fmt: skip
    assert (len(found.rank_lost()), found.rank_lost()[0]["to"]) == (2, "1")
    for text in ("outweighs signal along 3", "left for 2", "3 lie at or below the floor", "2 units are constant"):
        assert text in found.verdict, text
    assert "undecided" not in table(found)


def test_a_known_temperature_moves_the_line():
    """Small directions of signal fraction 0.6: a cosine loss lets them live at temperature 0.2, and not at 1."""
    rng, d = np.random.default_rng(5), 8
    scale, noise = np.repeat([1.0, 0.01], 4), np.repeat([0.1, math.sqrt(2 / 3)], 4)
    x = torch.tensor(rng.standard_normal((4000, d))).float()
    how = {"augmentations": [Noise(noise)], "threshold": 1e-2, "views": 2, "batch_size": 2048}
    fractions = np.repeat([1 / 1.01, 0.6], 4)
    for temperature, cause in ((None, "implicit"), (0.2, "implicit"), (1.0, "augmentation")):
        found = collapse.diagnose(linear(np.diag(scale)), x, temperature=temperature, **how)
        assert found.blocks[-1].attribution.counts()[cause] == 4
        line = found.provenance["line"]
        if temperature is None:
            assert line == 0.5
            lines = found.provenance["lines"]
            assert [float(key) for key in lines] == [0.05, 0.1, 0.2, 0.5]
            unknown = found.verdict
        else:  # temperature times what lies above the level is 1, up to the error of 4,000 images
            assert found.provenance["lines"] == {}
            level = (line - 1e-2 * fractions.max()) / (1 - 1e-2)
            assert temperature * np.maximum(fractions - level, 0).sum() == pytest.approx(1, abs=0.05)
        if temperature == 0.2:
            assert lines["0.2"] == line
    assert f"below {line:.2f}, under which a cosine loss of temperature 1 at rest" in found.verdict
    low, high = lines["0.05"], lines["0.5"]
    assert f"a cosine loss of 0.05 to 0.5 has its line at {low:.2f} to {high:.2f}, with which" in unknown
    assert "with which augmentation takes 0 to 0." in unknown


def test_other_losses_draw_their_lines_without_a_temperature():
    """Noise of 3 and 12 leaves signal fractions of 0.1 and 0.007; a dot product's variances are in proportion."""
    x = torch.tensor(np.random.default_rng(6).standard_normal((20_000, 4))).float()
    how = {"augmentations": [Noise(np.array([0.1, 0.1, 3.0, 12.0]))], "threshold": 5e-2, "views": 2, "batch_size": 8192}
    net = linear(np.diag([1.0, 0.9, 0.01, 0.001]))
    counts = collapse.diagnose(net, x, **how).blocks[-1].attribution.counts()
    assert (counts["augmentation"], counts["implicit"]) == (2, 0)
    found = collapse.diagnose(net, x, similarity="dot", **how)
    counts = found.blocks[-1].attribution.counts()
    assert (counts["augmentation"], counts["implicit"]) == (1, 1)
    assert found.provenance["line"] == pytest.approx(5e-2 / 1.01, rel=0.02)
    assert "under which a dot loss at rest" in found.verdict
    assert collapse.diagnose(net, x, similarity="euclidean", **how).provenance["line"] > found.provenance["line"]
    for wrong, message in (
        ({"similarity": "cosines"}, "give one of cosine, dot"),
        ({"similarity": "dot", "temperature": 1.0}, "leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            collapse.diagnose(net, x, **how, **wrong)


@pytest.mark.parametrize(
    ("training", "temperature"),
    [
        ({"method": "simclr", "temperature": 0.2}, 0.2),
        ({"method": "simclr", "method_kwargs": {"temperature": 0.3}}, 0.3),
        ({"method": "byol", "temperature": 0.2}, None),
        ({"temperature": 0.2}, None),
    ],
)
def test_a_files_own_temperature_is_used_and_the_callers_before_it(resnet18, photos, tmp_path, training, temperature):
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": torch.load(resnet18), "hyper_parameters": training}, path)
    assert collapse.inspect(path).temperature == temperature
    how = {"resize": 32, "views": 2, "limit": 4, "workers": 0}
    found = collapse.diagnose(path, photos, **how)
    assert found.provenance["temperature"] == temperature
    assert bool(found.provenance["lines"]) == (temperature is None)
    assert collapse.diagnose(path, photos, temperature=0.7, **how).provenance["temperature"] == 0.7


def test_a_temperature_that_is_no_number_is_one_line(resnet18, tmp_path):
    path = tmp_path / "net.ckpt"
    hyper = {"method": "simclr", "temperature": "warm"}
    torch.save({"state_dict": torch.load(resnet18), "hyper_parameters": hyper}, path)
    with pytest.raises(InputError, match="hyper_parameters: temperature is 'warm', expected a number"):
        collapse.inspect(path)


def test_a_layer_that_no_loss_has_ordered_is_said_to_be_so(tmp_path):
    """Where the largest variances have the least signal, training cannot have left them."""
    x = torch.tensor(np.random.default_rng(7).standard_normal((2000, 6))).float()
    noise = Noise(np.array([0.1, 0.2, 0.4, 0.8, 1.2, 2.0]))
    sizes = np.array([1, 0.9, 0.5, 0.3, 0.1, 0.003])
    for scale, order in ((sizes, 1.0), (sizes[::-1].copy(), -1.0)):
        made = scale / np.sqrt(1 + noise.root.diagonal() ** 2)
        found = collapse.diagnose(linear(np.diag(made)), x, augmentations=[noise], threshold=1e-3, batch_size=2048)
        assert found.blocks[-1].signal_order() == pytest.approx(order)
        assert ("no contrastive loss has ordered this layer" in found.verdict) == (order < 0)
    document = json.loads(found.to_json())
    found.save(tmp_path / "d.json")
    assert collapse.Diagnosis.load(tmp_path / "d.json").blocks[-1].signal_order() == pytest.approx(-1)
    for name in ("variance_share", "signal_order"):  # as written before there were any
        for block in document["blocks"]:
            del block[name]
    (tmp_path / "before.json").write_text(json.dumps(document))
    assert math.isnan(collapse.Diagnosis.load(tmp_path / "before.json").blocks[-1].signal_order())
    document["blocks"][-1]["variance_share"] = [0.5]
    (tmp_path / "cut.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="1 shares of the variance for 6 modes; it is cut"):
        collapse.Diagnosis.load(tmp_path / "cut.json")


def test_a_batch_norm_behind_the_last_map_is_folded_in():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5, bias=False), nn.BatchNorm1d(5))
    for _ in range(20):
        net(torch.randn(64, 6) * 3 + 1)
    nn.init.uniform_(net[4].weight, 0.2, 2)
    x = torch.randn(400, 6)
    name, weight = last_map(as_encoder(net.eval()), "representation", x[:2], {})
    assert name == "3"
    with torch.no_grad():
        h, z = net[:3](x).double().numpy(), net(x).double().numpy()
    np.testing.assert_allclose(weight @ np.cov(h.T) @ weight.T, np.cov(z.T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("problem", ["views", "images", "none", "nan"])
def test_python_callers_get_one_clear_line(problem):
    net, x = linear(np.eye(4)), torch.zeros(3, 4)
    how = {"augmentations": [Noise(np.ones(4))]}
    images, views = {"views": (x, 1), "images": (x[:1], 2), "none": ([], 2), "nan": (x + torch.nan, 2)}[problem]
    with pytest.raises(InputError, match={"nan": "NaN", "views": "views= is 1"}.get(problem, "needs at least 2")):
        collapse.diagnose(net, images, views=views, **how)


def test_the_papers_views_keep_their_blur_in_proportion_to_the_image():
    first, second = paper_augmentations(56)
    assert (first.size, first.sigma, first.blur, second.blur, second.solarize) == (56, (0.025, 0.5), 1.0, 0.1, 0.2)
    assert paper_augmentations(8, "digits")[0].blur == 0
    with pytest.raises(InputError, match="preset"):
        paper_augmentations(8, "nothing")


def test_images_are_decoded_to_a_square_of_the_resized_side():
    for resize, crop, side in ((40, 32, 40), (None, 32, 32), (40, None, 40), (None, None, None)):
        made = before_crop(Preprocessing(resize=resize, crop=crop))
        assert (made.resize, made.crop) == (side, side)
    net = as_encoder(nn.Flatten())
    for resize, crop, size in ((40, 32, 32), (40, None, 40), (None, None, 20)):
        net.preprocess = Preprocessing(resize=resize, crop=crop)
        views, said = augmentations_of(net, torch.zeros(2, 3, 24, 20), None, None)
        assert [view.size for view in views] == [size, size]
        assert said["recipe"] == "the paper's"
    with pytest.raises(InputError, match="does not say how large its images are"):
        augmentations_of(net, torch.zeros(2, 3, 24, 20), "images", None)


class Added:
    """Adds a number of its own and the draws, of which there is one."""

    DRAWS = 1

    def __init__(self, number):
        self.number = number

    def __call__(self, images, u):
        return images.add_(self.number + u)


def test_views_of_an_image_follow_one_another_and_take_turns_by_the_number_of_the_image():
    batches, starts = [torch.zeros(2, 1), torch.zeros(0, 1), torch.full((1, 1), 5.0)], iter([3, 5])
    made = list(augmented(batches, 3, [Added(10), Added(20)], 7, "cpu", lambda: next(starts)))
    drawn = [uniforms(7, 0, np.arange(3, 6), view, 1)[:, 0] for view in range(3)]
    expected = torch.stack([10 + drawn[0], 20 + drawn[1], 10 + drawn[2]], 1)
    expected[2] += 5
    assert [len(batch) for batch in made] == [6, 0, 3]
    torch.testing.assert_close(torch.cat(made)[:, 0], expected.flatten())


class Odd(nn.Module):
    """Children that give a tuple, that do not run, and that have no batch; in training, with dropout."""

    def __init__(self):
        super().__init__()
        self.rnn, self.unused, self.body = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 6), nn.Linear(6, 4)
        self.mixer, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        self.mixer(x.reshape(-1, 1, 6).mean(0))
        return self.dropout(self.body(self.rnn(x[:, None])[0][:, 0]))


def test_any_module_is_read_where_it_can_be_and_comes_back_in_its_mode():
    net, views = Odd(), [Noise(np.full(6, 0.1))]
    net.rnn.eval()
    modes = [module.training for module in net.modules()]
    found = collapse.diagnose(net, torch.randn(60, 6), views=2, augmentations=views)
    assert [module.training for module in net.modules()] == modes
    assert [block.layer for block in found.blocks] == ["body", "representation"]
    notes = [note.split(":")[0] for note in found.provenance["warnings"]]
    assert notes[:3] == ["layer rnn", "layer unused", "layer mixer"]
    flat = collapse.diagnose(nn.Flatten(), torch.randn(60, 6), views=2, augmentations=views)
    assert sum(flat.blocks[-1].attribution.counts().values()) == 6


def test_a_batch_norm_of_something_else_is_not_folded_in():
    """In a DenseNet the last norm sees all features, not those of the last convolution alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.BatchNorm1d(5)).eval()
    net[4].running_var.fill_(9.0)
    encoder, rows = as_encoder(net), torch.randn(3, 3, 2, 2)
    name, weight = last_map(encoder, "representation", rows, {})
    assert name == "2"
    np.testing.assert_array_equal(weight, net[2].weight.detach().double())


# The known truths, of trained networks.


def test_toys_made_to_collapse_are_attributed_rightly(tmp_path):
    done = scripted(ROOT / "experiments/beyond/diagnosis.py", "--seeds", 3, "--out", tmp_path / "d.npz")
    assert done.returncode == 0, done.stderr
    meta, arrays = load_result(tmp_path / "d.npz")
    assert meta["directions"] > 80
    assert meta["share"] >= 0.95
    assert (arrays["confusion"].sum(0).diagonal()[1:] > 0).all()


def test_the_stored_study_has_50_seeds_and_95_percent():
    meta, arrays = load_result(ROOT / "experiments/results/diagnosis.npz")
    assert arrays["right"].shape == (5, 50)
    assert meta["share"] >= 0.95
    table = arrays["confusion"].sum(0)
    assert (table.diagonal()[1:] / np.maximum(table.sum(1), table.sum(0))[1:] >= 0.95).all()


# The command.


def small(*arguments):
    return ["--resize", 40, "--crop", 32, "--workers", 0, "--views", 2, *arguments]


def check(document):
    assert document["schema"] == "collapse.diagnosis/1"
    assert document["verdict"]
    for block in document["blocks"]:
        assert list(block["attribution"]) == list(CAUSES)
        assert sum(block["attribution"].values()) == block["spectrum"]["dim"] == len(block["signal_fraction"])
        assert block["spectrum"]["schema"] == "collapse.spectrum/1"
        assert block["layer"] == block["spectrum"]["source"]["layer"]
        fractions = [f for f in block["signal_fraction"] if f is not None]
        assert fractions == sorted(fractions, reverse=True)
        assert 0 <= min(fractions) <= max(fractions) <= 1


def test_the_command_diagnoses_a_residual_network(capsys, resnet18, photos, tmp_path):
    out, report = tmp_path / "d.json", tmp_path / "d.html"
    files = ["--out", out, "--report", report]
    code, text, err = run(capsys, "diagnose", resnet18, photos, "--json", *files, *small("--limit", 20, "--seed", 3))
    assert code == 0, err
    assert text == out.read_text()
    document = json.loads(text)
    check(document)
    assert [b["layer"] for b in document["blocks"]][-2:] == ["layer4.1", "representation"]
    assert document["images"] == {"path": str(photos), "count": 20, "skipped": []}
    assert any(note.startswith("the first 20 of ") for note in document["warnings"])
    assert (document["views"], document["seed"], document["threshold"]) == (2, 3, 1e-6)
    assert [view["size"] for view in document["augmentation"]["views"]] == [32, 32]
    last = document["blocks"][-1]
    assert last["last_map"]["module"] == "layer4.1.conv2"
    assert (last["spectrum"]["n"], last["spectrum"]["l2_normalized"]) == (40, False)
    # 40 rows hold 39 directions: the others are rounding, and the verdict says why.
    assert last["attribution"]["rounding"] + last["attribution"]["dead"] >= 512 - 39
    assert "40 rows leave" in document["verdict"]
    assert len(document["rank_lost"]) == len(document["blocks"]) - 1
    html = report.read_text()
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    assert html.count("data:image/png;base64,") == 2
    assert "@media print" in html
    assert document["verdict"].split(".")[0] in html


def test_the_command_diagnoses_a_transformer_and_gives_a_table(capsys, photos, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3)
    path, report = tmp_path / "vit.pth", tmp_path / "r.html"
    torch.save(net.state_dict(), path)
    code, text, _ = run(capsys, "diagnose", path, photos, *small("--report", report))
    assert code == 0
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line and not line.startswith(" ")}
    assert {"blocks.0", "blocks.1", "blocks.2", "representation"} <= rows.keys()
    for name in ("blocks.0", "representation"):
        assert sum(map(int, rows[name][-5:])) == int(rows[name][1]) == 192
    assert report.read_bytes().startswith(b"<!doctype html>")


def test_bad_input_is_one_line(capsys, resnet18, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.png").write_bytes(next(photos.rglob("*.png")).read_bytes())
    (tmp_path / "file.html").write_text("mine")
    cases = [
        ((tmp_path / "empty", "--views", 2), "holds no image"),
        ((tmp_path / "absent", "--views", 2), "no such folder"),
        ((photos, "--views", 1), "at least 2"),
        ((tmp_path / "one",), "1 image; a diagnosis needs at least 2"),
        ((photos, "--report", tmp_path / "file.html"), "--force"),
        ((photos, "--report", tmp_path / "file.html/below.html"), "is not a folder"),
        ((photos, "--report", tmp_path / "r.pdf"), "a report is .html"),
        ((photos, "--report", tmp_path / "r.html", "--out", tmp_path / "r.html"), "are one file"),
        ((photos, "--out", tmp_path / "file.html/below.json"), "is not a folder"),
        ((photos, "--augmentation", "nothing"), "no 'nothing'"),
        ((photos, "--threshold", 2), "0..1"),
    ]
    for arguments, expected in cases:
        code, out, err = run(capsys, "diagnose", resnet18, *arguments, "--resize", 32, "--crop", 32, "--workers", 0)
        assert (code, out) == (2, ""), arguments
        assert expected in err, (arguments, err)
        assert err.count("\n") == 1
    assert (tmp_path / "file.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("scale", "noise", "n", "said"),
    [
        ([1, 1, 1, 1e-3], [0.1, 0.1, 0.1, 2e-4], 300, "use a nonlinear projector"),
        ([1, 1, 1, 1e-3], [0.1, 0.1, 0.1, 5.0], 300, "weaken crops or colour jitter"),
        ([1, 1, 1, 0], [0.1, 0.1, 0.1, 0.1], 300, "lower the learning rate"),
        ([*np.eye(4)[:3], [1, 1, 1, 0]], [0.1, 0.1, 0.1, 0.1], 300, "erases 1 directions"),
        ([1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], 300, "nothing has to be done for rank"),
        ([1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], 2, "measure again with at least 40 images"),
        ([1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], 300, "nothing is left to repair"),
    ],
)
def test_the_text_begins_with_what_it_comes_to_and_what_to_do(scale, noise, n, said):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    scale = np.array(scale, float)
    net = linear(np.diag(scale) if scale.ndim == 1 else scale)
    how = {"augmentations": [Noise(np.array(noise))], "views": 2, "threshold": 1e-4}
    found = collapse.diagnose(net, x[:, :4], **how)
    brief, numbers = table(found).split("\n\n")[:2]
    first, act = brief.split("To do: ")
    assert said in " ".join(act.split())
    assert 1 <= len(re.findall(r"[.](?= |$)", " ".join(first.split()))) <= 3
    assert ("Cannot tell" in first) == (n == 2)
    assert numbers.startswith("layer")


def test_a_page_says_what_a_name_means_and_escapes_it():
    net = linear(np.diag([1.0, 1e-3]))
    found = collapse.diagnose(net, torch.randn(40, 2), views=2, augmentations=[Noise(np.full(2, 0.1))], threshold=1e-3)
    found.provenance["source"]["path"] = "<b>.pth"
    assert "&lt;b&gt;.pth" in page(found)
    assert "<b>" not in page(found)


def test_complete_collapse_is_all_units_dead_and_nothing_is_made_up():
    found = collapse.diagnose(linear(np.zeros((3, 4))), torch.randn(40, 4), views=2, augmentations=[Noise(np.ones(4))])
    counts = found.blocks[-1].attribution.counts()
    assert counts == {"alive": 0, "augmentation": 0, "implicit": 0, "rounding": 0, "dead": 3}
    document = json.loads(found.to_json())
    assert document["blocks"][-1]["signal_fraction"] == [None] * 3
    assert document["blocks"][-1]["lidar"] is None
    assert "0 of 3 directions" in document["verdict"]
    assert "3 units are constant" in page(found)
