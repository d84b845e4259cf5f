"""The one command for a GPU, on the CPU: every line of it runs, and a stage that fails or hangs costs only itself."""

import io
import json
import lzma
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import scripted

from collapse.recipes.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """64 training and 32 validation images of 32 px in one file; the class is the colour."""
    rng, n, files = np.random.default_rng(0), 96, []
    for index in range(n):
        pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
        pixels[..., index % 3] += 160
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    head = json.dumps({"n": n, "classes": ["r", "g", "b"]}).encode()
    parts = [struct.pack("<I", len(head)), head, np.array([len(f) for f in files], "<u2").tobytes()]
    parts += [(np.arange(n) % 3).astype(np.uint8).tobytes(), (np.arange(n) >= 64).astype(np.uint8).tobytes(), *files]
    path = tmp_path_factory.mktemp("packed") / "images.xz"
    path.write_bytes(lzma.compress(b"".join(parts), preset=0))
    with zipfile.ZipFile(path.with_name("imagenet-100-samples.zip"), "w") as archive:
        for index, data in enumerate(files[:3]):
            archive.writestr(f"val/{index}/{index}.JPEG", data)
    return path


def gpu(tmp_path, *flags):
    """(exit code, the document, what was printed) of the command on the CPU."""
    call = [ROOT / "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--out", tmp_path / "gpu.json"]
    call += ["--trunks", tmp_path / "trunks"]
    ran = scripted(*call, *flags, seconds=1000)
    return ran.returncode, json.loads((tmp_path / "gpu.json").read_text()), ran.stdout + ran.stderr


def test_every_stage_runs_on_the_cpu(tmp_path, packed):
    code, document, printed = gpu(tmp_path, "--data", str(packed), "--seconds", "1500")
    assert code == 0, (printed, document)
    assert {stage["status"] for stage in document["stages"].values()} == {"done"}
    figures = document["figures"]
    assert {name.partition("/")[0] for name in figures} == {name.partition(",")[0] for name in document["stages"]}
    checks = {name: value for name, value in figures.items() if name.startswith("correct/")}
    assert len(checks) == 24
    assert all(value["holds"] for value in checks.values()), checks
    views = {name: figures["table1/recipe, seed 0"][name] for name in ("scale", "blur", "solarize")}
    assert views == {name: list(getattr(Config(), name)) for name in views}  # the paper's
    for head in ("none", "mlp", "directclr", "linear"):
        run = figures[f"table1/{head}, temperature 0.5, seed 0"]
        assert run["probe"]["top1_interval"][0] <= run["probe"]["top1"] <= run["probe"]["top1_interval"][1]
        assert len(run["representation"]["singular_values"]) == 16
        rest = figures[f"relaxed/{head}, temperature 0.5, seed 0"]
        assert set(rest["measured"]) == set(rest["predicted"]) == {"r", "z"}
        assert rest["steps"] == 5
    assert figures["table1/untrained, seed 0"]["knn"]["n"] == 32
    assert figures["trainer224/images"]["of"] == "imagenet-100-samples.zip"
    assert figures["trainer224/images_per_second_in_a_row"] > 0
    for name in ("trainer224/compiled", "trainer224/eager", "budget/step"):
        assert figures[name]["images_per_second"] > 0
    assert figures["extract/files"]["of"] == "imagenet-100-samples.zip"
    assert figures["spectrum/d = 32"]["relative_errors"]["int8, 4 slices"] < 1e-7
    assert figures["figures/drawn"] == "gpu.png"
    assert (tmp_path / "gpu.png").exists()


def test_a_stage_that_fails_or_hangs_costs_only_its_own_time(tmp_path, packed):
    """table1 finds no images, or is too slow for its limit."""
    (tmp_path / "damaged.xz").write_bytes(packed.read_bytes()[:-100])
    flags = ("--data", str(tmp_path / "damaged.xz"), "--only", "table1,figures", "--seconds", "1500")
    code, document, printed = gpu(tmp_path, *flags)
    assert code == 1
    assert "table1: failed: gpu: " in printed
    assert document["stages"]["figures"]["status"] == "done"
    code, document, printed = gpu(tmp_path, "--data", str(packed), "--only", "table1", "--seconds", "0.2")
    assert code == 1
    assert document["stages"]["table1, seed 0"]["status"].startswith("ended at its limit")
    assert document["stages"]["table1, seed 0"]["seconds"] < 30
    assert not any("/" in line for line in document["stages"]["table1, seed 0"]["said"] if line.startswith("  File"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tiny", "--device", "cpu", "--data", "nowhere.xz"), "gpu.py: error: --data: nowhere.xz is not there"),
        (("--tiny", "--device", "cpu", "--only", "tabel1"), "--only: tabel1 is not one of card"),
        (("--tiny", "--device", "cpu", "--epochs", "1"), "gpu.py: error: --epochs: 1 is too few; give 2 or more"),
        (("--only", "card"), "gpu.py: device=cuda: there are 0 CUDA devices here; --tiny --device cpu rehearses"),
        (("--only", "card", "--device", "tpu"), "gpu.py: device= is 'tpu', expected auto"),
    ],
)
def test_bad_input_is_said_before_anything_runs(tmp_path, flags, said):
    if "CUDA" in said and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    ran = scripted(ROOT / "benchmarks/gpu.py", *flags, "--out", tmp_path / "gpu.json", seconds=300)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "gpu.json").exists()
