"""Every figure's drawing: functions of arrays, which compute nothing.

Dots are simulation or measurement, lines are prediction, a grey band is what lies below the resolution.
Ordered things (mode, amplitude, depth, time) take a sequential map, unordered ones (heads) the style's colours.
Logarithms are natural, as in the paper, and drawn on a linear axis labelled "ln".
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from numpy.typing import ArrayLike, NDArray

from collapse.results import whole

COLUMN, TEXT = 3.25, 6.75  # inches: a column, and the text of a two-column paper
STYLE = Path(__file__).with_name("style.mplstyle")


def style() -> Any:
    """Context in which a figure is drawn: one look everywhere, and matplotlib's own settings stay as they are."""
    return matplotlib.style.context(STYLE)


def figure(width: float = COLUMN, height: float = 2.3, columns: int = 1, rows: int = 1, **options: Any) -> tuple:
    """(figure, axes) in the style of all figures; sizes in inches."""
    from matplotlib import pyplot as plt

    with style():
        return plt.subplots(rows, columns, figsize=(width, height), **options)


def sequence_colors(count: int) -> list:
    """`count` colours for ordered things, dark to light, without the palest that vanish on white."""
    import seaborn as sns

    return sns.color_palette("viridis", count + max(1, count // 5))[:count]


def save_figure(fig: Any, stem: Path, suffixes: Sequence[str] = (".png", ".pdf")) -> None:
    """Write `fig` to stem.png and stem.pdf, each whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    with style():
        for suffix in suffixes:
            with whole(stem.with_suffix(suffix)) as partial:
                # No date in the file: the same data gives the same bytes.
                fig.savefig(partial, metadata={"CreationDate": None} if suffix == ".pdf" else None)
    plt.close(fig)


def plot_prediction(ax: Any, x: NDArray, simulated: NDArray, predicted: NDArray, **options: Any) -> None:
    """Dots and a line per column: ln of simulated and predicted values, (T, K), over x, (T,).

    options: colors, a list of K; every, draw each `every`-th dot (default 1); markers, a list of K.
    """
    count = simulated.shape[1]
    colors, every = options.get("colors") or sequence_colors(count), options.get("every", 1)
    for k in range(count):
        ax.plot(x, np.log(predicted[:, k]), color=colors[k], zorder=2)
        dots = slice(None, None, every)
        ax.plot(x[dots], np.log(simulated[dots, k]), "o", color=colors[k], markeredgewidth=0, alpha=0.8, zorder=3)


def theory_legend(ax: Any, **options: Any) -> None:
    """The legend that every prediction figure shares: dots simulation, line prediction."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="0.3", marker="o", linestyle="", label="simulation"),
        Line2D([], [], color="0.3", label="prediction"),
    ]
    ax.legend(handles=handles, **options)


def plot_spectra(ax: Any, spectra: Mapping[str, ArrayLike], floor: float = 0.0) -> None:
    """ln of descending singular values against their index, one curve a name; a grey band up to ln(floor).

    Values at or below zero have no logarithm and are left out.
    """
    lowest = float(np.inf)
    for dashes, (name, given) in zip(cycle(("-", "--", "-.", ":")), spectra.items()):
        values = np.asarray(given, dtype=float)
        values = values[values > 0]
        if len(values) == 0:
            continue
        ax.plot(np.arange(1, len(values) + 1), np.log(values), dashes, label=name)
        lowest = min(lowest, float(np.log(values[-1])))
    if floor > 0 and np.isfinite(lowest) and lowest < np.log(floor) + 2:
        bottom = min(lowest, np.log(floor)) - 1
        ax.axhspan(bottom, np.log(floor), color="0.85", zorder=0, label="rounding")
        ax.set_ylim(bottom=bottom)
    ax.set(xlabel="index of the singular value", ylabel=r"$\ln$ singular value of $\mathrm{Cov}(z)$")
    if len(spectra) > 1 or floor > 0:
        ax.legend()


def plot_repeated_spectra(ax: Any, spectra: Mapping[str, NDArray]) -> None:
    """ln of singular values by index, one line a name through the mean of the logs; a band from least to largest.

    spectra: name -> (repeats, d), descending along d, > 0.
    """
    for dashes, (name, values) in zip(cycle(("-", "--", "-.", ":")), spectra.items()):
        index, logs = np.arange(1, values.shape[1] + 1), np.log(values)
        (line,) = ax.plot(index, logs.mean(0), dashes, label=name)
        ax.fill_between(index, logs.min(0), logs.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="index of the singular value", ylabel=r"$\ln$ singular value of $\mathrm{Cov}(z)$")
    ax.legend()
