"""One of the digits' networks measured by the command, from its file and a folder of images.

    python experiments/networks/digits_command.py  # after digits.py, which makes both: 5 s on one core

Runs collapse spectrum runs/digits/mlp.safetensors runs/digits/images.  The document of the command is kept as
experiments/results/digits_command.json, unless the one that is there says the same but for rounding, and drawn as
figures/digits_command.png.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from digits import RUNS, TOLERANCE

from collapse import InputError, plots
from collapse.experiment import Found, ending, settle, tell
from collapse.results import load_json
from collapse.spectra import Spectrum

ROOT = Path(__file__).resolve().parents[2]
RESULT, FIGURE = ROOT / "experiments/results/digits_command.json", ROOT / "figures/digits_command"
COMMAND = ["spectrum", str(RUNS / "mlp.safetensors"), str(RUNS / "images"), "--workers", "0", "--force"]


def measured(path: Path) -> Found:
    """What was measured, without what is computed from it and the digest of the network's file."""
    document, s = load_json(path), Spectrum.load(path)
    how = {key: document[key] for key in ("n", "dim", "l2_normalized", "method", "threshold", "images")}
    return how, {"singular_values": s.singular_values}


def main() -> None:
    """Run the command, keep its document or the stored one, draw what is kept."""
    new = RUNS / "digits_command.json"
    if subprocess.run([sys.executable, "-m", "collapse", *COMMAND, "--out", str(new)], check=False).returncode:
        raise InputError(f"collapse {' '.join(COMMAND)}: failed; run experiments/networks/digits.py first")
    stored = measured(RESULT) if RESULT.exists() else None
    settle(RESULT, measured(new), stored, TOLERANCE, lambda: shutil.copyfile(new, RESULT))
    plots.save_figure(Spectrum.load(RESULT).plot().figure, FIGURE, [".png"])
    tell(f"wrote figures/{FIGURE.name}.png")


if __name__ == "__main__":
    with ending(Path(__file__).name):
        main()
