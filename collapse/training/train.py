"""Contrastive training: SimCLR with any head, and DirectCLR (arXiv 2110.09348, sections 3 and 6).

`train` goes on where the RUN's last save is, and on a CPU gives the same weights and curve as if it had never stopped:
batches and draws are functions of (seed, epoch, image, view), the schedule of the step, and all else is in the save.
"""

import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.training import parallel
from collapse.training.config import Config
from collapse.training.data import Labelled, to_memory
from collapse.training.loader import Batch, Plan, Unreadable, batches
from collapse.training.network import Network, backward, checkpoint_blocks, finite, holds, resolve, save_encoder
from collapse.training.online import Evaluation, rank_metrics
from collapse.training.optim import learning_rate, make_optimizer, parameter_groups
from collapse.training.run import Run
from collapse.training.views import uniforms

SAVE_SECONDS = 600  # a save is due after so long, whatever the steps


@dataclass(frozen=True)
class Options:
    """What may differ between two parts of one run: where and how it is computed and watched, not what.

    save_every, spectrum_every: steps (None: at the end of every epoch; 0: no spectra).  knn_every: epochs (0: never).
    keep_every: epochs between encoder-0000.safetensors, the start's, and its like, which are kept (0: none).
    held: images of each evaluation.  checkpoint: recompute activations instead of keeping them.  nvjpeg: decode JPEGs
    on the device, where pixels may differ from the workers' by a grey level.
    stop: asked at each step, returns the number of a signal that came, or 0.
    """

    device: str = "cpu"
    workers: int = 0
    save_every: int | None = None
    spectrum_every: int | None = None
    knn_every: int = 10
    keep_every: int = 0
    log_every: int = 50
    held: int = 10_000
    compile: bool = False
    checkpoint: bool = False
    nvjpeg: bool = False
    tensorboard: bool = False
    stop: Callable[[], int] = field(default=lambda: 0)


class Training:
    """A network, its optimizer, the next step, and the losses that no line of the log has yet: what a save holds."""

    def __init__(self, config: Config, classes: int, plan: Plan, options: Options) -> None:
        self.plan, self.options, self.device = plan, options, options.device
        self.network = Network(config, classes)
        self.config = self.network.config
        if options.checkpoint:
            checkpoint_blocks(self.network.backbone)
        self.network = parallel.synchronise(self.network, self.device).to(self.device)  # type: ignore[assignment]
        self.network = self.network.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True  # shapes never change
        self.network.train()
        self.optimizer = self._make_optimizer()
        self.net: nn.Module = torch.compile(self.network) if options.compile else self.network  # type: ignore[assignment]
        if parallel.world() > 1:
            self.net = nn.parallel.DistributedDataParallel(self.net)
        self.augmentations = (self.config.augmentation(0), self.config.augmentation(1))
        self.preprocess = self.config.preprocessing()
        self.step, self.log_bytes, self.measured = 0, 0, 0
        self.window: list[float] = []  # since the last line
        self.epoch_losses: list[float] = []
        self.unread: list[Tensor] = []  # on the device

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config, network = self.config, self.network
        groups = parameter_groups(nn.ModuleList([network.backbone, network.projector]), config.weight_decay)
        for group in groups:
            group["peak"] = config.lr
        online = {"weight_decay": 0.0, "adapt": False, "peak": config.classifier_lr}
        groups.append({"params": list(network.classifier.parameters()), **online})
        return make_optimizer(config.optimizer, groups, config.momentum, config.eta)

    def state(self) -> dict[str, Any]:
        """All that a save holds; raises InputError if a loss since the last line, or a weight, is not finite."""
        self.read()
        if not torch.stack([weight.isfinite().all() for weight in self.network.parameters()]).all():
            raise InputError(f"step {self.step}: a weight is not finite; lower lr; the last save is kept")
        parts = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        losses = {"window": self.window, "epoch_losses": self.epoch_losses}
        counts = {"step": self.step, "log_bytes": self.log_bytes, "measured": self.measured}
        return {**parts, **losses, **counts, "environment": self.environment()}

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
        if changed and parallel.rank() == 0:
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
            "processes": parallel.world(),
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
            cropped = pixels.ndim == 5
            x = augmentation.colour(pixels[:, view].float() / 255, u) if cropped else augmentation(pixels, u)
            x = self.preprocess.standardise(x)
            made.append(x.contiguous(memory_format=torch.channels_last))
        return made[0], made[1]

    def run_step(self, views: tuple[Tensor, Tensor], labels: Tensor) -> None:
        """One optimiser step; nothing is read back from the device."""
        config, per_epoch = self.config, self.plan.per_epoch
        for group in self.optimizer.param_groups:
            schedule = (self.step, config.epochs * per_epoch, config.warmup * per_epoch)
            group["lr"] = learning_rate(*schedule, group["peak"], config.final_lr * group["peak"])
        self.unread.append(backward(self.net, self.network, views, labels, self.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
                f"lower lr (now {rate:.3g}); the last save is kept"
            )
        self.window += losses
        self.epoch_losses += losses


def train(
    folder: Path, config: Config, data: Labelled, val: Labelled | None = None, options: Options | None = None
) -> Iterator[dict[str, Any]]:
    """Train, or go on training, in `folder`; yields each line of the log, as it is written, and at an epoch's end.

    val: held-out images for the spectra and the other measurements; None measures nothing.
    In several processes, every one calls it with the same arguments; the first writes. A finished run yields nothing.

    Raises:
        InputError: a run of another configuration or another process in `folder`, fewer images than a batch, a batch
            that the processes cannot share, a loss that is not finite, a disk without room, no memory.
        SystemExit, KeyboardInterrupt: `options.stop` returned a signal; the state is saved.
    """
    options = options or Options()
    plan = _plan(config, data)
    if options.compile and options.checkpoint:
        raise InputError("--checkpoint: not with --compile; give one of them")
    about = {"images": len(data), "digest": data.digest, "held_digest": val.digest if val else None}
    same = {name: value for name, value in vars(options).items() if name not in ("device", "stop")}
    parallel.agree(repr((resolve(config), about, same, torch.__version__)), "configuration, options, data or torch")
    run = None
    try:
        training = Training(config, len(data.classes), plan, options)
        run = _open_run(folder, training, about)
        if _lead(lambda: run is not None and _finished(run, training)):
            return
        data = to_memory(data, options.workers)
        monitor = None
        if val is not None and (options.spectrum_every != 0 or options.knn_every):
            monitor = Evaluation(training.network, data, val, options.held, options.workers, options.device)
        yield from _Loop(training, run, monitor).run(data)
        if run is not None:
            save_encoder(run.encoder, training.network)
            (folder / "resume.prev.pt").unlink(missing_ok=True)
    except (RuntimeError, MemoryError) as error:
        if _out_of_memory(error):
            raise InputError(
                f"out of memory at {plan.batch_size // plan.world} images a process; give --checkpoint or --chunks"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).partition("\n")[0][:150]
            raise InputError(f"torch.compile does not work here ({reason}); give --no-compile") from error
        if isinstance(error, MemoryError) or not parallel.is_lost(error):
            raise
        raise InputError("another process is gone; start all again: the run goes on from its last save") from error
    finally:
        if run is not None:
            run.close()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _plan(config: Config, data: Labelled) -> Plan:
    world = parallel.world()
    if len(data) < config.batch_size:
        raise InputError(f"{len(data)} images, but a batch of {config.batch_size}; lower the batch size")
    if config.batch_size % world:
        raise InputError(f"a batch of {config.batch_size} cannot be shared by {world} processes; change one of them")
    own = config.batch_size // world
    if own % config.chunks:
        raise InputError(f"chunks: {config.chunks} do not divide the {own} images of each of {world} processes")
    return Plan(len(data), config.batch_size, config.epochs, config.seed, parallel.rank(), world)


def _lead(act: Callable[[], Any]) -> Any:
    """What `act` returns in the first process, in all; an InputError there is raised in all."""
    result: Any = None
    if parallel.rank() == 0:
        try:
            result = act()
        except InputError as error:
            result = error
    result = parallel.broadcast(result)
    if isinstance(result, InputError):
        raise result
    return result


def _open_run(folder: Path, training: Training, about: dict[str, Any]) -> Run | None:
    """Open RUN in the first process; restore its state, if there is one, in all."""
    opened: list[Run] = []

    def act() -> dict[str, Any] | None:
        opened.append(Run(folder, training.config.as_dict(), about))
        size = sum(t.numel() * t.element_size() for t in training.network.state_dict().values())
        if not opened[0].encoder.exists():
            opened[0].require_space(2 * size)
        return opened[0].load()

    try:
        state = _lead(act)
        if state is not None:
            training.restore(state)
    except InputError:
        for run in opened:
            run.close()
        raise
    return opened[0] if opened else None


def _finished(run: Run, training: Training) -> bool:
    """Whether the final encoder is there and whole; if not, the log and the spectra are made ready to go on.

    Raises InputError: it is damaged, and there is no state to write it from.
    """
    ends = training.step == training.config.epochs * training.plan.per_epoch
    if run.encoder.exists():
        if holds(run.encoder, training.network if ends else None):
            return True
        if not training.step:
            raise InputError(f"{run.encoder}: damaged, and no state is left to write it from; choose another RUN")
        run.keep_aside(run.encoder, "it is written again from resume.pt")
    run.cut_log(training.log_bytes)
    run.check_spectra(training.step, training.measured)
    return False


class _Loop:
    """The steps of a run, with its log, measurements and saves; `run` is None in all processes but the first."""

    def __init__(self, training: Training, run: Run | None, monitor: Evaluation | None) -> None:
        self.training, self.run_folder, self.monitor, self.options = training, run, monitor, training.options
        if monitor is not None:
            monitor.beat = self._beat
        self.unreadable = Unreadable(training.plan.n)
        self.saved = self.marked = time.monotonic()
        self.waited, self.marked_step = 0.0, training.step
        self.board = self._board() if run is not None and self.options.tensorboard else None

    def _board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard: not installed; pip install tensorboard") from error
        return SummaryWriter(str(self.run_folder and self.run_folder.folder), purge_step=self.training.step)

    def run(self, data: Labelled) -> Iterator[dict[str, Any]]:
        """Steps until the end; yields the lines of the log as they are written."""
        training, per_epoch = self.training, self.training.plan.per_epoch
        labels = torch.from_numpy(data.labels)
        options = (self.options.workers, training.device, self.options.nvjpeg)
        loader = batches(data, training.plan, training.augmentations, training.step, *options)
        self._keep()
        for batch, views in self._timed(ahead(loader, training.views, training.device)):
            self.unreadable.note(batch.unreadable)
            training.run_step(views, labels[torch.from_numpy(batch.images)].to(training.device, non_blocking=True))
            self._beat()
            step = training.step
            ends, last = step % per_epoch == 0, step == training.config.epochs * per_epoch
            measures = self.options.spectrum_every != 0 and (self._due(self.options.spectrum_every, ends) or last)
            if step % self.options.log_every == 0 or ends or (measures and self.monitor is not None):
                yield self._line(ends, measures)
            late = time.monotonic() - self.saved > SAVE_SECONDS
            stopped, overdue = divmod(parallel.largest(2 * self.options.stop() + late), 2)  # one message a step
            if self._due(self.options.save_every, ends) or last or stopped or overdue:
                self._save()
            if ends:
                self._keep()
            if stopped and self.run_folder is not None:
                print(
                    f"{self.run_folder.folder}: saved at step {step}; the same command goes on from it", file=sys.stderr
                )
            if stopped == signal.SIGINT:
                raise KeyboardInterrupt
            if stopped:
                raise SystemExit(128 + stopped)

    def _beat(self) -> None:
        if self.run_folder is not None:
            self.run_folder.beat()

    def _keep(self) -> None:
        """Keep the encoder of the epoch that has just ended, if it is due."""
        epoch, within = divmod(self.training.step, self.training.plan.per_epoch)
        every = self.options.keep_every
        if self.run_folder is not None and every and within == 0 and epoch % every == 0:
            save_encoder(self.run_folder.folder / f"encoder-{epoch:04d}.safetensors", self.training.network)

    def _due(self, every: int | None, ends: bool) -> bool:
        return ends if every is None else every > 0 and self.training.step % every == 0

    def _timed(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same items; counts the time spent waiting for them."""
        while True:
            start = time.monotonic()
            item = next(items, None)
            self.waited += time.monotonic() - start
            if item is None:
                return
            yield item

    def _line(self, ends: bool, measures: bool) -> dict[str, Any]:
        """Write and return one line: means since the last one, and what is due at this step."""
        training, now = self.training, time.monotonic()
        training.read()
        line: dict[str, Any] = {
            "step": training.step,
            "epoch": training.step // training.plan.per_epoch,
            "loss": math.fsum(training.window) / len(training.window),
            "lr": training.optimizer.param_groups[0]["lr"],
        }
        if ends:
            line["epoch_loss"] = math.fsum(training.epoch_losses) / len(training.epoch_losses)
            training.epoch_losses = []
        training.window = []
        if self.monitor is not None:
            line |= self._measure(self.monitor, ends, measures)
        seconds = max(now - self.marked, 1e-9)
        steps = training.step - self.marked_step
        line["images_per_second"] = steps * training.plan.batch_size / seconds
        line["waited"] = self.waited / seconds
        self.marked, self.marked_step, self.waited = time.monotonic(), training.step, 0.0
        training.log_bytes = self._write("log", line)
        if self.board is not None:
            for name, value in line.items():
                self.board.add_scalar(name, value, training.step)
            self.board.flush()
        return line

    def _measure(self, monitor: Evaluation, ends: bool, measures: bool) -> dict[str, Any]:
        line: dict[str, Any] = {}
        epoch, every = self.training.step // self.training.plan.per_epoch, self.options.knn_every
        if measures:
            spectra, line = monitor.spectra()
            line |= rank_metrics(spectra)
            values = {name: s.singular_values for name, s in spectra.items()}
            self._write("add_spectra", self.training.step, values)
            self.training.measured += 1
        if ends and every and (epoch % every == 0 or epoch == self.training.config.epochs):
            line |= monitor.neighbours()
        return line

    def _save(self) -> None:
        self._write("save", self.training.state())
        self.saved = time.monotonic()

    def _write(self, what: str, *values: Any) -> Any:
        """Call a method of the first process's run; its result, or its error, reaches all."""
        return _lead(lambda: getattr(self.run_folder, what)(*values))


def ahead(
    items: Iterable[Batch], prepare: Callable[[Batch], tuple[Tensor, Tensor]], device: str
) -> Iterator[tuple[Batch, tuple[Tensor, Tensor]]]:
    """(batch, its views); on CUDA the next batch is copied and augmented on a stream beside the current step."""
    if not device.startswith("cuda"):
        yield from ((batch, prepare(batch)) for batch in items)
        return
    stream, source = torch.cuda.Stream(device), iter(items)

    def following() -> tuple[Batch, tuple[Tensor, Tensor]] | None:
        with torch.cuda.stream(stream):  # the loader's own copies too
            batch = next(source, None)
            return None if batch is None else (batch, prepare(batch))

    item = following()
    while item is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        for view in item[1]:
            view.record_stream(torch.cuda.current_stream(device))
        ready, item = item, following()
        yield ready
