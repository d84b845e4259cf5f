"""What several test files need: images, checkpoints on disk, and the data that may lie beside the project."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from processes import code_of, forked

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


# Most of the suite's time is in these files' few long tests.
LONGEST = ("test_study.py", "test_experiments.py", "test_notebooks.py", "test_fuzz.py", "test_train.py",
           "test_parallel.py", "test_gpu.py", "test_never.py", "test_attacks.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: what two processes take from each other at the end is short."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def shared() -> Path:
    """Real checkpoints and images beside the project; tests that want them are skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real third-party files is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth random colour images of several sizes and modes in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = coarse.resize((40 + 3 * index, 60 - index), Image.Resampling.BICUBIC)
        image = image.convert(("RGB", "L", "P", "RGBA", "CMYK")[index % 5])
        path = folder / f"class{index % 2}" / f"{index:02d}.{'tif' if image.mode == 'CMYK' else 'png'}"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet18 state dict as torchvision itself makes it, with statistics that are not the initial ones."""
    from torchvision import models

    torch.manual_seed(0)
    net = models.resnet18().train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("checkpoints") / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def in_child() -> Callable[..., None]:
    """Calls a function in a fork; it may raise nothing, and take no more than some seconds of CPU and 500 MB.

    The fastest of three calls counts: a core that is shared takes up to 1.7 times as long.
    """

    def call(act: Callable[[], object], seconds: float = 2.0, megabytes: int = 500) -> None:
        def measured() -> int:
            before = resource.getrusage(resource.RUSAGE_SELF)
            act()
            after = resource.getrusage(resource.RUSAGE_SELF)
            used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
            return (used > seconds) + 2 * (after.ru_maxrss - before.ru_maxrss > megabytes << 10)

        codes = {0: "well", 1: "too slow", 2: "too much memory", 3: "slow and large", 70: "an error"}
        for _ in range(3):
            if (code := code_of(forked(measured))) not in (1, 3):
                break
        assert codes.get(code, f"signal {-code}") == "well"

    return call
