"""The notebooks, run from a fresh kernel.

    python tests/notebooks.py              # run all of them and store what they show
    python tests/notebooks.py 3 5          # those whose names begin so

Widgets are not drawn where a notebook is only rendered, so nothing of them is stored: figures stand beside them.
"""

import sys
from pathlib import Path
from queue import Empty
from time import perf_counter
from typing import Any

import nbformat
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import Type

FOLDER = Path(__file__).parents[1] / "notebooks"


class Channel(AsyncZMQSocketChannel):
    """Looks for messages every second: asyncio is not woken by each (pyzmq 27), and a notebook would wait for ever."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; raises Empty after `timeout` seconds."""
        end = float("inf") if timeout is None else perf_counter() + timeout
        while not await self.socket.poll(1000 * max(0, min(1, end - perf_counter()))):
            if perf_counter() >= end:
                raise Empty
        return await self._recv()


class Client(AsyncKernelClient):
    """With these channels."""

    shell_channel_class = iopub_channel_class = Type(Channel)


class Manager(AsyncKernelManager):
    """With this client."""

    client_factory = Type(Client)


def run(path: Path, last: str = "") -> NotebookNode:
    """The notebook with the outputs of a fresh kernel; `last` is a further cell. An error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(last)] if last else []
    where = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": 240, "coalesce_streams": True, "kernel_manager_class": Manager}
    NotebookClient(notebook, resources=where, **options).execute()
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
