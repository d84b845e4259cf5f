"""What an encoder takes, batch by batch: images, texts, sounds, or clips."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from collapse import InputError
from collapse.encoders.clips import ClipBatches
from collapse.encoders.groups import Groups
from collapse.encoders.networks import How, ImageBatches
from collapse.encoders.sounds import SoundBatches
from collapse.files import texts as files
from collapse.models.encoder import Encoder


def batches_of(net: Encoder, given: Any, how: How) -> Any:
    """Batches of what `given` holds, as an encoder takes it.

    Raises InputError: texts for a network of images; other things than images, shared over processes.
    """
    if how.distributed and net.takes != "images":
        raise InputError(f"distributed= shares images, and the network takes {net.takes}; run it in one process")
    if net.takes == "clips":
        return ClipBatches(given, how, max(1, (how.batch_size or 64) // 16))
    if net.takes == "sounds":
        return SoundBatches(given, how)
    if net.takes == "texts":
        return TextBatches(given, how)
    if isinstance(given, str) and not os.path.exists(given) and files.place_of(given)[1] is not None:
        raise InputError(f"{given}: are texts, and the network takes images")
    return ImageBatches(given, how)


def views_of(
    net: Encoder, given: Any, file: Any, augmentations: Any, views: int, how: How
) -> tuple[Any, dict[str, Any]]:
    """(batches of the views of each text or sound, those of one after another; their description), as given.

    file: a file of JSON lines, a list of the views of one text each, or such lists; of sounds the paths of their files,
    from the folder of the list.  augmentations: a function of a text, or of samples (t,), and a numpy.random.Generator,
    or several, of which view v is the v-th.

    Raises InputError: neither or both, lists of different lengths, no text.
    """
    if net.takes == "clips":
        raise InputError("an encoder of clips has no views yet; give embeddings of views to collapse.spectrum instead")
    if (file is None) == (augmentations is None):
        raise InputError(
            f"an encoder of {net.takes} has no views of its own: give views_file=, or augmentations= of your own"
        )
    if file is not None:
        if given is not None:
            raise InputError("views_file= has the views, and what they are of as well; leave one out")
        groups, path = _groups(file), os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
        recipe = {"recipe": "given, in a file" if path else "given"}
        if net.takes == "texts":
            return TextBatches(groups, how, len(groups[0]), path), recipe
        start = Path(path).parent if path else Path()
        return SoundBatches([[start / view for view in group] for group in groups], how, len(groups[0]), path), recipe
    chosen = [augmentations] if callable(augmentations) else augmentations
    if not isinstance(chosen, Sequence) or isinstance(chosen, str) or not chosen or not all(map(callable, chosen)):
        raise InputError(f"augmentations= is no function of one of the {net.takes} and a random generator, nor a list")
    batches = batches_of(net, given, how)
    batches.augment(chosen, views, how.seed)
    return batches, {"recipe": "given"}


def _groups(source: Any) -> list[list[str]]:
    """The views of each text, or the paths of the views of each sound."""
    path = source if isinstance(source, (str, os.PathLike)) else None
    groups = files.read_lists(path) if path is not None else [list(group) for group in source]
    if not groups or any(not isinstance(view, str) for group in groups for view in group):
        raise InputError("views_file=: wants lists of texts, the views of one each")
    for number, group in enumerate(groups, 1):
        if len(group) != len(groups[0]) or len(group) < 2:
            raise InputError(
                f"views_file=: entry {number} has {len(group)} views, where the first has {len(groups[0])}; "
                "give 2 or more, as many of each"
            )
    return groups


class TextBatches(Groups):
    """Batches of texts, `views` of each after another; as `ImageBatches`.

    texts: a file, an iterable of str or of lists of them; or, with `views`, a list of the views of each.
    Blank lines of a file are skipped.  A text that is longer than the network reads is cut, and counted.

    Raises InputError: a file that cannot be read, or what is no text.
    """

    unit = "texts"

    def __init__(self, texts: Any, how: How, views: int = 0, path: str | None = None) -> None:
        blank: list[dict[str, str]] = []
        if not views and isinstance(texts, (str, os.PathLike)):
            stored = files.read(texts, how.limit if how.sample is None else None)
            path, groups, lines = os.fspath(texts), [[text] for text in stored.texts], list(map(str, stored.lines))
            blank = [{"path": f"{stored.path}:{line}", "why": "blank"} for line in stored.blank]
        else:
            groups = texts if views else [[text] for text in _flat(texts)]
            lines = [str(number) for number in range(1, len(groups) + 1)]
        super().__init__(groups, lines, how, views, path)
        self.skipped = blank

    def augment(self, augmentations: Sequence[Callable[..., Any]], views: int, seed: int) -> None:
        """Put `views` views in the place of each text; each depends on the seed, the text's number and the view's.

        Raises InputError: a view that is no text.
        """
        for number, group in enumerate(self.groups):
            made = [augmentations[v % len(augmentations)](group[0], np.random.default_rng([seed, number, v]))
                    for v in range(views)]  # fmt: skip
            odd = next((view for view in made if not isinstance(view, str)), None)
            if odd is not None:
                raise InputError(f"augmentations=: gives a {type(odd).__name__} of text {number + 1}, expected a str")
            self.groups[number] = made
        self.views = views

    def read_names(self) -> list[str]:
        """The numbers of the lines of the texts, from 1, in order."""
        return self.names

    def notes(self) -> list[str]:
        """The warnings, when all have come."""
        lost, longest = len(self.skipped), getattr(self.preprocess, "max_length", 0)
        blank = [f"{lost} blank lines were skipped"] if lost else []
        rows = self.count * self.views
        cut = [f"{self.cut} of {rows} texts are longer than {longest} pieces and were cut"] if self.cut else []
        return [*self.warnings, *blank, *cut]

    def unread(self) -> str:
        """Nothing: a text can always be read."""
        return ""

    def __iter__(self) -> Iterator[Tensor]:
        assert self.preprocess is not None
        for start in range(0, len(self.groups), self.step):
            groups = self.groups[start : start + self.step]
            pieces, cut = self.preprocess.batch([view for group in groups for view in group], start * self.views)
            self.cut += cut
            self.count += len(groups)
            yield pieces


def _flat(texts: Any) -> Iterator[str]:
    """Every text of an iterable of str, or of lists of them."""
    if isinstance(texts, dict) or not isinstance(texts, Iterable):
        raise InputError(f"texts: got a {type(texts).__name__}, give a path, a list of str, or batches of them")
    for place, entry in enumerate(texts):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, Sequence) and all(isinstance(text, str) for text in entry):
            yield from entry
        else:
            raise InputError(
                f"texts: entry {place} is a {type(entry).__name__}, expected a str; the encoder takes texts"
            )
