"""Every notebook runs from a fresh kernel, with its sliders at both ends."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the machinery that runs notebooks
def test_a_notebook_runs_at_both_ends_of_every_slider(path):
    notebook = nbformat.read(path, as_version=4)
    ends = """
def end(slider, first):
    options = getattr(slider, "options", None)
    return options[0 if first else -1] if options else (slider.min if first else slider.max)

for first in (True, False):
    show(**{name: end(slider, first) for name, slider in sliders.items()})
"""
    notebook.cells.append(nbformat.v4.new_code_cell(ends))
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = [output.text for output in notebook.cells[-1].outputs if output.output_type == "stream"]
    assert printed, "the last cell shows what both ends give"
