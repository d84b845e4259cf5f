"""The recipes run, in a process of their own, where their library is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = dict(re.findall(r"## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL))
NEEDS = {"Lightning": "lightning", "Hugging Face Trainer": "accelerate", "accelerate": "accelerate",
         "TensorBoard": "tensorboard", "Weights & Biases": "wandb"}  # fmt: skip
INSTALLED = [name for name in RECIPES if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def test_every_recipe_is_known():
    assert RECIPES.keys() == {"A plain loop, with an alarm", *NEEDS}
    assert {"A plain loop, with an alarm", "Lightning"} <= set(INSTALLED)
    for text in RECIPES.values():
        compile(text, "recipe", "exec")


@pytest.mark.parametrize("name", INSTALLED)
def test_a_recipe_runs_and_reports(name, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", RECIPES[name]]
    result = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
    assert result.returncode == 0, result.stderr
    if name not in ("TensorBoard", "Weights & Biases"):
        assert re.search(r"\d\.\d+", result.stdout), result.stdout
