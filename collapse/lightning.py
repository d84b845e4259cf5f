"""`Monitor` as a callback of Lightning (the extra `lightning`)."""

from typing import Any

import lightning.pytorch as pl

from collapse.monitor import Monitor


class MonitorCallback(pl.Callback):
    """Logs the rank metrics of a layer as rank/NAME every `every` training batches, and saves its state with the run.

    layer: the name of a module of the LightningModule, as in named_modules(); the rest as for `Monitor`.
    """

    def __init__(self, layer: str, every: int = 1000, rows: int | None = None, normalize: bool = True) -> None:
        self.layer, self.options = layer, {"every": every, "rows": rows, "normalize": normalize}
        self.monitor: Monitor | None = None
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the layer and watch it."""
        if self.monitor is None:
            self.monitor = Monitor(pl_module.get_submodule(self.layer), **self.options)  # type: ignore[arg-type]
            if self._saved:
                self.monitor.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count a step; log the report when there is one."""
        assert self.monitor is not None
        if report := self.monitor.step():
            numbers = {f"rank/{name}": float(value) for name, value in report.items() if name != "step"}
            pl_module.log_dict(numbers)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves."""
        return self.monitor.state_dict() if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._saved = state_dict
        if self.monitor and state_dict:
            self.monitor.load_state_dict(state_dict)
