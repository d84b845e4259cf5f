"""The notebooks, run from a fresh kernel.

    python tests/notebooks.py              # run all of them and store what they show
    python tests/notebooks.py 3 5          # those whose names begin so

Widgets are not drawn where a notebook is only rendered, so nothing of them is stored: figures stand beside them.
"""

import sys
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(path: Path, last: str = "") -> NotebookNode:
    """The notebook with the outputs of a fresh kernel; `last` is a further cell. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(last)] if last else []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=240, coalesce_streams=True, resources=where).execute()
    return notebook


def shown(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs of a code cell that a reader sees without widgets."""
    view = "application/vnd.jupyter.widget-view+json"
    return [output for output in cell.outputs if view not in output.get("data", {})]


def store(path: Path) -> None:
    """Run the notebook and keep what is shown in its file."""
    notebook = run(path)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = shown(cell)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if path.name.startswith(tuple(sys.argv[1:]) or ""):
            before = perf_counter()
            store(path)
            print(f"{path.name}: {perf_counter() - before:.0f} s")
