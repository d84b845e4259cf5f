"""How well a prediction fits: R^2 of logarithms, of the change from the start, and what the runs themselves allow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError


def r_squared(measured: NDArray, predicted: NDArray) -> float:
    """Share of the variance of ln(measured) that ln(predicted) explains, over all entries of any one shape.

    Raises InputError if an entry is not positive, where the logarithm says nothing.
    """
    if not (np.all(measured > 0) and np.all(predicted > 0)):
        raise InputError("R^2 of logarithms needs positive values; drop what is zero first")
    x, y = np.log(measured), np.log(predicted)
    return float(1 - np.sum((x - y) ** 2) / np.sum((x - x.mean()) ** 2))


def r_squared_change(measured: NDArray, predicted: NDArray, start: NDArray) -> float:
    """R^2 of the change ln(x / start): what says nothing moves scores 0 at most, however wide the start is spread.

    measured, predicted: (..., K) values after the start; start: (K,), or of any shape that broadcasts.

    Raises InputError: a value is not positive.
    """
    return r_squared(measured / start, predicted / start)


def change_scores(runs: NDArray, predicted: NDArray) -> dict[str, Any]:
    """How a prediction of ln s(t) / s(0) fits the mean over runs, beside what the noise of the runs allows.

    runs: (T, R, ...) positive values from the start on; predicted: (T, ...), from the same start.

    Returns:
        change: R^2 of the change, of the mean of the runs' logarithms.
        rms: root mean square of that mean less the prediction, in nats.
        ceiling: (R,) R^2 of the change of one run by the mean of the others; empty for a single run.
        noise: root mean square of the standard error of the mean over runs, in nats, or None for a single run.

    Raises InputError: a value is not positive.
    """
    if not (np.all(runs > 0) and np.all(predicted > 0)):
        raise InputError("the change of logarithms needs positive values; drop what is zero first")
    change = np.log(runs[1:] / runs[0])
    mean, count = change.mean(1), runs.shape[1]
    expected = np.log(predicted[1:] / predicted[0])
    others = (count * mean[:, None] - change) / max(count - 1, 1)
    pairs = [(change[:, i], others[:, i]) for i in range(count)] if count > 1 else []
    return {
        "change": r_squared(np.exp(mean), np.exp(expected)),
        "rms": float(np.sqrt(np.mean((mean - expected) ** 2))),
        "ceiling": [r_squared(np.exp(one), np.exp(rest)) for one, rest in pairs],
        "noise": float(np.sqrt(np.mean(change.var(1, ddof=1)) / count)) if count > 1 else None,
    }


def change_text(scores: dict[str, Any]) -> str:
    """`change_scores` in a line."""
    ceiling = " ".join(f"{value:.3f}" for value in scores["ceiling"]) or "not known"
    noise = "" if scores["noise"] is None else f", of which the runs' noise {scores['noise']:.3f}"
    return f"R^2 {scores['change']:.4f}, rms {scores['rms']:.3f} nats{noise}; one run by the others {ceiling}"
