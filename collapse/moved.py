"""Modules by their old names, for one release: each gave its name to a function of the package.

`import collapse.compare` would put a module in the function's place.  So the function itself is what is found there,
with the names of the old module on it.
"""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {"collapse.compare": "collapse.comparison"}


def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    """What Python asks the entries of sys.meta_path."""
    return ModuleSpec(name, sys.modules[__name__]) if name in MOVED else None  # type: ignore[arg-type]


def create_module(spec: ModuleSpec) -> None:
    """Let Python make the module."""


def exec_module(module: ModuleType) -> None:
    """Put the function in the module's place."""
    name = module.__name__
    home = import_module(MOVED[name])
    warnings.warn(f"{name} is a function now, and its module {home.__name__}", DeprecationWarning, stacklevel=2)
    function = getattr(home, name.rpartition(".")[2])
    vars(function).update(comparison=_document, subspaces=home.subspaces, table=_table, COLUMNS=home.COLUMNS)
    sys.modules[name] = function


def _document(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """`collapse.comparison.comparison` as the document that it was."""
    return dict(import_module("collapse.comparison").comparison(spectra).to_dict())


def _table(document: Mapping[str, Any]) -> str:
    """`collapse.comparison.text` of such a document."""
    home = import_module("collapse.comparison")
    return str(home.text(home.Comparison(list(document["rows"]), list(document["subspaces"]))))
