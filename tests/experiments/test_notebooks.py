"""Every notebook runs from a fresh kernel, with its sliders at both ends, and shows where it is only rendered."""

import re
from pathlib import Path

import nbformat
import pytest

from notebooks import FOLDER, run, shown

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ENDS = """
def end(slider, place):
    if hasattr(slider, "options"):
        return slider.options[place]
    if hasattr(slider, "min"):
        value = (slider.min, slider.max)[place]
        return slider.base**value if hasattr(slider, "base") else value
    return bool(place)

for place in (0, -1):
    show(**{name: end(slider, place) for name, slider in sliders.items()})
"""


def kinds(outputs):
    """What a cell shows, by kind."""
    return [next((kind for kind in ("image/png", "text/plain") if kind in output.get("data", {})), output.output_type)
            for output in outputs]  # fmt: skip


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the machinery that runs notebooks
def test_a_notebook_runs_at_both_ends_of_every_slider_and_holds_what_it_shows(path):
    executed, stored = run(path, ENDS), nbformat.read(path, as_version=4)
    assert kinds(executed.cells[-1].outputs).count("image/png") == 2, "the last cell draws both ends"
    for new, old in zip(code(executed)[:-1], code(stored), strict=True):
        assert kinds(old.outputs) == kinds(shown(new)), f"{old.source[:60]!r}: run tests/notebooks.py"
        assert not any(output.get("name") == "stderr" for output in new.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_draws_and_ends_with_what_to_try(path):
    notebook = nbformat.read(path, as_version=4)
    assert re.search(r"%pip install --quiet .*'dimensional-collapse'", code(notebook)[0].source)
    assert sum(kinds(cell.outputs).count("image/png") for cell in code(notebook)) >= 2
    assert "**Try**" in notebook.cells[-1].source
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    names = re.findall(r"`((?:collapse|experiments)/[\w./]+)`", text) + re.findall(r"\]\(([^)]+)\)", text)
    assert names
    for name in names:
        assert (path.parent / name).exists() or (FOLDER.parent / name).exists(), name


def test_every_notebook_is_there():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n}_" for n in range(1, 8)]
    assert Path(FOLDER.parent / "Makefile").read_text().count("jupyter-lab") == 1
