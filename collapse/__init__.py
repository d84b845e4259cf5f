"""collapse: simulate, predict and measure dimensional collapse in self-supervised learning.

After Jing, Vincent, LeCun and Tian, "Understanding Dimensional Collapse in Contrastive Self-supervised
Learning", ICLR 2022 (arXiv 2110.09348). This file imports nothing heavy: each name below is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


class InputError(ValueError):
    """Bad input: what is wrong, where, and what to do, in one line. The command prints it and exits with 2."""


if TYPE_CHECKING:
    from collapse import metrics, theory
    from collapse.checkpoints import load
    from collapse.covariance import Covariance
    from collapse.diagnosis import diagnose
    from collapse.measure import spectrum
    from collapse.monitor import Monitor
    from collapse.spectra import Spectrum

_HOME = {
    "Covariance": "collapse.covariance",
    "Monitor": "collapse.monitor",
    "Spectrum": "collapse.spectra",
    "spectrum": "collapse.measure",
    "diagnose": "collapse.diagnosis",
    "load": "collapse.checkpoints",
    "metrics": "collapse.metrics",
    "theory": "collapse.theory",
}

__all__ = ["Covariance", "InputError", "Monitor", "Spectrum", "diagnose", "load", "metrics", "spectrum", "theory"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'collapse' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if module.__name__ == f"collapse.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
