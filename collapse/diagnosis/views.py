"""The views that a diagnosis compares: the paper's pair, a preset's, or the caller's, drawn anew for each image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from collapse import InputError
from collapse.data.preprocessing import Preprocessing
from collapse.models.encoder import Encoder
from collapse.recipes.config import Config, make_config
from collapse.recipes.views import uniforms


class Augment(Protocol):
    """One random view of images: a function of the images (n, ...) and of draws (n, DRAWS) in [0, 1)."""

    @property
    def DRAWS(self) -> int: ...

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """(n, ...), (n, DRAWS) -> (n, ...)."""


def augmentations_of(
    net: Encoder, first: Tensor, path: str | None, given: str | Sequence[Augment] | None
) -> tuple[Sequence[Augment], dict[str, Any]]:
    """(augmentations, their description) for the images (b, 3, h, w) of a first batch.

    Raises InputError: no such preset, no functions with their number of draws, other images, or none that say a size.
    """
    if given is not None and not isinstance(given, str):
        if not given or not all(callable(augment) and hasattr(augment, "DRAWS") for augment in given):
            raise InputError("augmentations= is no list of functions of images and draws, with their number DRAWS")
        return given, {"recipe": "given"}
    if first.ndim != 4 or first.shape[1] != 3:
        shape = tuple(first.shape)
        raise InputError(f"images: a batch of shape {shape}; the paper's views take (b, 3, h, w): give augmentations=")
    size = net.preprocess.crop or net.preprocess.resize
    if size is None and path is not None:
        raise InputError(
            f"{net.report['path'] or 'source'}: does not say how large its images are; give resize= and crop="
        )
    chosen = paper_augmentations(int(size or first.shape[-1]), given)
    return chosen, describe(chosen, given or "the paper's")


def before_crop(preprocess: Preprocessing) -> Preprocessing:
    """What images are decoded to before a random crop: the square on the shorter side, at the size of the resizing."""
    side = preprocess.resize or preprocess.crop
    return replace(preprocess, resize=side, crop=side)


def paper_augmentations(size: int, preset: str | None = None) -> tuple[Augment, Augment]:
    """The asymmetric pair of arXiv 2110.09348 at `size` pixels, its blur in proportion; or that of a trainer's preset.

    Raises InputError: no such preset.
    """
    share = size / 224
    recipe = make_config(preset, image_size=size) if preset else Config(
        image_size=size, sigma=(0.1 * share, 2.0 * share)
    )  # fmt: skip
    return recipe.augmentation(0), recipe.augmentation(1)


def describe(augmentations: Sequence[Any], recipe: str) -> dict[str, Any]:
    """The augmentations for the document."""
    return {"recipe": recipe, "views": [asdict(augment) for augment in augmentations]}


def augmented(
    batches: Iterable[Tensor],
    views: int,
    augmentations: Sequence[Augment],
    seed: int,
    device: str,
    start: Callable[[], int],
) -> Iterator[Tensor]:
    """Batches (b, ...) -> (b V, ...), the views of an image one after another; an empty batch stays so.

    start: gives the number of the first image of the batch that came last.
    """
    for batch in batches:
        if not len(batch):
            yield batch
            continue
        names, batch = start() + np.arange(len(batch)), batch.to(device, non_blocking=True)
        made = []
        for view in range(views):
            augment = augmentations[view % len(augmentations)]
            made.append(augment(batch.clone(), uniforms(seed, 0, names, view, augment.DRAWS)))
        yield torch.stack(made, 1).flatten(0, 1)
