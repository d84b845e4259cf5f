"""What is trained: backbone, projector and an online linear classifier, and how a step's gradients are made."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from collapse import InputError
from collapse.models.backbones import make_backbone
from collapse.models.heads import default_dim, head_tensors, make_head, make_predictor
from collapse.models.meta import on_meta
from collapse.models.resnet import ResNet, zero_last_norms
from collapse.moved import renamed
from collapse.recipes.config import PREDICTED, Config
from collapse.results import to_json
from collapse.results.outputs import atomic_write
from collapse.training.losses import barlow_twins, contrastive_loss, negative_cosine, vicreg

DEFAULT_HEADS = {"directclr": "none", "barlow-twins": "expander", "vicreg": "expander"}  # else mlp


class Network(nn.Module):
    """backbone: images -> r; projector: r -> z; classifier: detached r -> class logits.

    predictor: z -> p, of simsiam and byol.  target: byol's slow copy of backbone and projector, images -> z, else None.
    Each view is a pass of its own, so each has its own batch norm statistics, as in the paper's trainer.  Dropout and
    stochastic depth are off: their draws would depend on where a run was interrupted.  Without classes there is no
    classifier, and no logits.
    Attribute config: with the head, the width of its embedding and of the predictor filled in.

    Raises InputError: no such backbone or head, or a width that the head cannot have.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone = make_backbone(*_shape(config))
            if config.zero_init:
                zero_last_norms(self.backbone)
            for module in self.backbone.modules():
                if isinstance(module, (StochasticDepth, nn.Dropout)):
                    module.p = 0.0
            self.width: int = self.backbone.width  # type: ignore[assignment]
            config = _completed(config, self.width)
            self.projector = make_head(_kind(config), self.width, config.dim, config.depth)
            self.classifier = nn.Linear(self.width, classes) if classes else nn.Identity()
            self.predictor: nn.Module = nn.Identity()
            if config.method in PREDICTED:
                self.predictor = make_predictor(config.dim, config.predictor_dim)
        self.target: nn.Sequential | None = None
        if config.method == "byol":
            self.target = deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)
        self.classes = classes
        self.config = config

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Both views (n, 3, h, w) -> what the loss takes, and the first's class scores (n, classes), detached.

        The loss takes both embeddings (n, m); with a predictor both predictions and both targets, without gradient.
        """
        r = self.backbone(first)
        z, z_prime, logits = self.projector(r), self.projector(self.backbone(second)), self.classifier(r.detach())
        if self.config.method not in PREDICTED:
            return z, z_prime, logits
        targets = (z.detach(), z_prime.detach())
        if self.target is not None:
            with torch.no_grad():
                targets = self.target(first), self.target(second)
        return self.predictor(z), self.predictor(z_prime), *targets, logits

    def loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """The method's loss of what `forward` gives before the class scores, (n, m) each: a scalar.

        Raises InputError: unknown negatives.
        """
        config, (z, z_prime, *targets) = self.config, outputs
        if config.method == "barlow-twins":
            return barlow_twins(z, z_prime, config.redundancy)
        if config.method == "vicreg":
            return vicreg(z, z_prime, config.vicreg_weights)
        if config.method in PREDICTED:
            cosine = negative_cosine(z, z_prime, *targets)
            return 4 + 4 * cosine if config.method == "byol" else cosine
        return contrastive_loss(z, z_prime, config.temperature, config.negatives)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the target, if there is one: it keeps the share `momentum` of its weights and takes the rest."""
        if self.target is not None:
            online: list[Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_([*self.target.parameters()], online, 1 - momentum)


def _default_dim(method: str, head: str, width: int) -> int:
    """Width of the embedding: of a two-layer projector that of r in SimSiam, 256 in BYOL, as in their papers."""
    if head == "mlp" and method in PREDICTED:
        return 256 if method == "byol" else width
    return default_dim(head, width)


def _kind(config: Config) -> str:
    """The head that is made; DirectCLR's takes a part of r."""
    return "lowrank-diagonal" if config.method == "directclr" else config.head


def _shape(config: Config) -> tuple[str, int, tuple[int, ...], tuple[int, ...], int]:
    """What the backbone depends on."""
    return config.arch, config.image_size, config.blocks, config.planes, config.stem


def _completed(config: Config, width: int) -> Config:
    """With the head, the width of its embedding and of the predictor filled in, for r of this width."""
    config = replace(config, head=config.head or DEFAULT_HEADS.get(config.method, "mlp"))
    config = replace(config, dim=config.dim or _default_dim(config.method, _kind(config), width))
    if config.method not in PREDICTED:
        return config
    hidden = 2 * width if config.method == "byol" else max(1, config.dim // 4)
    return replace(config, predictor_dim=config.predictor_dim or hidden)


def resolve(config: Config) -> Config:
    """The configuration with the head and the width of its embedding filled in; raises InputError as Network does."""
    with torch.random.fork_rng(devices=[]):
        width = _width(*_shape(config))
        config = _completed(config, width)
        on_meta(partial(make_head, _kind(config), width, config.dim, config.depth))
    return config


@cache
def _width(*shape: Any) -> int:
    backbone: Any = on_meta(partial(make_backbone, *shape))
    return backbone.width


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Batch norms normalise as in training, and leave their running statistics alone."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())  # copies to write to; the kernels need some
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)


def recompute_blocks(net: nn.Module) -> None:
    """Keep only what enters each residual block; the backward pass computes the rest again, to the same bits.

    Raises InputError: the network has no residual blocks.
    """
    blocks = [module for module in net.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise InputError("checkpoint=True: the network has no residual blocks; use chunks=")
    for block in blocks:
        again = partial(lambda block: (nullcontext(), frozen_statistics(block)), block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=again)


def backward(net: nn.Module, network: Network, views: tuple[Tensor, Tensor], labels: Tensor, device: str) -> Tensor:
    """Add the gradients of a batch to the parameters; returns the method's loss, detached.

    net: `network`, perhaps compiled and wrapped for several processes.  views: two of (n, 3, h, w); labels: (n,).
    The gradient of the online classifier's loss reaches the classifier alone.
    """
    config = network.config
    half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16")
    if config.chunks > 1:
        return _cached(net, network, views, labels, half)
    with half:
        *outputs, logits = net(*views)
    loss = network.loss(outputs)
    (loss + F.cross_entropy(logits.float(), labels) if network.classes else loss).backward()
    return loss.detach()


def _cached(net: nn.Module, network: Network, views: tuple[Tensor, Tensor], labels: Tensor, half: Any) -> Tensor:
    """Gradient caching (arXiv 2101.06983): embeddings without graph, the loss's gradient at them, then chunk by chunk.

    Exact without batch norm.  With it, each chunk is normalised by its own statistics in both passes: other
    mathematics, that of a smaller batch for the norms and the whole batch for the loss.
    """
    config = network.config
    parts = [part.chunk(config.chunks) for part in (*views, labels)]
    with torch.no_grad(), frozen_statistics(network), half:
        embedded = [network(first, second)[:-1] for first, second in zip(*parts[:2], strict=True)]
    outputs = [torch.cat(rows) for rows in zip(*embedded, strict=True)]
    seen = [rows.requires_grad_() for rows in outputs[:2]]
    loss = network.loss(outputs)
    grads = [grad.chunk(config.chunks) for grad in torch.autograd.grad(loss, seen)]
    for k, (first, second, label) in enumerate(zip(*parts, strict=True)):
        waits = isinstance(net, nn.parallel.DistributedDataParallel) and k < config.chunks - 1
        with net.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with half:
                z, z_prime, *_, logits = net(first, second)
            online = [F.cross_entropy(logits.float(), label) / config.chunks] if network.classes else []
            torch.autograd.backward([z, z_prime, *online], [grads[0][k], grads[1][k], *[None for _ in online]])
    return loss.detach()


def memory_estimate(config: Config, images: int) -> float:
    """Bytes, roughly, of the activations that a step keeps for `images` images: what every layer puts out, twice.

    A layer that works in place puts out nothing of its own.  Of a ResNet-50 and 512 images this is 42.8 GiB.  The peak
    of a step on a card was 42.9, and compiled 42.0 (benchmarks/results/gpu.json).

    Raises InputError: the network does not take images of this size, or does not make one vector of each.
    """
    entries = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal entries
        if not list(module.children()) and isinstance(output, Tensor) and not getattr(module, "inplace", False):
            entries += output.numel()

    with torch.device("meta"), torch.no_grad():
        network = Network(config, 1).eval()
        for module in network.backbone.modules():
            module.register_forward_hook(count)
        try:
            made = network.backbone(torch.zeros(1, 3, config.image_size, config.image_size))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0][:120]
            raise InputError(f"arch {config.arch}: takes no images of {config.image_size} px ({reason})") from error
    if not isinstance(made, Tensor) or made.shape != (1, network.width):
        raise InputError(f"arch {config.arch}: gives no vector of {network.width} entries an image; take another")
    return 2.0 * entries * images / config.chunks * (2 if config.precision == "bf16" else 4)


def _encoder_tensors(network: Network) -> dict[str, Tensor]:
    head = {f"projector.{name}": value for name, value in head_tensors(network.projector).items()}
    return {name: t.detach().cpu().contiguous() for name, t in {**network.backbone.state_dict(), **head}.items()}


def holds(path: Path, network: Network | None) -> bool:
    """Whether an encoder's file can be read and has the network's weights, to the bit; with None, any weights."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
    wanted = stored if network is None else _encoder_tensors(network)
    return stored.keys() == wanted.keys() and all(torch.equal(t, stored[name]) for name, t in wanted.items())


def save_encoder(path: Path, network: Network) -> None:
    """The backbone under its library's names, the head under projector., and in the header what a reader must know.

    Raises InputError: the file cannot be written.
    """
    config, preprocess, tensors = network.config, network.config.preprocessing(), _encoder_tensors(network)
    known = asdict(network.backbone.shape) if isinstance(network.backbone, ResNet) else None
    architecture = known or {"arch": config.arch, "image_size": config.image_size, "planes": config.planes}
    facts = {"architecture": architecture, "preprocessing": preprocess.as_dict(), "training": config.as_dict()}
    with atomic_write(path) as partial:
        # One entry: safetensors writes several in random order, and equal runs shall give equal bytes.
        partial.write_bytes(save(tensors, {"collapse": to_json(facts)}))  # save_file's is closed to other users


def finite(losses: list[float]) -> int | None:
    """Position of the first loss that is not finite, or None."""
    return next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)


__getattr__ = renamed(__name__)
