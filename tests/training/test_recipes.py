"""The recipes run where their library is installed."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
RECIPES = dict(re.findall(r"## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
NEEDS = {"Lightning": "lightning", "torchmetrics in Lightning": "lightning", "torchmetrics": "torchmetrics",
         "Hugging Face Trainer": "accelerate", "accelerate": "accelerate",
         "TensorBoard": "tensorboard", "Weights & Biases": "wandb"}  # fmt: skip
INSTALLED = [name for name in RECIPES if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def test_every_recipe_is_known():
    assert RECIPES.keys() == {"A plain loop, with an alarm", *NEEDS}
    assert {"A plain loop, with an alarm", "Lightning", "torchmetrics", "TensorBoard"} <= set(INSTALLED)
    for text in RECIPES.values():
        compile(text, "recipe", "exec")


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_a_recipe_runs_and_reports(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(RECIPES[name], {"__name__": "recipe"})
    shown = capsys.readouterr().out
    if name == "TensorBoard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator("runs/rank").Reload()
        assert [1 < event.value <= 4 for event in board.Scalars("rank/effective_rank")] == [True] * 2
        assert [event.step for event in board.Scalars("rank/rankme")] == [4, 8]
        assert board.Images("rank/spectrum")[-1].encoded_image_string.startswith(b"\x89PNG")
    elif name == "Weights & Biases":
        assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    else:
        assert re.search(r"\d\.\d+", shown)
