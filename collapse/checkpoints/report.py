"""What a checkpoint is, as a result: the document of schema collapse.checkpoint/1."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from collapse.results import Result, list_of, require_schema, value_of

SCHEMA = "collapse.checkpoint/1"
TEXTS = ("container", "architecture", "branch")
LISTS = ("branches_left", "foreign", "warnings")


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Result):
    """A checkpoint: how it was read, the encoder in it, and what became of every other tensor.

    branch: the root of the encoder; branches_left: those of others.  projector: {"dims", "prefix"} or None.
    keys: numbers of tensors loaded, of the projector, dropped (dropped_by a rule) and unknown.
    foreign: names of classes that were not loaded.  temperature: of the contrastive cosine loss that trained it, where
    the file states it.

    Examples:
        >>> from torchvision.models import resnet18
        >>> from collapse import inspect
        >>> print(inspect(resnet18().state_dict()).sentence())
        a state dict, resnet18, 512 features, without a projector, branch (top).
    """

    path: str | None
    sha256: str | None
    container: str
    architecture: str
    feature_dim: int | None
    branch: str
    branches_left: list[str]
    projector: Mapping[str, Any] | None
    preprocessing: Mapping[str, Any]
    keys: Mapping[str, Any]
    foreign: list[str]
    warnings: list[str]
    projector_problem: str = ""
    temperature: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document of schema collapse.checkpoint/1."""
        return {"schema": SCHEMA, **asdict(self)}

    def inputs(self) -> list[str]:
        """The checkpoint itself."""
        return [self.path] if self.path else []

    def notes(self) -> list[str]:
        """The warnings."""
        return self.warnings

    def sentence(self) -> str:
        """Architecture, width, branch and projector."""
        dims = " -> ".join(map(str, self.projector["dims"])) if self.projector else ""
        head = f"with a projector {dims}" if dims else "without a projector"
        left = f"; {len(self.branches_left)} other encoders are left" if self.branches_left else ""
        name = self.path or "a state dict"
        wide = f"{self.feature_dim} features" if self.feature_dim else "of unknown width"
        return f"{name}, {self.architecture}, {wide}, {head}, branch {self.branch}{left}."

    def table(self) -> list[tuple[str, ...]]:
        """Where the tensors went."""
        numbers = [(name, str(self.keys[name])) for name in ("loaded", "projector", "dropped", "unknown")]
        return [("tensors", "number"), *numbers]

    @classmethod
    def _of(cls, document: Any, where: str) -> "Checkpoint":
        document = require_schema(document, SCHEMA, where)
        told: dict[str, Any] = {name: value_of(document, name, where, str) for name in TEXTS}
        told |= {name: list_of(document, name, where, str) for name in LISTS}
        keys = value_of(document, "keys", where, dict)
        for name in ("loaded", "projector", "dropped", "unknown"):
            value_of(keys, name, f"{where}: keys", int)
        return cls(
            path=value_of(document, "path", where, str, type(None)),
            sha256=value_of(document, "sha256", where, str, type(None)),
            feature_dim=value_of(document, "feature_dim", where, int, type(None)),
            projector=value_of(document, "projector", where, dict, type(None)),
            preprocessing=value_of(document, "preprocessing", where, dict),
            keys=keys,
            projector_problem=value_of({"projector_problem": "", **document}, "projector_problem", where, str),
            temperature=value_of({"temperature": None, **document}, "temperature", where, float, int, type(None)),
            **told,
        )
