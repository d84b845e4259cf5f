"""Watch a layer collapse while it trains: a few lines in anybody's training loop.

    monitor = collapse.Monitor(model.backbone, log="rank.jsonl")
    for images in loader:
        ...                                        # forward, backward, optimizer.step()
        if report := monitor.step():               # every 1,000 steps, else None
            print(report["step"], report["effective_rank"])

A forward hook adds the rows that pass in training to a streaming covariance during the last few steps before each
report; nothing is kept of the graph and nothing runs twice.  Under torch.distributed the processes' statistics are
joined exactly, and all get the same report.  `MonitorCallback` does it in Lightning (lightning.py).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse import InputError
from collapse.spectra.covariance import Covariance


class Monitor:
    """Rank metrics of the output of a module, (n, d) or feature maps (n, d, h, w), every so many training steps.

    Args:
        module: the layer to watch. An output that is no tensor is an error at the first step.
        every: steps between reports. The default costs well under 1 % of training (benchmarks/monitor.py).
        rows: how many rows a report wants, from all processes; default 10 d. It takes the last steps that give as many,
            at most `every`.
        normalize: divide each row by its norm, as the paper does.
        log: a file that gets one JSON line a report (of process 0); None for none.

    Attributes:
        history: the reports: {"step", "n", metric: number or NaN, ...}.
        steps: (T,) when.
        spectra: (T, d) singular values at each report, descending.

    Raises InputError: fewer than 1 step between reports, or fewer than 2 rows.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> monitor = Monitor(net, every=2)
        >>> for _ in range(4):
        ...     _ = net(torch.rand(50, 3))
        ...     _ = monitor.step()
        >>> monitor.steps.tolist(), monitor.spectra.shape
        ([2, 4], (2, 2))
    """

    def __init__(
        self,
        module: nn.Module,
        every: int = 1000,
        rows: int | None = None,
        normalize: bool = True,
        log: str | Path | None = None,
    ) -> None:
        if every < 1 or (rows is not None and rows < 2):
            raise InputError(f"monitor: every = {every}, rows = {rows}; expected at least 1 step and 2 rows")
        self.every, self.rows, self.normalize, self.log = every, rows, normalize, log and Path(log)
        self.count, self.window = 0, every
        self.history: list[dict[str, Any]] = []
        self._values: list[NDArray] = []
        self._sum: Covariance | None = None
        self._hook = module.register_forward_hook(self._see)

    @property
    def steps(self) -> NDArray:
        """(T,) steps of the reports."""
        return np.array([report["step"] for report in self.history], dtype=int)

    @property
    def spectra(self) -> NDArray:
        """(T, d) singular values at each report."""
        return np.array(self._values)

    @torch.no_grad()
    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 4):
            raise InputError(
                f"monitor: the layer gives {_describe(output)}; choose one that gives (n, d) or (n, d, h, w)"
            )
        if not module.training:
            return
        if self._sum is None:
            self._start(output)
        if self.every - self.count % self.every <= self.window:
            rows = output.detach()
            assert self._sum is not None
            self._sum.update(rows.mean((2, 3)) if rows.ndim == 4 else rows)

    def _start(self, output: Tensor) -> None:
        """Size the window by the first batch: the same on all processes, whose batches are alike."""
        dim, wanted = output.shape[1], self.rows or 10 * output.shape[1]
        self.window = min(self.every, math.ceil(wanted / (len(output) * _processes())))
        device = str(output.device) if output.device.type == "cuda" else None
        self._sum = Covariance(dim, normalize=self.normalize, device=device)

    def step(self) -> dict[str, Any] | None:
        """Count a training step; at every `every`-th, return the report if rows were seen. Call it on every process."""
        self.count += 1
        if self.count % self.every or self._sum is None:
            return None
        total = self._sum
        self._sum = Covariance(total.dim, normalize=total.normalize, device=total.device)
        if _processes() > 1:
            total.all_reduce()
        if total.n < 2:
            return None
        result = total.measured()
        report = {"step": self.count, "n": result.n, **result.metrics()}
        self.history.append(report)
        self._values.append(result.singular_values)
        if self.log and _rank() == 0:
            line = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in report.items()}
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        return report

    def plot(self, ax: Any = None) -> Any:
        """Heat map of the singular values over the steps; returns the axes."""
        from collapse import plots

        with plots.style():
            if ax is None:
                _, ax = plots.figure()
            plots.plot_over_time(ax, self.steps, self.spectra)
        return ax

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What to save with the run, this process's rows since the last report among it."""
        state = {"count": self.count, "window": self.window, "history": self.history, "spectra": self.spectra.tolist()}
        return {**state, "rank": _rank(), "sum": self._sum and self._sum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Where one process's state is loaded on all, its rows are counted once."""
        self.count, self.window, self.history = state["count"], state["window"], list(state["history"])
        self._values = [np.array(values) for values in state["spectra"]]
        self._sum = state["sum"] and Covariance.from_state_dict(state["sum"])
        if self._sum and state["rank"] != _rank():
            self._sum = Covariance(self._sum.dim, normalize=self.normalize, device=self._sum.device)


def _describe(output: Any) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _processes() -> int:
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank() if _processes() > 1 else 0
