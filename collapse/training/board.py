"""The curve of a run as TensorBoard shows it: numbers in groups, and a picture of the spectra at each measurement."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.spectra import METRICS, Spectrum

GROUPS = {
    "loss": ("loss", "epoch_loss"),
    "accuracy": ("classifier_top1", "knn_top1"),
    "schedule": ("lr", "epoch"),
    "speed": ("images_per_second", "waited"),
    "spectrum": METRICS,
}
TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}
TAGS |= {f"embedding_{name}": f"embedding_spectrum/{name}" for name in METRICS}


class Board:
    """Writes event files into the folder of a run; what lies there after `step`, from which a run goes on, is purged.

    Raises InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard=True: not installed; pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: Mapping[str, Any], spectra: Mapping[str, Spectrum]) -> None:
        """Write a line of the log at its step: each number under its tag, and `spectra`, if any, as spectrum/curves."""
        from collapse import plots

        step = line["step"]
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(TAGS[name], value, step)
        if spectra:
            self._writer.add_figure("spectrum/curves", plots.draw(spectra, "spectrum", None).figure, step)  # and close
        self._writer.flush()
