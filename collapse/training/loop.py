"""The steps of a run, with its log, measurements and saves."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from collapse.data.labelled import Labelled
from collapse.encoders import processes
from collapse.recipes.views import to_device
from collapse.spectra import Spectrum
from collapse.training.board import Board
from collapse.training.loader import Batch, Unreadable, batches
from collapse.training.network import save_encoder
from collapse.training.online import Evaluation, rank_metrics
from collapse.training.run import Run
from collapse.training.state import Training

SHARE = 0.05  # of the time of a run on a device, which measurements at ends of epochs may take, and saves


class Due:
    """When something is due: every so many steps, so many seconds after the last time, or at ends of epochs.

    epochs: at all ends; "rare": at those where what the last time took is less than `SHARE` of the time since then.
    """

    def __init__(self, every: int | None, seconds: float | None, epochs: bool | Literal["rare"]) -> None:
        self.every, self.seconds, self.epochs = every, seconds, epochs
        self.since, self.took = time.monotonic(), 0.0

    def late(self) -> bool:
        """Whether it is due by seconds."""
        return self.seconds is not None and time.monotonic() - self.since > self.seconds

    def __call__(self, step: int, ends: bool, more: Callable[[], float] = lambda: 0.0) -> bool:
        """Whether it is due by steps or epochs, the same in all processes; more: seconds that it took besides."""
        if self.every and step % self.every == 0:
            return True
        if not ends or self.epochs != "rare":
            return ends and bool(self.epochs)
        return bool(processes.lead(lambda: max(self.took, more()) < SHARE * (time.monotonic() - self.since)))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is done now."""
        start = time.monotonic()
        yield
        self.since = time.monotonic()
        self.took = self.since - start


class Ask:
    """Whether any process got a signal or finds something overdue: one message about every second, not every step.

    All processes ask at the same steps, since the steps between two questions follow from the slowest one's answer.
    """

    MOST = 50  # steps between two questions

    def __init__(self, step: int, stop: Callable[[], int], late: Callable[[], list[bool]]) -> None:
        self.stop, self.late, self.asked, self.next, self.since = stop, late, step, step + 1, time.monotonic()

    def __call__(self, step: int, now: bool) -> tuple[int, list[bool]]:
        """(number of the signal or 0, `late` of any process) after a step; `now` asks in any case."""
        late = self.late()
        if step < self.next and not now:
            return 0, [False] * len(late)
        pace = (time.monotonic() - self.since) / max(1, step - self.asked)
        stopped, pace, *overdue = processes.largest([self.stop(), pace, *late])
        apart = 1 if processes.world() == 1 else min(self.MOST, max(1, int(1 / max(pace, 1e-9))))
        self.asked, self.next, self.since = step, step + apart, time.monotonic()
        return int(stopped), [bool(value) for value in overdue]


class Loop:
    """The steps of a run, with its log, measurements and saves; `run` is None in all processes but the first."""

    def __init__(self, training: Training, run: Run | None, monitor: Evaluation | None) -> None:
        self.training, self.run_folder, self.monitor, self.options = training, run, monitor, training.options
        if monitor is not None:
            monitor.beat = self._beat
        self.unreadable = Unreadable(training.plan.n)
        self.marked, options = time.monotonic(), self.options
        epochs: bool | Literal["rare"] = "rare" if training.device.startswith("cuda") else True
        given = options.spectrum_every is not None or options.spectrum_seconds is not None
        self.measuring = Due(options.spectrum_every, options.spectrum_seconds, False if given else epochs)
        self.saving = Due(options.save_every, options.save_seconds, False if options.save_every else epochs)
        self.ask = Ask(training.step, lambda: options.stop(), lambda: [self.saving.late(), self.measuring.late()])
        self.overdue = False  # a measurement
        self.waited, self.marked_step = 0.0, training.step
        self.board = Board(run.folder, training.step) if run is not None and self.options.tensorboard else None

    def run(self, data: Labelled) -> Iterator[dict[str, Any]]:
        """Steps until the end; yields the lines of the log as they are written.

        Raises InputError: images cannot be read, a loader process died, or a file of the run cannot be written.
        """
        training, per_epoch = self.training, self.training.plan.per_epoch
        labels = torch.from_numpy(data.labels)
        options = (training.step, self.options.workers, training.device)
        loader = batches(data, training.plan, training.augmentations, *options)
        self._keep()
        for batch, views in self._timed(ahead(loader, training.views, training.device)):
            self.unreadable.note(batch.unreadable)
            training.run_step(views, to_device(labels[torch.from_numpy(batch.images)], training.device))
            self._beat()
            step = training.step
            ends, last = step % per_epoch == 0, step == training.config.epochs * per_epoch
            measures = self._measures(ends, last)
            if step % self.options.log_every == 0 or ends or measures:
                yield self._line(ends, measures)
            due = self.saving(step, ends, self._wrote) or last
            stopped, (late, self.overdue) = self.ask(step, due)
            if due or stopped or late:
                with self.saving.timed():
                    self._write("save", training.state())
            if last or stopped:
                self._write("settle")
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

    def _measures(self, ends: bool, last: bool) -> bool:
        if self.monitor is None or self.options.spectrum_every == 0:
            return False
        return self.measuring(self.training.step, ends) or self.overdue or last

    def _wrote(self) -> float:
        return self.run_folder.wrote() if self.run_folder is not None else 0.0

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
        every = self.options.knn_every if ends and self.monitor is not None else 0
        neighbours = every > 0 and (line["epoch"] % every == 0 or line["epoch"] == training.config.epochs)
        spectra: dict[str, Spectrum] = {}
        if self.monitor is not None and (measures or neighbours):
            with self.measuring.timed():
                more, spectra = self._measure(self.monitor, measures, neighbours)
                line |= more
        seconds = max(now - self.marked, 1e-9)
        steps = training.step - self.marked_step
        line["images_per_second"] = steps * training.plan.batch_size / seconds
        line["waited"] = self.waited / seconds
        self.marked, self.marked_step, self.waited = time.monotonic(), training.step, 0.0
        training.log_bytes = self._write("log", line)
        if self.board is not None:
            self.board.write(line, spectra)
        return line

    def _measure(
        self, monitor: Evaluation, measures: bool, neighbours: bool
    ) -> tuple[dict[str, Any], dict[str, Spectrum]]:
        """(what a line of the log says of it, the spectra)."""
        line: dict[str, Any] = {}
        spectra: dict[str, Spectrum] = {}
        self._write("settle")  # before workers are forked
        if measures:
            spectra, line = monitor.spectra()
            line |= rank_metrics(spectra)
            values = {name: s.singular_values for name, s in spectra.items()}
            self._write("add_spectra", self.training.step, values)
            self.training.measured += 1
        if neighbours:
            line |= monitor.neighbours()
        return line, spectra

    def _write(self, what: str, *values: Any) -> Any:
        """Call a method of the first process's run; its result, or its error, reaches all."""
        return processes.lead(lambda: getattr(self.run_folder, what)(*values))


def ahead(
    items: Iterable[Batch], prepare: Callable[[Batch], tuple[Tensor, Tensor]], device: str
) -> Iterator[tuple[Batch, tuple[Tensor, Tensor]]]:
    """(batch, its views (b, 3, h, w) twice); on CUDA the next is copied and augmented on a stream beside the step."""
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
        yield item  # its step is launched before the next batch is waited for
        item = following()
