"""Contrastive training: SimCLR with any head, and DirectCLR (arXiv 2110.09348, sections 3 and 6).

A RUN is a folder: config.json, metrics.jsonl (one line an epoch), resume.pt while it goes on, and encoder.safetensors
at its end.  Calling `train` again with the same RUN goes on from the last save and gives the same bytes on a CPU.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from collapse import InputError
from collapse.images import Preprocessing
from collapse.models import ResNet, ResNetShape, Subvector, make_head
from collapse.results import save_text, to_json, versions, whole
from collapse.views import Augmentation, uniforms


@dataclass(frozen=True)
class Config:
    """All that decides a run's result.

    method: simclr (the loss sees head(r)) or directclr (it sees the first `dim` entries of r).
    head: of simclr, see models.make_head; dim: width of the embedding.
    batch_size: images a step; lr: peak, for SGD with momentum 0.9, after `warmup` epochs, then a cosine to zero.
    """

    method: str = "simclr"
    head: str = "mlp"
    dim: int = 128
    seed: int = 0
    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.3
    warmup: float = 10
    weight_decay: float = 1e-4
    temperature: float = 0.1
    shape: ResNetShape = field(default_factory=lambda: ResNetShape((1, 1, 1), (32, 64, 128), stem=3, stem_planes=32))
    augmentation: Augmentation = field(default_factory=Augmentation)


def infonce(z: Tensor, z_prime: Tensor, temperature: float) -> Tensor:
    """Cosine InfoNCE of two views (n, m), negatives from the other view only, both directions averaged: a scalar.

    The loss of the paper's trainer; the mean over anchors of -ln softmax_j(cos(z_i, z'_j) / temperature)[i].
    """
    z, z_prime = F.normalize(z.float()), F.normalize(z_prime.float())
    logits = z @ z_prime.T / temperature
    positives = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to zero at `steps`: a function of the step alone."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


class Network(nn.Module):
    """backbone: images -> r; projector: r -> z."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbone = ResNet(config.shape)
            if config.method == "directclr":
                self.projector: nn.Module = self._subvector(config)
            else:
                self.projector = make_head(config.head, self.backbone.width, config.dim)

    def _subvector(self, config: Config) -> nn.Module:
        if config.head != "none":
            raise InputError(f"directclr has no projector: --head none, not {config.head}")
        if not 1 <= config.dim <= self.backbone.width:
            raise InputError(
                f"directclr: d0 = {config.dim}, expected 1..{self.backbone.width}, the representation's width"
            )
        return Subvector(config.dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class Training:
    """A network, its optimizer and the next epoch: everything that a save holds."""

    def __init__(self, config: Config) -> None:
        self.config, self.epoch, self.log_bytes = config, 0, 0
        self.network = Network(config)
        # Vectors (biases, batch norm) are not decayed, as in the paper's recipe.
        groups = [[p for p in self.network.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
        self.optimizer = torch.optim.SGD(
            [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
            lr=config.lr,
            momentum=0.9,
        )

    def state(self) -> dict[str, Any]:
        parts = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "epoch": self.epoch, "log_bytes": self.log_bytes}

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.log_bytes = state["epoch"], state["log_bytes"]

    def run_epoch(self, images: Tensor, preprocess: Preprocessing) -> float:
        """One pass over `images`, (n, 3, h, w) uint8, the last incomplete batch left out; returns the mean loss."""
        config, total = self.config, 0.0
        order = np.random.default_rng([config.seed, self.epoch]).permutation(len(images))
        per_epoch = len(images) // config.batch_size
        self.network.train()
        for step in range(per_epoch):
            rate = learning_rate(
                self.epoch * per_epoch + step, config.epochs * per_epoch, config.warmup * per_epoch, config.lr
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = order[step * config.batch_size : (step + 1) * config.batch_size]
            # One pass a view: each view has its own batch norm statistics, as in the paper's trainer.
            z, z_prime = (self.network(view) for view in self._views(images, batch, preprocess))
            loss = infonce(z, z_prime, config.temperature)
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"epoch {self.epoch}, step {step}: the loss is {loss.item()}; lower lr (now {rate:.3g})"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        self.epoch += 1
        return total / per_epoch

    def _views(self, images: Tensor, batch: np.ndarray, preprocess: Preprocessing) -> Iterator[Tensor]:
        pixels = images[torch.from_numpy(batch)].float() / 255
        augment = self.config.augmentation
        for view in range(2):
            draws = uniforms(self.config.seed, self.epoch, batch, view, augment.DRAWS)
            yield preprocess.normalize(255 * augment(pixels, draws))


def train(run: Path, config: Config, images: Tensor, preprocess: Preprocessing, save_every: int = 10) -> Iterator[int]:
    """Train, or go on training, in the folder `run`; yields the number of epochs done after each.

    images: (n, 3, h, w) uint8. save_every: epochs between saves. A finished run yields nothing.

    Raises InputError: a run of another configuration in `run`, fewer images than a batch, a loss that is not finite.
    """
    if len(images) < config.batch_size:
        raise InputError(f"{len(images)} images, but a batch of {config.batch_size}; lower the batch size")
    _same_config(run, config)
    if (run / "encoder.safetensors").exists():
        return
    training = Training(config)
    if (run / "resume.pt").exists():
        training.restore(run / "resume.pt")
    log = run / "metrics.jsonl"
    with open(log, "ab") as file:
        file.truncate(training.log_bytes)
    while training.epoch < config.epochs:
        loss = training.run_epoch(images, preprocess)
        line = json.dumps({"epoch": training.epoch, "loss": loss, "lr": training.optimizer.param_groups[0]["lr"]})
        with open(log, "ab") as file:
            file.write(line.encode() + b"\n")
            training.log_bytes = file.tell()
        if training.epoch % save_every == 0 and training.epoch < config.epochs:
            with whole(run / "resume.pt") as partial:
                torch.save(training.state(), partial)
        yield training.epoch
    _save_encoder(run / "encoder.safetensors", training.network, config, preprocess)
    (run / "resume.pt").unlink(missing_ok=True)


def _same_config(run: Path, config: Config) -> None:
    path, wanted = run / "config.json", json.loads(to_json(asdict(config)))
    if not path.exists():
        save_text(path, to_json({"schema": "collapse.run/1", "config": wanted, "versions": versions("numpy", "torch")}))
        return
    stored = json.loads(path.read_text())["config"]
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise InputError(f"{run}: holds a run with {key} = {stored.get(key)}, not {wanted[key]}; choose another folder")


def _save_encoder(path: Path, network: Network, config: Config, preprocess: Preprocessing) -> None:
    """The backbone under torchvision's names, the head under projector., and in the header what a reader must know."""
    tensors = {key.removeprefix("backbone."): value.contiguous() for key, value in network.state_dict().items()}
    facts = {"architecture": asdict(config.shape), "preprocessing": preprocess.as_dict(), "training": asdict(config)}
    with whole(path) as partial:
        # One entry: safetensors writes several in random order, and equal runs shall give equal bytes.
        save_file(tensors, os.fspath(partial), {"collapse": to_json(facts)})
