"""Figures and notebooks lie beside docs/: the site gets them too, and links to them lose their `../` there.

A notebook is a page with its text, code and stored outputs; it links to its file, in which the sliders move.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDERS = {"figures": "*.png", "notebooks": "*.ipynb"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs with the files of docs/."""
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
            if path.suffix == ".ipynb":
                files.append(File.generated(config, f"{folder}/{path.stem}.md", content=rendered(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    if page.file.src_uri.startswith("notebooks/"):
        return markdown
    markdown = re.sub(r"\]\(\.\./notebooks/([\w.]+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
    return markdown.replace("](../figures/", "](figures/")


def rendered(path: Path) -> str:
    """A notebook as a page: its cells in order, without the cell that installs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _cell(cell)]
    told = f"*The notebook itself, with sliders that move: [{path.name}]({path.name}), or `make notebooks`.*"
    return "\n\n".join([parts[0], told, *parts[1:]]) + "\n"


def _cell(cell: Mapping[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        text = re.sub(r"\]\((\d\w+)\.ipynb\)", r"](\1.md)", text)
        yield text.replace("](../docs/", "](../")
    elif "%pip" not in text:
        yield f"```python\n{text}\n```"
        for output in cell["outputs"]:
            yield from _output(output)


def _output(output: Mapping[str, Any]) -> Iterator[str]:
    """A picture, a table, or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        picture = "".join("".join(data["image/png"]).split())
        yield f'<img alt="output of the cell above" src="data:image/png;base64,{picture}">'
    elif "text/html" in data:
        yield f"<div>{' '.join(''.join(data['text/html']).split())}</div>"
    elif shown := ANSI.sub("", "".join(data.get("text/plain", ""))).strip():
        yield f"<pre><code>{html.escape(shown)}</code></pre>"
