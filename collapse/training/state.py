"""What a run computes with: the network, its optimizer, the views of a batch and a step; and how it is computed."""

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from collapse import InputError
from collapse.encoders import processes
from collapse.recipes.config import Config
from collapse.recipes.views import Augmentation, to_device, uniforms
from collapse.training import parallel
from collapse.training.loader import Batch, BatchOrder
from collapse.training.network import Network, backward, finite, recompute_blocks
from collapse.training.optim import learning_rate, make_optimizer, parameter_groups, target_momentum

BUDGET = 0.5  # share of the activations that a compiled network keeps with `checkpoint`


@dataclass(frozen=True)
class Options:
    """What may differ between two parts of one run: where and how it is computed and watched, not what.

    save_every, spectrum_every: steps (None: at the end of every epoch; 0: no spectra).  On CUDA None leaves out those
        ends of epochs where what the last one took is more than a twentieth of the time since then.
    save_seconds, spectrum_seconds: also so long after the last one; these spectra stand for those of every epoch.
    knn_every: epochs (0: never).
    keep_every: epochs between encoder-0000.safetensors, the start's, and its like, which are kept (0: none).
    held: images of each evaluation.  checkpoint: recompute activations instead of keeping all.
    stop: asked at each step, returns the number of a signal that came, or 0.
    """

    device: str = "cpu"
    workers: int = 0
    save_every: int | None = None
    save_seconds: float = 600.0
    spectrum_every: int | None = None
    spectrum_seconds: float | None = None
    knn_every: int = 10
    keep_every: int = 0
    log_every: int = 50
    held: int = 10_000
    compile: bool = False
    checkpoint: bool = False
    tensorboard: bool = False
    stop: Callable[[], int] = field(default=lambda: 0)


def _set_budget(share: float) -> None:
    """Of activations that compiled networks keep. A graph of another budget, which torch would take again, is gone."""
    if torch._functorch.config.activation_memory_budget != share:
        torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = share


class Training:
    """A network, its optimizer, the next step, and the losses that no line of the log has yet: what a save holds.

    Raises InputError: as `Network`, or blocks are to be computed again and the network has none.
    """

    def __init__(self, config: Config, classes: int, plan: BatchOrder, options: Options) -> None:
        self.plan, self.options, self.device = plan, options, options.device
        self.network = Network(config, classes)
        self.config = self.network.config
        if options.checkpoint and not options.compile:
            recompute_blocks(self.network.backbone)
        synchronised = parallel.synchronise(self.network, self.device, options.compile)
        self.network = synchronised.to(self.device)  # type: ignore[assignment]
        self.network = self.network.to(memory_format=torch.channels_last)
        # Shapes never change; but the quickest kernel is not the same one every time.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        self.network.train()
        self.optimizer = self._make_optimizer()
        if options.compile:  # the heads gain nothing, and each would be a graph of its own
            _set_budget(BUDGET if options.checkpoint else 1.0)
            self.network.backbone.compile()
            if self.network.target is not None:
                self.network.target[0].compile()
        self.net = parallel.distributed(self.network)
        self.augmentations = (self.config.augmentation(0), self.config.augmentation(1))
        self.colours = [self._compiled(self._colour(augmentation)) for augmentation in self.augmentations]
        self.whole = [self._compiled(self._whole(augmentation)) for augmentation in self.augmentations]
        self.preprocess = self.config.preprocessing()
        self.step, self.log_bytes, self.measured = 0, 0, 0
        self.window: list[float] = []  # since the last line
        self.epoch_losses: list[float] = []
        self.unread: list[Tensor] = []  # on the device

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False) if self.options.compile else function

    def _colour(self, augmentation: Augmentation) -> Callable[[Tensor, Tensor], Tensor]:
        return augmentation.colour if self.device == "cpu" and not self.options.compile else augmentation.masked

    def _whole(self, augmentation: Augmentation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(images, places, u) -> a view, as `Augmentation.whole`."""
        if self.device != "cpu" or self.options.compile:
            return augmentation.whole
        return lambda images, places, u: augmentation.colour(augmentation.cropped(images, places, u), u)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config, network = self.config, self.network
        trained = nn.ModuleList([network.backbone, network.projector, network.predictor])
        groups = parameter_groups(trained, config.weight_decay)
        for group in groups:
            group["peak"] = config.lr
        if network.classes:
            online = {"weight_decay": 0.0, "adapt": False, "peak": config.classifier_lr}
            groups.append({"params": list(network.classifier.parameters()), **online})
        return make_optimizer(config.optimizer, groups, config.momentum, config.eta)

    def state(self) -> dict[str, Any]:
        """All that a save holds; raises InputError if a loss since the last line, or a weight, is not finite."""
        self.read()
        if not torch.stack([weight.isfinite().all() for weight in self.network.parameters()]).all():
            raise InputError(f"step {self.step}: a weight is not finite; {self._advice()}; the last save is kept")
        parts = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        losses = {"window": self.window, "epoch_losses": self.epoch_losses}
        counts = {"step": self.step, "log_bytes": self.log_bytes, "measured": self.measured}
        return {**parts, **losses, **counts, "environment": self.environment()}

    def _advice(self, now: str = "") -> str:
        """What to do about a run that is not finite; bf16 on a CPU is said to give NaN gradients now and then."""
        if self.config.precision == "bf16" and self.device == "cpu":
            return f'give precision="float32", which tells whether bf16 on this CPU did it, or lower lr{now}'
        return f"lower lr{now}"

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`; a warning where the environment now differs in what changes last digits.

        Raises InputError: it is not the state of such a run.
        """
        try:
            self._restore(state)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(f"resume.pt: does not fit its config.json ({reason}); choose another RUN") from error
        now = self.environment()
        stored = state["environment"].items()
        changed = [f"{k} {v}, now {now.get(k, 'not known')}" for k, v in stored if now.get(k) != v]
        if changed and processes.rank() == 0:
            print(f"warning: {', '.join(changed)}: same data and schedule, other last digits", file=sys.stderr)

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log_bytes, self.measured = state["step"], state["log_bytes"], state["measured"]
        self.window, self.epoch_losses = state["window"], state["epoch_losses"]

    def environment(self) -> dict[str, Any]:
        """What changes the last digits of a run, as a save holds it."""
        cuda = self.device.startswith("cuda")
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "processes": processes.world(),
            "machine": platform.machine(),
            "capability": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
            "compiled": self.options.compile,
        }

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both views, (n, 3, s, s) float32, normalised, on the device, each image its own draw."""
        pixels = batch.pixels.to(self.device, non_blocking=True)
        made = []
        for view, augmentation in enumerate(self.augmentations):
            u = uniforms(self.config.seed, batch.epoch, batch.images, view, augmentation.DRAWS)
            there = to_device(u, self.device)
            if pixels.ndim == 5:
                x = self.colours[view](pixels[:, view].float() / 255, there)
            else:
                places = to_device(augmentation.places(u, pixels.shape[-2:]), self.device)
                x = self.whole[view](pixels, places, there)
            made.append(self.preprocess.standardise(x).contiguous(memory_format=torch.channels_last))
        return made[0], made[1]

    def run_step(self, views: tuple[Tensor, Tensor], labels: Tensor) -> None:
        """One optimiser step on views (b, 3, h, w), labels (b,) int64; nothing is read back from the device."""
        config, per_epoch = self.config, self.plan.per_epoch
        steps = config.epochs * per_epoch
        for group in self.optimizer.param_groups:
            schedule = (self.step, steps, config.warmup * per_epoch)
            group["lr"] = learning_rate(*schedule, group["peak"], config.final_lr * group["peak"])
        self.unread.append(backward(self.net, self.network, views, labels, self.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.network.follow(target_momentum(self.step, steps, config.target_momentum))
        self.step += 1

    def read(self) -> None:
        """Fetch the losses of the steps since the last call, the mean of all processes.

        Raises InputError, in all processes: one is not finite.
        """
        if not self.unread:
            return
        losses = parallel.mean(torch.stack(self.unread)).tolist()
        self.unread = []
        if (bad := finite(losses)) is not None:
            step, rate = self.step - len(losses) + bad, self.optimizer.param_groups[0]["lr"]
            raise InputError(
                f"epoch {step // self.plan.per_epoch}, step {step}: the loss is {losses[bad]}; "
                f"{self._advice(f' (now {rate:.3g})')}; the last save is kept"
            )
        self.window += losses
        self.epoch_losses += losses
