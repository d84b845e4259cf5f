"""collapse: simulate, predict and measure dimensional collapse in self-supervised learning.

After Jing, Vincent, LeCun and Tian, "Understanding Dimensional Collapse in Contrastive Self-supervised
Learning", ICLR 2022 (arXiv 2110.09348). This file imports nothing heavy: each name below is loaded on first use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from collapse import moved
from collapse.errors import CollapseWarning, GateError, InputError

__version__ = "0.1.0"

if moved not in sys.meta_path:
    sys.meta_path.append(moved)

if TYPE_CHECKING:
    from collapse import metrics, plots, theory
    from collapse.checkpoints import Checkpoint, inspect, load
    from collapse.diagnosis import Diagnosis, diagnose
    from collapse.diagnosis.onepage import report
    from collapse.encoders.accuracy import Accuracy
    from collapse.encoders.embedding import embed
    from collapse.monitor import Monitor
    from collapse.probes.calls import knn, probe
    from collapse.spectra import Spectrum
    from collapse.spectra.comparison import Comparison, compare
    from collapse.spectra.covariance import Covariance
    from collapse.spectra.measure import layer_spectra, spectrum
    from collapse.spectra.scale import references
    from collapse.training.result import Trained, train

_HOME = {
    "Accuracy": "collapse.encoders.accuracy",
    "Checkpoint": "collapse.checkpoints",
    "Comparison": "collapse.spectra.comparison",
    "Covariance": "collapse.spectra.covariance",
    "Diagnosis": "collapse.diagnosis",
    "Monitor": "collapse.monitor",
    "Spectrum": "collapse.spectra",
    "Trained": "collapse.training.result",
    "compare": "collapse.spectra.comparison",
    "diagnose": "collapse.diagnosis",
    "embed": "collapse.encoders.embedding",
    "inspect": "collapse.checkpoints",
    "knn": "collapse.probes.calls",
    "layer_spectra": "collapse.spectra.measure",
    "load": "collapse.checkpoints",
    "metrics": "collapse.metrics",
    "plots": "collapse.plots",
    "report": "collapse.diagnosis.onepage",
    "probe": "collapse.probes.calls",
    "references": "collapse.spectra.scale",
    "spectrum": "collapse.spectra.measure",
    "theory": "collapse.theory",
    "train": "collapse.training.result",
}

__all__ = [
    "Accuracy",
    "Checkpoint",
    "CollapseWarning",
    "Comparison",
    "Covariance",
    "Diagnosis",
    "GateError",
    "InputError",
    "Monitor",
    "Spectrum",
    "Trained",
    "compare",
    "diagnose",
    "embed",
    "inspect",
    "knn",
    "layer_spectra",
    "load",
    "metrics",
    "plots",
    "probe",
    "references",
    "report",
    "spectrum",
    "theory",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'collapse' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if module.__name__ == f"collapse.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
