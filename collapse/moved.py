"""Old names, for one release, each with a warning that says the new one: of modules, functions and attributes.

`collapse.compare` was a module and is a function: `import collapse.compare` would put a module in the function's place.
So the function itself is what is found there, with the names of the old module on it.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "collapse.accumulators": ("collapse.spectra.accumulators",),
    "collapse.attribution": ("collapse.metrics.attribution",),
    "collapse.checkpoints.encoder": ("collapse.models.encoder",),
    "collapse.compare": ("collapse.spectra.comparison",),
    "collapse.covariance": ("collapse.spectra.covariance", "collapse.files.rows"),
    "collapse.images": ("collapse.data.images", "collapse.data.preprocessing", "collapse.data.batches"),
    "collapse.evaluate": ("collapse.encoders.passes", "collapse.encoders.accuracy"),
    "collapse.measure": ("collapse.spectra.measure",),
    "collapse.outputs": ("collapse.results.outputs",),
    "collapse.training.config": ("collapse.recipes.config",),
    "collapse.training.data": ("collapse.data.labelled", "collapse.data.sources"),
    "collapse.training.views": ("collapse.recipes.views",),
}
RENAMED = {
    "collapse.checkpoints": {"Taps": "LayerHooks"},
    "collapse.models.encoder": {"Taps": "LayerHooks"},
    "collapse.results.outputs": {"whole": "atomic_write"},
    "collapse.training.loader": {"Plan": "BatchOrder"},
    "collapse.training.losses": {"infonce": "contrastive_loss"},
    "collapse.training.network": {"checkpoint_blocks": "recompute_blocks"},
}


def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    """What Python asks the entries of sys.meta_path."""
    return ModuleSpec(name, sys.modules[__name__]) if name in MOVED else None  # type: ignore[arg-type]


def create_module(spec: ModuleSpec) -> None:
    """Let Python make the module."""


def exec_module(module: ModuleType) -> None:
    """Give the module the names of its homes, or put the function of its name in its place."""
    name = module.__name__
    homes = [import_module(home) for home in MOVED[name]]
    today = " and ".join(home.__name__ for home in homes)
    if name == "collapse.compare":
        warnings.warn(f"{name} is a function now, and its module {today}", DeprecationWarning, stacklevel=2)
        function = homes[0].compare
        vars(function).update(
            comparison=_document, subspaces=homes[0].subspaces, table=_table, COLUMNS=homes[0].COLUMNS
        )
        sys.modules[name] = function
        return
    warnings.warn(f"{name} is {today} now", DeprecationWarning, stacklevel=2)
    for home in homes:
        vars(module).update((key, value) for key, value in vars(home).items() if not key.startswith("_"))
        vars(module).update((old, vars(home)[new]) for old, new in RENAMED.get(home.__name__, {}).items())


def _document(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """`collapse.spectra.comparison.comparison` as the document that it was."""
    return dict(import_module("collapse.spectra.comparison").comparison(spectra).to_dict())


def _table(document: Mapping[str, Any]) -> str:
    """`collapse.spectra.comparison.text` of such a document."""
    home = import_module("collapse.spectra.comparison")
    return str(home.text(home.Comparison(list(document["rows"]), list(document["subspaces"]))))


class Renamed:
    """An attribute of a class by its old name; `name` is that of today."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __set_name__(self, owner: type, old: str) -> None:
        self.old = f"{owner.__name__}.{old}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        warnings.warn(f"{self.old} is {self.name} now", DeprecationWarning, stacklevel=2)
        return getattr(instance, self.name)


def renamed(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module of `RENAMED`."""

    def find(old: str) -> Any:
        if old not in RENAMED[module]:
            raise AttributeError(f"module {module!r} has no attribute {old!r}")
        new = RENAMED[module][old]
        warnings.warn(f"{module}.{old} is {new} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return find
