"""Every layout of docs/checkpoints.md: written as its project writes it, loaded, and compared with the project."""

from pathlib import Path

import layouts_clips
import layouts_convnets
import layouts_sounds
import layouts_texts
import layouts_transformers
import pytest
import torch
from layouts import LAYOUTS
from torch import nn

import collapse

DOCS = Path(__file__).parents[2] / "docs/checkpoints.md"
assert layouts_convnets
assert layouts_transformers


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda row: row.write.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_embeddings_are_those_of_the_project(tmp_path, row):
    torch.manual_seed(0)
    case = row.write(tmp_path)
    path = case.tree
    if not isinstance(path, Path):
        path = tmp_path / "checkpoint.pth"
        torch.save(case.tree, path)
    for name, text in case.neighbours.items():
        (path.parent / name).write_text(text)
    net = collapse.load(path, **case.known)
    images = torch.randn(3, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        r, expected = net(images), case.reference(images)
        # float32 over a few dozen layers: differences are of order 1e-7, the bound leaves room for reordered sums
        assert relative(r, expected) < 1e-5
        assert r.shape == (3, net.report["feature_dim"])
        if case.projector is not None:
            assert net.projector is not None, net.report["warnings"]
            assert relative(net.layer("projector")(images), case.projector(expected)) < 1e-5
        for block in (net.blocks[0], net.blocks[-1]):
            assert net.layer(block)(images).shape[0] == 3
    assert case.projector is not None or net.projector is None
    report = net.report
    assert report["branch"] == case.branch
    assert report["keys"]["unknown"] == 0
    assert case.pixels.items() <= report["preprocessing"].items()
    assert not net.training
    assert not any(parameter.is_meta for parameter in nn.ModuleList([net]).parameters())


def table():
    """The rows of the document's first table."""
    section = DOCS.read_text().split("## What is read")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[1:]]


def test_the_document_lists_what_is_tested_and_nothing_else():
    rows = [*LAYOUTS, *layouts_clips.ROWS, *layouts_sounds.ROWS, *layouts_texts.ROWS]
    assert sorted(table()) == sorted((row.project, row.taken, row.branch, row.flags) for row in rows)
