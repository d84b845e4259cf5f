"""The sums of accumulators.py on a device, which the host feeds without ever waiting for it.

Rows are checked, normalised and shifted as they come, each in one kernel or two, and wait in a block of at least 4 d,
or of 128 MiB.  Then the product, of one triangle, takes most of the time, and not the host's launches.  What is known
of the rows, such as that one of them is not finite, stays on the device and is read at the end, in one transfer with
the result.
"""

import math
import sys
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError
from collapse.spectra.accumulators import RANGE, refuse_range, rounding32, tile32
from collapse.spectra.result import EPS

PANEL = 512  # columns of a product of one triangle
ENTRIES = 1 << 24  # of a block, at least, when it is full: an H200 multiplies 2048 rows of 512 in 30 us
ROWS = 1024  # of a block that grows, at first


class Stream(ABC):
    """Rows (b, d) of any real dtype on the device; a sum of them takes them block by block.

    mean: (d,) of the first rows, which is taken off all.  block: of DTYPE, of which the first `waiting` rows wait.
    facts: (4,) float64: zero rows; the number of the first row that is not finite; how many such there are; the
    largest entry.  numbers: what errors call the rows.
    """

    STATE: tuple[str, ...] = ("n", "mean", "waiting", "facts")
    ONES = 0  # columns of ones before each row
    DTYPE = torch.float64

    def __init__(self, dim: int, device: str, normalize: bool, name: str) -> None:
        self.dim, self.device, self.normalize, self.name = dim, device, normalize, name
        self.n, self.numbers = 0, range(sys.maxsize)
        self.mean: Any = None
        self.waiting, self.block = 0, self._zeros(0, dim + self.ONES).to(self.DTYPE)
        self.facts = self._zeros(4)
        self.facts[1].fill_(math.inf)  # facts[1] = math.inf would copy a number of the host's, and wait
        self._zero_rows = (0, 0)  # rows when they were last counted, and how many were zero

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    @property
    def zero_rows(self) -> int:
        """Rows that are zero and were left so by the normalisation; waits for the device if none read it since."""
        if self._zero_rows[0] != self.n:
            self._zero_rows = self.n, int(self.facts[0])
        return self._zero_rows[1]

    def add(self, z: Tensor) -> None:
        """Add rows (b, d) of any real dtype; what is wrong with them is said when the sum is read."""
        most = self._most()
        while len(z):
            part, z = z[: most - self.waiting], z[most - self.waiting :]
            self._take(part)
            if self.waiting == most:
                self._flush()

    def _most(self) -> int:
        """Rows that wait at most."""
        return max(4 * self.dim, ENTRIES // self.dim)

    def _take(self, z: Tensor) -> None:
        low, high = z.aminmax(dim=1)  # NaN if one entry is
        largest, norm = torch.maximum(-low.double(), high.double()), None
        if self.normalize:
            z, norm = _norms(z, largest)
        self._note(largest, norm)
        if self.mean is None:
            self.mean = (z if norm is None else z / norm[:, None]).mean(0, dtype=torch.float64)
        rows = self._room(len(z))[:, self.ONES :]
        if norm is None:
            torch.sub(z, self.mean, out=rows)
        else:
            torch.addcdiv(-self.mean, z, norm[:, None], out=rows)
        self.n += len(z)

    def _note(self, largest: Tensor, norm: Tensor | None) -> None:
        bad = ~largest.isfinite()
        numbers = torch.arange(len(bad), device=bad.device) * self.numbers.step + self.numbers[self.n]
        zero, first, count, entry = self.facts.unbind()
        self.facts = torch.stack([
            zero + (largest == 0).sum() if norm is not None else zero,
            torch.minimum(first, torch.where(bad, numbers.double(), math.inf).amin()),
            count + bad.sum(),
            torch.maximum(entry, torch.where(bad, 0.0, largest).amax()),
        ])  # fmt: skip

    def _room(self, count: int) -> Tensor:
        """The next `count` rows of the block, which grows for them."""
        end = self.waiting + count
        if end > len(self.block):
            size = min(max(end, 2 * len(self.block), ROWS), self._most())
            grown = self._zeros(size, self.dim + self.ONES).to(self.DTYPE)
            grown[: self.waiting] = self.block[: self.waiting]
            grown[:, : self.ONES] = 1
            self.block = grown
        room = self.block[self.waiting : end]
        self.waiting = end
        return room

    @abstractmethod
    def _flush(self) -> None:
        """Add the waiting rows to the sum."""

    def state(self) -> dict[str, Any]:
        """Numbers and tensors, copies of all there is."""
        copied = {name: getattr(self, name) for name in self.STATE}
        copied["waiting"] = self.block[: self.waiting]
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in copied.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, or what a version before streams did."""
        here = {name: v.to(self.facts.device) if isinstance(v, Tensor) else v for name, v in state.items()}
        waiting = here.pop("waiting", self.block)
        vars(self).update(here)
        self.mean, self.waiting = here["mean"] if self.n else None, 0
        self._room(len(waiting)).copy_(waiting)

    def _take_facts(self, other: "Stream") -> None:
        mine, theirs = self.facts, other.facts
        first, entry = torch.minimum(mine[1], theirs[1]), torch.maximum(mine[3], theirs[3])
        self.facts = torch.stack([mine[0] + theirs[0], first, mine[2] + theirs[2], entry])

    def _dtype(self) -> str:
        return str(self.DTYPE).removeprefix("torch.")

    def _reduce_facts(self) -> None:
        from torch import distributed

        zero, first, count, entry = self.facts.unbind()
        counts, most = torch.stack([zero, count]), torch.stack([-first, entry])
        distributed.all_reduce(counts)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        self.facts = torch.stack([counts[0], -most[0], counts[1], most[1]])

    def _sound(self, made: Tensor) -> Tensor:
        """`made`, or zeros where the rows are refused: decompositions fail at once, without a word on the rows."""
        refused = self.facts[2] > 0
        if not self.normalize:
            refused = refused | (self.facts[3] >= RANGE[self._dtype()][0])
        return torch.where(refused, 0.0, made)

    def read(self, *made: Tensor) -> list[NDArray]:
        """Tensors of any shape as float64 arrays; the one wait for the device.

        Raises InputError: a row was not finite, or squares of entries overflow or vanish in float64.
        """
        flat = torch.cat([self.facts, *(part.flatten() for part in made)]).cpu().numpy()
        zero, first, count, largest = flat[:4].tolist()
        self._zero_rows = self.n, int(zero)
        if count:
            raise InputError(
                f"{self.name}: row {first:.0f} is NaN or infinite ({count:.0f} such rows); "
                "remove them, or look at the network that wrote them"
            )
        if not self.normalize:
            refuse_range(self.name, largest, self._dtype())
        ends = np.cumsum([4, *(part.numel() for part in made)]).tolist()
        return [flat[start:end].reshape(part.shape) for (start, end), part in zip(pairwise(ends), made, strict=True)]


def _norms(z: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, norms) whose quotient are the unit rows; the norm of a zero row is given as 1."""
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64)
    if z.dtype == torch.float64:  # squares of 1e-200 or 1e200 leave its range: divide by the largest entry first
        odd = ~((norm > 1e-125) & (norm < 1e125)) & (largest > 0)
        z = z / torch.where(odd, largest, 1.0)[:, None]
        norm = torch.linalg.vector_norm(z, dim=1)
    return z, norm + (norm == 0)


class DeviceGram(Stream):
    """As `Gram`: total (d,) and scatter (d, d), its lower triangle, of all but the waiting rows about `mean`."""

    STATE = (*Stream.STATE, "total", "scatter")

    def __init__(self, dim: int, device: str, normalize: bool, name: str) -> None:
        super().__init__(dim, device, normalize, name)
        self.total, self.scatter = self._zeros(dim), self._zeros(dim, dim)

    def _flush(self) -> None:
        rows = self.block[: self.waiting]
        self.total += rows.sum(0, dtype=torch.float64)
        for start in range(0, self.dim, PANEL):
            self._multiply(rows[:, start:], slice(start, start + PANEL))
        self.waiting = 0

    def _multiply(self, rows: Tensor, columns: slice) -> None:
        """Add the part of the product of rows (b, k), of the last k columns, that has the first of these `columns`."""
        self.scatter[columns.start :, columns].addmm_(rows.T, rows[:, :PANEL])

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scatter (d, d) about the mean (d,) of all rows, that mean, and how far off `mean` it lies (d,)."""
        self._flush()
        off = self.total / max(1, self.n)
        scatter = self.scatter.tril() + self.scatter.tril(-1).T
        return scatter.addr_(off, off, alpha=-self.n), off if self.mean is None else self.mean + off, off

    def moments(self) -> Tensor:
        """(d + 1, d + 1): n, mean (d,), zero rows and scatter (d, d), as `Covariance.moments` says."""
        self._flush()
        off, made = self.total / max(1, self.n), self._zeros(self.dim + 1, self.dim + 1)
        made[0, 0].fill_(self.n)
        made[1, 0] = self.facts[0]
        made[0, 1:] = off if self.mean is None else self.mean + off
        made[1:, 1:] = self.scatter
        made[1:, 1:].addr_(off, off, alpha=-self.n)
        return made

    def join(self, other: "DeviceGram") -> None:
        """Add another's rows."""
        if other.n:
            self._flush()
            scatter, mean, _ = other._centred()
            self.mean = mean if self.mean is None else self.mean
            self._add(scatter, mean - self.mean, other.n)
            self._take_facts(other)

    def _add(self, scatter: Tensor, off: Tensor, n: int) -> None:
        """Add n rows of this scatter about their own mean, which lies `off` from the mean here."""
        self.scatter += scatter.addr(off, off, alpha=n)
        self.total += n * off
        self.n += n

    def all_reduce(self) -> None:
        """Join with the other processes' statistics: each recentres on the common mean, then scatters add up."""
        from torch import distributed

        scatter, mean, _ = self._centred()
        count = torch.cat([torch.full_like(mean[:1], self.n), mean * self.n])
        distributed.all_reduce(count)
        self.mean = count[1:] / count[0].clamp(min=1)
        off = mean - self.mean
        scatter.addr_(off, off, alpha=self.n)
        distributed.all_reduce(scatter)
        self.n, self.scatter, self.total = int(count[0]), scatter, torch.zeros_like(off)
        self._reduce_facts()

    def eigenvalues(self) -> tuple[NDArray, NDArray, float, float]:
        """As `Gram.eigenvalues`, (d,) twice; both decompositions on the device: at d = 8192 the CPU takes minutes."""
        scatter, mean, off = self._centred()
        moment = scatter.addr(mean, mean, alpha=self.n)
        column, far = moment.diagonal().amax() / self.n, off.square().sum() * self.n
        values = torch.linalg.eigvalsh(self._sound(torch.stack([scatter, moment]))).clamp(min=0)
        both, square, taken_off, *parts = self.read(values, column, far, *self._parts())
        # What is taken off again had to be added up first.
        rounded = self._rounded(both[0].max() + float(taken_off), both[0].sum() + float(taken_off), *parts)
        return both[0], both[1], float(square), float(rounded)

    def _parts(self) -> tuple[Tensor, ...]:
        """What `_rounded` wants to know besides, on the device."""
        return ()

    def _rounded(self, largest: float, total: float, *parts: Any) -> float:
        """The largest eigenvalue that rounding makes; of the sum, the largest eigenvalue and their total."""
        return 2 * math.sqrt(self.dim) * EPS * largest

    def centre(self) -> NDArray:
        """(d,): the mean, as `Gram.centre`."""
        return self.read(self._centred()[1])[0]

    def scattered(self) -> NDArray:
        """(d, d): the scatter, as `Gram.scattered`."""
        return self.read(self._centred()[0])[0]

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d) or (d, last): as `Gram.vectors`, on the device."""
        vectors = torch.linalg.eigh(self._sound(self._centred()[0]))[1].flip(1)
        return self.read(vectors[:, -(last or self.dim) :])[0]


class DeviceGram32(DeviceGram):
    """As `Gram32`: products of float32 rows, added up in float64."""

    STATE = (*DeviceGram.STATE, "squares")
    DTYPE = torch.float32

    def __init__(self, dim: int, device: str, normalize: bool, name: str) -> None:
        super().__init__(dim, device, normalize, name)
        self.squares = self._zeros(dim)

    def _most(self) -> int:
        return tile32(self.dim)

    def _multiply(self, rows: Tensor, columns: slice) -> None:
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        try:
            product = rows.T @ rows[:, :PANEL]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        self.scatter[columns.start :, columns] += product
        self.squares[columns] += product.diagonal().double().square()

    def join(self, other: DeviceGram) -> None:
        """Add another's rows."""
        assert isinstance(other, DeviceGram32)
        super().join(other)
        self.squares += other.squares

    def all_reduce(self) -> None:
        """As `DeviceGram.all_reduce`."""
        from torch import distributed

        super().all_reduce()
        distributed.all_reduce(self.squares)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.scatter.diagonal().amax(), self.squares.amax()

    def _rounded(self, largest: float, total: float, *parts: Any) -> float:
        column, squares = map(float, parts)
        rows = min(self.n, tile32(self.dim))
        return super()._rounded(largest, total) + rounding32(largest, total, column, squares, rows)


class DeviceTriangle(Stream):
    """As `Triangle`: R (d + 1, d + 1), or fewer rows, of all but the waiting rows."""

    STATE = (*Stream.STATE, "triangle")
    ONES = 1

    def __init__(self, dim: int, device: str, normalize: bool, name: str) -> None:
        super().__init__(dim, device, normalize, name)
        self.triangle = self._zeros(0, dim + 1)

    def restore(self, state: dict[str, Any]) -> None:
        """As `Stream.restore`; a version before streams kept a list of triangle and rows."""
        if isinstance(state["waiting"], list):
            old = torch.cat(state["waiting"]).to(self.facts.device)
            state = {"n": state["n"], "mean": state["shift"], "triangle": old}
        super().restore(state)

    def _flush(self) -> None:
        if self.waiting:
            rows = torch.cat([self.triangle, self.block[: self.waiting]])
            self.triangle, self.waiting = torch.linalg.qr(rows, mode="r").R, 0

    def _moved(self, to: Tensor | float) -> Tensor:
        """The triangle of the rows less `to` instead of `mean`: the column of ones says how much of it each holds."""
        self._flush()
        by = self.mean - to
        return torch.cat([self.triangle[:, :1], self.triangle[:, 1:] + self.triangle[:, :1] * by], 1)

    def join(self, other: "DeviceTriangle") -> None:
        """Add another's rows, moved to this mean."""
        if other.n:
            self.mean = other.mean if self.mean is None else self.mean
            self._flush()
            rows = torch.cat([self.triangle, other._moved(self.mean)])
            self.triangle, self.n = torch.linalg.qr(rows, mode="r").R, self.n + other.n
            self._take_facts(other)

    def all_reduce(self) -> None:
        """Join with the other processes' triangles; these are few, and small beside the rows."""
        from torch import distributed

        self._flush()
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, self.state())
        total = DeviceTriangle(self.dim, self.device, self.normalize, self.name)
        for state in everyone:
            part = DeviceTriangle(self.dim, self.device, self.normalize, self.name)
            part.restore(state)
            total.join(part)
        self.n, self.mean, self.triangle, self.facts = total.n, total.mean, total.triangle, total.facts

    def eigenvalues(self) -> tuple[NDArray, NDArray, float, float]:
        """As `Triangle.eigenvalues`, (d,) twice, on the device."""
        moved = self._moved(0.0)[:, 1:]
        column = moved.square().sum(0).amax() / self.n
        parts = self.triangle[1:, 1:], moved
        values = [torch.linalg.svdvals(self._sound(part))[: self.dim].square() for part in parts]
        padded = [torch.cat([v, v.new_zeros(self.dim - len(v))]) for v in values]
        scatter, moment, square = self.read(*padded, column)
        return scatter, moment, float(square), float((self.dim * EPS) ** 2 * moment.sum())

    def centre(self) -> NDArray:
        """(d,): the mean, as `Gram.centre`."""
        first = self._moved(0.0)[0]  # its first entry is sqrt(n), up to the sign
        return self.read(first[1:] / first[0])[0]

    def scattered(self) -> NDArray:
        """(d, d): the scatter, as `Gram.scattered`."""
        self._flush()
        triangle = self.triangle[1:, 1:]
        return self.read(triangle.T @ triangle)[0]

    def vectors(self, last: int | None = None) -> NDArray:
        """(d, d) or (d, last): as `Triangle.vectors`, on the device."""
        self._flush()
        vectors = torch.linalg.svd(self._sound(self.triangle[1:, 1:]))[2].T
        return self.read(vectors[:, -(last or self.dim) :])[0]


KINDS: dict[str, Any] = {"covariance": DeviceGram, "qr": DeviceTriangle, "float32": DeviceGram32}
