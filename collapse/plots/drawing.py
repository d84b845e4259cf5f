"""Every figure's drawing: functions of arrays, which compute nothing.

Dots are simulation or measurement, lines are prediction, a grey band is what lies below the resolution.
Ordered things (mode, amplitude, depth, time) take a sequential map, unordered ones (heads) the style's colours.
Logarithms are natural, as in the paper, and drawn on a linear axis labelled "ln".
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import matplotlib.ticker
import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse import InputError
from collapse.metrics import marchenko_pastur_density, marchenko_pastur_edges, noise_variance
from collapse.results import printable
from collapse.results.outputs import atomic_write

COLUMN, TEXT = 3.25, 6.75  # inches: a column, and the text of a two-column paper
STYLE = Path(__file__).with_name("style.mplstyle")


def style() -> Any:
    """Context in which a figure is drawn: one look everywhere, and matplotlib's own settings stay as they are.

    Examples:
        >>> with style():
        ...     matplotlib.rcParams["axes.spines.top"]
        False
    """
    return matplotlib.style.context(STYLE)


def figure(width: float = COLUMN, height: float = 2.3, columns: int = 1, rows: int = 1, **options: Any) -> tuple:
    """(figure, axes) in the style of all figures; sizes in inches.

    Examples:
        >>> fig, axes = figure(TEXT, columns=2)
        >>> fig.get_size_inches().tolist(), axes.shape
        ([6.75, 2.3], (2,))
    """
    from matplotlib import pyplot as plt

    with style():
        return plt.subplots(rows, columns, figsize=(width, height), **options)


def sequence_colors(count: int) -> list:
    """`count` colours for ordered things, dark to light, without the palest that vanish on white.

    Examples:
        >>> [round(sum(color), 1) for color in sequence_colors(3)]  # dark to light
        [1.0, 1.2, 1.3]
    """
    import seaborn as sns

    return sns.color_palette("viridis", count + max(1, count // 5))[:count]


def save_figure(fig: Any, stem: Path, suffixes: Sequence[str] = (".png", ".pdf")) -> None:
    """Write `fig` to stem.png and stem.pdf, all whole or none, and close it.

    Raises InputError: one cannot be written.

    Examples:
        >>> fig, _ = figure()
        >>> save_figure(fig, Path("a"), suffixes=(".png",))
        >>> [path.name for path in Path().iterdir()]
        ['a.png']
    """
    from matplotlib import pyplot as plt

    try:
        with style(), ExitStack() as files:
            partials = [files.enter_context(atomic_write(stem.with_name(stem.name + suffix))) for suffix in suffixes]
            for suffix, partial in zip(suffixes, partials, strict=True):
                # No date in the file: the same data gives the same bytes.
                metadata = {"CreationDate": None} if suffix == ".pdf" else None
                fig.savefig(partial, format=suffix[1:], metadata=metadata)
    finally:
        plt.close(fig)


def plot_prediction(ax: Any, x: NDArray, simulated: NDArray, predicted: NDArray, **options: Any) -> None:
    """Dots and a line per column: ln of simulated and predicted values, (T, K), over x, (T,).

    options: colors, a list of K; every, draw each `every`-th dot (default 1).

    Examples:
        >>> _, ax = figure()
        >>> times, modes = np.arange(3), np.exp([[0, 0], [1, -1], [2, -2]])
        >>> plot_prediction(ax, times, modes, modes)
        >>> [line.get_ydata().tolist() for line in ax.lines[::2]]
        [[0.0, 1.0, 2.0], [0.0, -1.0, -2.0]]
    """
    count = simulated.shape[1]
    colors, every = options.get("colors") or sequence_colors(count), options.get("every", 1)
    for k in range(count):
        ax.plot(x, np.log(predicted[:, k]), color=colors[k], zorder=2)
        dots = slice(None, None, every)
        ax.plot(x[dots], np.log(simulated[dots, k]), "o", color=colors[k], markeredgewidth=0, alpha=0.8, zorder=3)


def theory_legend(ax: Any, **options: Any) -> None:
    """The legend that every prediction figure shares: dots simulation, line prediction.

    Examples:
        >>> _, ax = figure()
        >>> theory_legend(ax)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['simulation', 'prediction']
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="0.3", marker="o", linestyle="", label="simulation"),
        Line2D([], [], color="0.3", label="prediction"),
    ]
    ax.legend(handles=handles, **options)


def plain(text: str) -> str:
    """A name as a label that shows it: matplotlib reads dollars as mathematics, and hides what begins with _.

    Examples:
        >>> plain("_hidden")
        ' _hidden'
    """
    return f"{' ' * text.startswith('_')}{printable(text)}".replace("$", r"\$")


def draw(spectra: Mapping[str, Any], kind: str, ax: Any, log10: bool = False, log_index: bool = False) -> Any:
    """Draw named Spectrum objects of one kind ("spectrum", "explained", "noise") on `ax` or a new figure; the axes.

    Raises InputError: no spectrum, an unknown kind, or "noise" for several, or for one of which half is zero.

    Examples:
        >>> from collapse import spectrum
        >>> ax = draw({"z": spectrum(np.random.default_rng(0).standard_normal((50, 3)))}, "explained", None)
        >>> float(ax.lines[0].get_ydata()[-1].round(6))
        1.0
    """
    spectra = {plain(name): spectrum for name, spectrum in spectra.items()}
    if not spectra:
        raise InputError("plot: no spectrum is given")
    many = len(spectra) > 6
    with style():
        if ax is None:
            _, ax = figure(TEXT if many else COLUMN, max(2.4, 0.14 * len(spectra) + 0.6))
        if kind == "spectrum":
            values = {name: s.singular_values for name, s in spectra.items()}
            errors = {name: np.asarray(s.errors["singular_values"]) for name, s in spectra.items() if s.errors}
            plot_spectra(ax, values, max(s.floor for s in spectra.values()), log10, log_index, errors)
        elif kind == "explained":
            plot_explained(ax, {name: s.singular_values for name, s in spectra.items()})
        elif kind == "noise" and len(spectra) == 1:
            plot_noise(ax, *((s.singular_values, s.n) for s in spectra.values()))
        else:
            raise InputError(f"plot: got kind {kind!r}, expected spectrum, explained, or noise for a single spectrum")
        legend_outside(ax, many)
    return ax


def legend_outside(ax: Any, right: bool = False) -> None:
    """Move the legend, if there is one, off the data: above the axes, or to their right.

    Examples:
        >>> _, ax = figure()
        >>> plot_spectra(ax, {"one": [2, 1], "two": [2, 2]})
        >>> legend_outside(ax)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['one', 'two']
    """
    if ax.get_legend() is None:
        return
    handles, labels = ax.get_legend_handles_labels()
    if right:
        ax.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5))
        return
    letters = 20 * ax.figure.get_size_inches()[0] - 4 * len(labels)  # of 7 points, beside the lines of the legend
    columns = max(1, int(letters // (max(map(len, labels)) + 4)))
    ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(labels), columns))


def draw_layers(layers: Mapping[str, Mapping[str, ArrayLike]], log10: bool = False, log_index: bool = False) -> Any:
    """Small multiples: a panel a layer with each network's singular values (d,), descending; returns the figure.

    layers: layer -> network -> values. A network has one colour in all panels; the legend stands above them.

    Examples:
        >>> fig = draw_layers({"layer1": {"net": [4, 1]}, "layer2": {"net": [2, 2], "other": [3, 1]}})
        >>> [(ax.get_title(), len(ax.lines)) for ax in fig.axes]
        [('layer1', 1), ('layer2', 2)]
    """
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for curves in layers.values() for name in curves))
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    log = np.log10 if log10 else np.log
    with style():
        fig, axes = figure(TEXT, 1.35 * lines + 0.5, columns, lines, sharey=True, squeeze=False)
        colors = dict(zip(names, cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])))
        for ax, (layer, curves) in zip(axes.flat[: len(layers)], layers.items(), strict=True):
            for name, given in curves.items():
                values = np.asarray(given, dtype=float)
                values = values[values > 0]
                ax.plot(np.arange(1, len(values) + 1), log(values), color=colors[name], label=plain(name))
            ax.set_title(plain(layer))
            if log_index:
                ax.set_xscale("log")
        for ax in axes.flat[len(layers) :]:
            ax.remove()
        handles = [plt.Line2D([], [], color=colors[name], label=plain(name)) for name in names]
        fig.legend(handles=handles, loc="outside upper center", ncols=min(3, len(names)))
        kind = r"$\log_{10}$" if log10 else r"$\ln$"
        fig.supxlabel("index of the singular value", fontsize=8)
        fig.supylabel(f"{kind} singular value", fontsize=8)
    return fig


def plot_spectra(
    ax: Any,
    spectra: Mapping[str, ArrayLike],
    floor: float = 0.0,
    log10: bool = False,
    log_index: bool = False,
    errors: Mapping[str, NDArray] | None = None,
) -> None:
    """Logarithm of descending singular values (d,) by index, one curve a name; a grey band up to that of the floor.

    Natural logarithms, as in the paper, or log10. Values at or below zero have none and are left out.
    errors: standard errors, (d,), of a name's values, drawn as a band of two of them either way.

    Examples:
        >>> _, ax = figure()
        >>> plot_spectra(ax, {"z": [100, 10, 0]}, log10=True)
        >>> ax.lines[0].get_ydata().tolist()
        [2.0, 1.0]
    """
    log = np.log10 if log10 else np.log
    lowest = float(np.inf)
    for dashes, (name, given) in zip(cycle(("-", "--", "-.", ":")), spectra.items()):
        values = np.asarray(given, dtype=float)
        values = values[values > 0]
        if len(values) == 0:
            continue
        index = np.arange(1, len(values) + 1)
        (line,) = ax.plot(index, log(values), dashes, label=name)
        if errors and name in errors:
            relative = 2 * errors[name][: len(values)] / values
            band = (log(values / (1 + relative)), log(values * (1 + relative)))
            ax.fill_between(index, *band, color=line.get_color(), alpha=0.25, linewidth=0)
        lowest = min(lowest, float(log(values[-1])))
    if floor > 0 and np.isfinite(lowest) and lowest < log(floor) + 2:
        bottom = min(lowest, log(floor)) - 1
        ax.axhspan(bottom, log(floor), color="0.85", zorder=0, label="rounding")
        ax.set_ylim(bottom=bottom)
    elif floor > 0 and np.isfinite(lowest):  # too far below to be drawn to scale
        ax.fill_between([], [], color="0.85", label=f"rounding: below {log(floor):.0f}")
    if log_index:
        ax.set_xscale("log")
    kind = r"$\log_{10}$" if log10 else r"$\ln$"
    ax.set(xlabel="index of the singular value", ylabel=kind + r" singular value of $\mathrm{Cov}(z)$")
    if (len(spectra) > 1 or floor > 0) and np.isfinite(lowest):
        ax.legend()


def plot_explained(ax: Any, spectra: Mapping[str, ArrayLike]) -> None:
    """Cumulative share of the variance, of singular values (d,), against the number of directions, one curve a name.

    Examples:
        >>> _, ax = figure()
        >>> plot_explained(ax, {"z": [3, 1]})
        >>> ax.lines[0].get_ydata().tolist()
        [0.75, 1.0]
    """
    for dashes, (name, values) in zip(cycle(("-", "--", "-.", ":")), spectra.items()):
        shares = np.cumsum(values) / np.sum(values)
        ax.plot(np.arange(1, len(shares) + 1), shares, dashes, label=name)
    ax.set(xlabel="number of directions", ylabel="share of the variance", ylim=(0, 1.02), xscale="log")
    ax.legend(loc="lower right")


def plot_noise(ax: Any, of: tuple[NDArray, int]) -> None:
    """Histogram of (singular values (d,), rows n), and the Marchenko-Pastur law of white noise of their median.

    Raises InputError: fewer than 3 rows, or half of the singular values are zero, so that there is no such noise.

    Examples:
        >>> _, ax = figure()
        >>> plot_noise(ax, (np.geomspace(4, 0.1, 20), 100))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['measured', 'white noise of the same median']
    """
    values, n = of
    variance = noise_variance(of_covariance=values, n=n)
    if not variance > 0:
        raise InputError("plot: kind noise wants 3 rows, and more than half of the singular values above zero")
    low, high = marchenko_pastur_edges(n, len(values), variance)
    shown = values[values > 0]
    bins = np.geomspace(shown[-1], shown[0] * (1 + 1e-9), 40)
    counts, _ = np.histogram(shown, bins)
    ax.stairs(counts / np.diff(np.log(bins)) / len(shown), np.log(bins), fill=True, alpha=0.5, label="measured")
    x = np.geomspace(max(low, shown[-1] * 1e-3), high, 400)
    # A density over ln x is x times one over x.
    density = x * marchenko_pastur_density(x, n, len(values), variance)
    ax.plot(np.log(x), density, color="0.2", label="white noise of the same median")
    ax.set(xlabel=r"$\ln$ singular value of $\mathrm{Cov}(z)$", ylabel="share per unit")
    ax.legend()


def plot_over_time(ax: Any, steps: ArrayLike, values: NDArray, log10: bool = False) -> Any:
    """Heat map of the logarithm of singular values (T, d) over steps (T,) and index; returns the colour bar.

    Examples:
        >>> _, ax = figure()
        >>> bar = plot_over_time(ax, [0, 1], np.exp([[0.0, -1], [0, -2]]))
        >>> ax.collections[0].get_array().ravel().round(6).tolist()
        [0.0, 0.0, -1.0, -2.0]
    """
    log, kind = (np.log10, r"$\log_{10}$") if log10 else (np.log, r"$\ln$")
    image = ax.pcolormesh(
        np.asarray(steps), np.arange(1, values.shape[1] + 1), log(np.maximum(values, 1e-300)).T, shading="nearest",
        cmap="viridis", vmin=log(values[values > 0].min()), rasterized=True,
    )  # fmt: skip
    ax.set(xlabel="step", ylabel="index of the singular value")
    return ax.figure.colorbar(image, ax=ax, label=f"{kind} singular value")


def plot_rank_by_depth(ax: Any, layers: Sequence[str], ranks: Mapping[str, ArrayLike], widths: ArrayLike) -> None:
    """Rank measures (L,), one curve a name, of L layers in the order of the forward pass, and their widths.

    Examples:
        >>> _, ax = figure()
        >>> plot_rank_by_depth(ax, ["layer1", "layer2"], {"effective_rank": [3.5, 2.5]}, widths=[4, 8])
        >>> [(line.get_label(), line.get_ydata().tolist()) for line in ax.lines]
        [('width', [4, 8]), ('effective rank', [3.5, 2.5])]
    """
    at = np.arange(len(layers))
    ax.plot(at, widths, color="0.7", drawstyle="steps-mid", label="width")
    for marker, (name, values) in zip(cycle("osv^"), ranks.items()):
        ax.plot(at, values, marker=marker, label=name.replace("_", " "))
    step = max(1, len(layers) // 16)
    ax.set_xticks(at[::step], list(map(plain, layers))[::step], rotation=90, fontsize=6)
    ax.set(yscale="log", ylabel="dimensions")
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    ax.legend()


# A head has one colour and one kind of line in every figure.
HEAD_COLORS = {"no projector": "#D55E00", "2-layer projector": "#0072B2", "linear projector": "#009E73",
               "DirectCLR": "#CC79A7", "orthogonal, fixed": "#E69F00", "diagonal": "#56B4E9",
               "low-rank, fixed": "#000000"}  # fmt: skip
HEAD_DASHES = {"no projector": "-", "2-layer projector": "--", "linear projector": "-.", "DirectCLR": ":"}


def plot_repeated_spectra(ax: Any, spectra: Mapping[str, NDArray]) -> None:
    """ln of singular values by index, one line a name through the mean of the logs; a band from least to largest.

    spectra: name -> (repeats, d), descending along d, > 0.  A head has its colour and dashes, HEAD_COLORS, HEAD_DASHES.

    Examples:
        >>> _, ax = figure()
        >>> plot_repeated_spectra(ax, {"DirectCLR": np.exp([[2.0, 0], [4, 0]])})
        >>> ax.lines[0].get_ydata().round(6).tolist()  # the mean of the logarithms
        [3.0, 0.0]
    """
    for dashes, (name, values) in zip(cycle(("-", "--", "-.", ":")), spectra.items()):
        index, logs = np.arange(1, values.shape[1] + 1), np.log(values)
        color, dashes = HEAD_COLORS.get(name), HEAD_DASHES.get(name, dashes)
        (line,) = ax.plot(index, logs.mean(0), linestyle=dashes, color=color, label=name)
        ax.fill_between(index, logs.min(0), logs.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="index of the singular value", ylabel=r"$\ln$ singular value of $\mathrm{Cov}(z)$")
    ax.legend()


CAUSE_COLORS = {"alive": "#0072B2", "augmentation": "#D55E00", "implicit": "#E69F00", "rounding": "0.6", "dead": "0.1"}


def plot_causes_by_depth(
    ax: Any, layers: Sequence[str], counts: Mapping[str, Sequence[int]], widths: ArrayLike, ranks: ArrayLike
) -> None:
    """Bars of L layers' directions by cause, (L,) a cause, and effective ranks, as shares of the layers' widths.

    widths, ranks: (L,).

    Examples:
        >>> _, ax = figure()
        >>> plot_causes_by_depth(ax, ["layer1"], {"alive": [3], "implicit": [1]}, widths=[4], ranks=[2])
        >>> [float(bar.get_height()) for bar in ax.patches], ax.lines[0].get_ydata().tolist()
        ([0.75, 0.25], [0.5])
    """
    at, widths, below = np.arange(len(layers)), np.asarray(widths, float), np.zeros(len(layers))
    for cause, numbers in counts.items():
        share = np.asarray(numbers) / widths
        ax.bar(at, share, 0.8, bottom=below, color=CAUSE_COLORS[cause], label=cause)
        below = below + share
    ax.plot(at, np.asarray(ranks) / widths, "o-", color="black", markerfacecolor="white", label="effective rank")
    step = max(1, len(layers) // 20)
    ax.set_xticks(at[::step], list(map(plain, layers))[::step], rotation=90, fontsize=6)
    ax.set(ylabel="share of the width", ylim=(0, 1), xlim=(-0.6, len(layers) - 0.4))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_causes(
    axes: Any, variances: NDArray, fractions: NDArray, causes: NDArray, floor: float, threshold: float
) -> None:
    """Two panels of d directions in colours of their causes: ln variance by rank, and signal fraction over it.

    variances, fractions, causes: (d,); floor, threshold: variances, drawn as lines.

    Examples:
        >>> _, axes = figure(TEXT, columns=2)
        >>> causes = np.array(["alive", "augmentation"])
        >>> plot_causes(axes, np.array([1, 1e-4]), np.array([0.9, 0.1]), causes, floor=1e-9, threshold=1e-2)
        >>> axes[0].get_legend_handles_labels()[1]
        ['alive', 'augmentation']
    """
    order = np.argsort(-variances)
    for cause, color in CAUSE_COLORS.items():
        chosen = np.flatnonzero((causes[order] == cause) & (variances[order] > 0))
        if len(chosen) == 0:
            continue
        logs = np.log(variances[order][chosen])
        axes[0].plot(chosen + 1, logs, "o", color=color, markeredgewidth=0, label=cause)
        axes[1].plot(logs, fractions[order][chosen], "o", color=color, markeredgewidth=0)
    for value, style_ in ((floor, {"color": "0.7"}), (threshold, {"color": "0.4", "linestyle": "--"})):
        if value > 0:
            axes[0].axhline(np.log(value), linewidth=0.8, **style_)
            axes[1].axvline(np.log(value), linewidth=0.8, **style_)
    axes[1].axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="direction", ylabel=r"$\ln$ variance")
    axes[1].set(xlabel=r"$\ln$ variance", ylabel="signal fraction", ylim=(-0.03, 1.03))
    if (variances > 0).any():
        axes[0].legend()
