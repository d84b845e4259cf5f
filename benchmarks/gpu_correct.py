"""CPU against a device: what gpu.py checks before it measures anything."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import collapse
from collapse.data.labelled import of_arrays
from collapse.models.backbones import make_backbone
from collapse.models.heads import HEADS
from collapse.monitor import Monitor
from collapse.recipes.config import Config, make_config
from collapse.recipes.views import Augmentation, to_device, uniforms
from collapse.spectra.covariance import Covariance
from collapse.training import parallel, relaxation
from collapse.training.loader import BatchOrder, batches
from collapse.training.loop import ahead
from collapse.training.network import Network, backward
from collapse.training.optim import make_optimizer, parameter_groups
from collapse.training.state import Options, Training
from collapse.training.train import train

TINY: dict[str, Any] = {"blocks": (1, 1), "planes": (8, 16)}


def correct(options: argparse.Namespace, say: Callable[[str, Any], None]) -> None:
    """Each check says its error, its bound and whether it holds; one that raises says so and costs no other."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    checks: dict[str, tuple[Callable[[argparse.Namespace], float], float]] = {
        "views": (views_error, 2e-5),
        "views_compiled": (partial(views_error, compiled=True), 2e-5),
        **{f"head_{head}": (partial(gradient_error, head=head), 1e-4) for head in (*HEADS, "directclr")},
        **{f"optimizer_{name}": (partial(optimizer_error, name=name), 1e-6) for name in ("lars", "sgd")},
        **{f"spectrum_{how}": (partial(spectrum_error, method=how), 1e-6) for how in ("covariance", "qr")},
        "monitor": (monitor_error, 1e-6),
        "collectives": (collectives_error, 1e-10),
        "step_that_waits": (step_waits, 0.0),
        "network_spectrum": (network_error, 1e-4),
        "network_diagnosis": (diagnosis_error, 1e-3),
        "relaxation_prediction": (relaxation_error, 1e-5),
        "resumed_bytes_that_differ": (resume_error, 0.0),
        "compiled": (compile_error, 1e-5),
    }
    failed = []
    for name, (check, bound) in checks.items():
        try:
            error = check(options)
            found: dict[str, Any] = {"error": error, "bound": bound, "holds": error <= bound}
        except Exception as problem:  # whatever a card does, the other checks are made
            found = {"problem": f"{type(problem).__name__}: {problem}"[:300], "bound": bound, "holds": False}
        failed += [] if found["holds"] else [name]
        say(name, found)
    if failed:
        raise SystemExit(f"does not hold: {', '.join(failed)}")


def pixels_of(n: int, size: int, seed: int) -> Tensor:
    """(n, 3, size, size) uint8, smooth."""
    coarse = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (fine * 255).clamp(0, 255).to(torch.uint8)


def views_error(options: argparse.Namespace, compiled: bool = False) -> float:
    """Largest difference of augmented views; compiled as the trainer compiles those of a set in memory."""
    images, worst = pixels_of(8 if options.tiny else 64, 40, options.seed), 0.0
    augmentation = Augmentation(32, blur=0.5, solarize=0.3, degrees=10)
    made: Callable[..., Tensor] = augmentation.whole
    if compiled:
        made = torch.compile(made, dynamic=False, backend=_backend(options))
    for epoch in range(3):
        u = uniforms(options.seed, epoch, np.arange(len(images)), 0, augmentation.DRAWS)
        given = (images, augmentation.places(u, images.shape[-2:]), u)
        ours = made(*(to_device(x, options.device) for x in given))
        worst = max(worst, float((ours.cpu() - augmentation(images, u)).abs().max()))
    return worst


def _backend(options: argparse.Namespace) -> str:
    return "aot_eager" if options.tiny else "inductor"  # which takes half a minute of C++ on a CPU


def _step(config: Config, device: str, backend: str | None = None) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) of one step on fixed views, on the CPU."""
    net = Network(config, 10).to(device).train()
    if backend is not None:
        net.backbone.compile(backend=backend)
    views = torch.randn(2, 64, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    loss = backward(net, net, (views[0], views[1]), torch.arange(64, device=device) % 10, device)
    return loss.cpu(), [p.grad.cpu() for p in net.parameters() if p.grad is not None]


def _distance(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> float:
    """Relative error of the loss, or of all gradients as one vector."""
    mine, theirs = (torch.cat([g.flatten() for g in grads]).double() for grads in (one[1], other[1]))
    return max(float((one[0] / other[0] - 1).abs()), float((mine - theirs).norm() / theirs.norm()))


def _small(**more: Any) -> Config:
    return make_config("cifar10", **TINY, batch_size=64, precision="float32", **more)


def gradient_error(options: argparse.Namespace, head: str) -> float:
    """Of loss and gradients, relative."""
    config = _small(method="directclr", dim=4) if head == "directclr" else _small(head=head)
    return _distance(_step(config, options.device), _step(config, "cpu"))


def optimizer_error(options: argparse.Namespace, name: str) -> float:
    """Of the weights after five steps of given gradients, relative."""
    made = []
    for device in (options.device, "cpu"):
        net = make_backbone("resnet18", 32, **TINY, stem=3)
        generator = torch.Generator().manual_seed(options.seed)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        net = net.to(device)
        optimizer = make_optimizer(name, parameter_groups(net, 1e-4), 0.9, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for _ in range(5):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        made.append(torch.cat([p.detach().cpu().double().flatten() for p in net.parameters()]))
    return float((made[0] - made[1]).norm() / made[1].norm())


def spectrum_error(options: argparse.Namespace, method: str) -> float:
    """Of the singular values above 1e-12 of the largest, relative; by "covariance" of those above 1e-7."""
    d = 32 if options.tiny else 256
    generator = torch.Generator().manual_seed(options.seed)
    z = torch.randn(20 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -5, d).double()
    there, here = (Covariance(d, method, False, where).update(z).spectrum() for where in (options.device, None))
    large = here.singular_values > (1e-12 if method == "qr" else 1e-7) * here.singular_values[0]
    return float(np.abs(there.singular_values[large] / here.singular_values[large] - 1).max())


def monitor_error(options: argparse.Namespace) -> float:
    """As `spectrum_error`, of a monitor's reports; what it adds to a step must not wait for the device."""
    d = 32 if options.tiny else 256
    generator = torch.Generator().manual_seed(options.seed)
    batches = [torch.randn(128, d, generator=generator) * torch.logspace(0, -2, d) for _ in range(40)]
    spectra = []
    for device in (options.device, "cpu"):
        layer, there = torch.nn.Identity(), [batch.to(device) for batch in batches]
        monitor = Monitor(layer, every=20)
        for batch in there:
            with unwaited(device):
                layer(batch)
            monitor.step()
        spectra.append(monitor.spectra)
    large = spectra[1] > 1e-7 * spectra[1].max()
    return float(np.abs(spectra[0][large] / spectra[1][large] - 1).max())


def step_waits(options: argparse.Namespace) -> float:
    """Of views and steps after the first ones, those that wait for the device, which is an error: none."""
    data = of_arrays(pixels_of(256, 32, options.seed), np.arange(256) % 10)
    config = _small(optimizer="lars", lr=0.1, blur=(1.0, 0.1), solarize=(0.0, 0.2))
    training = Training(config, 10, BatchOrder(256, 64, 9, 0), Options(device=options.device))
    order, labels = training.plan, torch.from_numpy(data.labels)
    views = iter(
        ahead(batches(data, order, training.augmentations, 0, 0, options.device), training.views, options.device)
    )
    for step in range(12):
        with unwaited(options.device if step > 3 else "cpu"):
            batch, pair = next(views)
            training.run_step(pair, to_device(labels[torch.from_numpy(batch.images)], options.device))
    training.read()
    return float(not np.isfinite(training.window).all())


def network_error(options: argparse.Namespace) -> float:
    """Of a network's singular values above 1e-3 of the largest, relative, by `collapse.spectrum` over images."""
    images = pixels_of(128, 40, options.seed)
    there, here = (
        collapse.spectrum(_given(), images, device=device).singular_values for device in (options.device, "cpu")
    )
    large = here > 1e-3 * here[0]
    return float(np.abs(there[large] / here[large] - 1).max())


def diagnosis_error(options: argparse.Namespace) -> float:
    """Largest difference of the signal fractions of the five largest modes, of `collapse.diagnose` over views."""
    images, found = pixels_of(128, 40, options.seed), []
    for device in (options.device, "cpu"):
        last = collapse.diagnose(_given(), images, views=2, device=device).blocks[-1]
        found.append(last.signal_fraction[:5])
    return float(np.abs(found[0] - found[1]).max())


def _given() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_backbone("resnet18", 32, **TINY, stem=3)


def relaxation_error(options: argparse.Namespace) -> float:
    """Of the spectra of a last map and its head before any step, relative; and it takes a few, without a NaN."""
    rng = np.random.default_rng(options.seed)
    rows = rng.standard_normal((500, 1, 24)) + rng.standard_normal((500, 4, 24))
    worst = 0.0
    for head in relaxation.HEADS:
        there, here = (
            relaxation.Relaxation.of(relaxation.Views(rows, device), head, 0.2) for device in (options.device, "cpu")
        )
        states = there.state(), here.state()
        assert there.predicted()[1] == here.predicted()[1]
        for of in ("r", "z"):
            one, other = (getattr(state, of) for state in states)
            large = other.singular_values > 1e-3 * other.singular_values[0]
            values = (s.singular_values[large] for s in (one, other))
            worst = max(worst, float(np.abs(np.divide(*values) - 1).max()))
        before = float(there.W.sum())
        for _ in range(3):
            there.step()
        assert np.isfinite(float(there.W.sum()))
        assert float(there.W.sum()) != before
    return worst


def collectives_error(options: argparse.Namespace) -> float:
    """Of a spectrum's sums, rows and gradients that went through a process group of one, NCCL's on CUDA; relative."""
    from torch import distributed

    d, backend = 64, "cpu:gloo,cuda:nccl" if options.device.startswith("cuda") else "gloo"
    z = torch.randn(1000, d, generator=torch.Generator().manual_seed(options.seed)) * torch.logspace(0, -2, d)
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        there = Covariance(d, "covariance", False, options.device).update(z).all_reduce().spectrum().singular_values
        rows = z.to(options.device).requires_grad_()
        gathered = parallel._Gather.apply(rows)
        (asked,) = torch.autograd.grad(gathered.sum(), rows)
    finally:
        distributed.destroy_process_group()
    here = Covariance(d, "covariance", False, None).update(z).spectrum().singular_values
    moved = (gathered.detach().cpu() - z).abs().max(), (asked - 1).abs().max()
    return max(float(np.abs(there / here - 1).max()), *map(float, moved))


@contextmanager
def unwaited(device: str) -> Iterator[None]:
    """Within it, whatever waits for a CUDA device is an error."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def resume_error(options: argparse.Namespace) -> float:
    """Bytes of the encoder in which a run that was left and went on differs from an unbroken one."""
    torch.use_deterministic_algorithms(True)
    data = of_arrays(pixels_of(256, 32, options.seed), np.arange(256) % 10)
    how, made = Options(device=options.device, save_every=2, log_every=1), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, lives in (("unbroken", [99]), ("broken", [3, 99])):
                for lines in lives:
                    running = train(Path(folder) / name, _small(epochs=2), data, options=how)
                    for _ in islice(running, lines):
                        pass
                    running.close()  # type: ignore[attr-defined]
                made.append((Path(folder) / name / "encoder.safetensors").read_bytes())
    finally:
        torch.use_deterministic_algorithms(False)
    return float(sum(a != b for a, b in zip(*made, strict=True)))


def compile_error(options: argparse.Namespace) -> float:
    """Of loss and gradients of a compiled network against the same one, relative."""
    return _distance(_step(_small(), options.device, _backend(options)), _step(_small(), options.device))
