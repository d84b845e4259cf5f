"""Training in one call, and what it gives: a RUN, its encoder, its log and its spectra."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.arguments import device_of, flag, given, known, pair, positive, share, whole, whole_or_none
from collapse.data.labelled import Labelled, open_parts
from collapse.encoders import processes
from collapse.errors import warn
from collapse.files import limits
from collapse.recipes.config import Config, make_config
from collapse.results import Result, command, list_of, require_schema, value_of, versions
from collapse.training.network import resolve
from collapse.training.run import Signals, last_line, spectra_of
from collapse.training.state import Options
from collapse.training.train import train as lines_of

SCHEMA = "collapse.training/1"
WATCHING = tuple(one.name for one in fields(Options) if one.name not in ("device", "compile", "stop"))
RECIPE = tuple(one.name for one in fields(Config))
SHOWN = {"loss": "epoch_loss", "effective rank": "effective_rank", "kNN": "knn_top1", "classifier": "classifier_top1"}


@dataclass(frozen=True, eq=False, repr=False)
class Trained(Result):
    """A finished run.

    run: its folder.  encoder: the network, for `collapse.load` and all else that takes a checkpoint.
    last: the last line of its log; empty if that is damaged.  lead: whether this process is the one that writes.

    Examples:
        >>> done = Trained(Path("RUN"), {"epoch": 10, "step": 200, "epoch_loss": 4.2, "effective_rank": 30.5})
        >>> print(done.sentence())
        RUN: 10 epochs, 200 steps: loss 4.2, effective rank 30.5; RUN/encoder.safetensors
    """

    run: Path
    last: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)
    lead: bool = True
    command: list[str] = field(default_factory=command)
    versions: Mapping[str, str] = field(default_factory=lambda: versions("numpy", "torch", "torchvision"))

    @property
    def encoder(self) -> Path:
        """The file of the network."""
        return self.run / "encoder.safetensors"

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.training/1."""
        header = {"schema": SCHEMA, "run": self.run, "encoder": self.encoder}
        return {**header, **self.last, "command": self.command, "versions": self.versions}

    def notes(self) -> list[str]:
        """The warnings."""
        return self.warnings

    def sentence(self) -> str:
        """Epochs, steps and the main numbers of the last line."""
        numbers = {name: self.last.get(key) for name, key in SHOWN.items()}
        values = ", ".join(f"{name} {v:.4g}" for name, v in numbers.items() if isinstance(v, (int, float)))
        ended = {"epoch", "step"} <= self.last.keys()
        done = f"{self.last['epoch']} epochs, {self.last['step']} steps: {values}" if ended else "finished"
        return f"{self.run}: {done}; {self.encoder}"

    def spectra(self) -> dict[str, Any]:
        """name -> (T, d) singular values over the run, and "steps", (T,); empty if none were measured."""
        return spectra_of(self.run / "spectra.npz") or {}

    def plot(self, ax: Any = None) -> Any:
        """The last spectra of the run; returns the axes. Raises InputError: none were measured, or they are damaged."""
        from collapse import plots

        spectra = {name: values[-1] for name, values in self.spectra().items() if name != "steps"}
        if not spectra:
            raise InputError(f"{self.run / 'spectra.npz'}: damaged, or nothing was measured; there is nothing to draw")
        with plots.style():
            if ax is None:
                _, ax = plots.figure()
            plots.plot_spectra(ax, spectra)
        return ax

    @classmethod
    def _of(cls, document: Any, where: str) -> "Trained":
        document = require_schema(document, SCHEMA, where)
        run = Path(value_of(document, "run", where, str))
        known_names = ("schema", "run", "encoder", "command", "versions")
        last = {name: value for name, value in document.items() if name not in known_names}
        told = list_of(document, "command", where, str), value_of(document, "versions", where, dict)
        return cls(run, last, [], True, *told)


@dataclass
class Job:
    """A run that is about to start: iterate over it, and it trains; it gives the lines of its log."""

    run: Path
    config: Config
    data: Labelled
    val: Labelled | None
    options: Options

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * (len(self.data) // self.config.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        return iter(lines_of(self.run, self.config, self.data, self.val, self.options))


def train(
    data: str | PathLike,
    out: str | PathLike,
    *,
    method: str | None = None,
    head: str | None = None,
    preset: str | PathLike | None = None,
    device: str = "auto",
    max_pixels: int = limits.PIXELS,
    pixel_range: tuple[float, float] | None = None,
    holdout: float | None = None,
    labels: bool = True,
    watch: Callable[[Job], Iterable[Any]] = iter,
    **options: Any,
) -> Trained:
    """Train without labels in the folder `out`, or go on with what is unfinished there.

    Args:
        data: a folder or zip of train/CLASS/* and val/CLASS/*, or what else `collapse.data.labelled.open_parts`
            takes: images need no labels, without which no classifier is trained beside, and no parts.
        out: the run's folder.
        method: "simclr" (the default), "directclr", "barlow-twins", "vicreg", "simsiam" or "byol".
        head: one of models.HEADS; default: none for directclr, expander for barlow-twins and vicreg, else mlp.
        preset: where all other values come from: a name, as "digits", or a JSON file; default: the paper's, "imagenet".
        device: "auto", "cpu" or "cuda[:i]"; under torchrun each process takes its own.
        max_pixels, pixel_range: of images, as for `collapse.layer_spectra`.
        holdout: of images without a held-out part, the share that is held out for the measurements; None is a tenth.
        labels: False takes folders for no classes.
        watch: gets the `Job` and passes its lines on, as a progress bar does.
        options: fields of `training.config.Config`, which decide the result (epochs, batch_size, lr, temperature, ...),
            and of `training.state.Options`, which do not (workers, save_every, spectrum_every, compile, ...).

    Raises:
        InputError: no such data, an impossible value, another run in `out`; see `training.train.train`.
        TypeError: an unknown keyword.
        SystemExit, KeyboardInterrupt: a signal came; the state is saved, and the same call goes on.

    Examples:
        >>> small = {"arch": "mlp", "planes": (16, 16), "batch_size": 1024, "held": 100}
        >>> done = train("sklearn:digits", "RUN", preset="digits", epochs=1, workers=0, **small)
        >>> done.last["epoch"], done.encoder.name, done.spectra()["representation"].shape
        (1, 'encoder.safetensors', (1, 16))
    """
    known("train", options, (*RECIPE, *WATCHING, "compile"), ("preset", "max_pixels", "pixel_range", "holdout"))
    whole("max_pixels", max_pixels, 1)
    pair("pixel_range", pixel_range)
    flag("labels", labels)
    if holdout is not None:
        share("holdout", holdout)
    how = _options({name: value for name, value in options.items() if name in (*WATCHING, "compile")})
    chosen = {"method": method, "head": head, **{name: options[name] for name in options if name in RECIPE}}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in given(chosen).items()}
    config = resolve(make_config(os.fspath(preset or "imagenet"), **chosen))
    text = os.fspath(data)
    train, val = open_parts(text, max_pixels, pixel_range, holdout, labels)
    here = processes.start(device_of(device))
    compiled = here.startswith("cuda") if how.get("compile") is None else how["compile"]
    try:
        main = threading.current_thread() is threading.main_thread()
        with Signals() if main else nullcontext(lambda: 0) as stop:
            job = Job(
                Path(out), config, train, val, Options(**{**how, "device": here, "compile": compiled, "stop": stop})
            )
            last = None
            for line in watch(job):
                last = line
        lead = processes.rank() == 0
    finally:
        processes.stop()
    notes = [*dict.fromkeys([*train.warnings, *(val.warnings if val else ())])]
    result = trained(job.run, notes, last) if lead else Trained(job.run, {}, notes, lead)
    warn(result.warnings)
    return result


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """The values of `Options`, checked."""
    least = {"workers": 0, "knn_every": 0, "keep_every": 0, "log_every": 1, "held": 1}
    for name in least.keys() & values.keys():
        whole(name, values[name], least[name])
    whole_or_none(1, save_every=values.get("save_every"))
    whole_or_none(0, spectrum_every=values.get("spectrum_every"))
    for name in ("save_seconds", "spectrum_seconds"):
        if values.get(name) is not None:
            positive(name, values[name])
    for name in ("checkpoint", "tensorboard", "compile"):
        if values.get(name) is not None:
            flag(name, values[name])
    return values


def trained(run: Path, notes: Sequence[str] = (), last: Mapping[str, Any] | None = None) -> Trained:
    """The result in a folder; last: the last line of its log, if it is known. A log that is damaged is a warning."""
    try:
        return Trained(run, last_line(run) if last is None else last, list(notes))
    except InputError as error:
        return Trained(run, {}, [*notes, str(error)])
