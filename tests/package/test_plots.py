"""Every drawing function draws the values that it is given."""

import matplotlib
import numpy as np
import pytest

from collapse import plots
from collapse.metrics import marchenko_pastur_density, noise_variance
from collapse.metrics.attribution import CAUSES

VALUES = np.exp(-np.sort(np.random.default_rng(0).random((3, 5))))


@pytest.fixture
def ax():
    figure, ax = plots.figure()
    yield ax
    matplotlib.pyplot.close(figure)


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_repeated_spectra_are_the_mean_of_logs_in_a_band_of_all(ax):
    plots.plot_repeated_spectra(ax, {"DirectCLR": VALUES, "another": VALUES[:2] / 2})
    first, second = ax.lines
    np.testing.assert_allclose(first.get_xydata(), np.stack([np.arange(1, 6), np.log(VALUES).mean(0)], 1))
    np.testing.assert_allclose(second.get_ydata(), np.log(VALUES[:2] / 2).mean(0))
    assert first.get_color() == plots.HEAD_COLORS["DirectCLR"]
    assert first.get_linestyle() != second.get_linestyle()
    x, y = ax.collections[0].get_paths()[0].vertices.T
    for index, logs in enumerate(np.log(VALUES).T, 1):
        np.testing.assert_allclose([y[x == index].min(), y[x == index].max()], [logs.min(), logs.max()])
    assert names(ax) == ["DirectCLR", "another"]


def test_predictions_are_lines_of_all_and_dots_of_every_other_value(ax):
    x = np.arange(5.0)
    plots.plot_prediction(ax, x, VALUES.T, 2 * VALUES.T, every=2)
    lines, dots = ax.lines[::2], ax.lines[1::2]
    for k in range(3):
        np.testing.assert_allclose(lines[k].get_xydata(), np.stack([x, np.log(2 * VALUES[k])], 1))
        np.testing.assert_allclose(dots[k].get_xydata(), np.stack([x, np.log(VALUES[k])], 1)[::2])
        assert lines[k].get_color() == dots[k].get_color() == plots.sequence_colors(3)[k]


def test_spectra_have_a_band_of_two_standard_errors_and_no_value_at_zero(ax):
    values, errors = np.array([4.0, 1.0, 0.25, 0.0]), np.array([0.4, 0.05, 0.1, 0.0])
    plots.plot_spectra(ax, {"a": values}, log10=True, log_index=True, errors={"a": errors})
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([[1, 2, 3], np.log10(values[:3])], 1))
    x, y = ax.collections[0].get_paths()[0].vertices.T
    grown = 1 + 2 * (errors / np.maximum(values, 1))[:2]
    for index in (1, 2):
        middle, wide = np.log10(values[index - 1]), np.log10(grown[index - 1])
        np.testing.assert_allclose(
            [y[x == index].min(), y[x == index].max()], [middle - wide, middle + wide], atol=1e-12
        )
    assert ax.get_xscale() == "log"
    assert "log_{10}" in ax.get_ylabel()


def test_the_explained_variance_is_a_running_share(ax):
    plots.plot_explained(ax, {"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0]})
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 1 / 2], [2, 5 / 6], [3, 1]])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [1 / 2, 1])


def test_noise_is_a_histogram_of_shares_and_the_density_over_the_logarithm(ax):
    rng = np.random.default_rng(1)
    values = np.linalg.svd(np.cov(rng.standard_normal((200, 20)).T), compute_uv=False)
    plots.plot_noise(ax, (values, 200))
    (steps,) = ax.patches
    heights, edges, _ = steps.get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    np.testing.assert_allclose(edges[[0, -1]], np.log([values[-1], values[0]]), atol=1e-8)
    x, density = ax.lines[0].get_data()
    variance = noise_variance(of_covariance=values, n=200)
    np.testing.assert_allclose(density, np.exp(x) * marchenko_pastur_density(np.exp(x), 200, 20, variance), atol=1e-9)


@pytest.mark.parametrize("log10", [False, True])
def test_a_spectrum_over_time_is_its_logarithms(ax, log10):
    bar = plots.plot_over_time(ax, [10, 20, 30], VALUES, log10)
    logs = np.log10(VALUES) if log10 else np.log(VALUES)
    image = ax.collections[0]
    np.testing.assert_allclose(np.reshape(image.get_array(), (5, 3)), logs.T)
    assert image.get_clim()[0] == pytest.approx(logs.min())
    assert ("10" in bar.ax.get_ylabel()) == log10


def test_ranks_by_depth_stand_beside_the_widths(ax):
    plots.plot_rank_by_depth(ax, ["layer1", "_a$b"], {"effective_rank": [3.0, 2.0]}, [64, 32])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 64], [1, 32]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0, 3], [1, 2]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["layer1", r" _a\$b"]
    assert names(ax) == ["width", "effective rank"]


def test_causes_by_depth_are_stacked_shares_of_the_width(ax):
    plots.plot_causes_by_depth(ax, ["a", "b"], {"alive": [3, 1], "dead": [1, 1]}, [4, 2], [2.0, 1.0])
    bars = [(bar.get_y(), bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [(0, 3 / 4), (0, 1 / 2), (3 / 4, 1 / 4), (1 / 2, 1 / 2)])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1 / 2, 1 / 2])


def test_causes_are_dots_in_the_order_of_variance():
    figure, axes = plots.figure(columns=2)
    variances, fractions = np.array([1e-9, 1.0, 1e-3, 1e-4, 0.0]), np.array([np.nan, 0.9, 0.2, 0.7, np.nan])
    causes = np.array(["rounding", "alive", "augmentation", "implicit", "dead"])
    plots.plot_causes(axes, variances, fractions, causes, 1e-8, 1e-2)
    dots = {line.get_label(): line.get_xydata()[0] for line in axes[0].lines if line.get_label() in CAUSES}
    expected = {"alive": 1, "augmentation": 2, "implicit": 3, "rounding": 4}
    assert {name: x for name, (x, _) in dots.items()} == expected
    for name, (_, y) in dots.items():
        assert y == pytest.approx(np.log(variances[causes == name][0]))
    beside = {line.get_color(): line.get_xydata()[0] for line in axes[1].lines if line.get_marker() == "o"}
    np.testing.assert_allclose(beside[plots.CAUSE_COLORS["implicit"]], [np.log(1e-4), 0.7])
    lines = [line.get_ydata()[0] for line in axes[0].lines if line.get_label() not in CAUSES]
    np.testing.assert_allclose(lines, np.log([1e-8, 1e-2]))
    matplotlib.pyplot.close(figure)
