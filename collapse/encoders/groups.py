"""What batches of texts and of sounds share: a group of views for each one, and what became of them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from collapse.encoders.networks import How


class Groups:
    """Groups of `views` of each text or sound, named, in order; the first `limit`, or a sample of them.

    names: what a reader finds each one by.  count: how many came.  skipped: {"path", "why"} of those that did not.
    cut: how many views were longer than the network reads.
    """

    unit: ClassVar[str]

    def __init__(self, groups: Sequence[Any], names: Sequence[str], how: How, views: int, path: str | None) -> None:
        self.how, self.preprocess, self.views, self.path = how, None, views or 1, path
        self.count, self.cut = 0, 0
        self.skipped, self.warnings = list[dict[str, str]](), list[str]()
        indices = np.arange(len(groups))[: how.limit]
        if how.sample is not None and how.sample < len(indices):
            self.warnings.append(f"{how.sample} of {len(indices)} {self.unit}, drawn at random with seed {how.seed}")
            indices = np.sort(np.random.default_rng(how.seed).choice(indices, how.sample, replace=False))
        self.groups, self.names = [groups[i] for i in indices], [names[i] for i in indices]

    def of(self, preprocess: Any) -> Any:
        """Itself, made ready as a network wants it."""
        self.preprocess = preprocess
        return self

    @property
    def total(self) -> int:
        """How many rows are to come."""
        return len(self.groups) * self.views

    @property
    def step(self) -> int:
        """How many groups a batch has."""
        return max(1, (self.how.batch_size or 64) // self.views)

    @property
    def name(self) -> str:
        """What errors call them."""
        return self.path or self.unit

    def provenance(self) -> dict[str, Any]:
        """The `images` of a document, when all have come."""
        return {"path": self.path, "count": self.count, "skipped": self.skipped}
