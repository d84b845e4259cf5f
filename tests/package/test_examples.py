"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import collapse

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


def test_there_are_thirty():
    assert sum(len(examples(name)) for name in LIBRARY) >= 30
