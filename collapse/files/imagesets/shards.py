"""Images in tar files (WebDataset's layout), read where their headers say they lie: any order costs the same."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from collapse import InputError
from collapse.files import limits, tars
from collapse.files.descriptor import Descriptor, opened
from collapse.files.imagesets.base import ImageSet, hidden, may_be_image, within


class Shards(ImageSet):
    """The images of some shards in order; NAME.cls or NAME.json beside an image is its label, where all have one.

    Raises InputError: a damaged or compressed tar, a label that is no class number, labels of some images alone.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self.where = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self.files: dict[Path, tuple[int, ...]] = {}
        self.members: list[tuple[Path, tars.Member]] = []
        keys: list[tuple[Path, str]] = []
        labels: dict[tuple[Path, str], int | None] = {}
        for path in paths:
            with opened(path) as source:
                self.files[path] = source.state
                self._look(path, source, keys, labels)
        self.names = [f"{path.name}/{member.name}" for path, member in self.members]
        self._label(keys, labels)

    def _look(self, path: Path, source: Descriptor, keys: list[tuple[Path, str]], labels: dict) -> None:
        members, links = tars.members(source)
        self.left_out += [f"{path.name}/{name}" for name in links]
        for member in members:
            key, ending = os.path.splitext(member.name)
            if hidden(member.name):
                continue
            if ending and may_be_image(member.name):
                self.members.append((path, member))
                keys.append((path, key))
            elif ending in (".cls", ".json"):
                labels[path, key] = _number(source, member)
            else:
                self.left_out.append(f"{path.name}/{member.name}")

    def _label(self, keys: list[tuple[Path, str]], labels: dict) -> None:
        values = [labels.get(key) for key in keys]
        if any(label is not None for label in values):
            missing = next((k for k, label in enumerate(values) if label is None), None)
            if missing is not None:
                raise InputError(
                    f"{self.path(missing)}: no image with a label, as others have; give all or none a NAME.cls beside"
                )
            self.labels = np.array(values, np.int64)

    def path(self, index: int) -> str:
        """The shard of image `index`, and its name there."""
        path, member = self.members[index]
        return f"{path}/{member.name}"

    def mark(self, index: int) -> tuple[int, bytes]:
        """Bytes of the file of image `index`; a tar has no checksums of contents."""
        return self.members[index][1].size, b""

    def read(self, index: int, most: int) -> bytes:
        """As of any set. Raises InputError: it cannot be read, or the shard has changed."""
        path, member = self.members[index]
        try:
            with opened(path) as source:
                if source.state != self.files[path]:
                    raise InputError("the shard is another file than at the start; begin again")
                return source.read(member.start, within(member.size, most))
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{path}: ")) from error


def _number(source: Descriptor, member: tars.Member) -> int | None:
    """The number of a class; None for JSON of something else than a label."""
    where = f"{source.path}/{member.name}"
    if member.size > limits.LABEL:
        raise InputError(f"{where}: a label of {member.size} bytes, at most {limits.LABEL} are read")
    try:
        value = json.loads(source.read(member.start, member.size))
        if isinstance(value, dict) and "label" not in value:
            return None
        value = value["label"] if isinstance(value, dict) else value
        number = int(value)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: expected a class number") from error
    if isinstance(value, bool) or number != float(value) or not 0 <= number < 1 << 62:
        raise InputError(f"{where}: expected a class number from 0, got {str(value)[:40]}")
    return number
