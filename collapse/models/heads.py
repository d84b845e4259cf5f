"""The heads of tables 1 and 2 (arXiv 2110.09348) and of other losses: representation r (n, d) -> embedding (n, m)."""

from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError


class Subvector(nn.Module):
    """DirectCLR's head (section 6): the first d0 entries of r are the embedding; it has no parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, dim)."""
        return r[:, : self.dim]


class Diagonal(nn.Module):
    """A trainable factor for each entry of r (proposition 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return r * self.scale


class Groups(nn.Module):
    """r in 8 groups of entries, at random but fixed, each with a loss of its own: (n, d) -> (n, 8, d / 8).

    Raises InputError: the width is no multiple of `COUNT`.
    """

    COUNT = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % self.COUNT:
            raise InputError(f"head group: {width} dimensions do not make {self.COUNT} equal groups")
        self.register_buffer("order", torch.randperm(width))

    def forward(self, r: Tensor) -> Tensor:
        """(n, d) -> (n, groups, d / groups)."""
        return r[:, self.get_buffer("order")].unflatten(1, (self.COUNT, -1))


HEADS = ("none", "linear", "mlp", "orthogonal", "diagonal", "lowrank", "lowrank-diagonal", "group", "expander")


def default_dim(head: str, width: int) -> int:
    """The papers' width of the embedding: 128 of a trained head, 360 of 2048 of a fixed low-rank one, 4 d, else d."""
    if head in ("linear", "mlp"):
        return 128
    if head == "expander":
        return 4 * width
    return max(1, round(width * 360 / 2048)) if head.startswith("lowrank") else width


def make_head(name: str, width: int, dim: int, depth: int = 1) -> nn.Module:
    """A projector of tables 1 and 2, from a representation of `width` to an embedding of `dim`.

    none: the loss sees r itself.  linear: `depth` linear layers without bias or activation.
    mlp: Linear, BatchNorm, ReLU, Linear, BatchNorm; the linear maps without bias, the hidden width that of r.
    orthogonal: a fixed random rotation of r.  diagonal: a trainable factor an entry.
    lowrank: fixed, `dim` random orthonormal directions of r.  lowrank-diagonal: fixed, its first `dim` entries, which
    is DirectCLR.  group: 8 groups of entries, see `Groups`.  expander: Linear, BatchNorm, ReLU, twice, and Linear,
    all `dim` wide, as in Barlow Twins and VICReg: nothing normalises what the loss sees.
    Random ones draw from torch's global generator.

    Raises InputError: an unknown name, or a dim that the head cannot have.
    """
    if name not in HEADS:
        raise InputError(f"head: got {name!r}, expected one of {', '.join(HEADS)}")
    if name.startswith("lowrank") and not 1 <= dim <= width:
        raise InputError(f"dim: d0 = {dim}, expected 1..{width}, the representation's width; give dim=")
    if name in ("none", "orthogonal", "diagonal", "group") and dim != width:
        raise InputError(f"head {name}: its embedding has the representation's {width} dimensions; leave dim= out")
    if depth < 1 or (depth > 1 and name != "linear"):
        raise InputError(f"head {name}: depth {depth}; only linear takes more than one layer")
    return _BUILDERS[name](width, dim, depth)


def _linear(width: int, dim: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, dim if last else width, bias=False) for last in [0] * (depth - 1) + [1]))


def _mlp(width: int, dim: int, depth: int) -> nn.Module:
    hidden = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim))


def _expander(width: int, dim: int, depth: int) -> nn.Module:
    layers = [
        layer
        for before in (width, dim)
        for layer in (nn.Linear(before, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers, nn.Linear(dim, dim, bias=False))


def make_predictor(dim: int, hidden: int) -> nn.Module:
    """The predictor of SimSiam (arXiv 2011.10566) and BYOL (2006.07733), (n, dim) -> (n, dim): two layers.

    Linear without bias to `hidden`, BatchNorm, ReLU, Linear.
    """
    first = [nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, nn.Linear(hidden, dim))


def _fixed(width: int, dim: int, depth: int) -> nn.Module:
    layer = nn.Linear(width, dim, bias=False).requires_grad_(False)
    nn.init.orthogonal_(layer.weight)
    return nn.Sequential(layer)


_BUILDERS: dict[str, Any] = {
    "none": lambda width, dim, depth: nn.Identity(),
    "linear": _linear,
    "mlp": _mlp,
    "orthogonal": _fixed,
    "lowrank": _fixed,
    "diagonal": lambda width, dim, depth: Diagonal(width),
    "lowrank-diagonal": lambda width, dim, depth: Subvector(dim),
    "group": lambda width, dim, depth: Groups(width),
    "expander": _expander,
}


def head_tensors(head: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a head: its state; a diagonal as the (m, d) matrix that readers of linear layers know."""
    if isinstance(head, Diagonal):
        return {"0.weight": torch.diag(head.scale.detach())}
    return {} if isinstance(head, Groups) else dict(head.state_dict())
