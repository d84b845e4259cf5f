"""The work of peers.py: name -> what makes a call of it, whose imports and inputs are not measured."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

import collapse

Call = Callable[[], Any]
OURS = "collapse"
# What is in a ratio besides speed.
NOTES = {
    "collapse, float32": "right down to its floor, 1e-7 to 1e-6 of the largest",
    "torch.cov, float32": "keeps all rows; float32: singular values of C are right down to 1e-7 of the largest",
    "PCA, covariance_eigh": "keeps all rows; float32, uncompensated, with the directions: right down to 1e-7",
    "the official script": "numpy.cov and svd; keeps all rows in float64",
    "numpy.cov, eigvalsh": "keeps all rows in float64",
    "torch.pca_lowrank": "the 64 largest values alone: it cannot see a collapse",
    "IncrementalPCA": "streams, as collapse does",
    "lightly, NTXentLoss": "2 N - 2 negatives, as negatives=all; the paper's loss has N - 1",
    "reptrix": "RankMe and alpha alone, of rows that are kept; collapse gives 20 measures and their floor",
    "KNeighborsClassifier": "brute force, cosine",
    "torchvision": "its architecture has to be known, and torch.load",
    "timm, create_model": "its architecture has to be known, and torch.load",
    "AutoModel.from_pretrained": "no check of what is not used, no preprocessing",
    "lightly-train, embed": "of its own trainer's checkpoints, which it unpickles",
}
# (work, width) -> peers that are not measured there, and why; benchmarks/spectrum.py has IncrementalPCA at 2,048.
LEFT_OUT = {
    ("spectrum", 2048): {"IncrementalPCA": "nine times as long at 512 columns, and more with more"},
    ("spectrum", 8192): {
        "the official script": "an SVD of 8,192 x 8,192: some ten minutes",
        "IncrementalPCA": "nine times as long at 512 columns, and more with more",
        "collapse, qr": "4,096 rows are fewer than columns: a triangle of all of them, some ten minutes",
    },
}


def spectrum(rng: np.random.Generator, d: int, n: int) -> dict[str, Callable[[], Call]]:
    """Singular values of the covariance of float32 rows (n, d), not normalised."""
    z = rng.standard_normal((n, d), dtype=np.float32)

    def ours(method: str) -> Call:
        return lambda: collapse.spectrum(z, normalize=False, method=method, device="cpu")

    def sklearn(kind: str, **options: Any) -> Call:
        from sklearn import decomposition

        return lambda: getattr(decomposition, kind)(**options).fit(z)

    return {
        OURS: lambda: ours("covariance"),
        "collapse, float32": lambda: ours("float32"),
        "collapse, qr": lambda: ours("qr"),
        "numpy.cov, eigvalsh": lambda: lambda: np.linalg.eigvalsh(np.cov(z.T)),
        "the official script": lambda: lambda: np.linalg.svd(np.cov(z.T), compute_uv=False),
        "torch.cov, float32": lambda: lambda: torch.linalg.eigvalsh(torch.cov(torch.from_numpy(z).T)),
        "torch.pca_lowrank": lambda: lambda: torch.pca_lowrank(torch.from_numpy(z), q=64),
        "PCA, covariance_eigh": lambda: sklearn("PCA", svd_solver="covariance_eigh"),
        "IncrementalPCA": lambda: sklearn("IncrementalPCA"),
    }


def ranks(rng: np.random.Generator, d: int, n: int) -> dict[str, Callable[[], Call]]:
    """Rank measures of float32 rows (n, d)."""
    z = torch.from_numpy(rng.standard_normal((n, d), dtype=np.float32))

    def reptrix() -> Call:
        from reptrix import alpha, rankme

        return lambda: (rankme.get_rankme(z), alpha.get_alpha(z))

    def by_svd() -> float:
        p = torch.linalg.svdvals(z)
        p = p / p.sum() + 1e-7
        return float(torch.exp(-(p * p.log()).sum()))

    return {
        OURS: lambda: lambda: collapse.spectrum(z, normalize=False, device="cpu").metrics(),
        "reptrix": reptrix,
        "RankMe by svdvals": lambda: by_svd,
    }


def loss(rng: np.random.Generator, m: int, n: int) -> dict[str, Callable[[], Call]]:
    """The contrastive loss of n pairs of m dimensions, forward and backward."""
    from collapse.training.losses import infonce

    views = [torch.from_numpy(rng.standard_normal((n, m), dtype=np.float32)).requires_grad_() for _ in range(2)]

    def lightly() -> Call:
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(temperature=0.1)
        return lambda: criterion(*views).backward()

    return {
        OURS: lambda: lambda: infonce(*views, 0.1, "all").backward(),
        "collapse, N - 1 negatives": lambda: lambda: infonce(*views, 0.1).backward(),
        "lightly, NTXentLoss": lightly,
    }


def optimiser(rng: np.random.Generator, width: int, n: int) -> dict[str, Callable[[], Call]]:
    """A step of LARS on n matrices (width, width)."""
    from collapse.training.optim import LARS

    def step(kind: Any, **options: Any) -> Call:
        held = [torch.nn.Parameter(torch.randn(width, width)) for _ in range(n)]
        for p in held:
            p.grad = torch.randn_like(p)
        return kind(held, lr=0.1, momentum=0.9, weight_decay=1e-4, **options).step

    def timm() -> Call:
        from timm.optim import Lars

        return step(Lars, trust_coeff=1e-3)

    def lightly() -> Call:
        from lightly.utils.lars import LARS as Theirs

        return step(Theirs)

    return {OURS: lambda: step(LARS), "timm, Lars": timm, "lightly, LARS": lightly}


def simclr(rng: np.random.Generator, size: int, n: int) -> dict[str, Callable[[], Call]]:
    """A step of SimCLR: ResNet-18 and a projector on two views of n images, loss, gradients, LARS."""
    from torchvision.models import resnet18

    from collapse.training.losses import infonce
    from collapse.training.optim import LARS

    views = [torch.from_numpy(rng.standard_normal((n, 3, size, size), dtype=np.float32)) for _ in range(2)]

    def training(criterion: Callable[..., torch.Tensor], kind: Any) -> Call:
        net = resnet18(num_classes=128)
        steps = kind(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

        def step() -> None:
            steps.zero_grad()
            criterion(*(net(view) for view in views)).backward()
            steps.step()

        return step

    def lightly() -> Call:
        from lightly.loss import NTXentLoss
        from lightly.utils.lars import LARS as Theirs

        return training(NTXentLoss(temperature=0.1), Theirs)

    return {OURS: lambda: training(lambda a, b: infonce(a, b, 0.1, "all"), LARS), "lightly": lightly}


def neighbours(rng: np.random.Generator, d: int, n: int) -> dict[str, Callable[[], Call]]:
    """The weighted vote of the 20 nearest of n rows of d dimensions, for a fifth as many."""
    from collapse.encoders.accuracy import knn

    keys, queries = (torch.from_numpy(rng.standard_normal((k, d), dtype=np.float32)) for k in (n, n // 5))
    classes, wanted = (torch.from_numpy(rng.integers(0, 10, k)) for k in (n, n // 5))

    def lightly() -> Call:
        from lightly.utils.benchmarking import knn_predict

        unit = torch.nn.functional.normalize
        return lambda: knn_predict(unit(queries), unit(keys).T, classes, 10, 20, 0.07)

    def sklearn() -> Call:
        from sklearn.neighbors import KNeighborsClassifier

        vote = KNeighborsClassifier(20, algorithm="brute", metric="cosine").fit(keys, classes)
        return lambda: vote.predict(queries)

    return {OURS: lambda: lambda: knn(keys, classes, queries, wanted), "lightly, knn_predict": lightly,
            "KNeighborsClassifier": sklearn}  # fmt: skip


def extraction(rng: np.random.Generator, size: int, n: int) -> dict[str, Callable[[], Call]]:
    """Embeddings of n images in memory by timm's ResNet-18."""
    import timm

    net = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.from_numpy(rng.random((n, 3, size, size), dtype=np.float32))

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        return torch.cat([net(batch) for batch in images.split(64)])

    return {OURS: lambda: lambda: collapse.embed(net, images, device="cpu"), "a loop over timm": lambda: plain}


def files(rng: np.random.Generator, size: int, n: int) -> dict[str, Callable[[], Call]]:
    """Embeddings of n JPEGs in a folder, by a ResNet-18 in a file, decoded in the same process."""
    from PIL import Image
    from torchvision.models import resnet18

    def write(folder: Path) -> None:
        folder.mkdir()
        for k in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=90)

    images = kept("images", write)
    net = resnet18()
    net(torch.rand(4, 3, 64, 64))  # else it looks untrained, and that is said
    path = kept("resnet18.pth", lambda path: torch.save(net.state_dict(), path))

    def lightly() -> Call:
        os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
        import lightly_train

        common: dict[str, Any] = {"data": images, "accelerator": "cpu", "num_workers": 0}
        with silent():
            lightly_train.pretrain(
                out=images.parent / "run", model="torchvision/resnet18", method="simclr", epochs=1, batch_size=n // 2,
                devices=1, **common
            )  # fmt: skip
        made = {"checkpoint": images.parent / "run/checkpoints/last.ckpt", "image_size": (size, size)}

        def embed() -> None:
            with silent():
                lightly_train.embed(out=images.parent / "rows.pt", batch_size=64, overwrite=True, **made, **common)

        return embed

    how: dict[str, Any] = {"device": "cpu", "resize": size, "crop": size, "batch_size": 64, "workers": 0}
    return {OURS: lambda: lambda: collapse.embed(path, images, **how), "lightly-train, embed": lightly}


@contextmanager
def silent() -> Iterator[None]:
    """What is said within is not said."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def loading_resnet(rng: np.random.Generator, depth: int, n: int) -> dict[str, Callable[[], Call]]:
    """A network of ImageNet in a file of torch, as a module with its weights."""
    import timm
    from torchvision import models

    name = f"resnet{depth}"
    path = kept(f"{name}.pth", lambda path: torch.save(getattr(models, name)().state_dict(), path))
    return {
        OURS: lambda: lambda: collapse.load(path),
        "torchvision": lambda: lambda: filled(getattr(models, name)(), path),
        "timm, create_model": lambda: lambda: filled(timm.create_model(name), path),
    }


def loading_vit(rng: np.random.Generator, size: int, n: int) -> dict[str, Callable[[], Call]]:
    """The same of a small vision transformer."""
    import timm

    name = f"vit_small_patch16_{size}"
    path = kept(f"{name}.pth", lambda path: torch.save(timm.create_model(name).state_dict(), path))
    return {
        OURS: lambda: lambda: collapse.load(path),
        "timm, create_model": lambda: lambda: filled(timm.create_model(name), path),
    }


def loading_transformers(rng: np.random.Generator, width: int, n: int) -> dict[str, Callable[[], Call]]:
    """A DINOv2 of so many dimensions in a folder of transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.Dinov2Config(hidden_size=width, num_attention_heads=width // 64)
    path = kept(f"dinov2-{width}", lambda path: transformers.Dinov2Model(config).save_pretrained(path))
    return {
        OURS: lambda: lambda: collapse.load(path),
        "AutoModel.from_pretrained": lambda: lambda: transformers.AutoModel.from_pretrained(path),
    }


def filled(net: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The network with the weights of a file."""
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def kept(name: str, write: Callable[[Path], Any]) -> Path:
    """A file or folder that `write` makes, until the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write(folder / name)
    return folder / name


Work = Callable[[np.random.Generator, int, int], dict[str, Callable[[], Call]]]
# (work, width, count, rounds)
WORK: tuple[tuple[Work, int, int, int], ...] = (
    (optimiser, 512, 20, 5),
    (loss, 128, 1024, 3),
    (neighbours, 128, 5_000, 3),
    (spectrum, 128, 20_000, 5),
    (loading_resnet, 50, 1, 3),
    (loading_vit, 224, 1, 3),
    (loading_transformers, 384, 1, 3),
    (simclr, 32, 32, 3),
    (extraction, 96, 32, 3),
    (files, 96, 64, 3),
    (ranks, 512, 3_000, 3),
    (spectrum, 512, 10_000, 3),
    (spectrum, 2048, 6_000, 2),
    (spectrum, 8192, 4_096, 1),
)
NAMED = {work.__name__: work for work, *_ in WORK}
