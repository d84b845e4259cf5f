"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from matplotlib import pyplot

import collapse
from collapse import metrics, plots, theory

PAGES = Path(collapse.__file__).parents[1] / "docs"

LIBRARY = sorted(name for _, name, _ in pkgutil.walk_packages(collapse.__path__, "collapse.")
                 if not name.startswith(("collapse.commands", "collapse.__main__", "collapse.lightning")))  # fmt: skip


class Finder(doctest.DocTestFinder):
    """Finds what a module defines, behind decorators of another too."""

    def _from_module(self, module, found):
        return module is not None and getattr(found, "__module__", None) == module.__name__


def examples(name):
    """The docstrings of a module that have any."""
    found = Finder(exclude_empty=True).find(importlib.import_module(name))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", LIBRARY)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for test in examples(name):
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        assert runner.run(test).failed == 0, test.name
    pyplot.close("all")


def reference():
    """The public names of the pages of the reference, and of the modules that they show whole."""
    for page in PAGES.glob("api*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            above, _, name = path.rpartition(".")
            if path in LIBRARY:
                own = vars(importlib.import_module(path)).items()
                yield from (f"{path}.{n}" for n, value in own if n[0] != "_" and is_of(value, path))
            elif above in LIBRARY:
                yield f"{getattr(importlib.import_module(above), name).__module__}.{name}"


def is_of(value, module=None):
    """Whether it is a function or class, of a module if one is named."""
    return (inspect.isroutine(value) or inspect.isclass(value)) and module in (None, value.__module__)


def test_every_public_name_has_an_example():
    shown = {test.name for name in LIBRARY for test in examples(name)}
    values = [(name, getattr(room, name)) for room in (collapse, metrics, plots, theory) for name in room.__all__]
    public = {f"{value.__module__}.{name}" for name, value in values if is_of(value)}
    assert len(public) > 110
    named = public | set(reference())
    assert len(named) > 150
    without = {name for name in named if not any(each == name or each.startswith(f"{name}.") for each in shown)}
    assert without <= {"collapse.theory.simulate.Views"}  # a protocol: its classes have one
