"""The same work by this package and by what one would take instead, interleaved in one process.

    make peers                                            # installs the peers beside the package, two minutes
    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --only spectrum ranks      # some of the work
    python benchmarks/peers.py --wide                     # 8,192 columns too, ten minutes

Seconds are processor time of one thread, so that other programs on the machine count little.  What is compared is the
median of the ratios, round by round.  A peer that is not installed is named with the reason.  The same work is not
always the same result: `NOTES` says what a peer leaves out.
"""

import argparse
import os
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import collapse
from collapse.results import provenance, save_text, to_json

Call = Callable[[], Any]
PEERS = ("lightly", "reptrix", "scikit-learn", "timm")
OURS = "collapse"
# What is in a ratio besides speed.
NOTES = {
    "torch.cov, float32": "keeps all rows; float32: singular values of C are right down to 1e-7 of the largest",
    "PCA, covariance_eigh": "keeps all rows; float32, uncompensated: right down to 1e-7 of the largest",
    "numpy.cov, svd": "the official script's way; keeps all rows in float64",
    "numpy.cov, eigvalsh": "keeps all rows in float64",
    "torch.pca_lowrank": "the 64 largest values alone: it cannot see a collapse",
    "IncrementalPCA": "streams, as collapse does; at 128 columns alone, it takes minutes at 2,048",
    "lightly, NTXentLoss": "2 N - 2 negatives, as negatives=all; the paper's loss has N - 1",
    "reptrix": "RankMe and alpha alone, of rows that are kept; collapse gives 20 measures and their floor",
    "KNeighborsClassifier": "brute force, cosine",
}


def spectrum(rng: np.random.Generator, d: int, n: int) -> dict[str, Callable[[], Call]]:
    """Singular values of the covariance of float32 rows (n, d), not normalised."""
    z = rng.standard_normal((n, d), dtype=np.float32)

    def sklearn(kind: str, **options: Any) -> Call:
        from sklearn import decomposition

        return lambda: getattr(decomposition, kind)(**options).fit(z)

    return {
        OURS: lambda: lambda: collapse.spectrum(z, normalize=False, device="cpu"),
        "collapse, qr": lambda: lambda: collapse.spectrum(z, normalize=False, method="qr", device="cpu"),
        "numpy.cov, eigvalsh": lambda: lambda: np.linalg.eigvalsh(np.cov(z.T)),
        "numpy.cov, svd": lambda: lambda: np.linalg.svd(np.cov(z.T), compute_uv=False),
        "torch.cov, float32": lambda: lambda: torch.linalg.eigvalsh(torch.cov(torch.from_numpy(z).T)),
        "torch.pca_lowrank": lambda: lambda: torch.pca_lowrank(torch.from_numpy(z), q=64),
        "PCA, covariance_eigh": lambda: sklearn("PCA", svd_solver="covariance_eigh"),
        **({"IncrementalPCA": lambda: sklearn("IncrementalPCA")} if d <= 128 else {}),
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


Work = Callable[[np.random.Generator, int, int], dict[str, Callable[[], Call]]]
# (work, width, count, rounds)
WORK: tuple[tuple[Work, int, int, int], ...] = (
    (optimiser, 512, 20, 5),
    (loss, 128, 1024, 3),
    (neighbours, 128, 5_000, 3),
    (spectrum, 128, 20_000, 3),
    (simclr, 32, 32, 3),
    (extraction, 96, 32, 3),
    (ranks, 512, 3_000, 3),
    (spectrum, 512, 10_000, 3),
    (spectrum, 2048, 6_000, 1),
)
WIDE: tuple[tuple[Work, int, int, int], ...] = ((spectrum, 8192, 4_096, 1),)


def measure(work: Work, width: int, count: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of each, (rounds,), and the median of each peer's over this package's; who is absent, and why."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, make in work(np.random.default_rng(seed), width, count).items():
        try:
            calls[name] = make()
        except ImportError as error:
            absent[name] = f"not installed: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1 if rounds > 1 else 0, rounds):
        for name in list(calls)[:: 1 if round_ % 2 else -1]:
            start = time.process_time()
            calls[name]()
            if round_ >= 0:
                seconds[name].append(time.process_time() - start)
    ratios = {name: float(np.median(np.divide(taken, seconds[OURS]))) for name, taken in seconds.items()}
    notes = {name: NOTES[name] for name in calls if name in NOTES}
    return {"work": work.__name__, "width": width, "count": count, "seconds": seconds, "ratios": ratios,
            "absent": absent, "notes": notes}  # fmt: skip


def installed() -> dict[str, str]:
    """Versions of the peers that are there."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({work.__name__ for work, *_ in WORK})
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORK", help=", ".join(names))
    parser.add_argument("--wide", action="store_true", help="8,192 columns too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    result = {"schema": 1, **provenance(), "peers": installed(), "date": str(date.today()), "load": os.getloadavg(),
              "seed": options.seed, "clock": "processor time, one thread", "cases": []}  # fmt: skip
    for work, width, count, rounds in (*WORK, *(WIDE if options.wide else ())):
        if work.__name__ not in options.only:
            continue
        case = measure(work, width, count, rounds, options.seed)
        result["cases"].append(case)
        print(to_json({name: case[name] for name in ("work", "width", "count", "ratios", "absent")}), flush=True)
        if options.out:
            save_text(options.out, to_json(result))


if __name__ == "__main__":
    main()
