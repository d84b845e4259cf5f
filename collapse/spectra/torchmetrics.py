"""A rank measure of embeddings as a `torchmetrics.Metric` (the extra `torchmetrics`).

    rank = SpectrumMetric(512)                     # the effective rank of rows of width 512
    for images in loader:
        rank.update(net(images))
    rank.compute()                                 # of all rows of all processes

The state is what a covariance needs: count, mean and scatter.  Joining states is exact, so processes, batches and
`merge_state` give what all rows at once would, to the rounding of float64.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from collapse import InputError
from collapse.arguments import choice, flag, share, whole
from collapse.errors import warn
from collapse.spectra.covariance import Covariance
from collapse.spectra.result import EPS, METRICS, Spectrum


class SpectrumMetric(torchmetrics.Metric):
    """One metric of the spectrum of all rows that `update` has got, as a scalar float64 tensor; NaN if undefined.

    It synchronises, merges, resets, saves and joins a `MetricCollection` as other metrics of torchmetrics do.  Several
    of one width and normalisation in a collection share their state.  `forward` gives the metric of its batch alone,
    so give it batches of at least 10 d rows, or call `update`.

    Args:
        dim: d, the width of a row.
        name: which metric: a name of `Spectrum.metrics()`, such as "effective_rank" or "collapsed_dimensions".
        normalize: divide each row by its norm, as the paper does.
        threshold: what counts as collapsed, as a share of the largest singular value.
        options: of torchmetrics.Metric, as `dist_sync_on_step`.

    Raises InputError: no column, an unknown metric, an impossible threshold.

    Examples:
        >>> rank = SpectrumMetric(3)
        >>> rank.update(torch.eye(3).repeat(20, 1))
        >>> round(rank.compute().item(), 6)
        2.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    moments: Tensor
    roundoff: Tensor

    def __init__(
        self,
        dim: int,
        name: str = "effective_rank",
        normalize: bool = True,
        threshold: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        whole("dim", dim, 1)
        choice("name", name, METRICS)
        flag("normalize", normalize)
        share("threshold", threshold)
        self.dim, self.name, self.normalize, self.threshold = dim, name, normalize, threshold
        self.add_state("moments", torch.zeros(dim + 1, dim + 1, dtype=torch.float64), dist_reduce_fx=joined)
        self.add_state("roundoff", torch.tensor(EPS / 2, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, rows: Tensor) -> None:
        """Add rows (n, d) of any real dtype. Raises InputError: another shape, or no real numbers."""
        part = Covariance(self.dim, normalize=self.normalize, device=str(self.device)).update(rows)
        self.moments = joined([self.moments, part.moments()])
        self.roundoff = self.roundoff.clamp(min=part.roundoff)

    def compute(self) -> Tensor:
        """The metric of all rows, a scalar; NaN, with a CollapseWarning, of fewer than two.

        Raises InputError: as `spectrum`.
        """
        if self.moments[0, 0] < 2:
            warn([f"{self.name}: {int(self.moments[0, 0])} rows; a covariance needs at least 2"])
            return self.moments.new_tensor(torch.nan)
        return self.moments.new_tensor(self.spectrum().metrics()[self.name])

    def spectrum(self) -> Spectrum:
        """The whole spectrum of this process's rows.

        Raises InputError: fewer than two rows, or one that is NaN or infinite.
        """
        if not self.moments.isfinite().all():
            raise InputError(f"{self.name}: a row is NaN or infinite; look at the network that made it, then reset()")
        device = None if self.device.type == "cpu" else str(self.device)
        parts = {"n": int(self.moments[0, 0]), "mean": self.moments[0, 1:], "scatter": self.moments[1:, 1:]}
        state = {"dim": self.dim, "method": "covariance", "normalize": self.normalize, "device": device, "sum": parts}
        state |= {"zero_rows": int(self.moments[1, 0]), "roundoff": float(self.roundoff)}
        return Covariance.from_state_dict(state).spectrum(self.threshold)


def joined(states: Tensor | Sequence[Tensor]) -> Tensor:
    """`Covariance.moments` (k, d + 1, d + 1) of k sets of rows as that of all (d + 1, d + 1), about the common mean."""
    n, means = (torch.stack([state[0, part] for state in states]) for part in (0, slice(1, None)))
    total = reduce(torch.add, states)
    total[0, 1:] = n @ means / n.sum().clamp(min=1)
    off = means - total[0, 1:]
    total[1:, 1:].addmm_((off * n[:, None]).T, off)
    return total
