"""Batches of clips, from a folder of folders of frames or from an array, as an encoder of clips takes them."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collapse import InputError
from collapse.data.images import Images
from collapse.encoders.networks import ImageBatches


class ClipBatches(ImageBatches):
    """Batches of clips; as `ImageBatches`.

    clips: a folder, each folder of images in it one clip, its frames in the order of their names; (n, frames, 3, h, w)
    array or tensor, or batches of them.  Of more frames than the network takes, evenly many are taken.
    """

    unit = "clips"

    def _opened(self, clips: Any) -> Any:
        images = super()._opened(clips)
        if not isinstance(images, Images):
            return images
        folders: dict[str, list[int]] = {}
        for place, name in enumerate(images.names):
            folders.setdefault(os.path.dirname(name), []).append(place)
        if "" in folders:
            raise InputError(f"{images.source}: has images that are in no folder of their own; a folder is one clip")
        self.folders, self.files = list(folders.items()), images
        return np.arange(len(self.folders))  # which clip, for `limit` and `sample`

    @property
    def path(self) -> str | None:
        """Where the clips are, if that has a path."""
        return str(self.files.source) if hasattr(self, "files") else None

    def read_names(self) -> list[str]:
        """The names of the folders that could be read, in order."""
        lost = {entry["path"] for entry in self.skipped}
        names = [self.folders[int(number)][0] for number in self.images]
        return [name for name in names if f"{self.path}/{name}" not in lost]

    def _batches(self) -> Iterator[Tensor]:
        if not hasattr(self, "files"):
            yield from super()._batches()
            return
        clips = (clip for number in self.images if (clip := self._clip(int(number))) is not None)
        yield from _stacked(clips, self.step)

    def _clip(self, number: int) -> Tensor | None:
        """(frames, 3, h, w) uint8 of a folder; None, and the reason kept, if it cannot be read."""
        name, places = self.folders[number]
        prepare: Any = self.preprocess
        try:
            if len(places) < prepare.frames:
                raise InputError(f"{len(places)} frames; the network takes {prepare.frames}")
            frames = [self.files.open(places[at]) for at in prepare.chosen(len(places))]
            return prepare(frames, self.files.max_pixels)
        except InputError as error:
            where = f"{self.path}/{name}"
            if self.how.strict:
                raise InputError(f"{where}: {error}") from error
            self.skipped.append({"path": where, "why": str(error)})
            return None

    def _look(self, batch: Tensor) -> None:
        if batch.ndim != 5 or batch.is_complex():
            raise InputError(f"clips: a batch of shape {tuple(batch.shape)}, expected (n, frames, 3, h, w)")
        super()._look(batch)


def _stacked(clips: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    for clip in clips:
        if waiting and clip.shape != waiting[0].shape:
            raise InputError("clips differ in size; give resize= and crop=")
        waiting.append(clip)
        if len(waiting) == step:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)
