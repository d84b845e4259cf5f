"""`Monitor` as a callback of Lightning (the extra `lightning`)."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from collapse import InputError
from collapse.errors import warn
from collapse.monitor import Monitor


class MonitorCallback(pl.Callback):
    """Logs the rank metrics of a layer as rank/NAME every `every` training batches, and saves its state with the run.

    Of several such callbacks in one trainer each logs as rank/LAYER/NAME, or rank/LAYER/EVERY/NAME on the same layer.
    layer: the name of a module of the LightningModule, as in named_modules(); the rest as for `Monitor`.
    transform: what the module gives -> (n, d) or (n, d, h, w).
    """

    def __init__(
        self,
        layer: str,
        every: int = 1000,
        rows: int | None = None,
        normalize: bool = True,
        transform: Callable[[Any], Tensor] | None = None,
        alarm: Mapping[str, float] | None = None,
        stop: bool = False,
        verbose: bool = True,
        on_alarm: Callable[[str, dict[str, Any]], Any] | None = None,
    ) -> None:
        self.layer, self.options = layer, {"every": every, "rows": rows, "normalize": normalize}
        self.alarm, self.stop, self.verbose, self.on_alarm = alarm, stop, verbose, on_alarm
        self.transform = transform
        self.monitor: Monitor | None = None
        self._saved: dict[str, Any] = {}
        self._prefix = "rank"

    @property
    def state_key(self) -> str:
        """What Lightning saves the state under: each layer and way of watching has its own."""
        return self._generate_state_key(layer=self.layer, **self.options)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the layer and watch it. Raises InputError: no such module."""
        if self.monitor is None:
            modules = dict(pl_module.named_modules())
            if self.layer not in modules:
                close = get_close_matches(self.layer, modules, 3, 0.5) or [name for name in modules if name][:8]
                raise InputError(f"layer: no module {self.layer!r}; there are {', '.join(close)}")
            self.monitor = Monitor(
                modules[self.layer],
                transform=self.transform,
                alarm=self.alarm,
                stop=self.stop,
                verbose=self.verbose,
                on_alarm=self.on_alarm,
                **self.options,  # type: ignore[arg-type]
            )
            if self._saved:
                self.monitor.load_state_dict(self._saved)
        others = [c for c in trainer.callbacks if isinstance(c, MonitorCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            again = any(other.layer == self.layer for other in others)
            self._prefix = f"rank/{self.layer}" + (f"/{self.options['every']}" if again else "")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count a step; log the report when there is one."""
        assert self.monitor is not None
        if report := self.monitor.step():
            numbers = {f"{self._prefix}/{name}": float(value) for name, value in report.items() if name != "step"}
            pl_module.log_dict(numbers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the training was too short for a report."""
        if self.monitor is not None and not self.monitor.history:
            warn([f"monitor: {self.monitor.count} steps, and a report comes every {self.monitor.every}; lower every="])

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves."""
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._saved = state_dict
        if self.monitor and state_dict:
            self.monitor.load_state_dict(state_dict)
