"""Every drawing function draws the values that it is given."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest

import collapse
from collapse import InputError, plots
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
    assert ax.get_xlabel() == "index of the singular value"


def test_predictions_are_lines_of_all_and_dots_of_every_other_value(ax):
    x = np.arange(5.0)
    plots.plot_prediction(ax, x, VALUES.T, 2 * VALUES.T, every=2)
    lines, dots = ax.lines[::2], ax.lines[1::2]
    for k in range(3):
        np.testing.assert_allclose(lines[k].get_xydata(), np.stack([x, np.log(2 * VALUES[k])], 1))
        np.testing.assert_allclose(dots[k].get_xydata(), np.stack([x, np.log(VALUES[k])], 1)[::2])
        assert lines[k].get_color() == dots[k].get_color() == plots.sequence_colors(3)[k]
    ax.clear()
    plots.plot_prediction(ax, x, VALUES.T, VALUES.T, colors=["C1", "C2", "C3"])
    assert [line.get_color() for line in ax.lines] == ["C1", "C1", "C2", "C2", "C3", "C3"]
    assert len(ax.lines[1].get_xdata()) == 5


def test_a_figure_has_the_size_and_style_of_all_and_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figure, axes = plots.figure(5, 3, columns=3, rows=2)
    assert axes.shape == (2, 3)
    assert figure.get_size_inches().tolist() == [5, 3]
    assert not axes[0, 0].spines["right"].get_visible()
    assert dict(matplotlib.rcParams) == before
    matplotlib.pyplot.close(figure)
    figure, axes = plots.figure(columns=2, sharey=True)
    axes[0].set_ylim(3, 4)
    assert axes[1].get_ylim() == (3, 4)
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_colours_of_ordered_things_grow_lighter_and_end_before_the_palest(count):
    light = np.array(plots.sequence_colors(count)) @ [0.2126, 0.7152, 0.0722]
    assert len(light) == count
    assert (np.diff(light) > 0).all()
    assert light[-1] < 0.75  # the palest of viridis has 0.84


def test_the_legend_of_predictions_is_a_dot_and_a_line(ax):
    plots.theory_legend(ax, loc="lower left")
    dot, line = ax.get_legend().legend_handles
    assert names(ax) == ["simulation", "prediction"]
    assert (dot.get_marker(), dot.get_linestyle()) == ("o", "None")
    assert (line.get_marker(), line.get_linestyle()) == ("None", "-")


def test_a_saved_figure_is_two_files_without_a_date_and_closed(tmp_path):
    figure, ax = plots.figure(1, 1)
    ax.plot([0, 1])
    plots.save_figure(figure, tmp_path / "a.1")
    assert not matplotlib.pyplot.fignum_exists(figure.number)
    assert (tmp_path / "a.1.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.1.pdf").read_bytes()
    assert page.startswith(b"%PDF")
    assert b"Date" not in page  # so the same data gives the same bytes


def test_a_floor_is_a_band_up_to_its_logarithm_or_said_where_it_lies_far_below(ax):
    plots.plot_spectra(ax, {"a": [1.0, 1e-3], "b": [1.0, 5e-5]}, floor=1e-5)
    (band,) = ax.patches
    np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()], [np.log(1e-5) - 1, np.log(1e-5)])
    assert ax.get_ylim()[0] == pytest.approx(np.log(1e-5) - 1)
    assert names(ax) == ["a", "b", "rounding"]
    ax.clear()
    plots.plot_spectra(ax, {"a": [1.0, 1e-3]}, floor=1e-5)
    assert not ax.patches
    assert names(ax) == ["a", "rounding: below -12"]
    assert ax.get_xscale() == "linear"
    assert ax.get_ylabel() == r"$\ln$ singular value of $\mathrm{Cov}(z)$"


def test_values_below_the_floor_leave_room_and_a_spectrum_of_zeros_is_no_curve(ax):
    plots.plot_spectra(ax, {"a": [1.0, 1e-8], "none": [0.0, 0.0]}, floor=1e-5)
    (band,) = ax.patches
    np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()], [np.log(1e-8) - 1, np.log(1e-5)])
    assert names(ax) == ["a", "rounding"]
    ax.clear()
    plots.plot_spectra(ax, {"none": [0.0, 0.0]}, floor=1e-5)
    assert not ax.lines
    assert not ax.patches
    ax.clear()
    plots.plot_spectra(ax, {"alone": [1.0, 0.5]})
    assert ax.get_legend() is None


def spectra(count, d=6):
    rng = np.random.default_rng(5)
    return {f"run {k}": collapse.spectrum(rng.standard_normal((200, d)) / (k + 1.0)) for k in range(count)}


def test_named_spectra_are_drawn_with_their_errors_and_the_highest_floor(ax):
    floors, some = {"run 0": 1e-4, "$b": 1e-3}, spectra(1)["run 0"]
    given = {name: replace(some, floor=floor) for name, floor in floors.items()}
    error = {"groups": 4, "metrics": {}, "singular_values": (0.1 * some.singular_values).tolist()}
    given["run 0"] = replace(given["run 0"], errors=error)
    assert plots.draw(given, "spectrum", ax, log10=True) is ax
    for line in ax.lines:
        np.testing.assert_allclose(line.get_ydata(), np.log10(some.singular_values))
    assert names(ax)[:2] == ["run 0", r"\$b"]
    y = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert y.max() == pytest.approx(np.log10(1.2 * some.singular_values[0]))
    assert names(ax)[-1] == "rounding: below -3"


def test_each_kind_of_drawing_is_asked_for_by_name(ax):
    two = spectra(2)
    plots.draw(two, "explained", ax)
    for line, s in zip(ax.lines, two.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.cumsum(s.singular_values) / s.singular_values.sum())
    assert (ax.get_xscale(), ax.get_ylim()) == ("log", (0, 1.02))
    for kind, several in (("noise", two), ("spectre", spectra(1))):
        with pytest.raises(InputError, match="expected spectrum, explained, or noise for a single"):
            plots.draw(several, kind, ax)
    many, few = plots.draw(spectra(7), "spectrum", None), plots.draw(spectra(6), "spectrum", None)
    for drawn, width in ((many, plots.TEXT), (few, plots.COLUMN)):
        assert drawn.figure.get_size_inches()[0] == width
        matplotlib.pyplot.close(drawn.figure)


def test_a_legend_above_has_as_many_columns_as_fit(ax):
    plots.legend_outside(ax)
    assert ax.get_legend() is None
    for label in ("four", "five5", "sixsix"):
        ax.plot([0, 1], label=label)
    ax.legend()
    plots.legend_outside(ax)
    assert names(ax) == ["four", "five5", "sixsix"]
    assert ax.get_legend()._ncols == 3
    ax.lines[0].set_label("twenty letters or so")  # 24 with the line beside them; 53 are in a column's width
    plots.legend_outside(ax)
    assert ax.get_legend()._ncols == 2
    ax.lines[0].set_label("a label that is as wide as it can be")
    plots.legend_outside(ax)
    assert ax.get_legend()._ncols == 1
    plots.legend_outside(ax, right=True)
    anchor = ax.get_legend().get_bbox_to_anchor()
    assert (anchor.x0, anchor.y0) == pytest.approx((ax.bbox.x1, (ax.bbox.y0 + ax.bbox.y1) / 2))


@pytest.mark.parametrize("log10", [False, True])
def test_layers_are_panels_in_which_a_network_has_one_colour(log10):
    layers = {f"layer{k}": {"a": VALUES[0] / (k + 1), "$b": [*VALUES[1], 0.0]} for k in range(4)}
    layers["_last"] = {"$b": VALUES[2], "c": VALUES[1]}
    figure = plots.draw_layers(layers, log10=log10, log_index=log10)
    assert [ax.get_title() for ax in figure.axes] == ["layer0", "layer1", "layer2", "layer3", " _last"]
    log, lines = (np.log10, {}) if log10 else (np.log, {})
    for ax, (layer, curves) in zip(figure.axes, layers.items(), strict=True):
        assert ax.get_xscale() == ("log" if log10 else "linear")
        for line, (name, values) in zip(ax.lines, curves.items(), strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.stack([np.arange(1, 6), log(values[:5])], 1))
            assert lines.setdefault(name, line.get_color()) == line.get_color(), layer
    assert len(set(lines.values())) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", r"\$b", "c"]
    assert [handle.get_color() for handle in legend.legend_handles] == list(lines.values())
    assert ("10" in figure.get_supylabel()) == log10
    places = [ax.get_subplotspec() for ax in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    matplotlib.pyplot.close(figure)


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
    corners = image.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [5, 15, 25, 35])
    np.testing.assert_allclose(corners[:, 0, 1], np.arange(6) + 0.5)


def test_the_colours_over_time_begin_at_the_least_value_above_zero(ax):
    plots.plot_over_time(ax, [10, 20], np.array([[1.0, 0.1], [0.5, 0.0]]))
    assert ax.collections[0].get_clim() == pytest.approx((np.log(0.1), 0))


def test_ranks_by_depth_stand_beside_the_widths(ax):
    plots.plot_rank_by_depth(ax, ["layer1", "_a$b"], {"effective_rank": [3.0, 2.0]}, [64, 32])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 64], [1, 32]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0, 3], [1, 2]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["layer1", r" _a\$b"]
    assert names(ax) == ["width", "effective rank"]
    assert ax.get_yscale() == "log"


def test_of_many_layers_every_other_is_named():
    layers = [f"layer{k}" for k in range(40)]
    figure, (left, right) = plots.figure(columns=2)
    plots.plot_rank_by_depth(left, layers, {"rankme": np.ones(40)}, np.full(40, 4))
    plots.plot_causes_by_depth(right, layers, {"alive": np.ones(40)}, np.full(40, 4), np.ones(40))
    for ax in (left, right):
        assert [text.get_text() for text in ax.get_xticklabels()] == layers[::2]
        assert ax.get_xticks().tolist() == list(range(0, 40, 2))
    matplotlib.pyplot.close(figure)


def test_causes_by_depth_are_stacked_shares_of_the_width(ax):
    plots.plot_causes_by_depth(ax, ["a", "b"], {"alive": [3, 1], "dead": [1, 1]}, [4, 2], [2.0, 1.0])
    bars = [(bar.get_y(), bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [(0, 3 / 4), (0, 1 / 2), (3 / 4, 1 / 4), (1 / 2, 1 / 2)])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 1 / 2], [1, 1 / 2]])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.patches], [0, 1, 0, 1], atol=1e-12)
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colors == [matplotlib.colors.to_hex(plots.CAUSE_COLORS[cause]) for cause in ("alive",) * 2 + ("dead",) * 2]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.6, 1.6), (0, 1))


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
    floor, threshold, half = axes[1].lines[-3:]
    np.testing.assert_allclose([floor.get_xdata()[0], threshold.get_xdata()[0]], np.log([1e-8, 1e-2]))
    assert list(half.get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
        "alive",
        "augmentation",
        "implicit",
        "rounding",
    ]
    assert [ax.get_xlabel() for ax in axes] == ["direction", r"$\ln$ variance"]
    for ax in axes:
        ax.clear()
    plots.plot_causes(axes, np.zeros(2), np.full(2, np.nan), np.array(["dead"] * 2), 0.0, 0.0)
    assert [len(ax.lines) for ax in axes] == [0, 1]
    assert axes[0].get_legend() is None
    matplotlib.pyplot.close(figure)
