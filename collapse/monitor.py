"""Watch a layer collapse while it trains: a few lines in anybody's training loop.

    monitor = collapse.Monitor(model.backbone, log="rank.jsonl")
    for images in loader:
        ...                                        # forward, backward, optimizer.step()
        if report := monitor.step():               # every 1,000 steps, else None
            print(report["step"], report["effective_rank"])

The words are those of torchmetrics: `update` adds rows, `compute` reports on them, `reset` forgets them, and `step`
counts, reports when it is due, and resets.  A forward hook updates with the rows that pass in training, in the last few
steps before each report; nothing is kept of the graph and nothing runs twice.  Under torch.distributed the processes'
statistics are joined exactly, and all get the same report.  `MonitorCallback` does it in Lightning (lightning.py).
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse import GateError, InputError
from collapse.arguments import choice
from collapse.encoders import processes
from collapse.errors import warn
from collapse.spectra import Spectrum
from collapse.spectra.covariance import METHODS, Covariance

RANKS = (
    "effective_rank", "rankme", "rankme_centered", "stable_rank", "participation_ratio", "numerical_rank", "vendi"
)  # fmt: skip


class Monitor:
    """Rank metrics of the output of a module, (n, d) or feature maps (n, d, h, w), every so many training steps.

    Tokens (n, t, d) are averaged, of a tuple the first part is taken, and of an output of transformers what its pooler
    gives, else its last hidden state; each is said once.

    Args:
        module: the layer to watch. Any other output is an error at the first step. None: `update` gets the rows.
        every: steps between reports. The default costs well under 1 % of training on a CPU (benchmarks/monitor.py).
        rows: how many rows a report wants, from all processes; default 10 d. It takes the last steps that give as many,
            at most `every`.
        normalize: divide each row by its norm, as the paper does.
        method: "covariance", or "float32" or "qr", as of `collapse.Covariance`.
        log: a file that gets one JSON line a report (of process 0); None for none.
        transform: from the module's output to what is watched, (n, d) or (n, d, h, w), as
            `lambda out: out.last_hidden_state[:, 0]`.
        alarm: {rank measure: share of its best so far}; a report below it is a CollapseWarning.
        on_alarm: called at such a report instead, with the sentence and the report.
        stop: raise GateError at such a report, which ends the training; after `on_alarm`, if that is given.
        verbose: say on stderr, at the first step, what is watched and when a report comes.

    Attributes:
        history: the reports: {"step", "n", metric: number or NaN, ...}.
        steps: (T,) when.
        spectra: (T, d) singular values at each report, descending.

    Raises InputError: fewer than 1 step between reports, fewer than 2 rows, or an alarm that is no share of a rank.

    Examples:
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
        module: nn.Module | None = None,
        every: int = 1000,
        rows: int | None = None,
        normalize: bool = True,
        log: str | Path | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        alarm: Mapping[str, float] | None = None,
        stop: bool = False,
        verbose: bool = True,
        on_alarm: Callable[[str, dict[str, Any]], Any] | None = None,
        method: str = "covariance",
    ) -> None:
        if module is not None and not isinstance(module, nn.Module):
            raise InputError(
                f"monitor: module is a {type(module).__name__}; expected a torch.nn.Module, as model.backbone"
            )
        _check_alarm(alarm)
        choice("method", method, METHODS[1:])
        if every < 1 or (rows is not None and rows < 2):
            raise InputError(f"monitor: every = {every}, rows = {rows}; expected at least 1 step and 2 rows")
        self.every, self.rows, self.normalize, self.log = every, rows, normalize, log and Path(log)
        self.transform, self.count, self.window, self.method = transform, 0, every, method
        self.alarm, self.stop, self.on_alarm = dict(alarm or {}), stop, on_alarm
        self._greets = verbose
        self._said: set[str] = set()
        self._module = module
        self._idle = "update was not called" if module is None else "the layer did not run"
        self._why, self._silent = self._idle, ""
        self.history: list[dict[str, Any]] = []
        self._values: list[NDArray] = []
        self._sum: Covariance | None = None
        self._hook = None if module is None else module.register_forward_hook(self._see)

    def __repr__(self) -> str:
        watched = type(self._module).__name__ if self._module is not None else "rows from update"
        return f"Monitor of {watched}: {self.count} steps, {len(self.history)} reports, one every {self.every} steps"

    @property
    def steps(self) -> NDArray:
        """(T,) steps of the reports."""
        return np.array([report["step"] for report in self.history], dtype=int)

    @property
    def spectra(self) -> NDArray:
        """(T, d) singular values at each report."""
        return np.array(self._values)

    @torch.no_grad()
    @torch.compiler.disable  # of a compiled network: statistics are numpy's, and none of the graph
    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            self._why = "the layer runs in eval mode, in which nothing is watched; call its .train()"
            return
        rows = self._rows(output)
        total = self._sum or self._start(rows)
        if self.every - self.count % self.every <= self.window:
            total.update(rows)
        else:
            self._why = f"the layer ran, but not in {self._last()}, from which a report takes rows"

    @torch.no_grad()
    @torch.compiler.disable
    def update(self, output: Any) -> None:
        """Add rows (n, d), array or tensor, or any output of which the hook would take them, to the next report.

        Raises InputError: nothing says which part of the output to take.
        """
        rows = self._rows(torch.tensor(output) if isinstance(output, np.ndarray) else output)
        (self._sum or self._start(rows)).update(rows)

    def _rows(self, output: Any) -> Tensor:
        """(n, d) of what the module gives. Raises InputError: nothing says which part of it."""
        rows, note = (self.transform(output), "") if self.transform else _part(output)
        what = _describe(output)
        if isinstance(rows, Tensor) and rows.ndim == 3 and not self.transform:
            rows, note = rows.mean(1), f"the mean of {note or 'its tokens'}"
        if not isinstance(rows, Tensor) or rows.ndim not in (2, 4):
            made = f", of which transform= makes {_describe(rows)}" if self.transform else ""
            raise InputError(
                f"monitor: the layer gives {what}{made}; give a transform= that makes (n, d) or (n, d, h, w)"
            )
        if note:
            self._say(f"monitor: the layer gives {what}: {note} is watched; transform= says otherwise")
        return rows.detach().mean((2, 3)) if rows.ndim == 4 else rows.detach()

    def _say(self, note: str) -> None:
        """A warning, once."""
        if note not in self._said:
            self._said.add(note)
            warn([note])

    def _start(self, rows: Tensor) -> Covariance:
        """Size the window by the first batch: the same on all processes, whose batches are alike."""
        dim, wanted = rows.shape[1], self.rows or 10 * rows.shape[1]
        self.window = min(self.every, math.ceil(wanted / max(1, len(rows) * processes.world())))
        self._sum = Covariance(dim, self.method, self.normalize, _where(rows))
        return self._sum

    def step(self) -> dict[str, Any] | None:
        """Count a training step; at every `every`-th, return the report if rows were seen. Call it on every process."""
        self.count += 1
        if self._greets:
            self._greet()
        if self.count % self.every:
            return None
        result = self._measured()
        if result is None and self._why != self._silent:
            self._warn_of_nothing()
        self._silent = self._why if result is None else ""
        self.reset()
        return None if result is None else self._keep(result)

    def compute(self) -> dict[str, Any] | None:
        """The report on the rows since the last one or `reset`, which stay; it enters neither `history` nor `log`.

        Call it on every process. Fewer than two rows give None, and a CollapseWarning that says why.
        """
        result = self._measured()
        if result is None:
            self._warn_of_nothing()
            return None
        warn(f"monitor: {note}" for note in result.warnings)
        return self._report(result)

    def reset(self) -> None:
        """Forget the rows since the last report; steps and `history` stay."""
        self._why = self._idle
        if self._sum is not None:
            self._sum = Covariance(self._sum.dim, self._sum.method, self._sum.normalize, self._sum.device)

    def _greet(self) -> None:
        """Say once, on the first process, what is watched and when a report comes."""
        self._greets = False
        what = f"; nothing seen yet: {self._why}"
        if self._sum is not None:
            name = "update" if self._module is None else type(self._module).__name__
            what = f" on the {self._sum.dim} dimensions of {name}"
            what += f", from {self._last()}" if self._hook else ""
        if processes.rank() == 0:
            print(f"monitor: step {self.count}: a report every {self.every} steps{what}", file=sys.stderr)

    def _last(self) -> str:
        return "the last step" if self.window == 1 else f"the last {self.window} steps"

    def _measured(self) -> Spectrum | None:
        """The spectrum of the rows of all processes since the last report; None if there are fewer than two."""
        total = self._sum if processes.world() == 1 else self._joined()
        if total is None or total.n < 2:
            if total is not None and total.n:
                self._why = "one row, and a covariance needs two"
            return None
        return total.measured()

    def _joined(self) -> Covariance | None:
        """The statistics of all processes, those without rows among them; None if no process has seen the layer run."""
        from torch import distributed

        mine, device = self._sum, _device(self._module)
        device = device if mine is None else mine.device
        dim = torch.tensor(0 if mine is None else mine.dim, device=device)
        distributed.all_reduce(dim, distributed.ReduceOp.MAX)
        if not int(dim):
            return None
        total = Covariance(int(dim), self.method, self.normalize, device)
        return (total if mine is None else total.merge(mine)).all_reduce()

    def _warn_of_nothing(self) -> None:
        warn([f"monitor: step {self.count}: nothing to report, every {self.every} steps: {self._why}"])

    def _report(self, result: Spectrum) -> dict[str, Any]:
        return {"step": self.count, "n": result.n, **result.metrics()}

    def _keep(self, result: Spectrum) -> dict[str, Any]:
        """The report, in `history` and `log`, with its warnings and alarms."""
        report = self._report(result)
        self.history.append(report)
        self._values.append(result.singular_values)
        if self.log and processes.rank() == 0:
            line = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in report.items()}
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        for note in result.warnings if len(self.history) == 1 else ():
            self._say(f"monitor: {note}")
        self._alarm(report)
        return report

    def _alarm(self, report: dict[str, Any]) -> None:
        for name, share in self.alarm.items():
            best = max(self.history, key=lambda past: past[name])
            if report[name] < share * best[name]:
                note = (
                    f"monitor: step {report['step']}: {name} is {report[name]:.4g}, below {share:g} of its best, "
                    f"{best[name]:.4g} at step {best['step']}"
                )
                if self.on_alarm is not None:
                    self.on_alarm(note, report)
                if self.stop:
                    raise GateError(note)
                if self.on_alarm is None:
                    warn([note])

    def plot(self, ax: Any = None) -> Any:
        """Heat map of the singular values over the steps; returns the axes. Raises InputError: no report was made."""
        from collapse import plots

        if not self.history:
            raise InputError(f"monitor: no report yet after {self.count} steps, one comes every {self.every}")

        with plots.style():
            if ax is None:
                _, ax = plots.figure()
            plots.plot_over_time(ax, self.steps, self.spectra)
        return ax

    def remove(self) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What to save with the run, this process's rows since the last report among it."""
        state = {"count": self.count, "window": self.window, "history": self.history, "spectra": self.spectra.tolist()}
        return {**state, "rank": processes.rank(), "sum": self._sum and self._sum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Where one process's state is loaded on all, its rows are counted once."""
        self.count, self.window, self.history = state["count"], state["window"], list(state["history"])
        self._values = [np.array(values) for values in state["spectra"]]
        self._sum = state["sum"] and Covariance.from_state_dict(state["sum"])
        if self._sum and state["rank"] != processes.rank():
            self._sum = Covariance(self._sum.dim, self._sum.method, self.normalize, self._sum.device)


def _where(tensor: Tensor) -> str | None:
    """The device on which a covariance of such tensors adds up; None for numpy."""
    return str(tensor.device) if tensor.device.type == "cuda" else None


def _device(module: nn.Module | None) -> str | None:
    """Where a module that has not run yet would give its output."""
    parameter = None if module is None else next(module.parameters(), None)
    return None if parameter is None else _where(parameter)


def _part(output: Any) -> tuple[Any, str]:
    """(the part of an output that is watched, its name where there are others)."""
    if isinstance(output, Mapping):
        for name in ("pooler_output", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                pooled = output[name]
                return pooled.flatten(1) if name == "pooler_output" else pooled, name
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], "its first part" if len(output) > 1 else ""
    return output, ""


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    parts = f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__name__}{parts}"[:200]


def _check_alarm(alarm: Any) -> None:
    """Raise InputError: an alarm that is no share of a rank measure."""
    if alarm is not None and not isinstance(alarm, Mapping):
        raise InputError(f"monitor: alarm = {alarm!r}; expected a dict, as {{'effective_rank': 0.5}}")
    for name, share in (alarm or {}).items():
        if name not in RANKS or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise InputError(f"monitor: alarm {name}: {share}; expected a share in 0..1 of {', '.join(RANKS)}")
