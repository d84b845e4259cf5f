"""Batches of sounds, from a folder or from arrays, as an encoder of sounds takes them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError
from collapse.encoders.groups import Groups
from collapse.encoders.networks import How
from collapse.files import sounds as files

WAITING = 64 << 20  # numbers of features that wait for a batch


class SoundBatches(Groups):
    """Batches of sounds, `views` of each after another; as `ImageBatches`.

    sounds: a folder of WAV and FLAC files; (n, t) array or tensor, or an iterable of (t,) ones, float in -1..1 at the
    network's own rate; or, with `views`, a list of the paths of the views of each.
    No sound is filled up for the sake of a batch: those that follow one another in one length are one batch.

    Raises InputError: no such folder, no sound in it, or arrays of another shape.
    """

    unit = "sounds"

    def __init__(self, sounds: Any, how: How, views: int = 0, path: str | None = None) -> None:
        notes: list[str] = []
        if not views and isinstance(sounds, (str, os.PathLike)):
            path = os.fspath(sounds)
            names, others = files.below(Path(sounds))
            groups: Sequence[Any] = [(Path(sounds) / name,) for name in names]
            if others:
                notes = [f"{len(others)} files are no sounds by their names, first {others[0]!r}; left out"]
        else:
            groups = sounds if views else _arrays(sounds)
            names = [str(number) for number in range(1, len(groups) + 1)]
        super().__init__(groups, names, how, views, path)
        self.warnings = [*notes, *self.warnings]
        self.augmentations, self.read = list[Callable[..., Any]](), list[str]()

    def augment(self, augmentations: Sequence[Callable[..., Any]], views: int, seed: int) -> None:
        """Put `views` views in the place of each sound; each depends on the seed, its number and the view's."""
        self.augmentations, self.views = list(augmentations), views

    def read_names(self) -> list[str]:
        """The names of the sounds that could be read, in order."""
        return self.read

    def notes(self) -> list[str]:
        """The warnings, when all have come."""
        lost = len(self.skipped)
        skipped = [f"{lost} of {self.count + lost} sounds were skipped"] if lost else []
        seconds = self.preprocess.longest / self.preprocess.rate if self.preprocess else 0
        cut = [f"{self.cut} of {self.count * self.views} sounds are longer than {seconds:g} s and were cut"]
        return [*self.warnings, *skipped, *(cut if self.cut else [])]

    def unread(self) -> str:
        """How many could not be read, and the first of them, for an error."""
        if not self.skipped:
            return ""
        first = self.skipped[0]
        return (
            f"{len(self.skipped)} of {len(self.groups)} sounds cannot be read, first {first['path']} ({first['why']})"
        )

    def __iter__(self) -> Iterator[Tensor]:
        waiting, size = list[list[Tensor]](), 0
        for number in range(len(self.groups)):
            views = self._views(number)
            if views is None:
                continue
            waiting.append(views)
            size += sum(view.numel() for view in views)
            if len(waiting) == self.step or size > WAITING:
                yield from self._batched(waiting)
                waiting, size = [], 0
        yield from self._batched(waiting)

    def _batched(self, waiting: list[list[Tensor]]) -> Iterator[Tensor]:
        """The sounds that follow one another in one shape, together; the views of one sound are of one shape."""
        for _, run in groupby(waiting, lambda views: views[0].shape):
            same = list(run)
            self.count += len(same)
            yield torch.stack([view for views in same for view in views])

    def _views(self, number: int) -> list[Tensor] | None:
        """The features of the views of one sound; None if it cannot be read."""
        preprocess: Any = self.preprocess
        try:
            waveforms = [self._heard(sound) for sound in self.groups[number]]
            if self.augmentations:
                waveforms = self._augmented(waveforms[0], number)
            made = [preprocess(samples) for samples in waveforms]
        except InputError as error:
            if self.how.strict or self.path is None or not isinstance(self.groups[number][0], Path):
                raise InputError(f"sound {self.names[number]}: {error}") from error
            where = str(self.groups[number][0])
            self.skipped.append({"path": where, "why": str(error).removeprefix(f"{where}: ")})
            return None
        if len({view.shape for view in made}) > 1:
            raise InputError(
                f"sound {self.names[number]}: its views differ in length, which this network would not hide"
            )
        self.cut += sum(bool(preprocess.longest) and len(samples) > preprocess.longest for samples in waveforms)
        self.read.append(self.names[number])
        return made

    def _heard(self, sound: Any) -> NDArray:
        preprocess: Any = self.preprocess
        if not isinstance(sound, Path):
            return sound
        rate, samples = files.read(sound)
        return files.resampled(samples, rate, preprocess.rate)

    def _augmented(self, samples: NDArray, number: int) -> list[NDArray]:
        made = []
        for view in range(self.views):
            augment, rng = self.augmentations[view % len(self.augmentations)], [self.how.seed, number, view]
            made.append(_samples(augment(samples.copy(), np.random.default_rng(rng)), number))
        return made


def _arrays(sounds: Any) -> list[tuple[NDArray]]:
    """Each sound as a group of its own. Raises InputError: no sounds."""
    if not isinstance(sounds, Iterable):
        raise InputError(f"sounds: got a {type(sounds).__name__}, give a folder, (n, t) or a list of (t,) arrays")
    return [(_samples(sound, number),) for number, sound in enumerate(sounds)]


def _samples(sound: Any, number: int) -> NDArray:
    """(t,) float32. Raises InputError: another shape, no real numbers, integers, NaN."""
    array = np.asarray(sound.detach().cpu() if isinstance(sound, Tensor) else sound)
    if array.ndim != 1 or array.dtype.kind != "f" or not len(array):
        raise InputError(f"sounds: {number} has shape {array.shape}, {array.dtype}; expected (t,) float in -1..1")
    if not np.isfinite(array).all():
        raise InputError(f"sounds: {number} holds NaN or infinity")
    return array.astype(np.float32)
